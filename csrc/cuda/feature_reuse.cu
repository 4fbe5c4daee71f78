// feature_reuse_write_, feature_reuse_exclude and feature_reuse_rank on CUDA: rows by id, and ranks by counting.
#include "common/ids.cuh"
#include "common/library.cuh"
#include "common/reduce.cuh"
#include "math/feature_reuse_check.h"

namespace maskops {
namespace {

constexpr int kReuseThreads = 256, kReuseWarps = kReuseThreads / 32;

// ---------------------------------------------------------------- write

template <typename T>
struct CacheRows {
  const T* from;  // [B, H, U, D]
  T* to;          // [B, H, N, D]
  TokenStrides source, target;
  std::int64_t heads, channels;

  // One warp copies a token, W neighbouring channels per lane (W = 1: any strides). Heads side by side are one row.
  template <int W>
  __device__ __forceinline__ void copy(std::int64_t b, std::int64_t token, std::int64_t slot) const {
    for (std::int64_t h = 0; h < heads; ++h) {
      const T* x = from + source.at(b, h, slot);
      T* y = to + target.at(b, h, token);
      for (std::int64_t c = static_cast<std::int64_t>(threadIdx.x % 32) * W; c < channels; c += 32 * W) {
        if constexpr (W == 1) store(y + c * target.channel, load(x + c * source.channel));
        else store_vec<W>(y + c, load_vec<W>(x + c));
      }
    }
  }
};

// The first blocks check ids, the others write: a warp owns a slot of a row.
template <typename T, int W>
__global__ void __launch_bounds__(kReuseThreads, 4)
    cache_write_kernel(const CacheRows<T> keys, const CacheRows<T> values, bool* __restrict__ valid, std::int64_t valid_batch,
                       std::int64_t valid_token, const IdsCheck check) {
  if (blockIdx.x < check.blocks) {
    check_ids<kReuseThreads>(check, blockIdx.x, "ContextCache.write_", "ids");
    return;
  }
  const std::int64_t row = (blockIdx.x - check.blocks) * kReuseWarps + threadIdx.x / 32;
  if (row >= check.batch * check.slots) return;
  const std::int64_t token = load(check.ids + row), b = row / check.slots, slot = row % check.slots;
  if (token < 0 || token >= check.tokens) return;
  keys.template copy<W>(b, token, slot);
  values.template copy<W>(b, token, slot);
  if (threadIdx.x % 32 == 0) store(valid + b * valid_batch + token * valid_token, true);
}

template <typename T>
CacheRows<T> rows_of(const Tensor& cache, const Tensor& x, bool& whole) {
  CacheRows<T> rows{const_data<T>(x), data<T>(cache), token_strides(x), token_strides(cache), cache.size(1), cache.size(3)};
  if (rows.channels > 1 && (rows.source.channel != 1 || rows.target.channel != 1)) {
    whole = false;
    return rows;
  }
  rows.source.channel = rows.target.channel = 1;
  if (rows.heads > 1 && (rows.source.head != rows.channels || rows.target.head != rows.channels)) return rows;
  rows.channels *= rows.heads, rows.heads = 1, rows.source.head = rows.target.head = 0;
  return rows;
}

template <typename T>
int width_of(const CacheRows<T>& rows) {
  return vector_width<T>({rows.channels, rows.source.batch, rows.source.head, rows.source.token, rows.target.batch, rows.target.head,
                          rows.target.token}, {rows.from, rows.to});
}

void feature_reuse_write_(const Tensor& k_cache, const Tensor& v_cache, const Tensor& valid, const Tensor& k, const Tensor& v,
                          const Tensor& ids_any) {
  check_cache_write(k_cache, v_cache, valid, k, v, ids_any);
  const DeviceScope scope(k_cache);
  const Tensor ids = torch::stable::contiguous(ids_any);
  const IdsCheck check(const_data<std::int64_t>(ids), ids.size(0), ids.size(1), k_cache.size(2), -1);
  dispatch_floats(k_cache.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    bool whole = true;
    const CacheRows<T> keys = rows_of<T>(k_cache, k, whole), values = rows_of<T>(v_cache, v, whole);
    const int width = whole && width_of(keys) == width_of(values) ? width_of(keys) : 1;
    const std::int64_t blocks = check.blocks + ceil_div(check.batch * check.slots, kReuseWarps);
    dispatch_width<T>(width, [&](auto w) {
      launch(cache_write_kernel<T, w()>, grid_for(blocks, 1), dim3(kReuseThreads), 0, scope.stream(), keys, values, data<bool>(valid),
             valid.stride(0), valid.stride(1), check);
    });
  });
}

// ---------------------------------------------------------------- exclude

constexpr int kSeenChunk = 2048;

// seen [L, B, N]: the first blocks check ids, each other one owns a chunk of a row: it marks the ids that fall into it, then copies.
__global__ void __launch_bounds__(kReuseThreads, 4)
    cache_exclude_kernel(const unsigned char* __restrict__ valid, unsigned char* __restrict__ seen, std::int64_t chunks, const IdsCheck check) {
  if (blockIdx.x < check.blocks) {
    check_ids<kReuseThreads>(check, blockIdx.x, "ContextCache.exclude", "ids");
    return;
  }
  MASKOPS_SHARED(int, hidden, kSeenChunk);
  const std::int64_t block = blockIdx.x - check.blocks, row = block / chunks, base = block % chunks * kSeenChunk, b = row % check.batch;
  const std::int64_t left = check.tokens - base, count = left < kSeenChunk ? left : kSeenChunk;
  for (int i = threadIdx.x; i < count; i += kReuseThreads) hidden[i] = 0;
  __syncthreads();
  for (std::int64_t k = threadIdx.x; k < check.slots; k += kReuseThreads) {
    const std::int64_t token = load(check.ids + b * check.slots + k) - base;
    if (token >= 0 && token < count) atomicMax(&hidden[token], 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kReuseThreads) {
    const std::int64_t at = row * check.tokens + base + i;
    store(seen + at, static_cast<unsigned char>(hidden[i] != 0 ? 0 : load(valid + at)));
  }
}

Tensor feature_reuse_exclude(const Tensor& valid_any, const Tensor& ids_any) {
  check_cache_exclude(valid_any, ids_any);
  const DeviceScope scope(valid_any);
  const Tensor valid = torch::stable::contiguous(valid_any), ids = torch::stable::contiguous(ids_any);
  const std::int64_t layers = valid.size(0), batch = valid.size(1), tokens = valid.size(2);
  Tensor seen = empty_like_device(valid, {layers, batch, tokens});
  const IdsCheck check(const_data<std::int64_t>(ids), batch, ids.size(1), tokens, -1);
  const std::int64_t chunks = ceil_div(tokens, kSeenChunk), blocks = check.blocks + layers * batch * chunks;
  launch(cache_exclude_kernel, grid_for(blocks, 1), dim3(kReuseThreads), 0, scope.stream(), const_data<unsigned char>(valid),
         data<unsigned char>(seen), chunks, check);
  return seen;
}

// ---------------------------------------------------------------- rank

template <typename S>
struct RankRows {
  const S* score;                    // [B, N]
  const unsigned char* known;        // [B, N]
  const std::int64_t* num_select;    // [B] or null
  std::int64_t *ids, *rest, *count;  // [B, N], [B, N], [B]
  std::int64_t tokens, chunks;
  double threshold;
};

// One block owns kReuseThreads tokens of a row. The place of a token is how many unknown ones come before it: higher, or as high with
// a lower index, NaN last. Quadratic and without scratch memory: rows have some hundreds of tokens.
template <typename S>
__global__ void __launch_bounds__(kReuseThreads, 4) rank_kernel(const RankRows<S> rows) {
  MASKOPS_SHARED(S, scores, kReuseThreads);
  MASKOPS_SHARED(int, free, kReuseThreads);
  MASKOPS_SHARED(int, scratch, kReuseWarps);
  const std::int64_t b = blockIdx.x / rows.chunks, n = blockIdx.x % rows.chunks * kReuseThreads + threadIdx.x;
  const std::int64_t row = b * rows.tokens;
  const bool mine = n < rows.tokens, unknown = mine && load(rows.known + row + n) == 0;
  const S score = unknown ? load(rows.score + row + n) : S(0);
  std::int64_t place = 0;
  int left = 0, above = 0;
  for (std::int64_t begin = 0; begin < rows.tokens; begin += kReuseThreads) {
    const std::int64_t m = begin + threadIdx.x;
    const bool is_free = m < rows.tokens && load(rows.known + row + m) == 0;
    const S found = is_free ? load(rows.score + row + m) : S(0);
    scores[threadIdx.x] = found;
    free[threadIdx.x] = is_free;
    left += is_free;
    above += is_free && static_cast<double>(found) > rows.threshold;
    __syncthreads();
    const std::int64_t rest = rows.tokens - begin, size = rest < kReuseThreads ? rest : kReuseThreads;
    for (int i = 0; unknown && i < size; ++i) {
      const S other = scores[i];
      const bool same = other == score || (other != other && score != score);
      const bool before = other > score || (score != score && other == other) || (same && begin + i < n);
      place += free[i] != 0 && before;
    }
    __syncthreads();
  }
  left = block_sum<kReuseWarps>(left, scratch);
  above = block_sum<kReuseWarps>(above, scratch);
  std::int64_t count = above > 1 ? above : 1;
  if (rows.num_select) {
    count = load(rows.num_select + b);
    MASKOPS_DEVICE_CHECK(count >= 0, std::invalid_argument, "select_tokens", "num_select must be at least 0", "num_select[", b,
                         "] must be at least 0, got ", count);
  }
  count = count < left ? count : left;
  if (unknown && place < count) store(rows.ids + row + place, n);
  if (unknown && place >= count) store(rows.rest + row + place - count, n);
  // Each block fills its own part of the padding.
  if (mine && n >= count) store(rows.ids + row + n, std::int64_t(-1));
  if (mine && n >= left - count) store(rows.rest + row + n, std::int64_t(-1));
  if (n == 0) store(rows.count + b, count);
}

std::tuple<Tensor, Tensor, Tensor> feature_reuse_rank(const Tensor& score_any, const Tensor& known_any, std::optional<Tensor> num_any,
                                                      double threshold) {
  check_rank(score_any, known_any, num_any, threshold);
  const DeviceScope scope(score_any);
  const Tensor score = torch::stable::contiguous(score_any), known = torch::stable::contiguous(known_any);
  const std::optional<Tensor> num = contiguous(num_any);
  const std::int64_t batch = score.size(0), tokens = score.size(1), chunks = tokens > 0 ? ceil_div(tokens, kReuseThreads) : 1;
  Tensor ids = empty_like_device(score, {batch, tokens}, ScalarType::Long), rest = empty_like_device(score, {batch, tokens}, ScalarType::Long);
  Tensor count = empty_like_device(score, {batch}, ScalarType::Long);
  auto rank = [&](auto type) {
    using S = typename decltype(type)::type;
    const RankRows<S> rows{const_data<S>(score), const_data<unsigned char>(known), const_data_or_null<std::int64_t>(num),
                           data<std::int64_t>(ids), data<std::int64_t>(rest), data<std::int64_t>(count), tokens, chunks, threshold};
    launch(rank_kernel<S>, grid_for(batch * chunks, 1), dim3(kReuseThreads), 0, scope.stream(), rows);
  };
  if (score.scalar_type() == ScalarType::Double) rank(Type<double>{});
  else rank(Type<float>{});
  return {ids, rest, count};
}

}  // namespace

MASKOPS_CUDA_LIBRARY(m) {
  m.impl("feature_reuse_write_", TORCH_BOX(&feature_reuse_write_));
  m.impl("feature_reuse_exclude", TORCH_BOX(&feature_reuse_exclude));
  m.impl("feature_reuse_rank", TORCH_BOX(&feature_reuse_rank));
}

}  // namespace maskops
