// visible_tokens_split on the CPU: per row one counting pass and one placing pass, without branches on the mask.
#include "common/split_row.h"

namespace maskops {

struct SplitKernels {
  int64_t (*count_hidden)(const uint8_t* hidden, int64_t tokens);
  void (*split_row)(const uint8_t* hidden, int64_t tokens, int64_t num_keep, int64_t* restore, int64_t* kept, int64_t* masked);
};
MASKOPS_DECLARE_KERNELS(SplitKernels)

namespace MASKOPS_ISA_NS {

static int64_t count(const uint8_t* hidden, int64_t tokens) { return count_hidden(hidden, tokens); }

static void row(const uint8_t* hidden, int64_t tokens, int64_t num_keep, int64_t* restore, int64_t* kept, int64_t* masked) {
  split_row(hidden, tokens, num_keep, restore, kept, masked);
}

extern const SplitKernels SplitKernels_table{&count, &row};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/ids.h"
#include "math/visible_tokens_check.h"

namespace maskops {
namespace {

std::vector<int64_t> count_kept(const bool* mask, int64_t batch, int64_t tokens) {
  std::vector<int64_t> kept(batch);
  const SplitKernels& kernels = pick_SplitKernels();
  parallel_for(batch, tokens / 16 + 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      kept[b] = tokens - kernels.count_hidden(reinterpret_cast<const uint8_t*>(mask + b * tokens), tokens);
    }
  });
  return kept;
}

void check_bounds(const std::vector<int64_t>& kept, int64_t tokens, int64_t max_keep, int64_t max_mask) {
  const char* op = "split_tokens";
  for (size_t b = 0; b < kept.size(); ++b) {
    const std::string row = "[" + std::to_string(b) + "]";
    if (kept[b] > max_keep) fail(op, "kept tokens of mask" + row, "be at most max_seqlen = " + std::to_string(max_keep), kept[b]);
  }
  for (size_t b = 0; b < kept.size(); ++b) {
    const std::string row = "[" + std::to_string(b) + "]";
    const int64_t masked = tokens - kept[b];
    if (masked > max_mask) fail(op, "masked tokens of mask" + row, "be at most max_masked = " + std::to_string(max_mask), masked);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> visible_tokens_split(const Tensor& mask_any, int64_t max_keep, int64_t max_mask) {
  check_split(mask_any, max_keep, max_mask);
  const Tensor mask = contiguous_or_copy(mask_any);
  const int64_t batch = mask.size(0), tokens = mask.size(1);
  const bool* data = static_cast<const bool*>(mask.const_data_ptr());
  const std::vector<int64_t> kept = count_kept(data, batch, tokens);
  check_bounds(kept, tokens, max_keep, max_mask);

  Tensor ids_keep = empty_like_device(mask, {batch, max_keep}, ScalarType::Long);
  Tensor ids_mask = empty_like_device(mask, {batch, max_mask}, ScalarType::Long);
  Tensor ids_restore = empty_like_device(mask, {batch, tokens}, ScalarType::Long);
  Tensor num_keep = empty_like_device(mask, {batch}, ScalarType::Long);
  Tensor cu_seqlens = empty_like_device(mask, {batch + 1}, ScalarType::Int);
  auto ids = [](const Tensor& x) { return static_cast<int64_t*>(x.mutable_data_ptr()); };
  int64_t *to_keep = ids(ids_keep), *to_mask = ids(ids_mask), *restore = ids(ids_restore);
  std::copy(kept.begin(), kept.end(), ids(num_keep));
  int32_t* starts = static_cast<int32_t*>(cu_seqlens.mutable_data_ptr());
  starts[0] = 0;
  for (int64_t b = 0; b < batch; ++b) starts[b + 1] = starts[b] + static_cast<int32_t>(kept[b]);

  const SplitKernels& kernels = pick_SplitKernels();
  parallel_for(batch, tokens * 24, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      int64_t *keep = to_keep + b * max_keep, *mask_row = to_mask + b * max_mask;
      kernels.split_row(reinterpret_cast<const uint8_t*>(data) + b * tokens, tokens, kept[b], restore + b * tokens, keep, mask_row);
      std::fill(keep + kept[b], keep + max_keep, int64_t{-1});
      std::fill(mask_row + (tokens - kept[b]), mask_row + max_mask, int64_t{-1});
    }
  });
  return {ids_keep, ids_mask, ids_restore, num_keep, cu_seqlens};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) { m.impl("visible_tokens_split", TORCH_BOX(&visible_tokens_split)); }

}  // namespace maskops
#endif
