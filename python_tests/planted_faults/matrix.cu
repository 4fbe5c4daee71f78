// One product of the sparse matrix instruction, through background copies and ldmatrix; wrong in one way with a Fault.
// d [16, 8] = a [16, 32] b^T, where a is given as its kept columns [16, 16] and the metadata of 32 lanes, b as its rows [8, 32].
#include "common/mma_sparse.cuh"
#include "common/tile.cuh"

namespace {

enum Fault { kNone, kMissingWait, kMissingBarrier, kMisalignedRow, kWrongSelector };

template <typename T, int SELECTOR>
__global__ void __launch_bounds__(32) matrix_kernel(const T* a, const T* b, const unsigned* metadata, float* d, int fault) {
  MASKOPS_SHARED(T, left, 16 * 16);
  MASKOPS_SHARED(T, right, 8 * 32);
  const int lane = threadIdx.x;
  maskops::AsyncCopies copies;
  copies.copy(left, 8 * lane, a + 8 * lane, true);
  copies.commit();
  copies.copy(right, 8 * lane, b + 8 * lane, true);
  copies.commit();
  if (fault == kMissingWait) copies.wait<1>();
  else copies.wait<0>();
  if (fault != kMissingBarrier) __syncthreads();
  unsigned kept[4], dense[4];
  maskops::load_matrices<T>(kept, left, lane % 16 * 16 + lane / 16 * 8 + (fault == kMisalignedRow ? 4 : 0));
  maskops::load_matrices<T>(dense, right, lane % 8 * 32 + lane / 8 * 8);
  float sum[4] = {};
  if (fault == kWrongSelector) maskops::mma_sparse<T, 1 - SELECTOR>(sum, kept, dense, metadata[lane]);
  else maskops::mma_sparse<T, SELECTOR>(sum, kept, dense, metadata[lane]);
  for (int i = 0; i < 4; ++i) maskops::store(d + (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2, sum[i]);
}

template <typename T>
void run(const void* a, const void* b, const unsigned* metadata, float* d, int selector, int fault, int threads) {
  const auto kernel = selector ? matrix_kernel<T, 1> : matrix_kernel<T, 0>;
  maskops::launch(kernel, dim3(1), dim3(threads), 0, nullptr, static_cast<const T*>(a), static_cast<const T*>(b), metadata, d, fault);
}

}  // namespace

// What went wrong, or an empty string.
extern "C" __attribute__((visibility("default"))) const char* run_matrix(const void* a, const void* b, const unsigned* metadata, float* d,
                                                                         int bfloat16, int selector, int fault, int threads) {
  static std::string message;
  message.clear();
  try {
    if (bfloat16) run<__nv_bfloat16>(a, b, metadata, d, selector, fault, threads);
    else run<__half>(a, b, metadata, d, selector, fault, threads);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
