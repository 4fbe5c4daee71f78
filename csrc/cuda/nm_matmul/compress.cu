// nm_matmul_compress on CUDA: weight [N, K] -> the kept values [N, J] and their places.
#include <algorithm>

#include "common/library.cuh"
#include "cuda/nm_matmul/groups.cuh"
#include "math/nm_matmul_check.h"

namespace maskops {
namespace {

// Eight groups fill whole bytes of places, whatever n and the bits of a place are: a block owns sixteen such bundles. Each row
// begins a new one, and groups past its end keep nothing.
constexpr int kBundle = 8;
constexpr int kCompressThreads = 128;
constexpr int kBundles = kCompressThreads / kBundle;

template <typename T>
struct CompressArgs {
  const T* weight;       // [N, K]
  T* values;             // [N, J]
  std::uint8_t* places;  // [N, row_bytes]
  std::int64_t rows, bundles;
  RowSplit bundle_rows;  // bundle -> row, bundle of the row
  FastDivisor slot_groups;
  NmLayout layout;

  // Where a group of the block stands. False: nowhere.
  __device__ __forceinline__ bool find(unsigned local, std::int64_t& row, std::int64_t& group) const {
    std::int64_t bundle = static_cast<std::int64_t>(blockIdx.x) * kBundles + local / kBundle;
    if (bundle >= bundles) return false;
    row = bundle_rows.split(bundle);
    group = bundle * kBundle + local % kBundle;
    return group < layout.groups;
  }
};

// A group of this thread keeps more than n. Under the emulator the sentence of the CPU backend: about the first of all such groups,
// not the one that a thread happened to find.
template <typename T>
__device__ __forceinline__ void fail_crowded(const CompressArgs<T>& a) {
#ifdef MASKOPS_EMULATE
  const NmLayout& layout = a.layout;
  std::vector<double> first;
  std::int64_t first_row = 0, first_group = 0, bad = 0;
  for (std::int64_t i = 0; i < a.rows * layout.groups; ++i) {
    const std::int64_t row = i / layout.groups, group = i % layout.groups;
    std::vector<double> contents;
    for (int c = 0; c < group_width(layout, group); ++c) contents.push_back(widen(a.weight[row * layout.K + group * layout.m + c]));
    if (std::count(contents.begin(), contents.end(), 0.0) + layout.n >= static_cast<std::int64_t>(contents.size())) continue;
    if (bad++ == 0) std::tie(first, first_row, first_group) = std::tie(contents, row, group);
  }
  fail_crowded_group(first_row, first_group, layout, first, bad, a.rows * layout.groups);
#else
  (void)a;
  device_fail("weight must have at most n nonzeros in every group of m", "nm_compress", __LINE__);
#endif
}

// One thread reads one group and leaves its n values and places in shared memory; then the block writes them in the order of the
// rows, neighbours by neighbours, and puts the bytes of the places together.
template <typename T, int M, bool WIDE>
__global__ void __launch_bounds__(kCompressThreads, 4) compress_kernel(const CompressArgs<T> a) {
  MASKOPS_SHARED(std::uint8_t, places, kCompressThreads * (kMaxGroup - 1));
  MASKOPS_DYNAMIC_SHARED(T, values);
  const int n = a.layout.n, m = a.layout.m;
  std::int64_t row = 0, group = 0;
  Group<T, M> weight = {};
  if (a.find(threadIdx.x, row, group)) {
    load_group<WIDE>(a.weight + row * a.layout.K + group * m, WIDE ? M : group_width(a.layout, group), weight);
  }
  unsigned nonzero = 0;
#pragma unroll
  for (int c = 0; c < M; ++c) nonzero |= static_cast<unsigned>(widen(weight.v[c]) != 0) << c;
  if (__popc(nonzero) > n) fail_crowded(a);
  const unsigned kept = fill_places(nonzero, n, m);
  int slot = threadIdx.x * n;
#pragma unroll
  for (int c = 0; c < M; ++c) {
    if ((kept >> c & 1) && slot < static_cast<int>(threadIdx.x + 1) * n) {
      places[slot] = static_cast<std::uint8_t>(c);
      values[slot++] = weight.v[c];
    }
  }
  __syncthreads();
  for (int s = threadIdx.x; s < kCompressThreads * n; s += kCompressThreads) {
    std::uint32_t i = s;
    const std::uint32_t local = a.slot_groups.split(i);
    if (a.find(local, row, group)) store(a.values + row * a.layout.slots + group * n + i, static_cast<T>(values[s]));
  }
  const int bits = a.layout.bits, bundle_bytes = n * bits;
  for (int b = threadIdx.x; b < kBundles * bundle_bytes; b += kCompressThreads) {
    const int local = b / bundle_bytes;
    a.find(local * kBundle, row, group);
    const std::int64_t byte = group / kBundle * bundle_bytes + b % bundle_bytes;
    if (static_cast<std::int64_t>(blockIdx.x) * kBundles + local >= a.bundles || byte >= a.layout.row_bytes) continue;
    // The slots of the row are a run of the block's: those past the end of the row are left out.
    const std::int64_t before = group * n - local * kBundle * n;
    const std::int64_t end = a.layout.slots - before;
    store(a.places + row * a.layout.row_bytes + byte, places_byte(b, end, bits, [&](std::int64_t s) { return int(places[s]); }));
  }
}

std::tuple<Tensor, Tensor> nm_matmul_compress(const Tensor& weight_any, std::int64_t n, std::int64_t m) {
  const NmLayout layout = check_nm_compress(weight_any, n, m);
  const DeviceScope scope(weight_any);
  const Tensor weight = torch::stable::contiguous(weight_any);
  const std::int64_t rows = weight.size(0), row_bundles = ceil_div(layout.groups, kBundle);
  Tensor values = empty_like_device(weight, {rows, layout.slots});
  Tensor places = empty_like_device(weight, {rows, layout.row_bytes}, ScalarType::Byte);
  dispatch_floats(weight.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const CompressArgs<T> args{const_data<T>(weight), data<T>(values), data<std::uint8_t>(places), rows, rows * row_bundles,
                               RowSplit(rows, row_bundles), FastDivisor(n), layout};
    const std::size_t shared = kCompressThreads * n * sizeof(T);
    dispatch_group<T>(layout, {args.weight}, [&](auto size, auto wide) {
      launch(compress_kernel<T, size(), wide()>, grid_for(args.bundles, kBundles), dim3(kCompressThreads), shared, scope.stream(), args);
    });
  });
  return {values, places};
}

}  // namespace

MASKOPS_CUDA_LIBRARY(m) { m.impl("nm_matmul_compress", TORCH_BOX(&nm_matmul_compress)); }

}  // namespace maskops
