// nm_matmul_mask on CUDA: the n largest scores of every group of m.
#include "common/library.cuh"
#include "cuda/nm_matmul/groups.cuh"
#include "math/nm_matmul_check.h"

namespace maskops {
namespace {

// largest_keys of math/nm_matmul.h with everything in registers: each pair is compared once and adds to the rank of the loser.
template <typename Key, int M>
__device__ __forceinline__ unsigned largest_of(const Group<Key, M>& key, int n) {
  int rank[M] = {};
#pragma unroll
  for (int later = 1; later < M; ++later) {
#pragma unroll
    for (int first = 0; first < later; ++first) {
      const bool wins = key.v[first] >= key.v[later];
      rank[later] += wins;
      rank[first] += !wins;
    }
  }
  unsigned kept = 0;
#pragma unroll
  for (int c = 0; c < M; ++c) kept |= static_cast<unsigned>(rank[c] < n) << c;
  return kept;
}

// mask [R, K]. One thread owns one group: it reads m neighbours and writes m bytes, next to the groups of its neighbours. Columns
// past the end of the row have the lowest key and the highest places, so they come last.
template <typename T, int M, bool WIDE>
__global__ void __launch_bounds__(kGroupThreads, 2)
    mask_kernel(const T* __restrict__ scores, bool* __restrict__ mask, std::int64_t groups, const RowSplit rows, const NmLayout layout) {
  std::int64_t group = static_cast<std::int64_t>(blockIdx.x) * kGroupThreads + threadIdx.x;
  if (group >= groups) return;
  std::int64_t at = group * M;
  int width = M;
  if constexpr (!WIDE) {
    const std::int64_t row = rows.split(group);
    at = row * layout.K + group * layout.m;
    width = group_width(layout, group);
  }
  Group<T, M> score;
  load_group<WIDE>(scores + at, width, score);
  Group<decltype(score_key(widen(T()))), M> key;
#pragma unroll
  for (int c = 0; c < M; ++c) key.v[c] = c < width ? score_key(widen(score.v[c])) : 0;
  const unsigned kept = largest_of(key, layout.n);
  Group<bool, M> out;
#pragma unroll
  for (int c = 0; c < M; ++c) out.v[c] = kept >> c & 1;
  store_group<WIDE>(mask + at, width, out);
}

Tensor nm_matmul_mask(const Tensor& scores_any, std::int64_t n, std::int64_t m) {
  const NmLayout layout = check_nm_mask(scores_any, n, m);
  const DeviceScope scope(scores_any);
  const Tensor scores = torch::stable::contiguous(scores_any);
  Tensor mask = empty_like_device(scores, {scores.size(0), scores.size(1)}, ScalarType::Bool);
  const std::int64_t groups = scores.size(0) * layout.groups;
  const RowSplit rows(scores.size(0), layout.groups);
  dispatch_floats(scores.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* from = const_data<T>(scores);
    bool* to = data<bool>(mask);
    dispatch_group<T>(layout, {from, to}, [&](auto size, auto wide) {
      launch(mask_kernel<T, size(), wide()>, grid_for(groups, kGroupThreads), dim3(kGroupThreads), 0, scope.stream(), from, to, groups,
             rows, layout);
    });
  });
  return mask;
}

}  // namespace

MASKOPS_CUDA_LIBRARY(m) { m.impl("nm_matmul_mask", TORCH_BOX(&nm_matmul_mask)); }

}  // namespace maskops
