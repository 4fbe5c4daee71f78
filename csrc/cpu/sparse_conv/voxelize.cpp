// Voxelisation on the CPU: the cell of each point as one number, a stable radix sort of these numbers, and the runs of equal ones.
#include "common/isa.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "math/sparse_conv_pool.h"

namespace maskops {
namespace {

struct Grid {
  int64_t axes, batch_size, cells;
  double low[kConvAxes], size[kConvAxes];
  int64_t shape[kConvAxes];

  // The number of the cell of a point of sample b, or `cells` where it lies outside; NaN is never inside.
  template <class T>
  uint64_t cell_of(const T* point, int64_t b) const {
    int64_t cell = b;
    for (int64_t axis = 0; axis < axes; ++axis) {
      const double at = std::floor((static_cast<double>(to_float(point[axis])) - low[axis]) / size[axis]);
      if (!(at >= 0 && at < static_cast<double>(shape[axis]))) return static_cast<uint64_t>(cells);
      cell = cell * shape[axis] + static_cast<int64_t>(at);
    }
    return static_cast<uint64_t>(cell);
  }
};

template <class Key>
struct Numbered {
  Key key;
  int32_t row;
};

// Uninitialised memory: a vector would be cleared first.
template <class T>
std::unique_ptr<T[]> raw(int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(count)]);
}

// Ascending by key, equal keys in the order of their rows: each pass keeps what the passes before it made.
template <class Key>
class RadixSort {
 public:
  RadixSort(Numbered<Key>* items, Numbered<Key>* other, int64_t count, int64_t chunks)
      : from_(items), to_(other), count_(count), chunks_(chunks), places_(static_cast<size_t>(chunks)) {}

  // Where the sorted items are.
  const Numbered<Key>* sort(int bits) {
    for (int shift = 0; shift < bits; shift += kBits) pass(shift);
    return from_;
  }

 private:
  static constexpr int kBits = 11;
  static constexpr size_t kDigits = size_t{1} << kBits;

  static size_t digit(Key key, int shift) { return static_cast<size_t>(key >> shift) & (kDigits - 1); }

  template <class Body>
  void each_chunk(const Body& body) {
    parallel_for(chunks_, 1 << 20, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        body(places_[static_cast<size_t>(chunk)].data(), chunk * count_ / chunks_, (chunk + 1) * count_ / chunks_);
      }
    });
  }
  void pass(int shift) {
    each_chunk([&](int64_t* places, int64_t begin, int64_t end) {
      std::fill_n(places, kDigits, 0);
      for (int64_t i = begin; i < end; ++i) ++places[digit(from_[i].key, shift)];
    });
    int64_t next = 0;
    for (size_t d = 0; d < kDigits; ++d) {
      const int64_t before = next;
      for (auto& places : places_) next += std::exchange(places[d], next);
      if (next - before == count_) return;  // all alike: nothing moves
    }
    each_chunk([&](int64_t* places, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to_[places[digit(from_[i].key, shift)]++] = from_[i];
    });
    std::swap(from_, to_);
  }

  Numbered<Key>*from_, *to_;
  int64_t count_, chunks_;
  std::vector<std::array<int64_t, kDigits>> places_;
};

struct Outputs {
  Tensor coords, inverse, order, count;
};

template <class T, class Key>
Outputs voxelize(const Tensor& points, const int32_t* batch_index, const Grid& grid) {
  const int64_t rows = points.size(0), stride = points.stride(0);
  const T* data = static_cast<const T*>(points.const_data_ptr());
  const auto items = raw<Numbered<Key>>(rows), other = raw<Numbered<Key>>(rows);
  FirstFault fault;
  parallel_for(rows, 32 * grid.axes, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = batch_index == nullptr ? 0 : batch_index[n];
      if (b < 0 || b >= grid.batch_size) return fault.note(n);
      items[n] = {static_cast<Key>(grid.cell_of(data + n * stride, b)), static_cast<int32_t>(n)};
    }
  });
  if (fault.any()) {
    const int64_t n = fault.position();
    fail_index("voxelize", "batch_index[" + std::to_string(n) + "]", "be in [0, " + std::to_string(grid.batch_size) + ")",
               std::to_string(batch_index[n]));
  }
  const int64_t chunks = std::clamp<int64_t>(rows / 8192, 1, torch::stable::get_num_threads());
  RadixSort<Key> radix(items.get(), other.get(), rows, chunks);
  const Numbered<Key>* sorted = radix.sort(std::bit_width(static_cast<uint64_t>(grid.cells)));

  // Runs of equal cells: first how many begin in each chunk, then their numbers.
  const Key outside = static_cast<Key>(grid.cells);
  auto begins = [&](int64_t i) { return sorted[i].key != outside && (i == 0 || sorted[i].key != sorted[i - 1].key); };
  std::vector<int64_t> before(static_cast<size_t>(chunks) + 1, 0);
  parallel_for(chunks, 1 << 20, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      int64_t found = 0;
      for (int64_t i = chunk * rows / chunks; i < (chunk + 1) * rows / chunks; ++i) found += begins(i);
      before[static_cast<size_t>(chunk) + 1] = found;
    }
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) before[static_cast<size_t>(chunk) + 1] += before[static_cast<size_t>(chunk)];
  const int64_t voxels = before.back(), columns = grid.axes + 1;
  Outputs out{empty_like_device(points, {voxels, columns}, ScalarType::Int), empty_like_device(points, {rows}, ScalarType::Int),
              empty_like_device(points, {rows}, ScalarType::Int), empty_like_device(points, {voxels}, ScalarType::Int)};
  auto ints = [](const Tensor& x) { return static_cast<int32_t*>(x.mutable_data_ptr()); };
  int32_t *coords = ints(out.coords), *inverse = ints(out.inverse), *order = ints(out.order), *count = ints(out.count);
  const auto begin_of = raw<int64_t>(voxels + 1);
  std::vector<int64_t> kept(static_cast<size_t>(chunks), 0);  // in each chunk
  parallel_for(chunks, 1 << 20, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      int64_t voxel = before[static_cast<size_t>(chunk)] - 1, inside = 0;
      for (int64_t i = chunk * rows / chunks; i < (chunk + 1) * rows / chunks; ++i) {
        const Numbered<Key> item = sorted[i];
        order[i] = item.row;
        if (item.key == outside) {
          inverse[item.row] = -1;
          continue;
        }
        ++inside;
        if (begins(i)) {
          begin_of[++voxel] = i;
          int64_t cell = static_cast<int64_t>(item.key);
          for (int64_t axis = grid.axes - 1; axis >= 0; --axis) {
            coords[voxel * columns + 1 + axis] = static_cast<int32_t>(cell % grid.shape[axis]);
            cell /= grid.shape[axis];
          }
          coords[voxel * columns] = static_cast<int32_t>(cell);
        }
        inverse[item.row] = static_cast<int32_t>(voxel);
      }
      kept[static_cast<size_t>(chunk)] = inside;
    }
  });
  begin_of[voxels] = 0;
  for (int64_t inside : kept) begin_of[voxels] += inside;
  parallel_for(voxels, 16, [&](int64_t first, int64_t last) {
    for (int64_t v = first; v < last; ++v) count[v] = static_cast<int32_t>(begin_of[v + 1] - begin_of[v]);
  });
  return out;
}

template <class T>
Outputs by_key(const Tensor& points, const int32_t* batch_index, const Grid& grid) {
  if (grid.cells < INT64_C(0xffffffff)) return voxelize<T, uint32_t>(points, batch_index, grid);
  return voxelize<T, uint64_t>(points, batch_index, grid);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_conv_voxelize(const Tensor& points_any, std::optional<Tensor> batch_any,
                                                                std::vector<double> voxel_size, std::vector<double> low, Sizes shape,
                                                                int64_t batch_size) {
  check_voxelize(points_any, batch_any, voxel_size, low, shape, batch_size);
  const Tensor points = with_contiguous_rows(points_any);
  const std::optional<Tensor> batch = batch_any ? std::optional<Tensor>(contiguous_or_copy(*batch_any)) : std::nullopt;
  const int32_t* batch_index = batch ? static_cast<const int32_t*>(batch->const_data_ptr()) : nullptr;
  Grid grid{static_cast<int64_t>(shape.size()), batch_size, batch_size, {}, {}, {}};
  for (int64_t axis = 0; axis < grid.axes; ++axis) {
    const size_t a = static_cast<size_t>(axis);
    grid.low[axis] = low[a], grid.size[axis] = voxel_size[a], grid.shape[axis] = shape[a];
    grid.cells *= shape[a];
  }
  auto run = [&] {
    switch (dtype_of(points)) {
      case Dtype::kFloat: return by_key<float>(points, batch_index, grid);
      case Dtype::kDouble: return by_key<double>(points, batch_index, grid);
      case Dtype::kBFloat16: return by_key<bf16>(points, batch_index, grid);
      default: return by_key<f16>(points, batch_index, grid);
    }
  };
  const Outputs out = run();
  return {out.coords, out.inverse, out.order, out.count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) { m.impl("sparse_conv_voxelize", TORCH_BOX(&sparse_conv_voxelize)); }

}  // namespace maskops
#endif
