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
// Packed element types: float, double, and Bf16Pair (two consecutive k; only where use_bf16_dot()). Other inputs
// are converted while they are packed.
#pragma once

#include "common/simd.h"

namespace maskops {

struct Bf16Pair {
  uint32_t bits;
};

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
  static constexpr int kStep = 1;  // values of k in one packed element
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
  static constexpr int kStep = 2;
  static constexpr int kWidth = VecF::width, kRows = kTileRows, kCols = 2 * kWidth;

  static inline __m512i all(const Bf16Pair* a) { return _mm512_set1_epi32(int(a->bits)); }
  static inline __m512i load(const Bf16Pair* b) { return _mm512_loadu_si512(b); }
  static inline VecF multiply_add(__m512i a, __m512i b, VecF sum) {
    return {_mm512_dpbf16_ps(sum.v, __m512bh(a), __m512bh(b))};
  }
};
#endif

constexpr int64_t kGemmSingle = 768;   // sums of at most so many packed steps are one chain of additions; longer ones
constexpr int64_t kGemmDepth = 512;    // are split into chains of at most this, for the caches and for the rounding error
constexpr int64_t kGemmRows = 192;     // rows of A that one block packs, a multiple of every kTileRows
constexpr int64_t kGemmColumns = 512;  // columns per pass where the depth is split

static inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

template <class P>
static inline int64_t gemm_steps(int64_t k) {
  return (k + Gemm<P>::kStep - 1) / Gemm<P>::kStep;
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
  const int64_t passes = split ? (steps + kGemmDepth - 1) / kGemmDepth : 1, depth = (steps + passes - 1) / passes;
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

// ---- packing ----------------------------------------------------------------------------------------------------

// memcpy of a few values, without the call.
template <class S>
static inline void copy_values(const S* from, int64_t count, S* to) {
  constexpr int64_t kLine = 64 / sizeof(S), kPiece = 16 / sizeof(S);
  int64_t i = 0;
  for (; i + kLine <= count; i += kLine) memcpy(to + i, from + i, 64);
  for (; i + kPiece <= count; i += kPiece) memcpy(to + i, from + i, 16);
  for (; i < count; ++i) to[i] = from[i];
}

// count values of storage type T as packed elements: in place where the bits are the same, else converted into buffer.
static inline const float* as_packed(const float* from, int64_t, float*) { return from; }
static inline const double* as_packed(const double* from, int64_t, double*) { return from; }
template <class T>
static inline const float* as_packed(const T* from, int64_t count, float* buffer) {
  int64_t i = 0;
  for (; i + VecF::width <= count; i += VecF::width) VecF::load(from + i).store(buffer + i);
  if (i < count) VecF::load_n(from + i, count - i).store_n(buffer + i, count - i);
  return buffer;
}
static inline const Bf16Pair* as_packed(const bf16* from, int64_t count, Bf16Pair* buffer) {
  memcpy(buffer, from, size_t(count) * sizeof(bf16));
  if (count % 2 == 1) buffer[count / 2].bits &= 0xffffu;  // the odd last k is paired with zero
  return buffer;
}

// to[s * width + r] = from[r][s], row by row.
template <class P>
static inline void transpose_panel(const P* const* from, int64_t steps, int width, P* to) {
  for (int64_t s = 0; s < steps; ++s) {
    for (int r = 0; r < width; ++r) to[s * width + r] = from[r][s];
  }
}

// The same for elements of four bytes, with the shuffles that the compilers do not find in the loop above. width >= 4.
template <class P>
static inline void transpose_words(const P* const* from, int64_t steps, int width, P* to) {
  typedef float Four __attribute__((vector_size(16)));
  for (int group = 0; group < width; group += 4) {
    const int r = min_of(group, width - 4);  // the last group may overlap the one before
    const P *p0 = from[r], *p1 = from[r + 1], *p2 = from[r + 2], *p3 = from[r + 3];
    int64_t s = 0;
    for (; s + 4 <= steps; s += 4) {
      Four a, b, c, d;
      memcpy(&a, p0 + s, 16);
      memcpy(&b, p1 + s, 16);
      memcpy(&c, p2 + s, 16);
      memcpy(&d, p3 + s, 16);
      const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), AB = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), CD = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      const Four x0 = __builtin_shufflevector(ab, cd, 0, 1, 4, 5), x1 = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
      const Four x2 = __builtin_shufflevector(AB, CD, 0, 1, 4, 5), x3 = __builtin_shufflevector(AB, CD, 2, 3, 6, 7);
      memcpy(to + (s + 0) * width + r, &x0, 16);
      memcpy(to + (s + 1) * width + r, &x1, 16);
      memcpy(to + (s + 2) * width + r, &x2, 16);
      memcpy(to + (s + 3) * width + r, &x3, 16);
    }
    for (; s < steps; ++s) {
      for (int i = 0; i < 4; ++i) to[s * width + r + i] = from[r + i][s];
    }
  }
}
static inline void transpose_panel(const float* const* from, int64_t steps, int width, float* to) {
  transpose_words(from, steps, width, to);
}
static inline void transpose_panel(const Bf16Pair* const* from, int64_t steps, int width, Bf16Pair* to) {
  transpose_words(from, steps, width, to);
}

// One panel of `count` <= width rows whose k values lie next to each other; missing rows are zero.
// row(i, k0, k1, buffer) returns the address of values k0..k1 of row i, which it may first collect in buffer.
template <class P, class T, class Row>
static inline void pack_panel(const Row& row, int64_t i0, int64_t count, int64_t k, int width, P* to) {
  constexpr int64_t kChunk = 64;  // values of k at a time: the staged rows stay in the L1 cache
  constexpr int kMost = 32;
  constexpr int64_t kStep = Gemm<P>::kStep;
  alignas(64) T gathered[kMost][kChunk];
  alignas(64) P converted[kMost][kChunk];
  alignas(64) static const P zeros[kChunk] = {};
  for (int64_t k0 = 0; k0 < k; k0 += kChunk) {
    const int64_t k1 = min_of(k, k0 + kChunk);
    const P* rows[kMost];
    for (int r = 0; r < width; ++r) {
      rows[r] = r < count ? as_packed(row(i0 + r, k0, k1, gathered[r]), k1 - k0, converted[r]) : zeros;
    }
    transpose_panel(rows, (k1 - k0 + kStep - 1) / kStep, width, to + k0 / kStep * width);
  }
}

// A from rows with contiguous k: rows [i0, i0 + rows) into panels.
template <class P, class T, class Row>
static void pack_a(const Row& row, int64_t i0, int64_t rows, int64_t k, P* to) {
  constexpr int64_t kRows = Gemm<P>::kRows;
  for (int64_t i = 0; i < rows; i += kRows) {
    pack_panel<P, T>(row, i0 + i, min_of<int64_t>(kRows, rows - i), k, kRows, to + i * gemm_steps<P>(k));
  }
}

// B whose columns have contiguous k (a weight [n, k]): panels [first, last) of the n columns.
template <class P, class T, class Row>
static void pack_b(const Row& row, int64_t n, int64_t k, int64_t first, int64_t last, P* to) {
  using G = Gemm<P>;
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t j = panel * G::kCols, left = n - j;
    const int width = left <= G::kWidth ? G::kWidth : G::kCols;
    pack_panel<P, T>(row, j, min_of<int64_t>(left, G::kCols), k, width, to + j * gemm_steps<P>(k));
  }
}

static inline void pack_piece(const float* const* from, int64_t count, float* to) { copy_values(from[0], count, to); }
static inline void pack_piece(const double* const* from, int64_t count, double* to) { copy_values(from[0], count, to); }
template <class T>
static inline void pack_piece(const T* const* from, int64_t count, float* to) {
  as_packed(from[0], count, to);
}
static inline void pack_piece(const bf16* const* from, int64_t count, Bf16Pair* to) {
  for (int64_t i = 0; i < count; ++i) to[i].bits = uint32_t(from[0][i].bits) | uint32_t(from[1][i].bits) << 16;
}

// Panels from rows that lie along m or n, one row per k: packed steps [s0, s1) of `count` columns starting at j0.
// row(k, j0, j1, buffer) returns the address of values j0..j1 of row k; buffers: kRowsAtOnce rows of `count` values.
// tail_width: the width of a last panel of at most that many columns (kWidth for B, all of it for A). k is the depth of
// the whole packed operand, of which [s0, s1) is a part.
constexpr int kRowsAtOnce = 16;  // rows per sweep over the panels, so that each visit writes a kilobyte or more

template <class P, class T, class Row>
static void pack_rows(const Row& row, int64_t j0, int64_t count, int64_t k, int64_t s0, int64_t s1, int width,
                      int tail_width, T* buffers, P* to) {
  constexpr int kStep = Gemm<P>::kStep, kSteps = kRowsAtOnce / kStep;
  const int64_t steps = gemm_steps<P>(k);
  const T* from[kSteps][kStep];
  for (int64_t start = s0; start < s1; start += kSteps) {
    const int64_t stop = min_of(s1, start + kSteps);
    for (int64_t at = start * kStep; at < stop * kStep; ++at) {
      const int64_t r = at - start * kStep;
      T* buffer = buffers + r * count;
      if (at >= k) memset(buffer, 0, size_t(count) * sizeof(T));
      from[r / kStep][r % kStep] = at < k ? row(at, j0, j0 + count, buffer) : buffer;
    }
    for (int64_t j = 0; j < count; j += width) {
      const int64_t left = min_of<int64_t>(count - j, width);
      const int64_t panel_width = left <= tail_width ? tail_width : width;
      for (int64_t s = start; s < stop; ++s) {
        const T* piece[kStep];
        for (int i = 0; i < kStep; ++i) piece[i] = from[s - start][i] + j;
        P* panel = to + j * steps + s * panel_width;
        pack_piece(piece, left, panel);
        if (left < panel_width) memset(panel + left, 0, size_t(panel_width - left) * sizeof(P));
      }
    }
  }
}

template <class P, class T, class Row>
static inline void pack_a_rows(const Row& row, int64_t i0, int64_t rows, int64_t k, T* buffers, P* to) {
  constexpr int kRows = Gemm<P>::kRows;
  pack_rows<P>(row, i0, rows, k, 0, gemm_steps<P>(k), kRows, kRows, buffers, to);
}
template <class P, class T, class Row>
static inline void pack_b_rows(const Row& row, int64_t n, int64_t k, int64_t s0, int64_t s1, T* buffers, P* to) {
  pack_rows<P>(row, 0, n, k, s0, s1, Gemm<P>::kCols, Gemm<P>::kWidth, buffers, to);
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
