// sparse_conv on CUDA: kernel maps by a hash of places, and their reverse. Integer atomics only: the slot that a place gets in the
// table depends on the order of the threads, what is found there does not.
#include "common/library.cuh"
#include "math/sparse_conv.h"
#include "math/sparse_conv_check.h"

namespace maskops {
namespace {

constexpr int kPlaceThreads = 256;

// Rows of coords [N, columns] as places of three axes.
struct PlaceRows {
  const std::int32_t* rows;
  std::int64_t count;
  int columns;

  __device__ __forceinline__ Place at(std::int64_t n) const {
    const std::int32_t* row = rows + n * columns;
    Place place;
    place.batch = load(row);
    // Not a loop: an index that varies would put the place into local memory.
    place.at[2] = load(row + columns - 1);
    place.at[1] = columns > 2 ? load(row + columns - 2) : 0;
    place.at[0] = columns > 3 ? load(row + columns - 3) : 0;
    return place;
  }
};

// For the sentence of the emulator.
struct PlaceText {
  Place place;
  int columns;
};
inline std::ostream& operator<<(std::ostream& out, const PlaceText& text) {
  out << "[" << text.place.batch;
  for (int axis = kConvAxes + 1 - text.columns; axis < kConvAxes; ++axis) out << ", " << text.place.at[axis];
  return out << "]";
}

__device__ __forceinline__ bool same_place(const Place& a, const Place& b) {
  return a.batch == b.batch && a.at[0] == b.at[0] && a.at[1] == b.at[1] && a.at[2] == b.at[2];
}

__device__ __forceinline__ std::int64_t slot_of(const Place& place, std::int64_t mask) {
  return static_cast<std::int64_t>(hash_of(place.batch, place.at[0], place.at[1], place.at[2])) & mask;
}

__global__ void __launch_bounds__(kPlaceThreads, 4) fill_kernel(std::int32_t* __restrict__ to, std::int64_t count) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kPlaceThreads + threadIdx.x;
  if (i < count) store(to + i, -1);
}

// A thread owns a row and puts its number into the table, at the first free slot from that of its hash on.
__global__ void __launch_bounds__(kPlaceThreads, 4) insert_kernel(const PlaceRows known, std::int32_t* table, std::int64_t mask) {
  const std::int64_t n = static_cast<std::int64_t>(blockIdx.x) * kPlaceThreads + threadIdx.x;
  if (n >= known.count) return;
  const Place place = known.at(n);
  for (std::int64_t slot = slot_of(place, mask);; slot = (slot + 1) & mask) {
    const std::int32_t before = atomicCAS(table + slot, -1, static_cast<std::int32_t>(n));
    if (before < 0) return;
    const std::int64_t first = before < n ? before : n, again = before < n ? n : before;
    (void)first, (void)again;
    MASKOPS_DEVICE_CHECK(!same_place(place, known.at(before)), std::out_of_range, "kernel_map", "coords must be unique", "coords[",
                         again, "] must be unique, got ", (PlaceText{place, known.columns}), " as in row ", first);
  }
}

// A thread owns a row of the result and walks over the kernel places: neighbours write neighbours of map [K, M].
__global__ void __launch_bounds__(kPlaceThreads, 2)
    map_kernel(const PlaceRows known, const PlaceRows wanted, const ConvGeometry g, const std::int32_t* __restrict__ table,
               std::int64_t mask, std::int32_t* __restrict__ map) {
  const std::int64_t m = static_cast<std::int64_t>(blockIdx.x) * kPlaceThreads + threadIdx.x;
  if (m >= wanted.count) return;
  const Place place = wanted.at(m);
  std::int32_t* to = map + m;
  for (int k0 = 0; k0 < g.size[0]; ++k0) {
    for (int k1 = 0; k1 < g.size[1]; ++k1) {
      for (int k2 = 0; k2 < g.size[2]; ++k2, to += wanted.count) {
        Place sought;
        sought.batch = place.batch;
        std::int32_t row = -1;
        if (g.source(0, place.at[0], k0, &sought.at[0]) && g.source(1, place.at[1], k1, &sought.at[1]) &&
            g.source(2, place.at[2], k2, &sought.at[2])) {
          for (std::int64_t slot = slot_of(sought, mask);; slot = (slot + 1) & mask) {
            row = load(table + slot);
            if (row < 0 || same_place(sought, known.at(row))) break;
          }
        }
        store(to, row);
      }
    }
  }
}

// A thread owns an entry of map [K, M] and writes the place it names in out [K, rows], which holds -1.
__global__ void __launch_bounds__(kPlaceThreads, 4) reverse_kernel(const std::int32_t* __restrict__ map, std::int32_t* out,
                                                                   std::int64_t entries, std::int64_t count, std::int64_t rows) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kPlaceThreads + threadIdx.x;
  if (i >= entries) return;
  const std::int32_t n = load(map + i);
  const std::int64_t k = i / count, m = i % count;
  const char* name = "kernel_map";
  (void)name;
  MASKOPS_DEVICE_CHECK(n >= -1 && n < rows, std::out_of_range, name, "map must be in [-1, rows)", "map[", k, ", ", m, "] must be in [-1, ",
                       rows, "), got ", n);
  if (n < 0) return;
  const std::int32_t before = atomicCAS(out + k * rows + n, -1, static_cast<std::int32_t>(m));
  (void)before;
  MASKOPS_DEVICE_CHECK(before < 0, std::out_of_range, name, "map must be unique in its row", "map[", k, ", ", before < m ? m : before,
                       "] must be unique in its row, got ", n, " again");
}

void fill(const Tensor& to, cudaStream_t stream) {
  launch(fill_kernel, grid_for(to.numel(), kPlaceThreads), dim3(kPlaceThreads), 0, stream, data<std::int32_t>(to), to.numel());
}

Tensor sparse_conv_map(const Tensor& coords_any, const Tensor& out_coords_any, const Sizes& kernel_size, const Sizes& stride,
                       const Sizes& padding, const Sizes& dilation, bool transposed) {
  check_conv_map(coords_any, out_coords_any, kernel_size, stride, padding, dilation);
  const DeviceScope scope(coords_any);
  const Tensor coords = torch::stable::contiguous(coords_any), out_coords = torch::stable::contiguous(out_coords_any);
  const ConvGeometry g = geometry_of(kernel_size, stride, padding, dilation, transposed);
  const int columns = static_cast<int>(coords.size(1));
  const PlaceRows known{const_data<std::int32_t>(coords), coords.size(0), columns};
  const PlaceRows wanted{const_data<std::int32_t>(out_coords), out_coords.size(0), columns};
  std::int64_t size = 16;
  while (size < 2 * known.count) size *= 2;
  Tensor table = empty_like_device(coords, {size}), map = empty_like_device(coords, {g.places(), wanted.count});
  fill(table, scope.stream());
  const dim3 block(kPlaceThreads);
  launch(insert_kernel, grid_for(known.count, kPlaceThreads), block, 0, scope.stream(), known, data<std::int32_t>(table), size - 1);
  launch(map_kernel, grid_for(wanted.count, kPlaceThreads), block, 0, scope.stream(), known, wanted, g, const_data<std::int32_t>(table),
         size - 1, data<std::int32_t>(map));
  return map;
}

Tensor sparse_conv_reverse(const Tensor& map_any, std::int64_t rows) {
  check_conv_reverse(map_any, rows);
  const DeviceScope scope(map_any);
  const Tensor map = torch::stable::contiguous(map_any);
  Tensor out = empty_like_device(map, {map.size(0), rows});
  fill(out, scope.stream());
  launch(reverse_kernel, grid_for(map.numel(), kPlaceThreads), dim3(kPlaceThreads), 0, scope.stream(), const_data<std::int32_t>(map),
         data<std::int32_t>(out), map.numel(), map.size(1), rows);
  return out;
}

}  // namespace

MASKOPS_CUDA_LIBRARY(m) {
  m.impl("sparse_conv_map", TORCH_BOX(&sparse_conv_map));
  m.impl("sparse_conv_reverse", TORCH_BOX(&sparse_conv_reverse));
}

}  // namespace maskops
