// What the products of nm_matmul share, compiled once per instruction set: types, blocks, buffers, results.
#pragma once

#include "common/gemm_pack.h"
#include "common/pieces.h"
#include "common/simd_math.h"

namespace maskops {

inline namespace MASKOPS_ISA_NS {

// `count` cut into about equal blocks of at most `most`, which are multiples of `unit`.
struct Blocks {
  int64_t count, size;

  static inline Blocks of(int64_t count, int64_t most, int64_t unit) {
    const int64_t blocks = parts_of(count, most < unit ? unit : most);
    return {count, blocks == 0 ? unit : round_up(parts_of(count, blocks), unit)};
  }
  inline int64_t number() const { return parts_of(count, size); }
  inline Range at(int64_t i) const { return {i * size, min_of(count, (i + 1) * size)}; }
};

// Rows of A in a block: many, as each block reads all of B; few enough that the block stays in the L2 cache beside a panel of B.
template <class P>
static inline Blocks row_blocks(int64_t rows, int64_t k) {
  constexpr int64_t kBytes = int64_t{1} << 20, kLeast = 48;
  const int64_t fit = kBytes / (int64_t(sizeof(P)) * max_of<int64_t>(1, gemm_steps<P>(k)));
  const int64_t most = min_of(kGemmRows, max_of(kLeast, fit)) / Gemm<P>::kRows * Gemm<P>::kRows;
  return Blocks::of(rows, most, Gemm<P>::kRows);
}

// out[r, c] = tile[r, c] + bias[c]; bias may be null.
template <class V, class T>
static inline void write_tile(const typename V::scalar* tile, int64_t stride, int64_t rows, int64_t cols, const T* bias, T* out,
                              int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; c += V::width) {
      const int64_t n = min_of<int64_t>(cols - c, V::width);
      V value = V::load(tile + r * stride + c);
      if (bias) value = value + V::load_n(bias + c, n);
      value.store_n(out + r * out_stride + c, n);
    }
  }
}

// ---- panels in the L1 cache ------------------------------------------------------------------------------------------------

// Steps of a panel of B that meet all rows of a block before the next ones do: so many stay in the L1 cache beside the rows.
constexpr int64_t kPanelSteps = 160;  // a multiple of 32

// The cache lines of `count` values, to the L2 cache; an address that does not exist is no fault.
template <class T>
static inline void fetch_ahead(const T* base, int64_t at, int64_t count) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(base) + uintptr_t(at) * sizeof(T);
  for (uintptr_t line = 0; line < uintptr_t(count) * sizeof(T); line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(first + line), 0, 2);
  }
}

// sums [rows, kCols], tile by tile, of `rows` packed rows of A with one panel of B, `steps` deep; added to what is there, or not.
// part(s0, s1) is where the steps [s0, s1) of the panel are. ahead(s0, s1) is called while a part is at work, for steps of the next
// one, which past the last step are those of the next panel.
template <class P, class Part, class Ahead>
static inline void multiply_panel(int64_t rows, int64_t steps, const P* a, bool narrow, typename Gemm<P>::Sum* sums, bool add,
                                  const Part& part, const Ahead& ahead) {
  using G = Gemm<P>;
  const int64_t tiles = parts_of(rows, G::kRows);
  for (int64_t s0 = 0; s0 == 0 || s0 < steps; s0 += kPanelSteps) {
    const int64_t s1 = min_of(steps, s0 + kPanelSteps), share = parts_of(kPanelSteps, tiles);
    const P* panel = part(s0, s1);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t i = tile * G::kRows, count = min_of<int64_t>(rows - i, G::kRows);
      const TileKernel<P> kernel = narrow ? tile_kernel<P, 1>(count) : tile_kernel<P, 2>(count);
      ahead(s1 + tile * share, s1 + min_of(kPanelSteps, (tile + 1) * share));
      kernel(s1 - s0, a + i * steps + s0 * G::kRows, panel, sums + i * G::kCols, add || s0 > 0);
    }
  }
}

// Rows of A times all of a packed B, panel by panel: finish(tile, stride, 0, j, rows, cols) for each. sums: [rows, kCols].
template <class P, class Finish>
static void multiply_all_panels(int64_t rows, int64_t n, int64_t k, const P* a, const P* b, typename Gemm<P>::Sum* sums,
                                const Finish& finish) {
  using G = Gemm<P>;
  const int64_t steps = gemm_steps<P>(k);
  for (int64_t j = 0; j < n; j += G::kCols) {
    const int64_t cols = min_of<int64_t>(n - j, G::kCols);
    const int width = cols <= G::kWidth ? G::kWidth : G::kCols;
    multiply_panel<P>(
        rows, steps, a, cols <= G::kWidth, sums, false, [&](int64_t s0, int64_t) { return b + j * steps + s0 * width; },
        [&](int64_t s0, int64_t s1) { fetch_ahead(b, j * steps + s0 * width, (s1 - s0) * width); });
    finish(sums, int64_t(G::kCols), int64_t(0), j, rows, cols);
  }
}

// ---- A^T B: sums over the rows of A [depth, m] and B [depth, n], as gradients of weights are ---------------------------------

constexpr int64_t kOuterDepth = 256;  // rows that are packed at a time: they and the sums of a block share the L2 cache
constexpr int64_t kOuterBlock = 384;  // rows and columns of a block of sums, and the least of them
constexpr int64_t kOuterLeast = 96;

// Blocks of the result [rows, cols] that threads share. Large ones, as every block packs its columns of A and B anew; smaller
// ones where the threads would not have the same share of them.
struct OuterBlocks {
  Blocks rows, cols;

  static inline OuterBlocks of(int64_t rows, int64_t row_unit, int64_t cols, int64_t col_unit, int64_t threads) {
    int64_t most_rows = kOuterBlock, most_cols = kOuterBlock;
    for (;;) {
      const OuterBlocks found{Blocks::of(rows, most_rows, row_unit), Blocks::of(cols, most_cols, col_unit)};
      const int64_t units = found.number();
      if (units % threads == 0 || units >= 4 * threads || most_rows + most_cols <= 2 * kOuterLeast) return found;
      int64_t& larger = most_rows > most_cols ? most_rows : most_cols;
      larger -= kOuterLeast;
    }
  }
  inline int64_t number() const { return rows.number() * cols.number(); }
  inline Range rows_at(int64_t i) const { return rows.at(i / cols.number()); }
  inline Range cols_at(int64_t i) const { return cols.at(i % cols.number()); }
};

template <class P, class T>
struct OuterBuffers {
  using Sum = typename Gemm<P>::Sum;
  P *a, *b;
  T* lines;
  Sum* sums;  // tile by tile, panel after panel

  OuterBuffers(int64_t rows, int64_t cols, Pieces& pieces)
      : a(pieces.take<P>(packed_a_size<P>(rows, kOuterDepth))),
        b(pieces.take<P>(packed_b_size<P>(cols, kOuterDepth))),
        lines(pieces.take<T>(kMostRowsAtOnce * max_of(rows, cols))),
        sums(pieces.take<Sum>(round_up(rows, Gemm<P>::kRows) * round_up(cols, Gemm<P>::kCols))) {}
};

// Columns of a matrix [depth, count] into panels kWidth wide, as many as are whole: copies of a size that the compiler knows. The
// rows lie too far apart for the processor to see the next ones coming.
// Returns how many columns it has packed.
template <int kWidth, class P>
static inline int64_t pack_whole_panels(const P* from, int64_t stride, int64_t depth, int64_t count, P* to) {
  const int64_t whole = count / kWidth * kWidth;
  for (int64_t k0 = 0; k0 < depth; k0 += kRowsAtOnce) {
    const int64_t k1 = min_of<int64_t>(depth, k0 + kRowsAtOnce);
    for (int64_t k = k1; k < min_of<int64_t>(depth, k1 + kRowsAtOnce); ++k) fetch_ahead(from, k * stride, whole);
    for (int64_t j = 0; j < whole; j += kWidth) {
      for (int64_t k = k0; k < k1; ++k) memcpy(to + j * depth + k * kWidth, from + k * stride + j, kWidth * sizeof(P));
    }
  }
  return whole;
}
template <int kWidth, class P, class T>
static inline int64_t pack_whole_panels(const T*, int64_t, int64_t, int64_t, P*) {
  return 0;
}

template <class P, int kWidth, class T>
static inline void pack_columns(MatrixRows<T> rows, int64_t depth, int64_t count, int tail_width, T* lines, P* to) {
  const int64_t whole = pack_whole_panels<kWidth>(rows.data, rows.stride, depth, count, to), steps = gemm_steps<P>(depth);
  if (whole == count) return;
  const MatrixRows<T> rest{rows.data + whole, rows.stride};
  pack_rows<P, T>(rest, 0, count - whole, depth, 0, steps, kWidth, tail_width, lines, to + whole * steps);
}

template <class P, class T>
static inline void pack_outer_a(MatrixRows<T> rows, int64_t depth, int64_t count, T* lines, P* to) {
  constexpr int kRows = Gemm<P>::kRows;
  if constexpr (Gemm<P>::kSteps > 1) pack_a_rows<P, T>(rows, 0, count, depth, lines, to);
  else pack_columns<P, kRows>(rows, depth, count, kRows, lines, to);
}

// sums[i, j] = sum over d < depth of a[d, i] * b[d, j] for `rows` columns of a and `cols` columns of b, in parts of fixed size:
// finish(tile, stride, 0, j, rows, cols) for each panel of columns.
template <class P, class T, class Finish>
static void multiply_outer(MatrixRows<T> a, MatrixRows<T> b, int64_t depth, int64_t rows, int64_t cols, const OuterBuffers<P, T>& use,
                           const Finish& finish) {
  using G = Gemm<P>;
  const Blocks parts = Blocks::of(depth, kOuterDepth, G::kStep);
  const int64_t panel_sums = round_up(rows, G::kRows) * G::kCols;
  for (int64_t part = 0; part == 0 || part < parts.number(); ++part) {  // no rows at all: the sums are zeros
    const Range at = parts.at(part);
    const int64_t count = at.end - at.begin, steps = gemm_steps<P>(count);
    pack_outer_a(MatrixRows<T>{a.data + at.begin * a.stride, a.stride}, count, rows, use.lines, use.a);
    pack_columns<P, G::kCols>(MatrixRows<T>{b.data + at.begin * b.stride, b.stride}, count, cols, G::kWidth, use.lines, use.b);
    for (int64_t j = 0; j < cols; j += G::kCols) {
      const bool narrow = cols - j <= G::kWidth;
      const int width = narrow ? G::kWidth : G::kCols;
      auto* sums = use.sums + j / G::kCols * panel_sums;
      multiply_panel<P>(
          rows, steps, use.a, narrow, sums, part > 0, [&](int64_t s0, int64_t) { return use.b + j * steps + s0 * width; },
          [](int64_t, int64_t) {});
    }
  }
  for (int64_t j = 0; j < cols; j += G::kCols) {
    finish(use.sums + j / G::kCols * panel_sums, int64_t(G::kCols), int64_t(0), j, rows, min_of<int64_t>(cols - j, G::kCols));
  }
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
