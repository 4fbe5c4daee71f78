// The packed GEMM that every family shares: C[m, n] = sum over k of A[m, k] * B[k, n], accumulated in float32 or float64.
//
// Operands are packed into panels first, so where a row comes from (a dense matrix, gathered rows, image patches) is
// the business of a small functor and costs nothing in the inner loop:
//     A panels: kRows rows wide,  element (i, k) at panel(i / kRows) + k * kRows + i % kRows
//     B panels: kCols columns wide (the last one kWidth wide where that is enough), laid out the same way
// The tile kernel keeps kRows x kCols sums in registers. Finished tiles go to an epilogue functor
//     epilogue(const Sum* tile, int64_t stride, int64_t i, int64_t j, int64_t rows, int64_t cols)
// which adds bias, converts, scatters or accumulates. Every sum runs over k in one fixed order, whatever the blocking of
// m and n, so results do not depend on the number of threads. Nothing here allocates: the caller brings the buffers.
//
// Packed element types: float, double, Bf16Pair and Bf16Tile (two consecutive k each, multiplied by vdpbf16ps or in the tile registers
// of AMX, which has A in another order: see Gemm<Bf16Tile>). Other inputs are converted while they are packed (gemm_pack.h).
#pragma once

#include "common/amx.h"

namespace maskops {

enum class Bf16Unit { kVector, kTile };

template <Bf16Unit>
struct Bf16Words {
  uint32_t bits;
};
using Bf16Pair = Bf16Words<Bf16Unit::kVector>;
using Bf16Tile = Bf16Words<Bf16Unit::kTile>;

inline namespace MASKOPS_ISA_NS {

#if MASKOPS_ISA_LEVEL == 2
constexpr int kTileRows = 12;  // 24 of 32 registers hold sums; 12 x 32 needs 14 loads for 24 multiply-adds
#else
constexpr int kTileRows = 6;  // 12 of 16 registers
#endif

template <class P>
struct Gemm {  // P = float or double
  using Vec = typename VecFor<P>::type;
  using Sum = P;
  using Value = P;                  // as it lies in rows that are read unpacked
  static constexpr int kStep = 1;   // values of k in one packed element
  static constexpr int kSteps = 1;  // packed steps are a multiple of it, filled up with zeros
  static constexpr int kWidth = Vec::width, kRows = kTileRows, kCols = 2 * kWidth;

  static inline Vec all(const P* a) { return Vec::all(*a); }
  static inline Vec load(const P* b) { return Vec::load(b); }
  static inline Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
};

#if MASKOPS_ISA_LEVEL == 2
template <>
struct Gemm<Bf16Pair> {
  using Vec = VecF;
  using Sum = float;
  using Value = bf16;
  static constexpr int kStep = 2, kSteps = 1;
  static constexpr int kWidth = VecF::width, kRows = kTileRows, kCols = 2 * kWidth;

  static inline __m512i all(const void* a) {
    int32_t pair;  // at any address
    memcpy(&pair, a, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static inline __m512i load(const Bf16Pair* b) { return _mm512_loadu_si512(b); }
  static inline VecF multiply_add(__m512i a, __m512i b, VecF sum) {
    return {_mm512_dpbf16_ps(sum.v, __m512bh(a), __m512bh(b))};
  }
};

// A tile register wants rows of A: the panels of A are blocks of kSteps steps, in each kRows rows of kSteps words.
template <>
struct Gemm<Bf16Tile> {
  using Vec = VecF;
  using Sum = float;
  static constexpr int kStep = 2, kSteps = int(kAmxRows);
  static constexpr int kWidth = int(kAmxRows), kRows = 2 * kWidth, kCols = 2 * kWidth;
};
#endif

// run.template operator()<packed type, storage type>() for a code of common/dispatch.h; bfloat16 is multiplied as `products` says,
// or widened while it is packed.
template <class Run>
static inline void with_packed_types(int dtype, [[maybe_unused]] Bf16Products products, const Run& run) {
  switch (dtype) {
    case 0: return run.template operator()<float, float>();
    case 1: return run.template operator()<double, double>();
    case 2: {
#if MASKOPS_ISA_LEVEL == 2
      if (products == Bf16Products::kDot) return run.template operator()<Bf16Pair, bf16>();
      if (products == Bf16Products::kAmx) {
        const AmxScope scope;
        return run.template operator()<Bf16Tile, bf16>();
      }
#endif
      return run.template operator()<float, bf16>();
    }
    default: return run.template operator()<float, f16>();
  }
}

constexpr int64_t kGemmSingle = 768;   // sums of at most so many packed steps are one chain of additions; longer ones
constexpr int64_t kGemmDepth = 512;    // are split into chains of at most this, for the caches and for the rounding error
constexpr int64_t kGemmRows = 192;     // rows of A that one block packs, a multiple of every kRows
constexpr int64_t kGemmColumns = 512;  // columns per pass where the depth is split

static inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

template <class P>
static inline int64_t gemm_steps(int64_t k) {
  return round_up((k + Gemm<P>::kStep - 1) / Gemm<P>::kStep, Gemm<P>::kSteps);
}
// Sizes of the caller's buffers, in elements: of P for the panels, of Sum for the partial tiles.
template <class P>
static inline int64_t packed_a_size(int64_t rows, int64_t k) {
  return round_up(rows, Gemm<P>::kRows) * gemm_steps<P>(k);
}
template <class P>
static inline int64_t packed_b_size(int64_t cols, int64_t k) {
  return round_up(cols, Gemm<P>::kWidth) * gemm_steps<P>(k);
}
template <class P>
static inline int64_t partial_size(int64_t rows, int64_t cols, int64_t k) {
  if (gemm_steps<P>(k) <= kGemmSingle) return 0;
  return round_up(rows, Gemm<P>::kRows) * round_up(min_of(cols, kGemmColumns), Gemm<P>::kCols);
}

// ---- the tile kernel --------------------------------------------------------------------------------------------

// R rows by V vectors of columns over `steps`; the sums are added to c, or replace what it held.
template <class P, int R, int V>
static void multiply_tile(int64_t steps, const P* a, const P* b, typename Gemm<P>::Sum* c, bool add) {
  using G = Gemm<P>;
  using Vec = typename G::Vec;
  Vec sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[r][v] = Vec::zero();
  }
  for (int64_t s = 0; s < steps; ++s) {
    decltype(G::load(b)) column[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) column[v] = G::load(b + v * G::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto row = G::all(a + r);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] = G::multiply_add(row, column[v], sum[r][v]);
    }
    a += G::kRows;
    b += V * G::kWidth;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      auto* to = c + r * G::kCols + v * G::kWidth;
      (add ? Vec::load(to) + sum[r][v] : sum[r][v]).store(to);
    }
  }
}

template <class P>
using TileKernel = void (*)(int64_t, const P*, const P*, typename Gemm<P>::Sum*, bool);

// The kernel for exactly `rows` rows, so that a last panel of few rows costs few multiplications.
template <class P, int V, int R = Gemm<P>::kRows>
static inline TileKernel<P> tile_kernel(int64_t rows) {
  if constexpr (R > 1) {
    if (rows < R) return tile_kernel<P, V, R - 1>(rows);
  }
  return &multiply_tile<P, R, V>;
}

#if MASKOPS_ISA_LEVEL == 2
template <int R, int V>  // registers; inside an AmxScope
static void multiply_amx_tile(int64_t steps, const Bf16Tile* a, const Bf16Tile* b, float* c, bool add) {
  using G = Gemm<Bf16Tile>;
  const AmxA left{reinterpret_cast<const bf16*>(a), kAmxDepth, G::kRows * kAmxDepth};
  amx_block<R, V>(steps * G::kStep, left, {reinterpret_cast<const uint32_t*>(b), V * G::kWidth}, {c, G::kCols, add});
}
template <>
inline TileKernel<Bf16Tile> tile_kernel<Bf16Tile, 1>(int64_t rows) {
  return rows > kAmxRows ? &multiply_amx_tile<2, 1> : &multiply_amx_tile<1, 1>;
}
template <>
inline TileKernel<Bf16Tile> tile_kernel<Bf16Tile, 2>(int64_t rows) {
  return rows > kAmxRows ? &multiply_amx_tile<2, 2> : &multiply_amx_tile<1, 2>;
}
#endif

// ---- the loops around it ----------------------------------------------------------------------------------------

// Columns [0, n) of `rows` packed rows. partial: partial_size() sums, untouched where the depth is not split.
template <class P, class Epilogue>
static void multiply_packed(int64_t rows, int64_t n, int64_t k, const P* a, const P* b, typename Gemm<P>::Sum* partial,
                            const Epilogue& epilogue) {
  using G = Gemm<P>;
  constexpr int64_t kTile = G::kRows * G::kCols;
  alignas(64) typename G::Sum tile[kTile];
  const int64_t steps = gemm_steps<P>(k);
  const bool split = steps > kGemmSingle;
  const int64_t columns = split ? kGemmColumns : n;
  const int64_t passes = split ? (steps + kGemmDepth - 1) / kGemmDepth : 1;
  const int64_t depth = round_up((steps + passes - 1) / passes, G::kSteps);
  for (int64_t j0 = 0; j0 < n; j0 += columns) {
    const int64_t j1 = min_of(n, j0 + columns);
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t s0 = pass * depth, s1 = min_of(steps, s0 + depth);
      auto* sums = partial;
      for (int64_t j = j0; j < j1; j += G::kCols) {
        const bool narrow = n - j <= G::kWidth;
        const P* panel = b + j * steps + s0 * (narrow ? G::kWidth : G::kCols);
        for (int64_t i = 0; i < rows; i += G::kRows, sums += kTile) {
          const int64_t count = min_of<int64_t>(rows - i, G::kRows);
          auto* c = split ? sums : tile;
          const TileKernel<P> kernel = narrow ? tile_kernel<P, 1>(count) : tile_kernel<P, 2>(count);
          kernel(s1 - s0, a + i * steps + s0 * G::kRows, panel, c, pass > 0);
          if (pass == passes - 1) epilogue(c, G::kCols, i, j, count, min_of<int64_t>(n - j, G::kCols));
        }
      }
    }
  }
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
