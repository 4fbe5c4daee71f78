// The sparse matrix instruction of the tensor cores, mma.sp.m16n8k32 for 16-bit floats, and its emulated twin.
#pragma once

#include "common/launch.cuh"

#ifdef MASKOPS_EMULATE
#include <source_location>
#endif

namespace maskops {

// Whether the current device has the instruction: sm_80 and newer.
inline bool has_sparse_mma() {
#ifdef MASKOPS_EMULATE
  return true;
#else
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) throw std::runtime_error(sentence("CUDA device query failed: ", cudaGetErrorString(error)));
  return major >= 8;
#endif
}

// d [16, 8] += a [16, 32] b [32, 8], where a has two kept columns in every four and is given as its kept ones, [16, 16].
// With g = lane / 4 and t = lane % 4, a lane holds, two neighbours to a register (the first one in the low half):
//   a[0], a[1]: rows g and g + 8, kept columns 2 t, 2 t + 1          a[2], a[3]: the same rows, kept columns 8 + 2 t, 9 + 2 t
//   b[i]: column g, rows 8 i + 2 t, 8 i + 2 t + 1
//   d[0], d[1]: row g, columns 2 t, 2 t + 1                          d[2], d[3]: row g + 8
//   metadata: only lanes t = 2 SELECTOR + h, h = 0 or 1: the places (0 to 3, two bits each, ascending in a group) of the kept
//   columns 8 h to 8 h + 7, of row g in the low half and of row g + 8 in the high half.
// (PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types".)
#ifdef MASKOPS_EMULATE

namespace detail {

struct SparseFragments {
  const unsigned (&a)[4];
  const unsigned (&b)[4];
  unsigned metadata;
};

template <typename T>
float half_of(unsigned word, int which) {
  const auto bits = static_cast<unsigned short>(word >> 16 * which);
  T value;
  std::memcpy(&value, &bits, sizeof bits);
  return widen(value);
}

// Row `half` (g or g + 8) of a lane's results.
template <typename T, int SELECTOR>
void sparse_row(float (&d)[4], int half, int lane, const SparseFragments* const (&peers)[32]) {
  const int g = lane / 4, t = lane % 4;
  for (int slot = 0; slot < 16; ++slot) {
    const int quad = 4 * g + slot % 8 / 2;  // the lane that holds this kept column
    const float kept = half_of<T>(peers[quad]->a[half + 2 * (slot / 8)], slot % 2);
    const unsigned places = peers[4 * g + 2 * SELECTOR + slot / 8]->metadata >> (16 * half + 2 * (slot % 8));
    if (slot % 2 == 0 && (places & 3) >= (places >> 2 & 3))
      throw maskops_emulator::KernelFault("the places of a group must ascend in the metadata of mma.sp");
    const int k = slot / 2 * 4 + static_cast<int>(places & 3);
    for (int c = 0; c < 2; ++c) d[2 * half + c] += kept * half_of<T>(peers[4 * (2 * t + c) + k % 8 / 2]->b[k / 8], k % 2);
  }
}

}  // namespace detail

template <typename T, int SELECTOR>
void mma_sparse(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned metadata,
                const std::source_location& at = std::source_location::current()) {
  static_assert(sizeof(T) == 2 && (SELECTOR == 0 || SELECTOR == 1));
  const detail::SparseFragments mine{a, b, metadata};
  maskops_emulator::exchange(mine, at, [&](const detail::SparseFragments* const (&peers)[32]) {
    for (int half = 0; half < 2; ++half) detail::sparse_row<T, SELECTOR>(d, half, maskops_emulator::lane_of_current(), peers);
  });
}

#else

#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5)
#define MASKOPS_MMA_SP "mma.sp::ordered_metadata"  // without it ptxas warns that the instruction is slow on sm_90 and newer
#else
#define MASKOPS_MMA_SP "mma.sp"
#endif
#define MASKOPS_MMA_SPARSE(type)                                                                                          \
  asm volatile(MASKOPS_MMA_SP ".sync.aligned.m16n8k32.row.col.f32." type "." type                                         \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"                 \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),   \
                 "n"(SELECTOR))

template <typename T, int SELECTOR>
__device__ __forceinline__ void mma_sparse(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned metadata) {
  static_assert(sizeof(T) == 2 && (SELECTOR == 0 || SELECTOR == 1));
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    MASKOPS_MMA_SPARSE("f16");
  } else {
    MASKOPS_MMA_SPARSE("bf16");
  }
#endif
}

#undef MASKOPS_MMA_SPARSE
#undef MASKOPS_MMA_SP

#endif

}  // namespace maskops
