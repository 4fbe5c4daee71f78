// What forward and backward share: rows and transposed tiles of q, k, v, and what the mask says about a tile.
#pragma once

#include "common/gemm_strided.h"
#include "common/simd_math.h"
#include "common/simd_shuffle.h"
#include "cpu/masked_attention/attention.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

constexpr int64_t kTile = kMaskTile;
constexpr int64_t kKeptBytes = int64_t{3} << 19;  // of transposed tiles that a thread keeps instead of making them again

template <class V>
static inline int64_t padded(int64_t channels) {
  return round_up(channels, V::width);
}

// run.template operator()<vector, storage type>()
template <class Run>
static inline auto with_vectors(int dtype, const Run& run) {
  switch (dtype) {
    case 0: return run.template operator()<VecF, float>();
    case 1: return run.template operator()<VecD, double>();
    case 2: return run.template operator()<VecF, bf16>();
    default: return run.template operator()<VecF, f16>();
  }
}

// ---- rows

template <class S>
struct Rows {
  const S* data;
  int64_t stride;
};

template <class T>
static inline const T* row_of(const HeadRows& rows, int64_t b, int64_t h, int64_t i) {
  return static_cast<const T*>(rows.data) + b * rows.batch + h * rows.head + i * rows.row;
}

// Rows of whole vectors, in the type of the sums: in place where they are so already, else copied to the buffer.
template <class V, class T>
static inline Rows<typename V::scalar> whole_rows(const T* from, int64_t stride, int64_t count, int64_t channels, typename V::scalar* buffer) {
  if constexpr (sizeof(T) == sizeof(typename V::scalar)) {
    if (channels % V::width == 0) return {from, stride};
  }
  const int64_t width = padded<V>(channels);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < width; d += V::width) {
      const int64_t some = min_of<int64_t>(V::width, channels - d);
      (some == V::width ? V::load(from + i * stride + d) : V::load_n(from + i * stride + d, some)).store(buffer + i * width + d);
    }
  }
  return {buffer, width};
}

template <class S>
static inline S zero_if_finite(S x) {
  return x * S(0);
}

// Whether no value is infinite or NaN.
template <class V>
static inline bool all_finite(const Rows<typename V::scalar>& rows, int64_t count, int64_t channels) {
  V sum = V::zero();
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < channels; d += V::width) sum = fma(V::load(rows.data + i * rows.stride + d), V::zero(), sum);
  }
  return sum.sum() == 0;
}

// to[d * kTile + i] = scale * row i, channel d; zeros for rows past the last.
template <class V, class T>
static inline void transpose_rows(const T* from, int64_t stride, int64_t count, int64_t channels, typename V::scalar scale,
                                  typename V::scalar* to) {
  constexpr int W = V::width;
  for (int64_t i = 0; i < kTile; i += W) {
    for (int64_t d = 0; d < channels; d += W) {
      const int64_t some = min_of<int64_t>(W, channels - d);
      V block[W];
      for (int r = 0; r < W; ++r) {
        const T* row = from + (i + r) * stride + d;
        block[r] = i + r >= count ? V::zero() : some == W ? V::load(row) : V::load_n(row, some);
      }
      transpose(block);
      for (int64_t c = 0; c < some; ++c) (block[c] * V::all(scale)).store(to + (d + c) * kTile + i);
    }
  }
}

// Transposed tiles of a head: all of them where they fit, else the last one.
template <class V>
struct TransposedTiles {
  using S = typename V::scalar;
  S* data;
  uint8_t* made;
  int64_t size;  // of a tile
  bool kept;

  TransposedTiles(int64_t tiles, int64_t channels, Pieces& pieces)
      : size(channels * kTile), kept(tiles * size * int64_t(sizeof(S)) <= kKeptBytes) {
    data = pieces.take<S>(kept ? tiles * size : size);
    made = pieces.take<uint8_t>(tiles);
  }
  inline void forget(int64_t tiles) const { memset(made, 0, size_t(tiles)); }

  template <class T>
  inline const S* get(int64_t tile, const T* from, int64_t stride, int64_t count, int64_t channels, S scale) const {
    S* to = kept ? data + tile * size : data;
    if (!kept || !made[tile]) transpose_rows<V, T>(from, stride, count, channels, scale, to);
    made[tile] = 1;
    return to;
  }
};

// ---- the mask

struct TileMask {
  bool empty, full;
  const uint64_t* words;  // of the queries, where not full

  inline uint64_t word(int64_t i, int64_t keys) const { return full ? bits_between(0, keys) : words[i]; }
};

static inline TileMask mask_of(const Attention& a, int64_t b, int64_t h, int64_t qt, int64_t kt) {
  if (a.tiles == nullptr) return {false, true, nullptr};
  const int32_t state = a.tiles[b * a.tiles_batch + h * a.tiles_head + qt * a.key_tiles() + kt];
  return {state == kMaskEmpty, state == kMaskFull, state < 0 ? nullptr : a.words + int64_t(state) * kTile};
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
