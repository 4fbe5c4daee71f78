// The products of the forward pass: as they are in the type of the sums, or of bfloat16 in AMX tiles.
//
// Either has the same four steps: take the queries of a tile; scores of a pair of tiles; add the values by weight; finish. The sums
// of AmxProducts are transposed, a row per channel, so that weights, a row per key, are its right operand as they are, and only
// values are transposed, once per head.
#pragma once

#include "common/amx_softmax.h"
#include "cpu/masked_attention/tiles.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

template <class V, class T>
struct FloatProducts {
  using S = typename V::scalar;
  struct Scope {};
  static constexpr bool kPacked = false;  // see soften_some in forward.cpp
  const Attention& a;
  TileCache<V> keys, values;
  S* queries;

  FloatProducts(const Attention& args, Pieces& pieces)
      : a(args), keys(a.key_tiles(), kTile * padded<V>(a.D), pieces), values(a.key_tiles(), kTile * padded<V>(a.D), pieces),
        queries(pieces.take<S>(a.D * kTile)) {}

  S scale() const { return 1; }
  static V exp2(V x) { return exp2_below_zero(x); }
  void start_head() const { keys.forget(a.key_tiles()), values.forget(a.key_tiles()); }

  void take_queries(const T* from, int64_t rows) const {
    transpose_rows<V, T>(from, a.q.row, rows, a.D, S(a.scale * kLog2E), queries);
  }
  void scores(const TilePair& at, int64_t kt, const T* key, S* to) const {
    make_scores<V, T>(a, at, queries, keys.template rows<T>(kt, key, a.k.row, at.keys, a.D), to);
  }
  // sums: [64, whole vectors of channels], multiplied by decay before, where there are some.
  void add_values(const TilePair& at, int64_t kt, const T* value, const S* weights, const S* decay, bool some, S* sums) const {
    const Rows<S> rows = values.template rows<T>(kt, value, a.v.row, at.keys, a.D);
    add_by_query<V>(at, weights, rows, padded<V>(a.D), {sums, padded<V>(a.D), some, some ? decay : nullptr});
  }
  void finish(int64_t, S*) const {}
};

#if MASKOPS_ISA_LEVEL == 2

// Sizes of the tiles of bfloat16, and what forward and backward do with them.
struct AmxTiles {
  const Attention& a;
  const int64_t depth, width;  // channels as whole registers: of what is summed over, and of rows
  float* bias;                 // [64, 64]

  AmxTiles(const Attention& args, Pieces& pieces)
      : a(args), depth(round_up(a.D, kAmxDepth)), width(round_up(a.D, kAmxRows)),
        bias(pieces.take<float>(a.bias.data == nullptr ? 0 : kTile * kTile)) {}

  // Rows as a left operand, in place where they are whole.
  AmxA left_rows(const bf16* from, int64_t stride, int64_t count, bf16* buffer) const {
    if (count == kTile && a.D == depth) return {from, stride};
    amx_copy_rows(from, stride, count, a.D, round_up(count, kAmxRows), depth, buffer);
    return {buffer, depth};
  }

  // As make_scores, but for a positive scale where there is no bias; queries: words of two channels, [depth / 2, 64].
  void scores(const TilePair& at, const AmxA& keys, const uint32_t* queries, float* to) const {
    amx_multiply(round_up(at.keys, kAmxRows), round_up(at.rows, kAmxRows), depth, keys, {queries, kTile}, {to, kTile, false});
    if (!is_scaled()) finish_scores(at, to);
  }
  bool is_scaled() const { return a.bias.data == nullptr && a.scale > 0; }
  void finish_scores(const TilePair& at, float* to) const {
    const int64_t columns = round_up(at.rows, kAmxRows);
    if (a.bias.data != nullptr) bias_of<VecF, bf16>(a, at, bias);
    const VecF scale = VecF::all(float(a.scale * kLog2E));
    for (int64_t j = 0; j < at.keys; ++j) {
      for (int64_t i = j * kTile; i < j * kTile + columns; i += VecF::width) {
        fma(VecF::load(to + i), scale, a.bias.data == nullptr ? VecF::zero() : VecF::load(bias + i)).store(to + i);
      }
    }
  }

  // to[j / 2, i] = the words of rows j and j + 1 of [keys, queries], as far as sums over whole registers of keys go.
  static void pair_keys(const TilePair& at, const float* from, uint32_t* to) {
    const int64_t columns = round_up(at.rows, kAmxRows);
    for (int64_t j = 0; j < round_up(at.keys, kAmxDepth); j += 2, from += 2 * kTile, to += kTile) {
      for (int64_t i = 0; i < columns; i += VecF::width) {
        const VecF even = j < at.keys ? VecF::load(from + i) : VecF::zero();
        const VecF odd = j + 1 < at.keys ? VecF::load(from + kTile + i) : VecF::zero();
        _mm512_storeu_si512(to + i, amx_pair(even, odd));
      }
    }
  }

  static bool all_finite(const void* values, int64_t bytes) {  // a multiple of 64
    bool finite = true;
    for (int64_t at = 0; at < bytes; at += 64) finite &= amx_finite(_mm512_loadu_si512(static_cast<const char*>(values) + at));
    return finite;
  }

  // to[query, channel], transposed, += left[key, query] right[key], pair by pair, so that what a query must not see stays away from it.
  void add_seen_by_query(const TilePair& at, const float* left, const bf16* right, int64_t stride, float* to) const {
    for (int64_t j = 0; j < at.keys; ++j) {
      for (uint64_t bits = at.seen[j]; bits != 0; bits &= bits - 1) {
        const int64_t i = __builtin_ctzll(bits);
        for (int64_t d = 0; d < a.D; ++d) to[d * kTile + i] += left[j * kTile + i] * to_float(right[j * stride + d]);
      }
    }
  }
};

struct AmxProducts {
  using Scope = AmxScope;
  static constexpr bool kPacked = true;
  AmxTiles tiles;
  KeptTiles<bf16> values;     // transposed: [width, 64]
  bf16* key_rows;             // where keys cannot be read where they are
  uint32_t *queries, *pairs;  // [depth / 2, 64]; weights of two keys: [32, 64]
  float* sums;                // [width, 64]

  AmxProducts(const Attention& a, Pieces& pieces)
      : tiles(a, pieces), values(a.key_tiles(), kTile * tiles.width, pieces), key_rows(pieces.take<bf16>(kTile * tiles.depth)),
        queries(pieces.take<uint32_t>(tiles.depth / 2 * kTile)), pairs(pieces.take<uint32_t>(kTile / 2 * kTile)),
        sums(pieces.take<float>(tiles.width * kTile)) {}

  float scale() const { return tiles.is_scaled() ? float(tiles.a.scale * kLog2E) : 1; }
  void start_head() const { values.forget(tiles.a.key_tiles()); }

  void take_queries(const bf16* from, int64_t rows) const {
    amx_transpose_words(from, tiles.a.q.row, rows, tiles.a.D, kTile, tiles.depth, queries, kTile);
  }
  void scores(const TilePair& at, int64_t, const bf16* key, float* to) const {
    tiles.scores(at, tiles.left_rows(key, tiles.a.k.row, at.keys, key_rows), queries, to);
  }

  static VecF exp2(VecF x) { return amx_exp2_below_zero(x); }
  void take_weights(int64_t j, int64_t i, VecF even, VecF odd) const { _mm512_storeu_si512(pairs + j / 2 * kTile + i, amx_pair(even, odd)); }

  void add_values(const TilePair& at, int64_t kt, const bf16* value, const float* weights, const float* decay, bool some, float*) const {
    const int64_t columns = round_up(at.rows, kAmxRows), width = tiles.width, stride = tiles.a.v.row;
    const bf16* by_channel = values.get(kt, [&](bf16* to) { amx_transpose_rows(value, stride, at.keys, tiles.a.D, kTile, width, to, kTile); });
    if (some) amx_decay(decay, width, columns, sums);
    if (at.seen != nullptr && !tiles.all_finite(by_channel, kTile * width * 2)) {
      if (!some) memset(sums, 0, size_t(width * kTile) * sizeof(float));
      return tiles.add_seen_by_query(at, weights, value, stride, sums);
    }
    amx_zero_pairs(at.keys, pairs);
    amx_multiply(width, columns, round_up(at.keys, kAmxDepth), {by_channel, kTile}, {pairs, kTile}, {sums, kTile, some});
  }
  void finish(int64_t rows, float* to) const { amx_transpose_sums(sums, kTile, rows, tiles.width, to); }
};

#endif

// run.template operator()<vector, storage type, products>(), which are Amx or Float<vector, storage type>.
template <template <class, class> class Float, class Amx, class Run>
static inline auto with_either(const Attention& a, const Run& run) {
#if MASKOPS_ISA_LEVEL == 2
  if (a.amx) return run.template operator()<VecF, bf16, Amx>();
#endif
  return with_vectors(a.dtype, [&]<class V, class T>() { return run.template operator()<V, T, Float<V, T>>(); });
}

struct AmxProducts;
template <class Run>
static inline auto with_products(const Attention& a, const Run& run) {
  return with_either<FloatProducts, AmxProducts>(a, run);
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
