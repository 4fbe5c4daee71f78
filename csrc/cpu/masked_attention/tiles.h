// What forward and backward share: rows and transposed tiles of q, k, v, scores of a tile, what mask and dropout say about it.
#pragma once

#include "common/gemm_strided.h"
#include "common/simd_math.h"
#include "common/simd_philox.h"
#include "common/simd_shuffle.h"
#include "cpu/masked_attention/attention.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

constexpr int64_t kTile = kMaskTile;
constexpr int64_t kCacheBytes = int64_t{3} << 18;  // of tiles that a thread keeps instead of making them again
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

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

// Whether rows can be read where they are: whole vectors in the type of the sums. Rows far from each other would meet in few sets of
// the cache.
template <class V, class T>
static inline bool in_place(int64_t stride, int64_t channels) {
  return sizeof(T) == sizeof(typename V::scalar) && channels % V::width == 0 && stride == channels;
}

template <class V, class T>
static inline void copy_rows(const T* from, int64_t stride, int64_t count, int64_t channels, typename V::scalar* to) {
  const int64_t width = padded<V>(channels);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < width; d += V::width) {
      const int64_t some = min_of<int64_t>(V::width, channels - d);
      (some == V::width ? V::load(from + i * stride + d) : V::load_n(from + i * stride + d, some)).store(to + i * width + d);
    }
  }
}

// Rows for a later tile on their way to the L2 cache.
template <class T>
static inline void fetch_rows(const T* from, int64_t stride, int64_t count, int64_t channels) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(T));
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < channels; d += kLine) __builtin_prefetch(from + i * stride + d, 0, 2);
  }
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
  const V by = V::all(scale);
  for (int64_t i = 0; i < kTile; i += W) {
    const bool all_rows = i + W <= count;
    for (int64_t d = 0; d < channels; d += W) {
      const T* corner = from + i * stride + d;
      V block[W];
      if (all_rows && d + W <= channels) {
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) block[r] = V::load(corner + r * stride);
        transpose(block);
#pragma GCC unroll 16
        for (int c = 0; c < W; ++c) (block[c] * by).store(to + (d + c) * kTile + i);
        continue;
      }
      const int64_t some = min_of<int64_t>(W, channels - d);
      for (int r = 0; r < W; ++r) block[r] = i + r >= count ? V::zero() : V::load_n(corner + r * stride, some);
      transpose(block);
      for (int64_t c = 0; c < some; ++c) (block[c] * by).store(to + (d + c) * kTile + i);
    }
  }
}

// Tiles of a head made from others: all of them where they fit, else the last one.
template <class S>
struct KeptTiles {
  S* data;
  uint8_t* made;
  int64_t size;  // of a tile
  bool kept;

  KeptTiles(int64_t tiles, int64_t tile_size, Pieces& pieces) : size(tile_size), kept(tiles * size * int64_t(sizeof(S)) <= kCacheBytes) {
    data = pieces.take<S>(kept ? tiles * size : size);
    made = pieces.take<uint8_t>(tiles);
  }
  inline void forget(int64_t tiles) const { memset(made, 0, size_t(tiles)); }

  template <class Make>
  inline const S* get(int64_t tile, const Make& make) const {
    S* to = kept ? data + tile * size : data;
    if (!kept || !made[tile]) make(to);
    made[tile] = 1;
    return to;
  }
};

template <class V>
struct TileCache : KeptTiles<typename V::scalar> {
  using S = typename V::scalar;
  using KeptTiles<S>::KeptTiles;

  template <class T>
  inline const S* transposed(int64_t tile, const T* from, int64_t stride, int64_t count, int64_t channels, S scale) const {
    return this->get(tile, [&](S* to) { transpose_rows<V, T>(from, stride, count, channels, scale, to); });
  }
  template <class T>
  inline Rows<S> rows(int64_t tile, const T* from, int64_t stride, int64_t count, int64_t channels) const {
    if constexpr (sizeof(T) == sizeof(S)) {
      if (in_place<V, T>(stride, channels)) return {from, stride};
    }
    return {this->get(tile, [&](S* to) { copy_rows<V, T>(from, stride, count, channels, to); }), padded<V>(channels)};
  }
};

// ---- the mask

// Bit i of by_key[j] tells of query i and key j; null where everything is kept.
using KeyBits = const uint64_t*;

// The other way round: bit j of words[i] becomes bit i of by_key[j].
static inline void transpose_bits(const uint64_t* words, uint64_t* by_key) {
  if (by_key != words) memcpy(by_key, words, kTile * sizeof(uint64_t));
  uint64_t mask = 0x00000000ffffffff;
  for (int half = 32; half > 0; half /= 2, mask ^= mask << half) {
    for (int i = 0; i < kTile; i += 2 * half) {
      for (int j = i; j < i + half; ++j) {
        const uint64_t moved = ((by_key[j] >> half) ^ by_key[j + half]) & mask;
        by_key[j] ^= moved << half;
        by_key[j + half] ^= moved;
      }
    }
  }
}

struct TileMask {
  bool empty, full;
  const uint64_t* words;  // of the queries, where not full
};

static inline TileMask mask_of(const Attention& a, int64_t b, int64_t h, int64_t qt, int64_t kt) {
  if (a.tiles == nullptr) return {false, true, nullptr};
  const int32_t state = a.tiles[b * a.tiles_batch + h * a.tiles_head + qt * a.key_tiles() + kt];
  return {state == kMaskEmpty, state == kMaskFull, state < 0 ? nullptr : a.words + int64_t(state) * kTile};
}

// A pair of tiles: where it is, how large, and who sees whom.
struct TilePair {
  int64_t b, h, q0, k0, rows, keys;
  KeyBits seen, kept;  // kept: what dropout leaves

  TilePair(const Attention& a, int64_t batch, int64_t head, int64_t qt, int64_t kt, const TileMask& mask, uint64_t* bits)
      : b(batch), h(head), q0(qt * kTile), k0(kt * kTile), rows(min_of(kTile, a.L - q0)), keys(min_of(kTile, a.S - k0)), seen(nullptr),
        kept(nullptr) {
    if (!mask.full) transpose_bits(mask.words, bits), seen = bits;
    if (a.drop_below > 0) draw(a, bits + kTile), kept = bits + kTile;
  }

 private:
  // Each query has the words of whole tiles of keys to itself.
  void draw(const Attention& a, uint64_t* bits) const {
    uint32_t words[kTile];
    const uint64_t counters = uint64_t(a.key_tiles()) * kTile / 4;
    for (int64_t i = 0; i < kTile; ++i) bits[i] = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const uint64_t first = uint64_t((b * a.H + h) * a.L + q0 + i) * counters + uint64_t(k0) / 4;
      philox_words(a.key, first, kTile, words);
      for (int64_t j = 0; j < kTile; ++j) bits[i] |= uint64_t(words[j] >= a.drop_below) << j;
    }
    transpose_bits(bits, bits);
  }
};

// ---- scores

// to[j * kTile + i] = log2(e) bias, a row per key.
template <class V, class T>
static inline void bias_of(const Attention& a, const TilePair& at, typename V::scalar* to) {
  using S = typename V::scalar;
  const T* bias = row_of<T>(a.bias, at.b, at.h, at.q0) + at.k0;
  if (a.bias.row != 0) return transpose_rows<V, T>(bias, a.bias.row, at.rows, at.keys, S(kLog2E), to);
  for (int64_t j = 0; j < at.keys; ++j) {
    const V value = V::all(S(to_float(bias[j])) * S(kLog2E));
    for (int64_t i = 0; i < round_up(at.rows, V::width); i += V::width) value.store(to + j * kTile + i);
  }
}

// scores[j * kTile + i] = log2(e) (scale q k + bias), a row per key; queries: transposed and scaled by log2(e) scale.
template <class V, class T>
static inline void make_scores(const Attention& a, const TilePair& at, const typename V::scalar* queries, const Rows<typename V::scalar>& keys,
                               typename V::scalar* scores) {
  const int64_t columns = round_up(at.rows, V::width);
  if (a.bias.data != nullptr) bias_of<V, T>(a, at, scores);
  multiply_strided<typename V::scalar>(at.keys, columns, a.D, {keys.data, keys.stride, 1}, queries, kTile, {scores, kTile, a.bias.data != nullptr});
}

// Pair by pair, where a row that somebody must not see is not finite: to[onto] += left[j, i] right[from].
template <class V>
static inline void add_seen(const TilePair& at, const typename V::scalar* left, const Rows<typename V::scalar>& right, int64_t width,
                            bool by_key, typename V::scalar* to) {
  for (int64_t j = 0; j < at.keys; ++j) {
    for (uint64_t bits = at.seen[j]; bits != 0; bits &= bits - 1) {
      const int64_t i = __builtin_ctzll(bits), from = by_key ? i : j, onto = by_key ? j : i;
      for (int64_t d = 0; d < width; ++d) to[onto * width + d] += left[j * kTile + i] * right.data[from * right.stride + d];
    }
  }
}

// to.to[query] = or += sum over keys of left[key, query] right[key]
template <class V>
static inline void add_by_query(const TilePair& at, const typename V::scalar* left, const Rows<typename V::scalar>& right, int64_t width,
                                const StridedC<typename V::scalar>& to) {
  if (at.seen == nullptr || all_finite<V>(right, at.keys, width)) {
    return multiply_strided<typename V::scalar>(at.rows, width, at.keys, {left, 1, kTile}, right.data, right.stride, to);
  }
  for (int64_t i = 0; i < at.rows; ++i) {
    const auto times = !to.add ? 0 : to.times == nullptr ? 1 : to.times[i];
    for (int64_t d = 0; d < width; ++d) to.to[i * width + d] = times == 0 ? 0 : to.to[i * width + d] * times;
  }
  add_seen<V>(at, left, right, width, false, to.to);
}

// to[key] += sum over queries of left[key, query] right[query]
template <class V>
static inline void add_by_key(const TilePair& at, const typename V::scalar* left, const Rows<typename V::scalar>& right, int64_t width,
                              typename V::scalar* to) {
  if (at.seen != nullptr && !all_finite<V>(right, at.rows, width)) return add_seen<V>(at, left, right, width, true, to);
  multiply_strided<typename V::scalar>(at.keys, width, at.rows, {left, kTile, 1}, right.data, right.stride, {to, width, true});
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
