// Small products whose operands lie where they are: C[rows, columns] = or += A B, over up to a tile of steps.
//
// Element (i, s) of A is at `at + i * row + s * step`, so that A may be a tile of rows or the transpose of one. Row s of B is at
// b + s * b_stride, its columns next to each other, whole vectors of them.
#pragma once

#include "common/gemm.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

// Vectors of columns and rows of a tile: on AVX-512 24 of 32 registers hold sums, which needs 10 loads for 24 multiply-adds, else 12
// of 16. Narrow tiles are as high, or each sum would wait for its own last multiply-add.
#if MASKOPS_ISA_LEVEL == 2
constexpr int kStridedVectors = 4;
constexpr int strided_rows(int vectors) { return vectors <= 2 ? 12 : 24 / vectors; }
#else
constexpr int kStridedVectors = 2;
constexpr int strided_rows(int vectors) { return 12 / vectors; }
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
  bool add;                  // to what is there
  const S* times = nullptr;  // by which, row by row, it is multiplied before

  inline S* row(int64_t r) const { return to + r * stride; }
  inline StridedC tile(int64_t i, int64_t j) const { return {row(i) + j, stride, add, times == nullptr ? nullptr : times + i}; }
};

// Rows that lie anywhere, of which each is added to.
template <class S>
struct ScatteredC {
  S* to;
  int64_t stride;
  const int32_t* rows;
  static constexpr bool add = true;
  static constexpr const S* times = nullptr;

  inline S* row(int64_t r) const { return to + rows[r] * stride; }
  inline ScatteredC tile(int64_t i, int64_t j) const { return {to + j, stride, rows + i}; }
};

template <class V, int R, int C, class Result>
static void strided_tile(int64_t steps, const StridedA<typename V::scalar>& a, const typename V::scalar* b, int64_t b_stride,
                         const Result& result) {
  // Copied, because the compiler takes it that a store of a vector may change them.
  const Result c = result;
  const int64_t row_stride = a.row, step = a.step;
  V sum[R][C];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) sum[r][v] = c.add ? V::load(c.row(r) + v * V::width) : V::zero();
  }
  if (c.times != nullptr) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < C; ++v) sum[r][v] = sum[r][v] * V::all(c.times[r]);
    }
  }
  const typename V::scalar* at = a.at;
  for (int64_t s = 0; s < steps; ++s, at += step, b += b_stride) {
    V column[C];
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) column[v] = V::load(b + v * V::width);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const V row = V::all(at[r * row_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < C; ++v) sum[r][v] = fma(row, column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) sum[r][v].store(c.row(r) + v * V::width);
  }
}

template <class V, class Result>
using StridedTile = void (*)(int64_t, const StridedA<typename V::scalar>&, const typename V::scalar*, int64_t, const Result&);

template <class V, class Result, int C, int R = strided_rows(C)>
static inline StridedTile<V, Result> strided_kernel(int64_t rows) {
  if constexpr (R > 1) {
    if (rows < R) return strided_kernel<V, Result, C, R - 1>(rows);
  }
  return &strided_tile<V, R, C, Result>;
}

template <class V, class Result, int C = kStridedVectors>
static inline StridedTile<V, Result> strided_kernel(int64_t rows, int64_t vectors) {
  if constexpr (C > 1) {
    if (vectors < C) return strided_kernel<V, Result, C - 1>(rows, vectors);
  }
  return strided_kernel<V, Result, C>(rows);
}

// Result: StridedC or ScatteredC.
template <class V, class Result = StridedC<typename V::scalar>>
static void multiply_strided(int64_t rows, int64_t columns, int64_t steps, const StridedA<typename V::scalar>& a,
                             const typename V::scalar* b, int64_t b_stride, const Result& c) {
  constexpr int64_t kWide = kStridedVectors * V::width;
  for (int64_t j = 0; j < columns; j += kWide) {
    const int64_t vectors = min_of<int64_t>(columns - j, kWide) / V::width, most = strided_rows(int(vectors));
    const StridedTile<V, Result> whole = strided_kernel<V, Result>(most, vectors);
    for (int64_t i = 0; i < rows; i += most) {
      const StridedTile<V, Result> kernel = rows - i >= most ? whole : strided_kernel<V, Result>(rows - i, vectors);
      kernel(steps, {a.at + i * a.row, a.row, a.step}, b + j, b_stride, c.tile(i, j));
    }
  }
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
