// Backward: for each tile of keys the queries of all heads that read it, tile by tile. The weights are computed again from the
// logarithm of their sum. Gradients of keys and values are finished tile by tile; that of the queries is added up over the keys.
// The gradient of the bias is a pass of its own, because every batch entry and head that shares the bias adds to it.
#include "cpu/masked_attention/gradients.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

// What the gradient of a score needs of its query.
template <class V>
struct QueryTerms {
  using S = typename V::scalar;
  S *lse, *delta, *surprise;  // [64]: log2(e) lse, the part that is subtracted, log(2) times the gradient of the entropy

  static constexpr int64_t kSize = 3 * kTile;
  explicit QueryTerms(S* data) : lse(data), delta(data + kTile), surprise(data + 2 * kTile) {}
};

// weights = dropped exp(score - lse) and slopes = the gradient of the scores, both [keys, queries], of a pair of tiles.
//     slope = weight (dropped grad v^T - delta - grad_entropy (log weight + entropy)),  delta = sum of grad out - grad_lse
template <class V, class T>
struct Slopes {
  using S = typename V::scalar;
  const Attention& a;
  S *weights, *slopes;
  S* terms;  // of each query tile of each head of a group
  uint64_t* bits;

  Slopes(const Attention& args, int64_t tiles, Pieces& pieces)
      : a(args), weights(pieces.take<S>(kTile * kTile)), slopes(pieces.take<S>(kTile * kTile)),
        terms(pieces.take<S>(tiles * QueryTerms<V>::kSize)), bits(pieces.take<uint64_t>(2 * kTile)) {}

  QueryTerms<V> terms_at(int64_t place) const { return QueryTerms<V>(terms + place * QueryTerms<V>::kSize); }

  S dot(const T* x, const T* y) const {
    V sum = V::zero();
    for (int64_t d = 0; d < a.D; d += V::width) {
      const int64_t some = min_of<int64_t>(V::width, a.D - d);
      sum = fma(V::load_n(x + d, some), V::load_n(y + d, some), sum);
    }
    return sum.sum();
  }

  void make_terms(int64_t b, int64_t h, int64_t qt, int64_t place) const {
    const QueryTerms<V> to = terms_at(place);
    const int64_t first = qt * kTile, at = (b * a.H + h) * a.L + first;
    const T* out = static_cast<const T*>(a.of_out) + at * a.D;
    const S *grad_lse = static_cast<const S*>(a.grad_lse) + at, *lse = static_cast<const S*>(a.of_lse) + at;
    for (int64_t i = 0; i < kTile; ++i) to.lse[i] = __builtin_inff(), to.delta[i] = 0, to.surprise[i] = 0;
    for (int64_t i = 0; i < min_of(kTile, a.L - first); ++i) {
      if (lse[i] == -__builtin_inff()) continue;  // sees nothing: weights 2^-inf
      to.lse[i] = lse[i] * S(kLog2E);
      to.delta[i] = dot(row_of<T>(a.grad, b, h, first + i), out + i * a.D) - grad_lse[i];
      if (a.grad_entropy == nullptr) continue;
      const S grad = static_cast<const S*>(a.grad_entropy)[at + i];
      to.delta[i] += grad * (static_cast<const S*>(a.of_entropy)[at + i] - lse[i]);
      to.surprise[i] = grad * S(kLn2);
    }
  }

  template <bool kMasked, bool kMore>
  void finish_some(const TilePair& at, const QueryTerms<V>& of) const {
    for (int64_t i = 0; i < at.rows; i += V::width) {
      const V lse = V::load(of.lse + i), delta = V::load(of.delta + i), surprise = V::load(of.surprise + i);
      for (int64_t j = 0; j < at.keys; ++j) {
        S *weight_at = weights + j * kTile + i, *slope_at = slopes + j * kTile + i;
        const V score = V::load(weight_at);
        V weight = exp2_below_zero(score - lse), slope = V::load(slope_at), dropped = weight;
        if constexpr (kMore) {
          if (at.kept != nullptr) {
            const uint32_t kept = uint32_t(at.kept[j] >> i);
            const V by = V::all(S(a.keep_scale));
            dropped = keep_bits(weight * by, kept);
            slope = keep_bits(slope * by, kept);
          }
          slope = slope - surprise * max(score, V::all(S(-1e30)));
        }
        slope = weight * (slope - delta);
        if constexpr (kMasked) {
          const uint32_t seen = uint32_t(at.seen[j] >> i);
          dropped = keep_bits(dropped, seen), slope = keep_bits(slope, seen);
        }
        dropped.store(weight_at);
        slope.store(slope_at);
      }
    }
  }

  // From scores in weights and products of gradients and values in slopes.
  void finish(const TilePair& at, const QueryTerms<V>& of) const {
    const bool masked = at.seen != nullptr, more = at.kept != nullptr || a.grad_entropy != nullptr;
    if (more) masked ? finish_some<true, true>(at, of) : finish_some<false, true>(at, of);
    else masked ? finish_some<true, false>(at, of) : finish_some<false, false>(at, of);
  }
};

// ---------------------------------------------------------------- gradients of q, k and v

template <class V, class T, class Products>
struct Work {
  using S = typename V::scalar;
  const Attention& a;
  const int64_t width, heads;
  Slopes<V, T> pair;
  Products products;
  S *grad_k, *grad_v;  // of a tile

  Work(const Attention& args, Pieces& pieces)
      : a(args), width(padded<V>(args.D)), heads(args.H / args.G), pair(args, tiles(), pieces), products(args, tiles(), pieces),
        grad_k(pieces.take<S>(kTile * width)), grad_v(pieces.take<S>(kTile * width)) {}

  inline int64_t tiles() const { return heads * a.query_tiles(); }
  inline int64_t rows_in(int64_t qt) const { return min_of<int64_t>(kTile, a.L - qt * kTile); }

  void write(const S* from, int64_t rows, double scale, T* to) const {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < a.D; d += V::width) {
        (V::load(from + i * width + d) * V::all(S(scale))).store_n(to + i * a.D + d, min_of<int64_t>(V::width, a.D - d));
      }
    }
  }

  void key_tile(const AttentionItem& item, int64_t kt) const {
    const int64_t k0 = kt * kTile, keys = min_of<int64_t>(kTile, a.S - k0);
    const T *key = row_of<T>(a.k, item.b, item.head, k0), *value = row_of<T>(a.v, item.b, item.head, k0);
    const typename Products::Keys of = products.take_keys(key, value, keys);
    memset(grad_k, 0, size_t(kTile * width) * sizeof(S));
    memset(grad_v, 0, size_t(kTile * width) * sizeof(S));
    each_query_tile(item, [&](int64_t h, int64_t qt, int64_t place) {
      const TileMask mask = mask_of(a, item.b, h, qt, kt);
      if (mask.empty) return;
      const TilePair at(a, item.b, h, qt, kt, mask, pair.bits);
      const T *query = row_of<T>(a.q, at.b, at.h, at.q0), *grad = row_of<T>(a.grad, at.b, at.h, at.q0);
      products.make(at, place, of, query, grad, pair.weights, pair.slopes);
      pair.finish(at, pair.terms_at(place));
      if (item.grad_kv) products.add_kv(at, place, query, grad, pair.weights, pair.slopes, grad_k, grad_v);
      if (item.grad_q) products.add_q(at, place, of, key, pair.slopes);
    });
    if (!item.grad_kv) return;
    const int64_t at = ((item.b * a.G + item.head) * a.S + k0) * a.D;
    write(grad_k, keys, a.scale, static_cast<T*>(a.grad_k) + at);
    write(grad_v, keys, 1, static_cast<T*>(a.grad_v) + at);
  }

  template <class Do>
  void each_query_tile(const AttentionItem& item, const Do& run) const {
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t qt = item.queries.begin; qt < item.queries.end; ++qt) run(item.head * heads + head, qt, head * a.query_tiles() + qt);
    }
  }

  void run(const AttentionItem& item) const {
    products.forget(tiles());
    each_query_tile(item, [&](int64_t h, int64_t qt, int64_t place) {
      pair.make_terms(item.b, h, qt, place);
      if (item.grad_q) products.clear_grad_q(place);
    });
    for (int64_t kt = item.keys.begin; kt < item.keys.end; ++kt) key_tile(item, kt);
    if (!item.grad_q) return;
    each_query_tile(item, [&](int64_t h, int64_t qt, int64_t place) {
      const S* rows = products.grad_q_rows(place, rows_in(qt));
      write(rows, rows_in(qt), a.scale, static_cast<T*>(a.grad_q) + ((item.b * a.H + h) * a.L + qt * kTile) * a.D);
    });
  }
};

// ---------------------------------------------------------------- gradient of the bias

// An item is a batch entry and a head of the bias, and ranges of tiles; all that share its entries are added up.
template <class V, class T, class Products>
struct BiasWork {
  using S = typename V::scalar;
  const Attention& a;
  Slopes<V, T> pair;
  Products products;
  S* sums;  // [keys, queries] of a pair of tiles, or of all tiles of queries where those share the bias

  BiasWork(const Attention& args, Pieces& pieces)
      : a(args), pair(args, 1, pieces), products(args, 1, pieces), sums(pieces.take<S>(kTile * kTile)) {}

  void add_pair(int64_t b, int64_t h, int64_t qt, int64_t kt) const {
    const TileMask mask = mask_of(a, b, h, qt, kt);
    if (mask.empty) return;
    const TilePair at(a, b, h, qt, kt, mask, pair.bits);
    const int64_t group = h / (a.H / a.G);
    const T *query = row_of<T>(a.q, b, h, at.q0), *grad = row_of<T>(a.grad, b, h, at.q0);
    products.forget(1);
    pair.make_terms(b, h, qt, 0);
    products.make(at, 0, products.take_keys(row_of<T>(a.k, b, group, at.k0), row_of<T>(a.v, b, group, at.k0), at.keys), query, grad,
                  pair.weights, pair.slopes);
    pair.finish(at, pair.terms_at(0));
    for (int64_t j = 0; j < at.keys; ++j) {
      for (int64_t i = 0; i < at.rows; i += V::width) {
        (V::load(sums + j * kTile + i) + V::load(pair.slopes + j * kTile + i)).store(sums + j * kTile + i);
      }
    }
  }

  void add_shared(const AttentionItem& item, int64_t qt, int64_t kt) const {
    for (int64_t b = a.bias_B == 1 ? 0 : item.b; b < (a.bias_B == 1 ? a.B : item.b + 1); ++b) {
      for (int64_t h = a.bias_H == 1 ? 0 : item.head; h < (a.bias_H == 1 ? a.H : item.head + 1); ++h) add_pair(b, h, qt, kt);
    }
  }

  void write(const AttentionItem& item, int64_t qt, int64_t kt) const {
    const int64_t k0 = kt * kTile, keys = min_of(kTile, a.S - k0), q0 = qt * kTile, rows = min_of(kTile, a.L - q0);
    T* to = static_cast<T*>(a.grad_bias) + (item.b * a.bias_H + item.head) * a.bias_L * a.S + k0;
    if (a.bias_L == 1) {
      for (int64_t j = 0; j < keys; ++j) {
        V sum = V::zero();
        for (int64_t i = 0; i < kTile; i += V::width) sum = sum + V::load(sums + j * kTile + i);
        from_float(sum.sum(), to + j);
      }
      return;
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < keys; ++j) from_float(sums[j * kTile + i], to + (q0 + i) * a.S + j);
    }
  }

  void run(const AttentionItem& item) const {
    const size_t bytes = size_t(kTile * kTile) * sizeof(S);
    for (int64_t kt = item.keys.begin; kt < item.keys.end; ++kt) {
      memset(sums, 0, bytes);
      for (int64_t qt = 0; qt < a.query_tiles(); ++qt) {
        add_shared(item, qt, kt);
        if (a.bias_L == 1) continue;
        write(item, qt, kt);
        memset(sums, 0, bytes);
      }
      if (a.bias_L == 1) write(item, 0, kt);
    }
  }
};

template <template <class, class, class> class Kind>
int64_t bytes_of(const Attention& a) {
  return with_gradients(a, [&]<class V, class T, class Products>() {
    Pieces pieces(nullptr);
    Kind<V, T, Products>(a, pieces);
    return pieces.bytes;
  });
}

template <template <class, class, class> class Kind>
void run_item(const Attention& a, const AttentionItem& item, void* buffer) {
  with_gradients(a, [&]<class V, class T, class Products>() {
    Pieces pieces(buffer);
    [[maybe_unused]] const typename Products::Scope scope;
    Kind<V, T, Products>(a, pieces).run(item);
  });
}

}  // namespace

extern const BackwardKernels BackwardKernels_table{&bytes_of<Work>, &run_item<Work>, &bytes_of<BiasWork>, &run_item<BiasWork>};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
