// mask_sampling on CUDA: sort the tokens of each row by (class, noise, index) and write the split.
// Rows of up to kSortTokens tokens are sorted in the shared memory of one block; longer ones, and float64 noise (whose key and index
// do not fit 64 bits), get the rank of every token by counting the smaller keys.
#include <algorithm>

#include "common/library.cuh"
#include "common/philox.h"
#include "common/split_row.cuh"
#include "math/mask_sampling_check.h"

namespace maskops {
namespace {

constexpr int kSampleThreads = 256;
constexpr int kSortTokens = 4096;  // 32 KiB of keys

// ---------------------------------------------------------------- keys

// Drawn noise; the key holds class, noise and index, so keys are distinct.
struct DrawnKeys {
  const std::int64_t* seed;    // [2] = (seed, offset)
  const unsigned char* mask;   // [B, N] or null
  std::int64_t tokens;

  static constexpr bool kHoldsIndex = true;
  __device__ __forceinline__ std::uint64_t at(std::int64_t b, std::int64_t n) const {
    const std::int64_t word = b * tokens + n;
    const PhiloxWords words = philox(PhiloxKey::of(load(seed), load(seed + 1)), static_cast<std::uint64_t>(word >> 2));
    const int w = static_cast<int>(word & 3);
    const std::uint32_t noise = w == 0 ? words.word[0] : w == 1 ? words.word[1] : w == 2 ? words.word[2] : words.word[3];
    return sampling_key(mask && load(mask + word) ? 1u : 0u, noise, n);
  }
};

struct GivenKeys {
  const float* noise;  // [B, N]
  std::int64_t tokens;
  bool highest_first = false;

  static constexpr bool kHoldsIndex = true;
  __device__ __forceinline__ std::uint64_t at(std::int64_t b, std::int64_t n) const {
    const float x = load(noise + b * tokens + n);
    return sampling_key(0, ordered_bits(highest_first ? -x : x), n);
  }
};

struct GivenDoubleKeys {
  const double* noise;  // [B, N]
  std::int64_t tokens;
  bool highest_first = false;

  static constexpr bool kHoldsIndex = false;
  __device__ __forceinline__ std::uint64_t at(std::int64_t b, std::int64_t n) const {
    const double x = load(noise + b * tokens + n);
    return ordered_bits(highest_first ? -x : x);
  }
};

struct SampleRows {
  const std::int64_t *num_keep, *lengths;            // [B], lengths may be null
  std::int64_t *ids_keep, *ids_mask, *ids_restore;   // [B, K], [B, M], [B, N]
  std::int64_t* num_mask;                            // [B]
  std::int64_t max_keep, max_mask, tokens;
  bool ascending;

  // Counts that do not fit are reported by check() and clamped here.
  __device__ __forceinline__ SplitRow row(std::int64_t b) const {
    std::int64_t length = lengths ? load(lengths + b) : tokens, keep = load(num_keep + b);
    length = length < 0 ? 0 : length > tokens ? tokens : length;
    keep = keep < 0 ? 0 : keep > length ? length : keep;
    return {ids_keep + b * max_keep, ids_mask + b * max_mask, ids_restore + b * tokens, max_keep, max_mask, tokens, keep, length};
  }
  // By one thread: the counts of row b, and num_mask[b].
  __device__ __forceinline__ void check(std::int64_t b) const {
    const char* name = "random_masking";
    (void)name;
    const std::int64_t length = lengths ? load(lengths + b) : tokens, keep = load(num_keep + b), masked = length - keep;
    MASKOPS_DEVICE_CHECK(length >= 0 && length <= tokens, std::invalid_argument, name, "lengths must be in [0, N]", "lengths[", b,
                         "] must be in [0, ", tokens, "], got ", length);
    MASKOPS_DEVICE_CHECK(keep >= 0 && keep <= length && keep <= max_keep, std::invalid_argument, name,
                         "num_keep must be in [0, length] and at most max_keep", "num_keep[", b,
                         "] must be in [0, length] and at most ", max_keep, ", got ", keep);
    MASKOPS_DEVICE_CHECK(masked <= max_mask, std::invalid_argument, name, "masked tokens must be at most max_mask", "masked tokens[",
                         b, "] must be at most ", max_mask, ", got ", masked);
    store(num_mask + b, masked);
  }
};

// ---------------------------------------------------------------- rows that fit shared memory

// Bitonic sort of `size` (a power of two) keys in shared memory by the whole block. In each step a thread owns pairs, so between two
// barriers no key is touched by two threads.
template <typename Keys>
__device__ __forceinline__ void sort_shared(Keys& keys, int size) {
  for (int width = 2; width <= size; width <<= 1) {
    for (int stride = width >> 1; stride > 0; stride >>= 1) {
      __syncthreads();
      for (int pair = threadIdx.x; pair < size / 2; pair += kSampleThreads) {
        const int low = 2 * pair - (pair & (stride - 1)), high = low + stride;
        const std::uint64_t a = keys[low], b = keys[high];
        if ((a > b) == ((low & width) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  }
  __syncthreads();
}

// One block owns one row: draw the keys, sort them, write slots in key order; ascending, compact the kept and masked sets once more.
template <typename Keys>
__global__ void __launch_bounds__(kSampleThreads, 4) sample_sort_kernel(const Keys source, const SampleRows rows, const int size) {
  MASKOPS_DYNAMIC_SHARED(std::uint64_t, keys);
  MASKOPS_SHARED(unsigned, hidden_bits, kSortTokens / 32);
  MASKOPS_SHARED(int, scratch, kSampleThreads / 32);
  const std::int64_t b = blockIdx.x;
  if (threadIdx.x == 0) rows.check(b);
  const SplitRow row = rows.row(b);
  for (int n = threadIdx.x; n < size; n += kSampleThreads) keys[n] = n < row.length ? source.at(b, n) : padding_key(n);
  for (int n = threadIdx.x; n < kSortTokens / 32; n += kSampleThreads) hidden_bits[n] = 0u;
  sort_shared(keys, size);
  if (rows.ascending) {
    for (int slot = threadIdx.x; slot < row.length; slot += kSampleThreads) {
      const std::int64_t n = index_of_key(keys[slot]);
      if (slot >= row.num_keep) atomicOr(&hidden_bits[n / 32], 1u << (n % 32));
    }
    __syncthreads();
    write_ascending_row<kSampleThreads>(row, [&](std::int64_t n) { return (hidden_bits[n / 32] >> (n % 32) & 1u) != 0; }, scratch);
    return;
  }
  for (int slot = threadIdx.x; slot < rows.tokens; slot += kSampleThreads) {
    const std::int64_t n = slot < row.length ? index_of_key(keys[slot]) : slot;
    store(row.ids_restore + n, static_cast<std::int64_t>(slot));
    row.place(slot, n);
  }
  pad_split_row<kSampleThreads>(row);
}

// ---------------------------------------------------------------- longer rows

// ids_restore[b, n] = how many real tokens of the row have a smaller key. One block owns kSampleThreads tokens of one row and walks
// over the row's keys in tiles of shared memory. Quadratic, but without scratch memory, for rows that are rare.
template <typename Keys>
__global__ void __launch_bounds__(kSampleThreads, 4) sample_rank_kernel(const Keys source, const SampleRows rows, std::int64_t chunks) {
  MASKOPS_SHARED(std::uint64_t, tile, kSampleThreads);
  const std::int64_t b = blockIdx.x / chunks, n = blockIdx.x % chunks * kSampleThreads + threadIdx.x;
  if (n == 0) rows.check(b);
  const std::int64_t length = rows.row(b).length;
  const bool real = n < length;
  const std::uint64_t mine = real ? source.at(b, n) : 0;
  std::int64_t rank = 0;
  for (std::int64_t begin = 0; begin < length; begin += kSampleThreads) {
    const std::int64_t other = begin + threadIdx.x;
    if (other < length) tile[threadIdx.x] = source.at(b, other);
    __syncthreads();
    const int count = static_cast<int>(length - begin < kSampleThreads ? length - begin : kSampleThreads);
    for (int i = 0; i < count; ++i) {
      const std::uint64_t theirs = tile[i];
      rank += theirs < mine || (!Keys::kHoldsIndex && theirs == mine && begin + i < n);
    }
    __syncthreads();
  }
  if (n < rows.tokens) store(rows.ids_restore + b * rows.tokens + n, real ? rank : n);
}

// From ids_restore in key order to the ids, ascending where asked. One block owns one row. ids_restore is read and written here, a
// token by the same thread, so it must not be read through load(), which promises memory that nobody writes.
__global__ void __launch_bounds__(kSampleThreads, 4) sample_write_kernel(const SampleRows rows) {
  MASKOPS_SHARED(int, scratch, kSampleThreads / 32);
  const SplitRow row = rows.row(blockIdx.x);
  const std::int64_t* restore = row.ids_restore;
  if (rows.ascending) {
    write_ascending_row<kSampleThreads>(row, [&](std::int64_t n) { return restore[n] >= row.num_keep; }, scratch);
    return;
  }
  for (std::int64_t n = threadIdx.x; n < row.length; n += kSampleThreads) row.place(restore[n], n);
  pad_split_row<kSampleThreads>(row);
}

// ---------------------------------------------------------------- cells

// From the slots of cells [B, N], in index order, to the split of the patches of their grid. A thread owns a patch of rows.tokens.
//
// Before a kept cell c are slot[c] kept cells, before a hidden one c less the hidden ones before it. Before a patch are the kept patches
// of earlier lines of cells, then the lines above it in its own line of cells, then the kept cells to its left.
__global__ void __launch_bounds__(kSampleThreads, 4)
    cells_kernel(const SampleRows rows, const std::int64_t* slots, const Cells cells, std::int64_t chunks) {
  const std::int64_t b = blockIdx.x / chunks, i = blockIdx.x % chunks * kSampleThreads + threadIdx.x;
  const std::int64_t area = cells.area(), tokens = area ? rows.tokens / area : 0, wanted = load(rows.num_keep + b);
  const std::int64_t keep = wanted < 0 ? 0 : wanted > tokens ? tokens : wanted;  // as where the slots were made
  const SplitRow row{rows.ids_keep + b * rows.max_keep, rows.ids_mask + b * rows.max_mask, rows.ids_restore + b * rows.tokens,
                     rows.max_keep, rows.max_mask, rows.tokens, area * keep, rows.tokens};
  if (i == 0) store(rows.num_mask + b, area * (tokens - keep));
  if (i < rows.tokens) {
    const std::int64_t width = cells.across * cells.wide, line = i / width, x = i % width;
    const std::int64_t first = line / cells.high * cells.across, cell = first + x / cells.wide;
    auto slot_of = [&](std::int64_t c) { return load(slots + b * tokens + c); };
    auto kept_before = [&](std::int64_t c) {
      if (c == tokens) return keep;
      const std::int64_t slot = slot_of(c);
      return slot < keep ? slot : c - (slot - keep);
    };
    const bool kept = slot_of(cell) < keep;
    const std::int64_t above = kept_before(first), in_line = kept_before(first + cells.across) - above;
    const std::int64_t left = cells.wide * (kept_before(cell) - above) + (kept ? x % cells.wide : 0);
    const std::int64_t before = cells.wide * (cells.high * above + line % cells.high * in_line) + left;
    const std::int64_t slot = kept ? before : area * keep + i - before;
    store(row.ids_restore + i, slot);
    row.place(slot, i);
  }
  if (blockIdx.x % chunks == 0) pad_split_row<kSampleThreads>(row);
}

// ---------------------------------------------------------------- the highest scores

// A thread owns a token of all: whether its rank is below count.
__global__ void __launch_bounds__(kSampleThreads, 4)
    top_kernel(const std::int64_t* ranks, std::int64_t count, unsigned char* mask, std::int64_t total) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kSampleThreads + threadIdx.x;
  if (i < total) store(mask + i, static_cast<unsigned char>(load(ranks + i) < count));
}

// ---------------------------------------------------------------- ops

using Split = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename Keys>
void launch_sampling(const Keys& keys, const SampleRows& rows, std::int64_t batch, cudaStream_t stream) {
  if (Keys::kHoldsIndex && rows.tokens <= kSortTokens) {
    int size = 2;
    while (size < rows.tokens) size *= 2;
    launch(sample_sort_kernel<Keys>, grid_for(batch, 1), dim3(kSampleThreads), size * sizeof(std::uint64_t), stream, keys, rows, size);
    return;
  }
  const std::int64_t chunks = std::max<std::int64_t>(1, ceil_div(rows.tokens, kSampleThreads));
  launch(sample_rank_kernel<Keys>, grid_for(batch * chunks, 1), dim3(kSampleThreads), 0, stream, keys, rows, chunks);
  launch(sample_write_kernel, grid_for(batch, 1), dim3(kSampleThreads), 0, stream, rows);
}

struct Outputs {
  Tensor ids_keep, ids_mask, ids_restore, num_mask;

  Outputs(const Tensor& num_keep, std::int64_t max_keep, std::int64_t max_mask, std::int64_t tokens)
      : ids_keep(empty_like_device(num_keep, {num_keep.size(0), max_keep})),
        ids_mask(empty_like_device(num_keep, {num_keep.size(0), max_mask})),
        ids_restore(empty_like_device(num_keep, {num_keep.size(0), tokens})), num_mask(empty_like_device(num_keep, {num_keep.size(0)})) {}

  SampleRows rows(const Tensor& num_keep, const std::optional<Tensor>& lengths, bool ascending) const {
    return {const_data<std::int64_t>(num_keep), const_data_or_null<std::int64_t>(lengths), data<std::int64_t>(ids_keep),
            data<std::int64_t>(ids_mask), data<std::int64_t>(ids_restore), data<std::int64_t>(num_mask),
            ids_keep.size(1), ids_mask.size(1), ids_restore.size(1), ascending};
  }
};

template <typename Keys>
Split sample(const Keys& keys, const Tensor& num_keep_any, const std::optional<Tensor>& lengths_any, std::int64_t max_keep,
             std::int64_t max_mask, bool ascending, cudaStream_t stream, const Cells& cells = {}) {
  const Tensor num_keep = torch::stable::contiguous(num_keep_any);
  const std::optional<Tensor> lengths = contiguous(lengths_any);
  const std::int64_t batch = num_keep.size(0), area = cells.area();
  Outputs out(num_keep, max_keep, max_mask, keys.tokens);
  launch_sampling(keys, out.rows(num_keep, lengths, ascending), batch, stream);
  if (!cells.single()) {
    const Tensor slots = out.ids_restore;
    out = Outputs(num_keep, area * max_keep, area * max_mask, area * keys.tokens);
    const std::int64_t chunks = std::max<std::int64_t>(1, ceil_div(area * keys.tokens, kSampleThreads));
    launch(cells_kernel, grid_for(batch * chunks, 1), dim3(kSampleThreads), 0, stream, out.rows(num_keep, lengths, ascending),
           const_data<std::int64_t>(slots), cells, chunks);
  }
  Tensor cu_seqlens = empty_like_device(num_keep, {batch + 1}, ScalarType::Int);
  exclusive_cumsum(const_data<std::int64_t>(num_keep), data<std::int32_t>(cu_seqlens), batch, stream, area);
  return {out.ids_keep, out.ids_mask, out.ids_restore, out.num_mask, cu_seqlens};
}

Split mask_sampling_uniform(const Tensor& seed_any, const Tensor& num_keep, std::optional<Tensor> lengths,
                            std::optional<Tensor> mask_any, std::int64_t tokens, std::int64_t max_keep, std::int64_t max_mask,
                            bool ascending, std::int64_t across, std::int64_t high, std::int64_t wide) {
  const Cells cells{across, high, wide};
  check_sampling_uniform(seed_any, num_keep, lengths, mask_any, tokens, max_keep, max_mask, ascending, cells);
  const DeviceScope scope(num_keep);
  const Tensor seed = torch::stable::contiguous(seed_any);
  const std::optional<Tensor> mask = contiguous(mask_any);
  const DrawnKeys keys{const_data<std::int64_t>(seed), const_data_or_null<unsigned char>(mask), tokens};
  return sample(keys, num_keep, lengths, max_keep, max_mask, ascending, scope.stream(), cells);
}

Split mask_sampling_rank(const Tensor& noise_any, const Tensor& num_keep, std::optional<Tensor> lengths, std::int64_t max_keep,
                         std::int64_t max_mask, bool ascending) {
  check_sampling_rank(noise_any, num_keep, lengths, max_keep, max_mask);
  const DeviceScope scope(noise_any);
  const Tensor noise = torch::stable::contiguous(noise_any);
  if (noise.scalar_type() == ScalarType::Float)
    return sample(GivenKeys{const_data<float>(noise), noise.size(1)}, num_keep, lengths, max_keep, max_mask, ascending, scope.stream());
  return sample(GivenDoubleKeys{const_data<double>(noise), noise.size(1)}, num_keep, lengths, max_keep, max_mask, ascending,
                scope.stream());
}

Tensor mask_sampling_top(const Tensor& score_any, std::int64_t count) {
  check_sampling_top(score_any, count);
  const DeviceScope scope(score_any);
  const Tensor score = torch::stable::contiguous(score_any);
  const std::int64_t batch = score.size(0), tokens = score.size(1), total = batch * tokens;
  Tensor counts = empty_like_device(score, {batch}, ScalarType::Long), out = empty_like_device(score, {batch, tokens}, ScalarType::Bool);
  torch::stable::fill_(counts, static_cast<double>(count));
  const Split split =
      score.scalar_type() == ScalarType::Float
          ? sample(GivenKeys{const_data<float>(score), tokens, true}, counts, {}, count, tokens - count, false, scope.stream())
          : sample(GivenDoubleKeys{const_data<double>(score), tokens, true}, counts, {}, count, tokens - count, false, scope.stream());
  launch(top_kernel, grid_for(ceil_div(total, kSampleThreads), 1), dim3(kSampleThreads), 0, scope.stream(),
         const_data<std::int64_t>(std::get<2>(split)), count, data<unsigned char>(out), total);
  return out;
}

}  // namespace

MASKOPS_CUDA_LIBRARY(m) {
  m.impl("mask_sampling_uniform", TORCH_BOX(&mask_sampling_uniform));
  m.impl("mask_sampling_rank", TORCH_BOX(&mask_sampling_rank));
  m.impl("mask_sampling_top", TORCH_BOX(&mask_sampling_top));
}

}  // namespace maskops
