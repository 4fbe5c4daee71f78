// feature_reuse_sample, feature_reuse_rank and feature_reuse_drift on the CPU: checks, threads, and the sort of a row.
#include "cpu/feature_reuse/select.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/buffer.h"
#include "common/dispatch.h"
#include "common/ids.h"
#include "math/feature_reuse_check.h"

namespace maskops {
namespace {

std::tuple<Tensor, Tensor> feature_reuse_sample(const Tensor& logits_any, const Tensor& known_any, const Tensor& seed_any,
                                                int64_t first_row, double temperature, double noise, bool probs) {
  check_sample(logits_any, known_any, seed_any, first_row, temperature, noise, probs);
  const Tensor logits = with_contiguous_rows(logits_any), known = contiguous_or_copy(known_any), seed = contiguous_or_copy(seed_any);
  const int64_t batch = logits.size(0), tokens = logits.size(1), values = logits.size(2);
  Tensor ids = empty_like_device(logits, {batch, tokens}, ScalarType::Long);
  Tensor confidence = empty_like_device(logits, {batch, tokens}, accumulation_type(logits.scalar_type()));
  const int64_t* words = static_cast<const int64_t*>(seed.const_data_ptr());
  const TokenSample args{static_cast<int>(dtype_of(logits)), batch * tokens, tokens, values, logits.const_data_ptr(), logits.stride(0),
                         logits.stride(1), static_cast<const bool*>(known.const_data_ptr()), PhiloxKey::of(words[0], words[1]), first_row,
                         temperature, noise, probs, static_cast<int64_t*>(ids.mutable_data_ptr()), confidence.mutable_data_ptr()};
  const SelectKernels& kernels = pick_SelectKernels();
  const int64_t size = kernels.bytes(args);
  parallel_for(args.rows, values * 8, [&](int64_t begin, int64_t end) {
    const Buffer buffer(size);
    kernels.sample(args, begin, end, buffer.get());
  });
  return {ids, confidence};
}

Tensor feature_reuse_drift(const Tensor& fresh_any, const Tensor& cached_any, int64_t kind) {
  check_drift(fresh_any, cached_any, kind);
  const Tensor fresh = with_contiguous_rows(fresh_any), cached = with_contiguous_rows(cached_any);
  const int64_t batch = fresh.size(0), tokens = fresh.size(1), channels = fresh.size(2);
  Tensor out = empty_like_device(fresh, {batch, tokens}, accumulation_type(fresh.scalar_type()));
  const TokenDrift args{static_cast<int>(dtype_of(fresh)), static_cast<int>(kind), tokens, channels, fresh.const_data_ptr(),
                        cached.const_data_ptr(), fresh.stride(0), fresh.stride(1), cached.stride(0), cached.stride(1), out.mutable_data_ptr()};
  const SelectKernels& kernels = pick_SelectKernels();
  parallel_for(batch * tokens, channels * 8, [&](int64_t begin, int64_t end) { kernels.drift(args, begin, end); });
  return out;
}

// Best first: higher score, then lower index; NaN after all numbers.
template <class S>
void rank_row(const S* score, const bool* known, int64_t tokens, int64_t wanted, bool by_threshold, double threshold, int64_t* ids,
              int64_t* rest, int64_t* count, std::vector<int64_t>& order) {
  order.clear();
  int64_t above = 0;
  for (int64_t n = 0; n < tokens; ++n) {
    if (known[n]) continue;
    order.push_back(n);
    above += double(score[n]) > threshold;
  }
  const int64_t unknown = static_cast<int64_t>(order.size());
  std::sort(order.begin(), order.end(), [score](int64_t a, int64_t b) {
    const S x = score[a], y = score[b];
    const bool x_nan = x != x, y_nan = y != y;
    if (x_nan || y_nan) return x_nan != y_nan ? y_nan : a < b;
    return x != y ? x > y : a < b;
  });
  *count = std::min(unknown, by_threshold ? std::max<int64_t>(above, 1) : wanted);
  for (int64_t n = 0; n < tokens; ++n) {
    ids[n] = n < *count ? order[n] : -1;
    rest[n] = *count + n < unknown ? order[*count + n] : -1;
  }
}

std::tuple<Tensor, Tensor, Tensor> feature_reuse_rank(const Tensor& score_any, const Tensor& known_any, std::optional<Tensor> num_any,
                                                      double threshold) {
  check_rank(score_any, known_any, num_any, threshold);
  const Tensor score = contiguous_or_copy(score_any), known = contiguous_or_copy(known_any);
  const int64_t batch = score.size(0), tokens = score.size(1);
  std::optional<Tensor> num;
  const int64_t* wanted = nullptr;
  if (num_any) num = contiguous_or_copy(*num_any), wanted = static_cast<const int64_t*>(num->const_data_ptr());
  for (int64_t b = 0; wanted != nullptr && b < batch; ++b) {
    if (wanted[b] < 0) fail("select_tokens", "num_select[" + std::to_string(b) + "]", "be at least 0", wanted[b]);
  }
  Tensor ids = empty_like_device(score, {batch, tokens}, ScalarType::Long), rest = empty_like_device(score, {batch, tokens}, ScalarType::Long);
  Tensor count = empty_like_device(score, {batch}, ScalarType::Long);
  int64_t *chosen = static_cast<int64_t*>(ids.mutable_data_ptr()), *others = static_cast<int64_t*>(rest.mutable_data_ptr());
  int64_t* counts = static_cast<int64_t*>(count.mutable_data_ptr());
  const bool* flags = static_cast<const bool*>(known.const_data_ptr());
  auto rank = [&](const auto* scores) {
    parallel_for(batch, tokens * 64, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> order;
      order.reserve(static_cast<size_t>(tokens));
      for (int64_t b = begin; b < end; ++b) {
        rank_row(scores + b * tokens, flags + b * tokens, tokens, wanted == nullptr ? 0 : wanted[b], wanted == nullptr, threshold,
                 chosen + b * tokens, others + b * tokens, counts + b, order);
      }
    });
  };
  if (dtype_of(score) == Dtype::kDouble) rank(static_cast<const double*>(score.const_data_ptr()));
  else rank(static_cast<const float*>(score.const_data_ptr()));
  return {ids, rest, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("feature_reuse_sample", TORCH_BOX(&feature_reuse_sample));
  m.impl("feature_reuse_rank", TORCH_BOX(&feature_reuse_rank));
  m.impl("feature_reuse_drift", TORCH_BOX(&feature_reuse_drift));
}

}  // namespace maskops
#endif
