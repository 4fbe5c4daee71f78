// Small products whose operands lie where they are: C[rows, columns] = or += A B, over up to a tile of steps.
//
// Element (i, s) of A is at `at + i * row + s * step`, so that A may be a tile of rows or the transpose of one. Row s of B is at
// b + s * b_stride, its columns next to each other, whole vectors of them.
#pragma once

#include "common/gemm.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

#if MASKOPS_ISA_LEVEL == 2
constexpr int kStridedRows = 6, kStridedVectors = 4;  // 24 of 32 registers hold sums: 10 loads for 24 multiply-adds
#else
constexpr int kStridedRows = 6, kStridedVectors = 2;  // 12 of 16
#endif

template <class S>
struct StridedA {
  const S* at;
  int64_t row, step;
};

template <class S>
struct StridedC {
  S* to;
  int64_t stride;
  bool add;
};

template <class V, int R, int C>
static void strided_tile(int64_t steps, const StridedA<typename V::scalar>& a, const typename V::scalar* b, int64_t b_stride,
                         const StridedC<typename V::scalar>& c) {
  V sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) sum[r][v] = c.add ? V::load(c.to + r * c.stride + v * V::width) : V::zero();
  }
  const typename V::scalar* at = a.at;
  for (int64_t s = 0; s < steps; ++s, at += a.step, b += b_stride) {
    V column[C];
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) column[v] = V::load(b + v * V::width);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V row = V::all(at[r * a.row]);
#pragma GCC unroll 4
      for (int v = 0; v < C; ++v) sum[r][v] = fma(row, column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) sum[r][v].store(c.to + r * c.stride + v * V::width);
  }
}

template <class V>
using StridedTile = void (*)(int64_t, const StridedA<typename V::scalar>&, const typename V::scalar*, int64_t,
                             const StridedC<typename V::scalar>&);

template <class V, int C, int R = kStridedRows>
static inline StridedTile<V> strided_kernel(int64_t rows) {
  if constexpr (R > 1) {
    if (rows < R) return strided_kernel<V, C, R - 1>(rows);
  }
  return &strided_tile<V, R, C>;
}

template <class V, int C = kStridedVectors>
static inline StridedTile<V> strided_kernel(int64_t rows, int64_t vectors) {
  if constexpr (C > 1) {
    if (vectors < C) return strided_kernel<V, C - 1>(rows, vectors);
  }
  return strided_kernel<V, C>(rows);
}

template <class V>
static void multiply_strided(int64_t rows, int64_t columns, int64_t steps, const StridedA<typename V::scalar>& a,
                             const typename V::scalar* b, int64_t b_stride, const StridedC<typename V::scalar>& c) {
  constexpr int64_t kWide = kStridedVectors * V::width;
  for (int64_t j = 0; j < columns; j += kWide) {
    const int64_t vectors = min_of<int64_t>(columns - j, kWide) / V::width;
    const StridedTile<V> whole = strided_kernel<V>(kStridedRows, vectors);
    for (int64_t i = 0; i < rows; i += kStridedRows) {
      const int64_t count = min_of<int64_t>(rows - i, kStridedRows);
      const StridedTile<V> kernel = count == kStridedRows ? whole : strided_kernel<V>(count, vectors);
      kernel(steps, {a.at + i * a.row, a.row, a.step}, b + j, b_stride, {c.to + i * c.stride + j, c.stride, c.add});
    }
  }
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
