// Voxelisation on CUDA: the cell of each point as one number, a stable radix sort of these numbers, and the runs of equal ones.
// Integer atomics on counters only: what a block adds up does not depend on the order of its threads.
#include <bit>

#include "common/library.cuh"
#include "common/reduce.cuh"
#include "math/sparse_conv_pool.h"

namespace maskops {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 8 * kThreads;  // items of a block, taken in rounds of one per thread
constexpr int kBits = 8, kDigits = 1 << kBits;
static_assert(kDigits == kThreads);  // thread d looks after digit d

struct VoxelGrid {
  double low[kConvAxes], size[kConvAxes];
  std::int64_t shape[kConvAxes];  // axes that lack come last and have one cell
  std::int64_t batch_size, cells;
  int axes;
};

struct Items {
  const std::uint64_t* key;
  const std::int32_t* row;  // null: the items are in the order of the rows
};

// A thread owns a point and writes the number of its cell, `cells` for one that lies outside; NaN is never inside.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    cell_kernel(const T* __restrict__ points, const std::int32_t* __restrict__ batch_index, std::uint64_t* __restrict__ keys,
                std::int64_t count, std::int64_t stride, const VoxelGrid grid) {
  const std::int64_t n = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= count) return;
  const std::int32_t b = batch_index == nullptr ? 0 : load(batch_index + n);
  MASKOPS_DEVICE_CHECK(b >= 0 && b < grid.batch_size, std::out_of_range, "voxelize", "batch_index must be in [0, batch_size)",
                       "batch_index[", n, "] must be in [0, ", grid.batch_size, "), got ", b);
  std::int64_t cell = b;
  bool inside = true;
#pragma unroll
  for (int axis = 0; axis < kConvAxes; ++axis) {
    if (axis >= grid.axes) continue;
    const double value = static_cast<double>(widen(load(points + n * stride + axis)));
    const double at = floor((value - grid.low[axis]) / grid.size[axis]);
    inside = inside && at >= 0 && at < static_cast<double>(grid.shape[axis]);
    cell = cell * grid.shape[axis] + (inside ? static_cast<std::int64_t>(at) : 0);
  }
  store(keys + n, static_cast<std::uint64_t>(inside ? cell : grid.cells));
}

__device__ __forceinline__ int digit_of(std::uint64_t key, int shift) { return static_cast<int>(key >> shift) & (kDigits - 1); }

// counts [kDigits, blocks]: how many items of a block's tile have a digit.
__global__ void __launch_bounds__(kThreads, 4)
    count_digits_kernel(const std::uint64_t* __restrict__ keys, std::int32_t* __restrict__ counts, std::int64_t count, int shift) {
  MASKOPS_SHARED(int, bins, kDigits);
  bins[threadIdx.x] = 0;
  __syncthreads();
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kTile;
  for (std::int64_t i = first + threadIdx.x; i < first + kTile && i < count; i += kThreads) {
    atomicAdd(&bins[digit_of(load(keys + i), shift)], 1);
  }
  __syncthreads();
  store(counts + static_cast<std::int64_t>(threadIdx.x) * gridDim.x + blockIdx.x, bins[threadIdx.x]);
}

// A block owns a digit: before [kDigits, blocks] tells how many items with it stand in earlier tiles, totals [kDigits] of all.
__global__ void __launch_bounds__(kThreads, 4) scan_digits_kernel(const std::int32_t* __restrict__ counts,
                                                                  std::int32_t* __restrict__ before,
                                                                  std::int32_t* __restrict__ totals, std::int64_t blocks) {
  MASKOPS_SHARED(int, scratch, kWarps);
  const std::int64_t row = blockIdx.x * blocks;
  int carry = 0;
  for (std::int64_t tile = 0; tile < blocks; tile += kThreads) {
    const std::int64_t i = tile + threadIdx.x;
    int total = 0;
    const int sum = block_sum_before<kWarps>(i < blocks ? load(counts + row + i) : 0, scratch, total);
    if (i < blocks) store(before + row + i, carry + sum);
    carry += total;
  }
  if (threadIdx.x == 0) store(totals + blockIdx.x, carry);
}

// Which lanes of the warp have the same digit; all lanes come here. Ballots cost about what __match_any_sync does.
__device__ __forceinline__ unsigned peers_of(int digit, bool valid) {
  unsigned peers = __ballot_sync(kFullWarp, valid);
#pragma unroll
  for (int bit = 0; bit < kBits; ++bit) {
    const bool mine = (digit >> bit & 1) != 0;
    const unsigned with = __ballot_sync(kFullWarp, mine);
    peers &= mine ? with : ~with;
  }
  return peers;
}

// A block moves the items of its tile to the places of their digits. Rounds go in order, within a round warps and lanes do, so
// items with the same digit keep their order.
__global__ void __launch_bounds__(kThreads, 4)
    move_kernel(const Items from, const std::int32_t* __restrict__ before, const std::int32_t* __restrict__ totals,
                std::uint64_t* __restrict__ keys, std::int32_t* __restrict__ rows, std::int64_t count, int shift) {
  MASKOPS_SHARED(int, scratch, kWarps);
  MASKOPS_SHARED(int, places, kWarps * kDigits);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, digits = threadIdx.x;
  int unused = 0;
  int next = block_sum_before<kWarps>(load(totals + digits), scratch, unused);
  next += load(before + static_cast<std::int64_t>(digits) * gridDim.x + blockIdx.x);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kTile;
  for (std::int64_t round = first; round < first + kTile && round < count; round += kThreads) {
    const std::int64_t i = round + threadIdx.x;
    const bool valid = i < count;
    const std::uint64_t key = valid ? load(from.key + i) : 0;
    const int digit = digit_of(key, shift);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) places[w * kDigits + digits] = 0;
    __syncthreads();
    const unsigned peers = peers_of(digit, valid);
    const int rank = __popc(peers & ((1u << lane) - 1));
    if (valid && rank == 0) places[warp * kDigits + digit] = __popc(peers);
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int here = places[w * kDigits + digits];
      places[w * kDigits + digits] = next;
      next += here;
    }
    __syncthreads();
    if (valid) {
      const int place = places[warp * kDigits + digit] + rank;
      store(keys + place, key);
      store(rows + place, from.row == nullptr ? static_cast<std::int32_t>(i) : load(from.row + i));
    }
    __syncthreads();
  }
}

__device__ __forceinline__ bool begins(const std::uint64_t* keys, std::int64_t i, std::uint64_t key, std::uint64_t outside) {
  return key != outside && (i == 0 || load(keys + i - 1) != key);
}

// begun [blocks]: how many voxels begin in a block's tile of sorted items.
__global__ void __launch_bounds__(kThreads, 4)
    count_voxels_kernel(const std::uint64_t* __restrict__ keys, std::int64_t* __restrict__ begun, std::int64_t count,
                        std::uint64_t outside) {
  MASKOPS_SHARED(int, scratch, kWarps);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kTile;
  int mine = 0;
  for (std::int64_t i = first + threadIdx.x; i < first + kTile && i < count; i += kThreads) {
    mine += begins(keys, i, load(keys + i), outside);
  }
  const int total = block_sum<kWarps>(mine, scratch);
  if (threadIdx.x == 0) store(begun + blockIdx.x, static_cast<std::int64_t>(total));
}

struct VoxelOutputs {
  std::int32_t *coords, *inverse;  // [V, 1 + axes], [P]
  std::int32_t* begin;             // [V + 1]
};

// A block numbers the voxels that begin in its tile, after those of earlier ones.
__global__ void __launch_bounds__(kThreads, 4)
    name_voxels_kernel(const Items sorted, const std::int32_t* __restrict__ earlier, const VoxelOutputs out, std::int64_t count,
                       const VoxelGrid grid) {
  MASKOPS_SHARED(int, scratch, kWarps);
  const std::uint64_t outside = static_cast<std::uint64_t>(grid.cells);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kTile;
  std::int32_t voxels = load(earlier + blockIdx.x);
  for (std::int64_t round = first; round < first + kTile && round < count; round += kThreads) {
    const std::int64_t i = round + threadIdx.x;
    const std::uint64_t key = i < count ? load(sorted.key + i) : outside;
    const bool begin = i < count && begins(sorted.key, i, key, outside);
    int begun = 0;
    const std::int32_t voxel = voxels + block_rank<kWarps>(begin, scratch, begun) + begin - 1;
    voxels += begun;
    if (i >= count) continue;
    store(out.inverse + load(sorted.row + i), key == outside ? -1 : voxel);
    if (key != outside && (i + 1 == count || load(sorted.key + i + 1) == outside)) {
      store(out.begin + voxel + 1, static_cast<std::int32_t>(i + 1));  // the last one ends here
    }
    if (!begin) continue;
    store(out.begin + voxel, static_cast<std::int32_t>(i));
    std::int32_t* to = out.coords + static_cast<std::int64_t>(voxel) * (grid.axes + 1);
    std::int64_t cell = static_cast<std::int64_t>(key);
#pragma unroll
    for (int axis = kConvAxes - 1; axis >= 0; --axis) {
      if (axis >= grid.axes) continue;
      const std::int64_t above = cell / grid.shape[axis];
      store(to + 1 + axis, static_cast<std::int32_t>(cell - above * grid.shape[axis]));
      cell = above;
    }
    store(to, static_cast<std::int32_t>(cell));
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    count_points_kernel(const std::int32_t* __restrict__ begin, std::int32_t* __restrict__ counts, std::int64_t voxels) {
  const std::int64_t v = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (v < voxels) store(counts + v, load(begin + v + 1) - load(begin + v));
}

VoxelGrid grid_of(const std::vector<double>& voxel_size, const std::vector<double>& low, const Sizes& shape,
                  std::int64_t batch_size) {
  VoxelGrid grid{{}, {}, {1, 1, 1}, batch_size, batch_size, static_cast<int>(shape.size())};
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    grid.low[axis] = low[axis], grid.size[axis] = voxel_size[axis], grid.shape[axis] = shape[axis];
    grid.cells *= shape[axis];
  }
  return grid;
}

// Ascending by key, equal keys in the order of their rows. Returns (keys, rows).
std::pair<Tensor, Tensor> sorted(Tensor keys, std::int64_t cells, cudaStream_t stream) {
  const std::int64_t count = keys.size(0), blocks = ceil_div(count, kTile);
  const dim3 grid = grid_for(count, kTile), block(kThreads);
  Tensor counts = empty_like_device(keys, {kDigits, blocks}, ScalarType::Int);
  Tensor before = empty_like_device(keys, {kDigits, blocks}, ScalarType::Int);
  Tensor totals = empty_like_device(keys, {kDigits}, ScalarType::Int);
  Tensor other = empty_like_device(keys, {count}), rows = empty_like_device(keys, {count}, ScalarType::Int);
  Tensor other_rows = empty_like_device(keys, {count}, ScalarType::Int);
  const int bits = std::bit_width(static_cast<std::uint64_t>(cells));
  for (int shift = 0; shift < bits; shift += kBits) {
    const auto* from = const_data<std::uint64_t>(keys);
    launch(count_digits_kernel, grid, block, 0, stream, from, data<std::int32_t>(counts), count, shift);
    launch(scan_digits_kernel, dim3(kDigits), block, 0, stream, const_data<std::int32_t>(counts), data<std::int32_t>(before),
           data<std::int32_t>(totals), blocks);
    launch(move_kernel, grid, block, 0, stream, Items{from, shift == 0 ? nullptr : const_data<std::int32_t>(rows)},
           const_data<std::int32_t>(before), const_data<std::int32_t>(totals), data<std::uint64_t>(other),
           data<std::int32_t>(other_rows), count, shift);
    std::swap(keys, other), std::swap(rows, other_rows);
  }
  return {keys, rows};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_conv_voxelize(const Tensor& points_any, std::optional<Tensor> batch_any,
                                                                std::vector<double> voxel_size, std::vector<double> low,
                                                                Sizes shape, std::int64_t batch_size) {
  check_voxelize(points_any, batch_any, voxel_size, low, shape, batch_size);
  const DeviceScope scope(points_any);
  const Tensor points = torch::stable::contiguous(points_any);
  const std::optional<Tensor> batch = contiguous(batch_any);
  const VoxelGrid grid = grid_of(voxel_size, low, shape, batch_size);
  const std::int64_t count = points.size(0), blocks = ceil_div(count, kTile), columns = grid.axes + 1;
  Tensor inverse = empty_like_device(points, {count}, ScalarType::Int);
  if (count == 0) {
    return {empty_like_device(points, {0, columns}, ScalarType::Int), inverse, empty_like_device(points, {0}, ScalarType::Int),
            empty_like_device(points, {0}, ScalarType::Int)};
  }
  Tensor cells = empty_like_device(points, {count}, ScalarType::Long);
  dispatch_floats(points.scalar_type(), [&]<typename T>(Type<T>) {
    launch(cell_kernel<T>, grid_for(count, kThreads), dim3(kThreads), 0, scope.stream(), const_data<T>(points),
           const_data_or_null<std::int32_t>(batch), data<std::uint64_t>(cells), count, points.size(1), grid);
  });
  const auto [keys, order] = sorted(cells, grid.cells, scope.stream());
  Tensor begun = empty_like_device(points, {blocks}, ScalarType::Long);
  Tensor earlier = empty_like_device(points, {blocks + 1}, ScalarType::Int);
  launch(count_voxels_kernel, grid_for(count, kTile), dim3(kThreads), 0, scope.stream(), const_data<std::uint64_t>(keys),
         data<std::int64_t>(begun), count, static_cast<std::uint64_t>(grid.cells));
  exclusive_cumsum(data<std::int64_t>(begun), data<std::int32_t>(earlier), blocks, scope.stream());
  const std::int64_t voxels = read_back(const_data<std::int32_t>(earlier) + blocks, scope.stream());
  Tensor coords = empty_like_device(points, {voxels, columns}, ScalarType::Int);
  Tensor counts = empty_like_device(points, {voxels}, ScalarType::Int);
  Tensor begin = empty_like_device(points, {voxels + 1}, ScalarType::Int);
  const VoxelOutputs out{data<std::int32_t>(coords), data<std::int32_t>(inverse), data<std::int32_t>(begin)};
  launch(name_voxels_kernel, grid_for(count, kTile), dim3(kThreads), 0, scope.stream(),
         Items{const_data<std::uint64_t>(keys), const_data<std::int32_t>(order)}, const_data<std::int32_t>(earlier), out, count,
         grid);
  launch(count_points_kernel, grid_for(voxels, kThreads), dim3(kThreads), 0, scope.stream(), const_data<std::int32_t>(begin),
         data<std::int32_t>(counts), voxels);
  return {coords, inverse, order, counts};
}

}  // namespace

MASKOPS_CUDA_LIBRARY(m) { m.impl("sparse_conv_voxelize", TORCH_BOX(&sparse_conv_voxelize)); }

}  // namespace maskops
