// A small kernel, right without a FAULT_ macro, wrong in one way with it: python_tests/test_emulator.py proves that each is caught.
// Block b reverses row b of x [rows, 64] through shared memory, adds the warp sums, and counts the rows.
#include "common/reduce.cuh"

namespace {

constexpr int kThreads = 64;

__global__ void __launch_bounds__(kThreads) tile_kernel(const float* x, float* out, float* total, int* rows_done) {
  MASKOPS_SHARED(float, tile, kThreads);
  const int i = threadIdx.x;
#ifdef FAULT_EXITED_BEFORE_BARRIER
  if (i >= 32) return;
#endif
#ifdef FAULT_SHARED_RACE
  tile[i / 2] = maskops::load(x + blockIdx.x * kThreads + i);
#else
  tile[i] = maskops::load(x + blockIdx.x * kThreads + i);
#endif
#ifdef FAULT_DIVERGENT_BARRIER
  if (i < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
#elif !defined(FAULT_MISSING_BARRIER)
  __syncthreads();
#endif
#ifdef FAULT_SHARED_OUT_OF_BOUNDS
  const float mirrored = tile[kThreads - i];
#else
  const float mirrored = tile[kThreads - 1 - i];
#endif
#ifdef FAULT_DIVERGENT_WARP
  const float sum = i % 32 < 16 ? maskops::warp_sum(mirrored) : __shfl_sync(maskops::kFullWarp, mirrored, 0);
#else
  const float sum = maskops::warp_sum(mirrored);
#endif
#ifdef FAULT_WRONG_STRIDE
  const int at = blockIdx.x * (kThreads - 1) + i;
#elif defined(FAULT_OUT_OF_BOUNDS)
  const int at = blockIdx.x * kThreads + i + 1;
#else
  const int at = blockIdx.x * kThreads + i;
#endif
  maskops::store(out + at, mirrored + sum);
#ifdef FAULT_FLOAT_ATOMIC
  atomicAdd(total, mirrored);
#else
  (void)total;
#endif
#ifdef FAULT_MISALIGNED_VECTOR
  if (i == 0) maskops::store_vec<4>(out + 1, maskops::zero_vec<float, 4>());
#endif
  if (i == 0) atomicAdd(rows_done, 1);
}

}  // namespace

// What went wrong, or an empty string.
extern "C" __attribute__((visibility("default"))) const char* run_tile(const float* x, float* out, int* rows_done, int rows, int threads) {
  static std::string message;
  message.clear();
  float total = 0;
  try {
    maskops::launch(tile_kernel, dim3(rows), dim3(threads), 0, nullptr, x, out, &total, rows_done);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
