// Matrices packed with their rows along the vectors, and the way back.
#pragma once

#include "common/simd_shuffle.h"
#include "cpu/nm_matmul/linear.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

// Vectors of rows in a full panel. Two rows of sums per vector and what is multiplied stay in registers; 64 columns of a full
// panel fill two thirds of a 48 KiB L1 cache (AVX-512). More vectors need fewer broadcasts, but more traffic of sums.
#if MASKOPS_ISA_LEVEL == 2
constexpr int kPanelVectors = 8;
#else
constexpr int kPanelVectors = 6;
#endif

template <class V>
static inline NmPanels panels_of(int64_t rows) {
  const int64_t vectors = parts_of(rows, V::width), count = parts_of(vectors, kPanelVectors);
  if (count == 0) return {0, 1, 0, int64_t(sizeof(V))};
  const int64_t each = parts_of(vectors, count), full = parts_of(vectors, each);
  return {full, each, vectors - (full - 1) * each, each * int64_t(sizeof(V))};
}

// Columns of rows [row, row + width) of a, one vector per column, `stride` values apart. Missing rows are zeros.
template <class V, class T>
static inline void pack_rows_of(const NmMatrix& a, int64_t row, Range columns, int64_t stride, typename V::scalar* to) {
  constexpr int W = V::width;
  const int64_t count = min_of<int64_t>(W, a.rows - row);
  const T* from = static_cast<const T*>(a.data) + row * a.stride;
  for (int64_t k = columns.begin; k < columns.end; k += W) {
    const int64_t some = min_of<int64_t>(W, columns.end - k);
    V tile[W];
    if (count == W && some == W) {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) tile[i] = V::load(from + i * a.stride + k);
    } else {
      for (int i = 0; i < W; ++i) tile[i] = i < count ? V::load_n(from + i * a.stride + k, some) : V::zero();
    }
    transpose(tile);
    typename V::scalar* at = to + k * stride;
    if (some == W) {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) tile[i].store(at + i * stride);
    } else {
      for (int64_t i = 0; i < some; ++i) tile[i].store(at + i * stride);
    }
  }
}

// `columns` of panels [some.begin, some.end), in pieces that are finished while they are in the L1 cache.
constexpr int64_t kPiece = 64;

template <class V, class T>
static void pack_panels(const NmMatrix& a, const NmPanels& panels, Range some, Range columns, typename V::scalar* to) {
  const int64_t stride = panels.vectors * V::width;
  for (int64_t p = some.begin; p < some.end; ++p) {
    const int64_t used = p + 1 == panels.count ? panels.last : panels.vectors;
    typename V::scalar* panel = to + p * a.columns * stride;
    for (int64_t k = columns.begin; k < columns.end; k += kPiece) {
      const Range piece{k, min_of(columns.end, k + kPiece)};
      for (int64_t v = 0; v < used; ++v) pack_rows_of<V, T>(a, (p * panels.vectors + v) * V::width, piece, stride, panel + v * V::width);
    }
  }
}

// Sums [place of a column][vectors of rows] to out [rows, columns].
template <class V, class T>
static inline void unpack_sums(const typename V::scalar* sums, const int32_t* places, int64_t columns, int vectors, int64_t rows, T* out,
                               int64_t out_stride) {
  constexpr int W = V::width;
  const int64_t stride = vectors * W;
  for (int64_t v = 0; v < vectors; ++v) {  // each row of the result is written on and on
    const int64_t first = v * W, count = min_of<int64_t>(W, rows - first);
    for (int64_t j = 0; j < columns; j += W) {
      const int64_t some = min_of<int64_t>(W, columns - j);
      const typename V::scalar* from = sums + v * W;
      T* to = out + first * out_stride + j;
      V tile[W];
      if (some == W && count == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) tile[i] = V::load(from + places[j + i] * stride);
        transpose(tile);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) tile[i].store(to + i * out_stride);
      } else {
        for (int i = 0; i < W; ++i) tile[i] = i < some ? V::load(from + places[j + i] * stride) : V::zero();
        transpose(tile);
        for (int64_t i = 0; i < count; ++i) tile[i].store_n(to + i * out_stride, some);
      }
    }
  }
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
