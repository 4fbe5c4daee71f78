// Rows that lie anywhere, brought side by side.
#pragma once

#include "common/gemm.h"
#include "cpu/sparse_conv/types.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

// Rows of x, widened, side by side, each as wide as `stride`. The next ones are fetched: they lie anywhere.
template <class T, class A>
static void gather(const T* x, int64_t x_stride, const int32_t* row, int64_t count, int64_t channels, A* to, int64_t stride) {
  constexpr int64_t kAhead = 4, kLine = 64 / int64_t(sizeof(T));
  for (int64_t r = 0; r < count; ++r) {
    if (r + kAhead < count) {
      const T* next = x + int64_t(row[r + kAhead]) * x_stride;
      for (int64_t c = 0; c < channels; c += kLine) __builtin_prefetch(next + c);
    }
    widen(x + int64_t(row[r]) * x_stride, channels, to + r * stride);
  }
}

// Rows of x as they are multiplied with each other, row by row or two rows to a step, of which the last is filled up with zeros.
template <class T, class A>
static void gather_steps(const T* x, int64_t x_stride, const int32_t* row, int64_t count, int64_t channels, A* to, int64_t stride) {
  gather(x, x_stride, row, count, channels, to, stride);
}
#if MASKOPS_ISA_LEVEL == 2
static inline void gather_steps(const bf16* x, int64_t x_stride, const int32_t* row, int64_t count, int64_t channels, Bf16Pair* to,
                                int64_t stride) {
  constexpr int64_t kAhead = 4, kLine = 32;
  for (int64_t r = 0; r < count; r += 2, to += stride) {
    for (int64_t next = r + kAhead; next < min_of(count, r + kAhead + 2); ++next) {
      for (int64_t c = 0; c < channels; c += kLine) __builtin_prefetch(x + row[next] * x_stride + c);
    }
    const bf16 *even = x + row[r] * x_stride, *odd = r + 1 < count ? x + row[r + 1] * x_stride : nullptr;
    for (int64_t c = 0; c < channels; c += 16) _mm512_storeu_si512(to + c, amx_pair(even, odd, c, first_words(channels - c)));
  }
}
#endif

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
