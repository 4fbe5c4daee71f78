// Reductions and scans of a warp and of a block, each in a fixed order: the same input gives the same bits.
#pragma once

#include "common/launch.cuh"

namespace maskops {

constexpr unsigned kFullWarp = 0xffffffffu;

// The sum of a value over the warp, in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

// Over a block of WARPS full warps: how many threads before this one have `flag`, and how many in all (count).
// `scratch` holds WARPS ints of shared memory and is free for the next call on return.
template <int WARPS, typename Scratch>
__device__ __forceinline__ int block_rank(bool flag, Scratch& scratch, int& count) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned ballot = __ballot_sync(kFullWarp, flag);
  if (lane == 0) scratch[warp] = __popc(ballot);
  __syncthreads();
  int before = __popc(ballot & ((1u << lane) - 1));
  count = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    const int in_warp = scratch[w];
    if (w < warp) before += in_warp;
    count += in_warp;
  }
  __syncthreads();
  return before;
}

// The sum of an integer over a block of WARPS full warps, in every thread. `scratch` as in block_rank.
template <int WARPS, typename T, typename Scratch>
__device__ __forceinline__ T block_sum(T value, Scratch& scratch) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  T total = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) total += scratch[w];
  __syncthreads();
  return total;
}

// Over a block of WARPS full warps: the sum of the integers of the threads before this one, and that of all (total). `scratch` as in
// block_rank.
template <int WARPS, typename Scratch>
__device__ __forceinline__ int block_sum_before(int value, Scratch& scratch, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const int left = __shfl_up_sync(kFullWarp, sum, offset);
    if (lane >= offset) sum += left;
  }
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  total = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    const int in_warp = scratch[w];
    if (w < warp) sum += in_warp;
    total += in_warp;
  }
  __syncthreads();
  return sum - value;
}

constexpr int kCumsumThreads = 256;

// cu_seqlens[0] = 0, cu_seqlens[b + 1] = counts[0] + ... + counts[b].  counts [B], cu_seqlens [B + 1].
// One block walks over the batch in tiles of its width: batches are short, and the result needs no second launch.
static __global__ void __launch_bounds__(kCumsumThreads)
    exclusive_cumsum_kernel(const std::int64_t* __restrict__ counts, std::int32_t* __restrict__ cu_seqlens, std::int64_t batch,
                            std::int64_t times) {
  constexpr int kWarps = kCumsumThreads / 32;
  MASKOPS_SHARED(int, warp_totals, kWarps);
  int carry = 0;
  if (threadIdx.x == 0) store(cu_seqlens, std::int32_t(0));
  for (std::int64_t tile = 0; tile < batch; tile += kCumsumThreads) {
    const std::int64_t b = tile + threadIdx.x;
    const int count = b < batch ? static_cast<int>(times * load(counts + b)) : 0;
    int total = 0;
    const int before = block_sum_before<kWarps>(count, warp_totals, total);
    if (b < batch) store(cu_seqlens + b + 1, std::int32_t(carry + before + count));
    carry += total;
  }
}

// times: what each count is multiplied by.
inline void exclusive_cumsum(const std::int64_t* counts, std::int32_t* cu_seqlens, std::int64_t batch, cudaStream_t stream,
                             std::int64_t times = 1) {
  launch(exclusive_cumsum_kernel, dim3(1), dim3(kCumsumThreads), 0, stream, counts, cu_seqlens, batch, times);
}

}  // namespace maskops
