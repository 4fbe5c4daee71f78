// What the backward pass multiplies, as floats or in AMX tiles: see products.h. `place` numbers the tiles of queries of all heads that
// read a head of keys; what is made of their rows is kept, where it fits, for all tiles of keys.
#pragma once

#include <initializer_list>

#include "cpu/masked_attention/products.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

template <class V, class T>
Rows<typename V::scalar> whole_rows(const T* from, int64_t stride, int64_t count, int64_t channels, typename V::scalar* buffer) {
  if constexpr (sizeof(T) == sizeof(typename V::scalar)) {
    if (in_place<V, T>(stride, channels)) return {from, stride};
  }
  copy_rows<V, T>(from, stride, count, channels, buffer);
  return {buffer, padded<V>(channels)};
}

template <class V, class T>
struct FloatGradients {
  using S = typename V::scalar;
  struct Scope {};
  const Attention& a;
  const int64_t width;
  TileCache<V> queries, grads;  // transposed
  TileCache<V> query_rows, grad_rows;
  S *key_buffer, *value_buffer;
  S* grad_q;  // of the group's queries

  FloatGradients(const Attention& args, int64_t tiles, Pieces& pieces)
      : a(args), width(padded<V>(args.D)), queries(tiles, a.D * kTile, pieces), grads(tiles, a.D * kTile, pieces),
        query_rows(tiles, width * kTile, pieces), grad_rows(tiles, width * kTile, pieces), key_buffer(pieces.take<S>(kTile * width)),
        value_buffer(pieces.take<S>(kTile * width)), grad_q(pieces.take<S>(tiles * kTile * width)) {}

  // The keys and values of a tile.
  struct Keys {
    Rows<S> keys, values;
  };
  Keys take_keys(const T* key, const T* value, int64_t count) const {
    return {whole_rows<V, T>(key, a.k.row, count, a.D, key_buffer), whole_rows<V, T>(value, a.v.row, count, a.D, value_buffer)};
  }
  void forget(int64_t tiles) const {
    for (const TileCache<V>* cache : {&queries, &grads, &query_rows, &grad_rows}) cache->forget(tiles);
  }
  void clear_grad_q(int64_t place) const { memset(grad_q + place * kTile * width, 0, size_t(kTile * width) * sizeof(S)); }

  void make(const TilePair& at, int64_t place, const Keys& of, const T* query, const T* grad, S* scores, S* products) const {
    const S* transposed = queries.template transposed<T>(place, query, a.q.row, at.rows, a.D, S(a.scale * kLog2E));
    make_scores<V, T>(a, at, transposed, of.keys, scores);
    const S* grad_tile = grads.template transposed<T>(place, grad, a.grad.row, at.rows, a.D, S(1));
    multiply_strided<S>(at.keys, round_up(at.rows, V::width), a.D, {of.values.data, of.values.stride, 1}, grad_tile, kTile,
                        {products, kTile, false});
  }
  void add_kv(const TilePair& at, int64_t place, const T* query, const T* grad, const S* weights, const S* slopes, S* grad_k, S* grad_v) const {
    add_by_key<V>(at, weights, grad_rows.template rows<T>(place, grad, a.grad.row, at.rows, a.D), width, grad_v);
    add_by_key<V>(at, slopes, query_rows.template rows<T>(place, query, a.q.row, at.rows, a.D), width, grad_k);
  }
  void add_q(const TilePair& at, int64_t place, const Keys& of, const T*, const S* slopes) const {
    add_by_query<V>(at, slopes, of.keys, width, {grad_q + place * kTile * width, width, true});
  }
  const S* grad_q_rows(int64_t place, int64_t) const { return grad_q + place * kTile * width; }
};

#if MASKOPS_ISA_LEVEL == 2

struct AmxGradients {
  using Scope = AmxScope;
  AmxTiles tiles;
  const int64_t width;
  KeptTiles<uint32_t> query_words, grad_words;  // of two channels: [depth / 2, 64]
  KeptTiles<uint32_t> query_pairs, grad_pairs;  // of two rows: [32, width]
  bf16 *key_rows, *value_rows, *keys_by_channel, *left;  // the last: weights or slopes, [64, 64]
  uint32_t* pairs;                                       // slopes of two keys: [32, 64]
  float *grad_q, *rows;                                  // transposed: [width, 64]; one of them as rows

  AmxGradients(const Attention& a, int64_t count, Pieces& pieces)
      : tiles(a, pieces), width(tiles.width), query_words(count, tiles.depth / 2 * kTile, pieces),
        grad_words(count, tiles.depth / 2 * kTile, pieces), query_pairs(count, kTile / 2 * width, pieces),
        grad_pairs(count, kTile / 2 * width, pieces), key_rows(pieces.take<bf16>(kTile * tiles.depth)),
        value_rows(pieces.take<bf16>(kTile * tiles.depth)), keys_by_channel(pieces.take<bf16>(width * kTile)),
        left(pieces.take<bf16>(kTile * kTile)), pairs(pieces.take<uint32_t>(kTile / 2 * kTile)),
        grad_q(pieces.take<float>(count * kTile * width)), rows(pieces.take<float>(kTile * width)) {}

  struct Keys {
    AmxA keys, values;
  };
  Keys take_keys(const bf16* key, const bf16* value, int64_t count) const {
    const Attention& a = tiles.a;
    amx_transpose_rows(key, a.k.row, count, a.D, kTile, width, keys_by_channel, kTile);
    return {tiles.left_rows(key, a.k.row, count, key_rows), tiles.left_rows(value, a.v.row, count, value_rows)};
  }
  void forget(int64_t count) const {
    for (const KeptTiles<uint32_t>* cache : {&query_words, &grad_words, &query_pairs, &grad_pairs}) cache->forget(count);
  }
  void clear_grad_q(int64_t place) const { memset(grad_q + place * kTile * width, 0, size_t(kTile * width) * sizeof(float)); }

  void make(const TilePair& at, int64_t place, const Keys& of, const bf16* query, const bf16* grad, float* scores, float* products) const {
    const auto words = [&](const KeptTiles<uint32_t>& cache, const bf16* from, int64_t stride) {
      return cache.get(place, [&](uint32_t* to) { amx_transpose_words(from, stride, at.rows, tiles.a.D, kTile, tiles.depth, to, kTile); });
    };
    tiles.scores(at, of.keys, words(query_words, query, tiles.a.q.row), scores);
    if (tiles.is_scaled()) tiles.finish_scores(at, scores);
    amx_multiply(round_up(at.keys, kAmxRows), round_up(at.rows, kAmxRows), tiles.depth, of.values,
                 {words(grad_words, grad, tiles.a.grad.row), kTile}, {products, kTile, false});
  }
  void add_kv(const TilePair& at, int64_t place, const bf16* query, const bf16* grad, const float* weights, const float* slopes,
              float* grad_k, float* grad_v) const {
    add_by_key(at, weights, grad_pairs, place, grad, tiles.a.grad.row, grad_v);
    add_by_key(at, slopes, query_pairs, place, query, tiles.a.q.row, grad_k);
  }
  void add_q(const TilePair& at, int64_t place, const Keys&, const bf16* key, const float* slopes) const {
    float* to = grad_q + place * kTile * width;
    if (at.seen != nullptr && !tiles.all_finite(keys_by_channel, width * kTile * 2)) {
      return tiles.add_seen_by_query(at, slopes, key, tiles.a.k.row, to);
    }
    tiles.pair_keys(at, slopes, pairs);
    amx_multiply(width, round_up(at.rows, kAmxRows), round_up(at.keys, kAmxDepth), {keys_by_channel, kTile}, {pairs, kTile}, {to, kTile, true});
  }
  const float* grad_q_rows(int64_t place, int64_t count) const {
    amx_transpose_sums(grad_q + place * kTile * width, kTile, count, width, rows);
    return rows;
  }

 private:
  // to[key] += sum over queries of of_keys[key, query] right[query]
  void add_by_key(const TilePair& at, const float* of_keys, const KeptTiles<uint32_t>& cache, int64_t place, const bf16* right, int64_t stride,
                  float* to) const {
    const uint32_t* words = cache.get(place, [&](uint32_t* out) { amx_pair_rows(right, stride, at.rows, tiles.a.D, kTile, width, out); });
    if (at.seen != nullptr && !tiles.all_finite(words, kTile / 2 * width * 4)) {
      for (int64_t j = 0; j < at.keys; ++j) {
        for (uint64_t bits = at.seen[j]; bits != 0; bits &= bits - 1) {
          const int64_t i = __builtin_ctzll(bits);
          for (int64_t d = 0; d < tiles.a.D; ++d) to[j * width + d] += of_keys[j * kTile + i] * to_float(right[i * stride + d]);
        }
      }
      return;
    }
    const int64_t columns = round_up(at.rows, kAmxRows), steps = round_up(at.rows, kAmxDepth), count = round_up(at.keys, kAmxRows);
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t i = 0; i < steps; i += VecF::width) {
        const VecF x = j < at.keys && i < columns ? VecF::load(of_keys + j * kTile + i) : VecF::zero();
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(left + j * kTile + i), __m256i(_mm512_cvtneps_pbh(x.v)));
      }
    }
    amx_multiply(count, width, steps, {left, kTile}, {words, width}, {to, width, true});
  }
};

#endif

struct AmxGradients;
template <class Run>
static inline auto with_gradients(const Attention& a, const Run& run) {
  return with_either<FloatGradients, AmxGradients>(a, run);
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
