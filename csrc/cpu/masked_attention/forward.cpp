// Forward: for each tile of queries the keys tile by tile, with the maximum and the sum of the weights so far (online softmax).
#include "cpu/masked_attention/products.h"

#include <initializer_list>

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

constexpr int64_t kFetchedRows = 4096;  // of keys that the L2 cache holds besides what is in use

// What is known of each query of a tile after some keys. Scores are logarithms to base 2.
template <class V>
struct Sums {
  using S = typename V::scalar;
  S* values;                        // [64, whole vectors of channels], weights times values
  S *top, *total, *spread, *decay;  // [64]: highest score, sum of weights 2^(score - top), of weights times score - top

  static int64_t size(int64_t channels) { return kTile * (padded<V>(channels) + 4); }
  Sums(S* data, int64_t channels)
      : values(data), top(data + kTile * padded<V>(channels)), total(top + kTile), spread(total + kTile), decay(spread + kTile) {}

  void clear() const {
    for (int64_t i = 0; i < kTile; ++i) top[i] = -__builtin_inff(), total[i] = 0, spread[i] = 0;
  }
  void clear_values(int64_t rows, int64_t width) const { memset(values, 0, size_t(rows * width) * sizeof(S)); }
};

template <class V, class Products>
struct ForwardBuffers {
  using S = typename V::scalar;
  Products products;
  S* scores;
  Sums<V> sums;
  uint64_t* bits;  // of mask and dropout

  ForwardBuffers(const Attention& a, Pieces& pieces)
      : products(a, pieces), scores(pieces.take<S>(kTile * kTile)), sums(pieces.take<S>(Sums<V>::size(a.D)), a.D),
        bits(pieces.take<uint64_t>(2 * kTile)) {}
};

template <class V>
V highest_base(V top) {  // what scores are taken relative to: no infinity minus infinity
  return where_less(V::all(-__builtin_inff()), top, top, V::zero());
}

// The highest score of kTogether vectors of queries, with what hidden pairs hold overwritten.
template <class V, int kTogether, bool kMasked>
void raise_top(const TilePair& at, int64_t i, typename V::scalar* scores, V (&top)[kTogether]) {
  for (int64_t j = 0; j < at.keys; ++j) {
#pragma GCC unroll 4
    for (int c = 0; c < kTogether; ++c) {
      typename V::scalar* score = scores + j * kTile + i + c * V::width;
      V x = V::load(score);
      if constexpr (kMasked) {
        x = choose_bits(x, V::all(-__builtin_inff()), uint32_t(at.seen[j] >> (i + c * V::width)));
        x.store(score);
      }
      top[c] = max(x, top[c]);
    }
  }
}

// Scores of kTogether vectors of queries to weights 2^(score - top), with a new top where one is higher. Where products are kPacked they
// take the weights, in pairs of keys, and scores are still to be multiplied by their scale(); else weights take the place of scores.
template <class Products, class V, int kTogether, bool kMasked, bool kMore>
void soften_some(const TilePair& at, const Products& products, const Sums<V>& sums, int64_t first, typename V::scalar* scores) {
  constexpr bool kPacked = Products::kPacked;
  V top[kTogether], base[kTogether], total[kTogether], spread[kTogether];
  const V scale = V::all(products.scale());
  for (int c = 0; c < kTogether; ++c) top[c] = kPacked ? V::all(-__builtin_inff()) : V::load(sums.top + first + c * V::width);
  raise_top<V, kTogether, kMasked>(at, first, scores, top);
  for (int c = 0; c < kTogether; ++c) {
    const int64_t i = first + c * V::width;
    if constexpr (kPacked) top[c] = max(top[c] * scale, V::load(sums.top + i));
    base[c] = highest_base(top[c]);
    const V fall = V::load(sums.top + i) - base[c], decay = exp2_below_zero(fall), before = V::load(sums.total + i);
    top[c].store(sums.top + i);
    decay.store(sums.decay + i);
    total[c] = before * decay;
    if constexpr (kMore) spread[c] = (V::load(sums.spread + i) + before * max(fall, V::all(-1000))) * decay;
  }
  const auto soften_key = [&](int64_t j, V(&weights)[kTogether]) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int c = 0; c < kTogether; ++c) {
      const V score = V::load(scores + j * kTile + first + c * V::width);
      // Rounded as the base was, not fused: of huge scores the rest would be no small power of two.
      const V x = (kPacked ? loaded_once(score * scale) : score) - base[c];
      V weight = products.exp2(x);
      total[c] = total[c] + weight;
      if constexpr (kMore) {
        spread[c] = fma(weight, max(x, V::all(-1000)), spread[c]);
        if (at.kept != nullptr) weight = keep_bits(weight, uint32_t(at.kept[j] >> (first + c * V::width)));
      }
      // Masked pairs may have to be multiplied one by one.
      if constexpr (!kPacked || kMasked) weight.store(scores + j * kTile + first + c * V::width);
      weights[c] = weight;
    }
  };
  V even[kTogether], odd[kTogether];
  if constexpr (kPacked) {
    for (int64_t j = 0; j < at.keys; j += 2) {
      soften_key(j, even);
      for (int c = 0; c < kTogether; ++c) odd[c] = V::zero();
      if (j + 1 < at.keys) soften_key(j + 1, odd);
#pragma GCC unroll 4
      for (int c = 0; c < kTogether; ++c) products.take_weights(j, first + c * V::width, even[c], odd[c]);
    }
  } else {
    for (int64_t j = 0; j < at.keys; ++j) soften_key(j, even);
  }
  for (int c = 0; c < kTogether; ++c) {
    const int64_t i = first + c * V::width;
    total[c].store(sums.total + i);
    if constexpr (kMore) spread[c].store(sums.spread + i);
  }
}

template <bool kMasked, bool kMore, class Products, class V>
void soften_all(const TilePair& at, const Products& products, const Sums<V>& sums, typename V::scalar* scores) {
  constexpr int kTogether = 4;
  int64_t i = 0;
  for (; i + (kTogether - 1) * V::width < at.rows; i += kTogether * V::width) {
    soften_some<Products, V, kTogether, kMasked, kMore>(at, products, sums, i, scores);
  }
  for (; i < at.rows; i += V::width) soften_some<Products, V, 1, kMasked, kMore>(at, products, sums, i, scores);
}

template <class Products, class V>
void soften(const TilePair& at, const Products& products, const Sums<V>& sums, bool more, typename V::scalar* scores) {
  if (at.seen != nullptr) more ? soften_all<true, true>(at, products, sums, scores) : soften_all<true, false>(at, products, sums, scores);
  else more ? soften_all<false, true>(at, products, sums, scores) : soften_all<false, false>(at, products, sums, scores);
}

template <class V, class T>
void write_rows(const Attention& a, const Sums<V>& sums, int64_t b, int64_t h, int64_t first, int64_t rows) {
  using S = typename V::scalar;
  const int64_t width = padded<V>(a.D), at = (b * a.H + h) * a.L + first;
  T* out = static_cast<T*>(a.out) + at * a.D;
  S *lse = static_cast<S*>(a.lse) + at, *entropy = a.entropy == nullptr ? nullptr : static_cast<S*>(a.entropy) + at;
  const V lowest = V::all(-__builtin_inff());
  for (int64_t i = 0; i < rows; i += V::width) {
    const int64_t some = min_of<int64_t>(V::width, rows - i);
    const V total = V::load(sums.total + i), none = where_less(lowest, V::load(sums.top + i), V::zero(), V::all(1));
    const V divisor = total + none, log_total = log_of_positive(divisor) + (divisor - divisor);  // of a query that sees nothing 1, and its result is 0
    const V top = V::load(sums.top + i);  // infinite where a score is: so is lse
    where_less(top, V::all(__builtin_inff()), fma(top, V::all(S(kLn2)), log_total), top).store_n(lse + i, some);
    (V::all(S(a.keep_scale)) / divisor).store(sums.decay + i);
    if (entropy != nullptr) (log_total - V::load(sums.spread + i) / divisor * V::all(S(kLn2))).store_n(entropy + i, some);
  }
  for (int64_t i = 0; i < rows; ++i, out += a.D) {
    const V inverse = V::all(sums.decay[i]);
    for (int64_t d = 0; d < a.D; d += V::width) {
      (V::load(sums.values + i * width + d) * inverse).store_n(out + d, min_of<int64_t>(V::width, a.D - d));
    }
  }
}

// What comes next: the following tile of queries, and a part of the next head's keys and values.
template <class V, class T>
void fetch_next(const Attention& a, const AttentionItem& item, int64_t qt) {
  const int64_t first = (qt + 1) * kTile;
  if (qt + 1 < item.queries.end) {
    fetch_rows(row_of<T>(a.q, item.b, item.head, first), a.q.row, min_of<int64_t>(kTile, a.L - first), a.D);
  }
  const int64_t next = item.b * a.H + item.head + 1, tiles = item.queries.end - item.queries.begin;
  if (next >= a.B * a.H || next % (a.H / a.G) != 0 || tiles * a.S > kFetchedRows) return;
  const int64_t begin = (qt - item.queries.begin) * a.S / tiles, end = (qt + 1 - item.queries.begin) * a.S / tiles;
  for (const HeadRows& rows : {a.k, a.v}) {
    fetch_rows(row_of<T>(rows, next / a.H, next % a.H / (a.H / a.G), begin), rows.row, end - begin, a.D);
  }
}

template <class V, class T, class Products>
void query_tile(const Attention& a, const AttentionItem& item, const ForwardBuffers<V, Products>& use, const Sums<V>& sums, int64_t qt) {
  const int64_t b = item.b, h = item.head, first = qt * kTile, rows = min_of<int64_t>(kTile, a.L - first);
  const int64_t group = h / (a.H / a.G);
  use.products.take_queries(row_of<T>(a.q, b, h, first), rows);
  sums.clear();
  bool some = false;
  for (int64_t kt = item.keys.begin; kt < item.keys.end; ++kt) {
    const TileMask mask = mask_of(a, b, h, qt, kt);
    if (mask.empty) continue;
    const TilePair at(a, b, h, qt, kt, mask, use.bits);
    use.products.scores(at, kt, row_of<T>(a.k, b, group, at.k0), use.scores);
    soften(at, use.products, sums, a.entropy != nullptr || at.kept != nullptr, use.scores);
    use.products.add_values(at, kt, row_of<T>(a.v, b, group, at.k0), use.scores, sums.decay, some, sums.values);
    some = true;
  }
  if (some) use.products.finish(rows, sums.values);
  else sums.clear_values(rows, padded<V>(a.D));
}

template <class V, class S = typename V::scalar>
Sums<V> partial_sums(const Attention& a, int64_t b, int64_t h, int64_t part) {
  return {static_cast<S*>(a.partial) + ((b * a.H + h) * a.parts + part) * Sums<V>::size(a.D), a.D};
}

// Adds the parts of a head's keys in their order.
template <class V, class T>
void merge_parts(const Attention& a, int64_t b, int64_t h, const Sums<V>& sums) {
  using S = typename V::scalar;
  const int64_t width = padded<V>(a.D);
  sums.clear();
  sums.clear_values(a.L, width);
  for (int64_t part = 0; part < a.parts; ++part) {
    const Sums<V> some = partial_sums<V>(a, b, h, part);
    for (int64_t i = 0; i < a.L; ++i) {
      if (some.total[i] == 0) continue;
      const S top = max_of(sums.top[i], some.top[i]), own = S(__builtin_exp2(double(sums.top[i] - top)));
      const S other = S(__builtin_exp2(double(some.top[i] - top)));
      if (a.entropy != nullptr) {
        const S before = sums.total[i] == 0 ? S(0) : sums.spread[i] + sums.total[i] * (sums.top[i] - top);
        sums.spread[i] = own * before + other * (some.spread[i] + some.total[i] * (some.top[i] - top));
      }
      sums.total[i] = own * sums.total[i] + other * some.total[i];
      sums.top[i] = top;
      for (int64_t d = 0; d < width; d += V::width) {
        const V added = V::load(some.values + i * width + d) * V::all(other);
        fma(V::load(sums.values + i * width + d), V::all(own), added).store(sums.values + i * width + d);
      }
    }
  }
  write_rows<V, T>(a, sums, b, h, 0, a.L);
}

int64_t bytes(const Attention& a) {
  return with_products(a, [&]<class V, class T, class Products>() {
    Pieces pieces(nullptr);
    ForwardBuffers<V, Products>(a, pieces);
    return pieces.bytes;
  });
}

int64_t partial_bytes(const Attention& a) {
  return with_vectors(a.dtype, [&]<class V, class T>() { return Sums<V>::size(a.D) * int64_t(sizeof(typename V::scalar)); });
}

void run(const Attention& a, const AttentionItem& item, void* buffer) {
  with_products(a, [&]<class V, class T, class Products>() {
    Pieces pieces(buffer);
    const ForwardBuffers<V, Products> use(a, pieces);
    [[maybe_unused]] const typename Products::Scope scope;
    use.products.start_head();
    if (a.parts > 1) return query_tile<V, T>(a, item, use, partial_sums<V>(a, item.b, item.head, item.part), 0);
    for (int64_t qt = item.queries.begin; qt < item.queries.end; ++qt) {
      fetch_next<V, T>(a, item, qt);
      query_tile<V, T>(a, item, use, use.sums, qt);
      write_rows<V, T>(a, use.sums, item.b, item.head, qt * kTile, min_of<int64_t>(kTile, a.L - qt * kTile));
    }
  });
}

void merge(const Attention& a, int64_t b, int64_t head, void* buffer) {
  with_products(a, [&]<class V, class T, class Products>() {
    Pieces pieces(buffer);
    merge_parts<V, T>(a, b, head, ForwardBuffers<V, Products>(a, pieces).sums);
  });
}

}  // namespace

extern const ForwardKernels ForwardKernels_table{&bytes, &partial_bytes, &run, &merge};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
