// nm_matmul_decompress and nm_matmul_select on CUDA: compressed [N, J] -> dense [N, K] and back, each the other's gradient.
#include "common/library.cuh"
#include "cuda/nm_matmul/groups.cuh"
#include "math/nm_matmul_check.h"

namespace maskops {
namespace {

// dense [N, K]. One thread owns one group: n values and places come through the cache, m neighbours are written at once.
template <typename T, int M, bool WIDE>
__global__ void __launch_bounds__(kGroupThreads, 2)
    decompress_kernel(const T* __restrict__ values, const std::uint8_t* __restrict__ places, T* __restrict__ dense, std::int64_t groups,
                      const RowSplit rows, const NmLayout layout) {
  std::int64_t group = static_cast<std::int64_t>(blockIdx.x) * kGroupThreads + threadIdx.x;
  if (group >= groups) return;
  const std::int64_t row = rows.split(group), first = group * layout.n;
  const T* value = values + row * layout.slots + first;
  PlaceReader reader(places + row * layout.row_bytes, first, layout.bits);
  Group<T, M> out;
#pragma unroll
  for (int c = 0; c < M; ++c) out.v[c] = T(0.0f);
#pragma unroll 1
  for (int i = 0; i < layout.n; ++i) {
    const int place = reader.next();
    const T kept = load(value + i);
#pragma unroll
    for (int c = 0; c < M; ++c) {
      if (c == place) out.v[c] = kept;
    }
  }
  store_group<WIDE>(dense + row * layout.K + group * layout.m, WIDE ? M : group_width(layout, group), out);
}

// values [N, J]. One thread owns W slots of a row; their columns lie in a few neighbouring groups, which a warp reads together.
template <typename T, int W>
__global__ void __launch_bounds__(kGroupThreads, 4)
    select_kernel(const T* __restrict__ dense, const std::uint8_t* __restrict__ places, T* __restrict__ values, std::int64_t chunks,
                  const RowSplit rows, const RowSplit slot_groups, const NmLayout layout) {
  std::int64_t chunk = static_cast<std::int64_t>(blockIdx.x) * kGroupThreads + threadIdx.x;
  if (chunk >= chunks) return;
  const std::int64_t row = rows.split(chunk), first = chunk * W;
  PlaceReader reader(places + row * layout.row_bytes, first, layout.bits);
  std::int64_t slot = first;
  std::int64_t begin = slot_groups.split(slot) * layout.m;
  const T* from = dense + row * layout.K;
  Vec<T, W> out;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const std::int64_t column = begin + reader.next();
    out.v[i] = column < layout.K ? load(from + column) : T(0.0f);
    if (++slot == layout.n) {
      slot = 0;
      begin += layout.m;
    }
  }
  store_vec<W>(values + row * layout.slots + first, out);
}

Tensor nm_matmul_decompress(const Tensor& values_any, const Tensor& places_any, std::int64_t n, std::int64_t m, std::int64_t K) {
  const NmLayout layout = check_nm_decompress(values_any, places_any, n, m, K);
  const DeviceScope scope(values_any);
  const Tensor values = torch::stable::contiguous(values_any), places = torch::stable::contiguous(places_any);
  const std::int64_t rows = values.size(0), groups = rows * layout.groups;
  Tensor dense = empty_like_device(values, {rows, K});
  dispatch_floats(values.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* to = data<T>(dense);
    dispatch_group<T>(layout, {to}, [&](auto size, auto wide) {
      launch(decompress_kernel<T, size(), wide()>, grid_for(groups, kGroupThreads), dim3(kGroupThreads), 0, scope.stream(),
             const_data<T>(values), const_data<std::uint8_t>(places), to, groups, RowSplit(rows, layout.groups), layout);
    });
  });
  return dense;
}

Tensor nm_matmul_select(const Tensor& dense_any, const Tensor& places_any, std::int64_t n, std::int64_t m) {
  const NmLayout layout = check_nm_select(dense_any, places_any, n, m);
  const DeviceScope scope(dense_any);
  const Tensor dense = torch::stable::contiguous(dense_any), places = torch::stable::contiguous(places_any);
  const std::int64_t rows = dense.size(0);
  Tensor values = empty_like_device(dense, {rows, layout.slots});
  dispatch_floats(dense.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* to = data<T>(values);
    dispatch_width<T>(vector_width<T>({layout.slots}, {to}), [&](auto w) {
      const std::int64_t row_chunks = layout.slots / w(), chunks = rows * row_chunks;
      launch(select_kernel<T, w()>, grid_for(chunks, kGroupThreads), dim3(kGroupThreads), 0, scope.stream(), const_data<T>(dense),
             const_data<std::uint8_t>(places), to, chunks, RowSplit(rows, row_chunks), RowSplit(ceil_div(layout.slots, n), n), layout);
    });
  });
  return values;
}

}  // namespace

MASKOPS_CUDA_LIBRARY(m) {
  m.impl("nm_matmul_decompress", TORCH_BOX(&nm_matmul_decompress));
  m.impl("nm_matmul_select", TORCH_BOX(&nm_matmul_select));
}

}  // namespace maskops
