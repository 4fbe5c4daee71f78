// Small products whose operands lie where they are: C[rows, columns] = or += A B, over up to a tile of steps.
//
// Element (i, s) of a StridedA is at `at + i * row + s * step`, so that it may be a tile of rows or the transpose of one. Row s of B
// has its columns next to each other, whole vectors of them. The rows of A, of B and of C may lie anywhere as well: numbers of rows
// of a larger matrix then say where.
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

// What is multiplied is a P of common/gemm.h: a float or double, or a pair of bfloat16, two values of a row of A by a word of B.
//
// An A has a Walk<R>: R rows of it, of which walk[r] is where the element lies at the step that was gone to.
template <class S>
struct StridedA {
  const S* at;
  int64_t row, step;

  template <int R>
  struct Walk {
    const S* at;
    int64_t row, step;
    const S* now;

    explicit Walk(const StridedA& a) : at(a.at), row(a.row), step(a.step), now(a.at) {}
    inline void go_to(int64_t s) { now = at + s * step; }
    inline const S* operator[](int r) const { return now + r * row; }
  };
  inline StridedA tile(int64_t i) const { return {at + i * row, row, step}; }
  inline void fetch(int64_t, int64_t, int64_t) const {}
};

// Rows of a matrix by their numbers: as B, and as what an A is made of.
template <class S>
struct PickedB {
  const S* at;
  int64_t stride;
  const int32_t* numbers;

  inline const S* row(int64_t i) const { return at + numbers[i] * stride; }
  inline PickedB rows(int64_t i) const { return {at, stride, numbers + i}; }
  inline PickedB columns(int64_t j) const { return {at + j, stride, numbers}; }
};

template <class S>
struct StridedB {
  const S* at;
  int64_t stride;

  inline const S* row(int64_t s) const { return at + s * stride; }
  inline StridedB columns(int64_t j) const { return {at + j, stride}; }
};

// Rows as they are picked, their steps of kStep values next to each other.
template <class S, int kStep = 1>
struct PickedRowsA {
  PickedB<S> from;

  template <int R>
  struct Walk {
    const S* rows[R];
    int64_t now = 0;

    explicit Walk(const PickedRowsA& a) {
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) rows[r] = in_register(a.from.row(r));  // one by one: as vectors it takes long
    }
    inline void go_to(int64_t s) { now = s * kStep; }
    inline const S* operator[](int r) const { return rows[r] + now; }
  };
  inline PickedRowsA tile(int64_t i) const { return {from.rows(i)}; }
  // Rows [begin, end), on their way to the L1 cache.
  inline void fetch(int64_t begin, int64_t end, int64_t steps) const {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t s = 0; s < steps * kStep; s += 64 / int64_t(sizeof(S))) __builtin_prefetch(from.row(i) + s);
    }
  }
};

// The transpose: a step is a picked row, the rows of A are its columns.
template <class S>
struct PickedStepsA {
  PickedB<S> from;

  template <int R>
  struct Walk {
    const PickedB<S> from;
    const S* now = nullptr;

    explicit Walk(const PickedStepsA& a) : from(a.from) {}
    inline void go_to(int64_t s) { now = from.row(s); }
    inline const S* operator[](int r) const { return now + r; }
  };
  inline PickedStepsA tile(int64_t i) const { return {from.columns(i)}; }
  inline void fetch(int64_t, int64_t, int64_t) const {}
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

// Rows at offsets, of which each is added to.
template <class S>
struct ScatteredC {
  S* to;
  const int32_t* offsets;
  static constexpr bool add = true;
  static constexpr const S* times = nullptr;

  inline S* row(int64_t r) const { return to + offsets[r]; }
  inline ScatteredC tile(int64_t i, int64_t j) const { return {to + j, offsets + i}; }
};

template <class P, int R, int C, class A, class B, class Result>
static inline void strided_tile(int64_t steps, const A& a, const B& right, const Result& result) {
  using G = Gemm<P>;
  using V = typename G::Vec;
  // Copied, because the compiler takes it that a store of a vector may change them.
  const Result c = result;
  const B b = right;
  V sum[R][C];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const typename V::scalar* const from = c.row(r);
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) sum[r][v] = c.add ? V::load(from + v * V::width) : V::zero();
  }
  if (c.times != nullptr) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < C; ++v) sum[r][v] = sum[r][v] * V::all(c.times[r]);
    }
  }
  typename A::template Walk<R> left(a);
  for (int64_t s = 0; s < steps; ++s) {
    left.go_to(s);
    const P* from = b.row(s);
    decltype(G::load(from)) column[C];
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) column[v] = G::load(from + v * V::width);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const auto row = G::all(left[r]);
#pragma GCC unroll 4
      for (int v = 0; v < C; ++v) sum[r][v] = G::multiply_add(row, column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    typename V::scalar* const to = c.row(r);
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) sum[r][v].store(to + v * V::width);
  }
}

// All rows: whole tiles, then one of the rows that are left. With `ahead`, the rows of the next tile are fetched. One call for all tiles:
// what stands between two of them is not hidden behind their multiply-adds.
template <class P, int R, int C, class A, class B, class Result>
static void strided_tiles(int64_t rows, int64_t steps, const A& a, const B& b, const Result& c, bool ahead);

template <class A, class B, class Result>
using StridedTiles = void (*)(int64_t, int64_t, const A&, const B&, const Result&, bool);

template <class P, class A, class B, class Result, int C, int R = strided_rows(C)>
static inline StridedTiles<A, B, Result> strided_kernel(int64_t rows) {
  if constexpr (R > 1) {
    if (rows < R) return strided_kernel<P, A, B, Result, C, R - 1>(rows);
  }
  return &strided_tiles<P, R, C, A, B, Result>;
}

template <class P, class A, class B, class Result, int C = kStridedVectors>
static inline StridedTiles<A, B, Result> strided_kernel(int64_t rows, int64_t vectors) {
  if constexpr (C > 1) {
    if (vectors < C) return strided_kernel<P, A, B, Result, C - 1>(rows, vectors);
  }
  return strided_kernel<P, A, B, Result, C>(rows);
}

template <class P, int R, int C, class A, class B, class Result>
static void strided_tiles(int64_t rows, int64_t steps, const A& a, const B& b, const Result& c, bool ahead) {
  if constexpr (R < strided_rows(C)) {
    strided_tile<P, R, C>(steps, a, b, c);
  } else {
    int64_t i = 0;
    for (; i + R <= rows; i += R) {
      if (ahead) a.fetch(i + R, min_of(rows, i + 2 * R), steps);
      strided_tile<P, R, C>(steps, a.tile(i), b, c.tile(i, 0));
    }
    if (i < rows) strided_kernel<P, A, B, Result, C>(rows - i)(rows - i, steps, a.tile(i), b, c.tile(i, 0), false);
  }
}

// A: StridedA, PickedRowsA or PickedStepsA. B: StridedB or PickedB. Result: StridedC or ScatteredC.
template <class P, class A, class B, class Result>
static void multiply_picked(int64_t rows, int64_t columns, int64_t steps, const A& a, const B& b, const Result& c) {
  constexpr int64_t kWidth = Gemm<P>::kWidth, kWide = kStridedVectors * kWidth;
  if (rows <= 0) return;
  for (int64_t j = 0; j < columns; j += kWide) {
    const int64_t vectors = min_of<int64_t>(columns - j, kWide) / kWidth;
    strided_kernel<P, A, B, Result>(rows, vectors)(rows, steps, a, b.columns(j), c.tile(0, j), j == 0);
  }
}

template <class P, class Result = StridedC<typename Gemm<P>::Sum>>
static void multiply_strided(int64_t rows, int64_t columns, int64_t steps, const StridedA<P>& a, const P* b, int64_t b_stride,
                             const Result& c) {
  multiply_picked<P>(rows, columns, steps, a, StridedB<P>{b, b_stride}, c);
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
