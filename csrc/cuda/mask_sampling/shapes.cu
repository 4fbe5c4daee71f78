// Rectangles on a grid on CUDA: a warp owns an image; a row of its grid is a 64-bit word in shared memory.
#include <algorithm>

#include "common/library.cuh"
#include "common/reduce.cuh"
#include "math/mask_sampling_law_check.h"

namespace maskops {
namespace {

constexpr int kWarp = 32;

__device__ __forceinline__ int count_word(std::uint64_t word) {
  return __popc(static_cast<unsigned>(word)) + __popc(static_cast<unsigned>(word >> 32));
}

template <typename Grid>
__device__ __forceinline__ std::int64_t count_inside(const Grid& grid, const Rectangle& r) {
  const std::uint64_t columns = row_bits(r.left, r.width);
  std::int64_t count = 0;
  for (std::int64_t y = r.top; y < r.top + r.height; ++y) count += count_word(grid[y] & columns);
  return count;
}

// The j-th cell, in reading order, that is not set yet. By one thread.
template <typename Grid>
__device__ __forceinline__ void set_free(Grid& grid, std::int64_t j, std::int64_t w) {
  for (std::int64_t y = 0;; ++y) {
    std::uint64_t rest = ~grid[y] & row_bits(0, w);
    const std::int64_t count = count_word(rest);
    if (j >= count) {
      j -= count;
      continue;
    }
    for (; j > 0; --j) rest &= rest - 1;
    grid[y] = grid[y] | (rest & (~rest + 1));
    return;
  }
}

// By the whole warp.
template <typename Grid>
__device__ __forceinline__ void write_grid(const Grid& grid, std::int64_t h, std::int64_t w, bool* to) {
  for (std::int64_t cell = threadIdx.x; cell < h * w; cell += kWarp) store(to + cell, (grid[cell / w] >> (cell % w) & 1) != 0);
}

struct Blocks {
  const std::int64_t *seed, *num_mask;  // [2], [B]
  const std::int32_t* shapes;           // [A, 2]
  std::int64_t count, h, w, smallest, largest, tries;
  bool fill;
};

// The lanes draw a round's rectangles at once; the first that fits is taken, as if they had been drawn one after the other.
__global__ void __launch_bounds__(kWarp, 8) blocks_kernel(const Blocks law, bool* out) {
  MASKOPS_SHARED(std::uint64_t, grid, kMaxSide);
  const std::int64_t b = blockIdx.x, lane = threadIdx.x, cells = law.h * law.w;
  const PhiloxKey key = PhiloxKey::of(load(law.seed), load(law.seed + 1));
  const std::int64_t wanted = load(law.num_mask + b);
  const char* name = "block_masking";
  (void)name;
  MASKOPS_DEVICE_CHECK(wanted >= 0 && wanted <= cells, std::invalid_argument, name, "num_mask must be in [0, h w]", "num_mask[", b,
                       "] must be in [0, ", cells, "], got ", wanted);
  for (int y = lane; y < kMaxSide; y += kWarp) grid[y] = 0;
  __syncthreads();
  std::int64_t left = wanted, drawn = 0;
  for (bool found = true; found && left > 0; drawn += law.tries) {
    found = false;
    const std::int64_t room = left < law.largest ? left : law.largest;
    for (std::int64_t first = 0; first < law.tries && !found; first += kWarp) {
      const std::int64_t t = first + lane;
      Rectangle r{0, 0, 0, 0};
      if (t < law.tries) {
        const PhiloxWords words = philox(key, row_counter(b) + static_cast<std::uint64_t>(drawn + t));
        r = block_rectangle(words, law.shapes, law.count, law.h, law.w, law.smallest, room);
      }
      const int more = static_cast<int>(r.height * r.width - count_inside(grid, r));
      const unsigned fits = __ballot_sync(kFullWarp, more > 0 && more <= room);
      if (fits == 0) continue;
      const int winner = __ffs(fits) - 1;
      const int top = __shfl_sync(kFullWarp, static_cast<int>(r.top), winner), begin = __shfl_sync(kFullWarp, static_cast<int>(r.left), winner);
      const int height = __shfl_sync(kFullWarp, static_cast<int>(r.height), winner);
      const int width = __shfl_sync(kFullWarp, static_cast<int>(r.width), winner);
      left -= __shfl_sync(kFullWarp, more, winner);
      __syncthreads();
      for (int y = top + lane; y < top + height; y += kWarp) grid[y] = grid[y] | row_bits(begin, width);
      __syncthreads();
      found = true;
    }
  }
  if (law.fill && lane == 0) {
    for (std::int64_t i = 0; left > 0; ++i, --left) set_free(grid, below(row_word(key, b, kFillWords + i), cells - wanted + left), law.w);
  }
  __syncthreads();
  write_grid(grid, law.h, law.w, out + b * cells);
}

struct MultiBlock {
  const std::int64_t* seed;                          // [2]
  const std::int32_t *target_sizes, *context_sizes;  // [A, 2]
  std::int64_t target_count, context_count, h, w, targets, min_keep;
  bool shared;
};

__device__ __forceinline__ std::int64_t checked_size(const std::int32_t* sizes, std::int64_t i, std::int64_t side) {
  const std::int64_t size = load(sizes + i);
  const char* name = "multiblock_masking";
  (void)name;
  MASKOPS_DEVICE_CHECK(size >= 1 && size < side, std::invalid_argument, name, "sizes must be at least 1 and less than the grid's side",
                       "target_sizes or context_sizes must be at least 1 and less than the grid's side, got ", size);
  return size;
}

__global__ void __launch_bounds__(kWarp, 8) multiblock_kernel(const MultiBlock law, bool* targets, bool* context) {
  MASKOPS_SHARED(std::uint64_t, grid, kMaxSide);
  MASKOPS_SHARED(int, tops, 64);
  MASKOPS_SHARED(int, lefts, 64);
  const std::int64_t b = blockIdx.x, lane = threadIdx.x, cells = law.h * law.w;
  const PhiloxKey key = PhiloxKey::of(load(law.seed), load(law.seed + 1));
  const PhiloxWords size = philox(key, law.shared ? kSharedCounter : row_counter(b));
  const std::int64_t t_size = 2 * below(size.word[0], law.target_count), c_size = 2 * below(size.word[1], law.context_count);
  const std::int64_t t_height = checked_size(law.target_sizes, t_size, law.h), t_width = checked_size(law.target_sizes, t_size + 1, law.w);
  const std::int64_t c_height = checked_size(law.context_sizes, c_size, law.h);
  const std::int64_t c_width = checked_size(law.context_sizes, c_size + 1, law.w);
  for (std::int64_t t = lane; t < law.targets; t += kWarp) {
    const Rectangle r = placed(philox(key, row_counter(b) + static_cast<std::uint64_t>(1 + t)), law.h, law.w, t_height, t_width);
    tops[t] = static_cast<int>(r.top);
    lefts[t] = static_cast<int>(r.left);
  }
  __syncthreads();
  for (std::int64_t i = lane; i < law.targets * cells; i += kWarp) {
    const std::int64_t t = i / cells, y = i % cells / law.w, x = i % law.w;
    store(targets + b * law.targets * cells + i,
          y >= tops[t] && y < tops[t] + t_height && x >= lefts[t] && x < lefts[t] + t_width);
  }
  const std::int64_t last = kTriesPerTarget * law.targets;
  for (std::int64_t a = 0; a <= last; ++a) {
    const Rectangle r = placed(philox(key, row_counter(b) + static_cast<std::uint64_t>(1 + law.targets + a)), law.h, law.w, c_height, c_width);
    const std::int64_t kept_away = law.targets - a / kTriesPerTarget;
    int count = 0;
    for (std::int64_t y = lane; y < law.h; y += kWarp) {
      std::uint64_t row = y >= r.top && y < r.top + r.height ? row_bits(r.left, r.width) : 0;
      for (std::int64_t t = 0; t < kept_away; ++t) {
        if (y >= tops[t] && y < tops[t] + t_height) row &= ~row_bits(lefts[t], t_width);
      }
      grid[y] = row;
      count += count_word(row);
    }
    if (warp_sum(count) > law.min_keep) break;
  }
  __syncthreads();
  write_grid(grid, law.h, law.w, context + b * cells);
}

Tensor mask_sampling_blocks(const Tensor& seed_any, const Tensor& num_mask_any, const Tensor& shapes_any, std::int64_t h, std::int64_t w,
                            std::int64_t smallest, std::int64_t largest, std::int64_t tries, bool fill) {
  check_blocks(seed_any, num_mask_any, shapes_any, h, w, smallest, largest, tries);
  const DeviceScope scope(seed_any);
  const Tensor seed = torch::stable::contiguous(seed_any), num_mask = torch::stable::contiguous(num_mask_any);
  const Tensor shapes = torch::stable::contiguous(shapes_any);
  Tensor out = empty_like_device(seed, {num_mask.size(0), h * w}, ScalarType::Bool);
  const Blocks law{const_data<std::int64_t>(seed), const_data<std::int64_t>(num_mask), const_data<std::int32_t>(shapes), shapes.size(0),
                   h, w, smallest, largest, tries, fill};
  launch(blocks_kernel, grid_for(num_mask.size(0), 1), dim3(kWarp), 0, scope.stream(), law, data<bool>(out));
  return out;
}

std::tuple<Tensor, Tensor> mask_sampling_multiblock(const Tensor& seed_any, const Tensor& target_any, const Tensor& context_any,
                                                    std::int64_t batch, std::int64_t h, std::int64_t w, std::int64_t targets,
                                                    std::int64_t min_keep, bool shared) {
  check_multiblock(seed_any, target_any, context_any, batch, h, w, targets, min_keep);
  const DeviceScope scope(seed_any);
  const Tensor seed = torch::stable::contiguous(seed_any), target = torch::stable::contiguous(target_any);
  const Tensor context = torch::stable::contiguous(context_any);
  Tensor found = empty_like_device(seed, {batch, targets, h * w}, ScalarType::Bool);
  Tensor kept = empty_like_device(seed, {batch, h * w}, ScalarType::Bool);
  const MultiBlock law{const_data<std::int64_t>(seed), const_data<std::int32_t>(target), const_data<std::int32_t>(context),
                       target.size(0), context.size(0), h, w, targets, min_keep, shared};
  launch(multiblock_kernel, grid_for(batch, 1), dim3(kWarp), 0, scope.stream(), law, data<bool>(found), data<bool>(kept));
  return {found, kept};
}

}  // namespace

MASKOPS_CUDA_LIBRARY(m) {
  m.impl("mask_sampling_blocks", TORCH_BOX(&mask_sampling_blocks));
  m.impl("mask_sampling_multiblock", TORCH_BOX(&mask_sampling_multiblock));
}

}  // namespace maskops
