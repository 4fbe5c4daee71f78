// feature_reuse_write_ and feature_reuse_exclude on the CPU: copies of rows, and bits.
#include "common/isa.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "common/ids.h"
#include "math/feature_reuse_check.h"

namespace maskops {
namespace {

// The rows of a token, all heads, from one tensor to the other.
struct RowCopy {
  char* to;
  const char* from;
  TokenStrides into, out_of;
  int64_t heads, channels, size;

  RowCopy(const Tensor& cache, const Tensor& x)
      : to(static_cast<char*>(cache.mutable_data_ptr())), from(static_cast<const char*>(x.const_data_ptr())), into(token_strides(cache)),
        out_of(token_strides(x)), heads(cache.size(1)), channels(cache.size(3)), size(static_cast<int64_t>(cache.element_size())) {
    if (channels == 0 || heads == 0) {  // nothing to copy, and the addresses may be null
      heads = 0;
      return;
    }
    const bool rows = channels <= 1 || (into.channel == 1 && out_of.channel == 1);
    if (!rows) return;
    // Heads side by side in both are one row, and an axis of one entry may have any stride.
    if (heads <= 1 || (into.head == channels && out_of.head == channels)) channels *= heads, heads = 1;
    whole_ = true;
  }

  void operator()(int64_t b, int64_t token, int64_t slot) const {
    char* target = to + into.at(b, 0, token) * size;
    const char* source = from + out_of.at(b, 0, slot) * size;
    for (int64_t h = 0; h < heads; ++h, target += into.head * size, source += out_of.head * size) {
      if (whole_) {
        std::memcpy(target, source, static_cast<size_t>(channels * size));
        continue;
      }
      for (int64_t c = 0; c < channels; ++c) {
        std::memcpy(target + c * into.channel * size, source + c * out_of.channel * size, static_cast<size_t>(size));
      }
    }
  }

 private:
  bool whole_ = false;
};

void feature_reuse_write_(const Tensor& k_cache, const Tensor& v_cache, const Tensor& valid, const Tensor& k, const Tensor& v,
                          const Tensor& ids_any) {
  check_cache_write(k_cache, v_cache, valid, k, v, ids_any);
  const Tensor ids = contiguous_or_copy(ids_any);
  const int64_t batch = ids.size(0), slots = ids.size(1), stride_b = valid.stride(0), stride_n = valid.stride(1);
  const int64_t* id = static_cast<const int64_t*>(ids.const_data_ptr());
  // Nothing is written before every id is known to be good.
  check_ids("ContextCache.write_", "ids", id, batch, slots, k_cache.size(2), -1);
  bool* mark = static_cast<bool*>(valid.mutable_data_ptr());
  const RowCopy keys(k_cache, k), values(v_cache, v);
  parallel_for(batch * slots, 4 * keys.heads * keys.channels * keys.size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (id[i] < 0) continue;
      const int64_t b = i / slots, slot = i % slots;
      keys(b, id[i], slot);
      values(b, id[i], slot);
      mark[b * stride_b + id[i] * stride_n] = true;
    }
  });
}

Tensor feature_reuse_exclude(const Tensor& valid_any, const Tensor& ids_any) {
  check_cache_exclude(valid_any, ids_any);
  const Tensor valid = contiguous_or_copy(valid_any), ids = contiguous_or_copy(ids_any);
  const int64_t layers = valid.size(0), batch = valid.size(1), tokens = valid.size(2), slots = ids.size(1);
  const int64_t* id = static_cast<const int64_t*>(ids.const_data_ptr());
  check_ids("ContextCache.exclude", "ids", id, batch, slots, tokens, -1);
  Tensor seen = empty_like_device(valid, {layers, batch, tokens});
  if (seen.numel() == 0) return seen;
  bool* to = static_cast<bool*>(seen.mutable_data_ptr());
  std::memcpy(to, valid.const_data_ptr(), static_cast<size_t>(seen.numel()));
  for (int64_t row = 0; row < layers * batch; ++row) {
    for (int64_t k = 0; k < slots; ++k) {
      const int64_t token = id[row % batch * slots + k];
      if (token >= 0) to[row * tokens + token] = false;
    }
  }
  return seen;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("feature_reuse_write_", TORCH_BOX(&feature_reuse_write_));
  m.impl("feature_reuse_exclude", TORCH_BOX(&feature_reuse_exclude));
}

}  // namespace maskops
#endif
