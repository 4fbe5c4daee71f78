// Packing for the GEMM of gemm.h: rows from anywhere into panels.
#pragma once

#include "common/gemm.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

// Rows of a matrix, as the functions below ask for them: (row, first column, last, buffer) -> where they are.
template <class T>
struct MatrixRows {
  const T* data;
  int64_t stride;

  inline const T* operator()(int64_t i, int64_t j0, int64_t, T*) const { return data + i * stride + j0; }
};

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
template <Bf16Unit kUnit>
static inline const Bf16Words<kUnit>* as_packed(const bf16* from, int64_t count, Bf16Words<kUnit>* buffer) {
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
template <Bf16Unit kUnit>
static inline void transpose_panel(const Bf16Words<kUnit>* const* from, int64_t steps, int width, Bf16Words<kUnit>* to) {
  transpose_words(from, steps, width, to);
}

// The steps of a panel that fill up the depth k.
template <class P>
static inline void zero_steps(int64_t k, int width, P* panel) {
  const int64_t used = (k + Gemm<P>::kStep - 1) / Gemm<P>::kStep, steps = gemm_steps<P>(k);
  if (used < steps) memset(panel + used * width, 0, size_t(steps - used) * width * sizeof(P));
}

// One panel of `count` <= width rows whose k values lie next to each other; missing rows, and steps past k, are zero.
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
  zero_steps(k, width, to);
}

constexpr int kRowsAtOnce = 16;  // rows per sweep over the panels, so that each visit writes a kilobyte or more
constexpr int kMostRowsAtOnce = 32;

#if MASKOPS_ISA_LEVEL == 2
// A in the order of AMX, from rows with contiguous k.
template <class Row>
static void pack_a_tiles(const Row& row, int64_t i0, int64_t rows, int64_t k, Bf16Tile* to) {
  using G = Gemm<Bf16Tile>;
  constexpr int64_t kChunk = 8 * kAmxDepth;
  alignas(64) bf16 gathered[kChunk];
  const int64_t steps = gemm_steps<Bf16Tile>(k);
  for (int64_t i = 0; i < round_up(rows, kAmxRows); ++i) {
    Bf16Tile* first = to + i / G::kRows * G::kRows * steps + i % G::kRows * G::kSteps;
    for (int64_t k0 = 0; k0 < k; k0 += kChunk) {
      const int64_t k1 = min_of(k, k0 + kChunk);
      const bf16* from = i < rows ? row(i0 + i, k0, k1, gathered) : nullptr;
      for (int64_t at = k0; at < k1; at += kAmxDepth) {
        const __m512i values = from ? _mm512_maskz_loadu_epi16(first_lanes(k1 - at), from + (at - k0)) : _mm512_setzero_si512();
        _mm512_storeu_si512(first + at / G::kStep * G::kRows, values);
      }
    }
  }
}

// The same from rows that lie along m, one per k; buffers: kMostRowsAtOnce rows.
template <class Row>
static void pack_a_tile_rows(const Row& row, int64_t i0, int64_t rows, int64_t k, bf16* buffers, Bf16Tile* to) {
  using G = Gemm<Bf16Tile>;
  const int64_t steps = gemm_steps<Bf16Tile>(k);
  const bf16* lines[kAmxDepth];
  for (int64_t k0 = 0; k0 < k; k0 += kAmxDepth, to += G::kRows * G::kSteps) {
    for (int64_t r = 0; r < kAmxDepth; ++r) lines[r] = k0 + r < k ? row(k0 + r, i0, i0 + rows, buffers + r * rows) : nullptr;
    for (int64_t i = 0; i < rows; i += kAmxRows) {
      Bf16Tile* block = to + i / G::kRows * G::kRows * steps + i % G::kRows * G::kSteps;
      amx_transpose_lines(lines, i, rows, reinterpret_cast<bf16*>(block), kAmxDepth);
    }
  }
}
#endif

// A from rows with contiguous k: rows [i0, i0 + rows) into panels.
template <class P, class T, class Row>
static void pack_a(const Row& row, int64_t i0, int64_t rows, int64_t k, P* to) {
  constexpr int64_t kRows = Gemm<P>::kRows;
  if constexpr (Gemm<P>::kSteps > 1) {
    pack_a_tiles(row, i0, rows, k, to);
  } else {
    for (int64_t i = 0; i < rows; i += kRows) {
      pack_panel<P, T>(row, i0 + i, min_of<int64_t>(kRows, rows - i), k, kRows, to + i * gemm_steps<P>(k));
    }
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
template <Bf16Unit kUnit>
static inline void pack_piece(const bf16* const* from, int64_t count, Bf16Words<kUnit>* to) {
  for (int64_t i = 0; i < count; ++i) to[i].bits = uint32_t(from[0][i].bits) | uint32_t(from[1][i].bits) << 16;
}

// Panels from rows that lie along m or n, one row per k: packed steps [s0, s1) of `count` columns starting at j0.
// row(k, j0, j1, buffer) returns the address of values j0..j1 of row k; buffers: kMostRowsAtOnce rows of `count` values.
// tail_width: the width of a last panel of at most that many columns (kWidth for B, all of it for A). k is the depth of
// the whole packed operand, of which [s0, s1) is a part.

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
  if constexpr (Gemm<P>::kSteps > 1) pack_a_tile_rows(row, i0, rows, k, buffers, to);
  else pack_rows<P>(row, i0, rows, k, 0, gemm_steps<P>(k), kRows, kRows, buffers, to);
}
template <class P, class T, class Row>
static inline void pack_b_rows(const Row& row, int64_t n, int64_t k, int64_t s0, int64_t s1, T* buffers, P* to) {
  pack_rows<P>(row, 0, n, k, s0, s1, Gemm<P>::kCols, Gemm<P>::kWidth, buffers, to);
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
