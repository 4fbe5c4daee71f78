// The products of block-masked convolution in registers: rows lie anywhere, columns in panels as wide as kStridedVectors vectors.
#pragma once

#include "common/gemm_strided.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

// R rows by N vectors of columns: the sum over `count` kernel places of rows[place, r] times weights[place], `steps` operands each.
// It begins with `begin`, the same for all rows, or with the rows of `from`.
template <class P, int R, int N>
static void product_tile(int64_t count, const typename Gemm<P>::Value* const* rows, const P* const* weights, int64_t steps,
                         const typename Gemm<P>::Sum* begin, const typename Gemm<P>::Sum* from, typename Gemm<P>::Sum* const* to) {
  using G = Gemm<P>;
  using V = typename G::Vec;
  constexpr int64_t kWidth = kStridedVectors * V::width;
  V sum[R][N];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      sum[r][v] = from == nullptr ? V::load(begin + v * V::width) : V::load(from + r * kWidth + v * V::width);
    }
  }
  for (int64_t i = 0; i < count; ++i, rows += R) {
    const typename Gemm<P>::Value* row[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) row[r] = rows[r];
    const P* b = weights[i];
    for (int64_t s = 0; s < steps; ++s, b += kWidth) {
      decltype(G::load(b)) column[N];
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) column[v] = G::load(b + v * V::width);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const auto value = G::all(row[r] + s * G::kStep);
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) sum[r][v] = G::multiply_add(value, column[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sum[r][v].store(to[r] + v * V::width);
  }
}

// R channels by N vectors of columns of one kernel place of the weight's gradient: to += the sum over `steps` pairs.
template <class V, int R, int N>
static void outer_tile(int64_t steps, const typename V::scalar* const* rows, int64_t at, const typename V::scalar* const* grads,
                typename V::scalar* to) {
  using A = typename V::scalar;
  constexpr int64_t kWidth = kStridedVectors * V::width;
  V sum[R][N];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sum[r][v] = V::load(to + r * kWidth + v * V::width);
  }
  for (int64_t s = 0; s < steps; ++s) {
    const A *row = rows[s] + at, *b = grads[s];
    V column[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) column[v] = V::load(b + v * V::width);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const V value = V::all(row[r]);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) sum[r][v] = fma(value, column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sum[r][v].store(to + r * kWidth + v * V::width);
  }
}

template <class P>
struct Product {
  using Sum = typename Gemm<P>::Sum;
  using Row = typename Gemm<P>::Value;
  using Call = void (*)(int64_t, const Row* const*, const P* const*, int64_t, const Sum*, const Sum*, Sum* const*);
  template <int R, int N>
  static constexpr Call tile = &product_tile<P, R, N>;
};
template <class V>
struct Outer {
  using Call = void (*)(int64_t, const typename V::scalar* const*, int64_t, const typename V::scalar* const*, typename V::scalar*);
  template <int R, int N>
  static constexpr Call tile = &outer_tile<V, R, N>;
};

template <class K, int N, int R = strided_rows(N)>
static typename K::Call tile_of(int64_t rows) {
  if constexpr (R > 1) {
    if (rows < R) return tile_of<K, N, R - 1>(rows);
  }
  return K::template tile<R, N>;
}
template <class K, int N = kStridedVectors>
static typename K::Call tile_of(int64_t rows, int64_t vectors) {
  if constexpr (N > 1) {
    if (vectors < N) return tile_of<K, N - 1>(rows, vectors);
  }
  return tile_of<K, N>(rows);
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
