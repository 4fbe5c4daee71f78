// Small products whose operands lie where they are: C[R rows, columns] = or += A B, over up to a tile of steps.
//
// Element (i, s) of A is at a + i * kRow + s * kStep, known when compiled, so that A may be a packed panel, a tile of rows or the
// transpose of one. Row s of B is at b + s * b_stride, its columns next to each other, whole vectors of them.
#pragma once

#include "common/gemm.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

template <class S>
struct StridedC {
  S* to;
  int64_t stride;
  bool add;
};

template <class V, int R, int C, int kRow, int kStep>
static void strided_tile(int64_t steps, const typename V::scalar* a, const typename V::scalar* b, int64_t b_stride,
                         const StridedC<typename V::scalar>& c) {
  V sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < C; ++v) sum[r][v] = c.add ? V::load(c.to + r * c.stride + v * V::width) : V::zero();
  }
  for (int64_t s = 0; s < steps; ++s, a += kStep, b += b_stride) {
    V column[C];
#pragma GCC unroll 2
    for (int v = 0; v < C; ++v) column[v] = V::load(b + v * V::width);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V row = V::all(a[r * kRow]);
#pragma GCC unroll 2
      for (int v = 0; v < C; ++v) sum[r][v] = fma(row, column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < C; ++v) sum[r][v].store(c.to + r * c.stride + v * V::width);
  }
}

template <class V>
using StridedTile = void (*)(int64_t, const typename V::scalar*, const typename V::scalar*, int64_t, const StridedC<typename V::scalar>&);

template <class V, int C, int kRow, int kStep, int R = kTileRows>
static inline StridedTile<V> strided_kernel(int64_t rows) {
  if constexpr (R > 1) {
    if (rows < R) return strided_kernel<V, C, kRow, kStep, R - 1>(rows);
  }
  return &strided_tile<V, R, C, kRow, kStep>;
}

// All rows and columns of C. Rows of A come in groups of kTileRows, kGroup elements apart.
template <class V, int kRow, int kStep>
static void multiply_strided(int64_t rows, int64_t columns, int64_t steps, const typename V::scalar* a, int64_t group,
                             const typename V::scalar* b, int64_t b_stride, const StridedC<typename V::scalar>& c) {
  constexpr int64_t kWide = 2 * V::width;
  for (int64_t j = 0; j < columns; j += kWide) {
    const bool narrow = columns - j <= V::width;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const int64_t count = min_of<int64_t>(rows - i, kTileRows);
      const StridedTile<V> kernel = narrow ? strided_kernel<V, 1, kRow, kStep>(count) : strided_kernel<V, 2, kRow, kStep>(count);
      kernel(steps, a + i / kTileRows * group, b + j, b_stride, {c.to + i * c.stride + j, c.stride, c.add});
    }
  }
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
