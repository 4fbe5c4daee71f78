// Backward: for each tile of keys the queries of all heads that read it, tile by tile. The weights are computed again from the
// logarithm of their sum. Gradients of keys and values are finished tile by tile; that of the queries is added up over the keys.
#include "cpu/masked_attention/tiles.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

template <class V>
struct BackwardBuffers {
  using S = typename V::scalar;
  TransposedTiles<V> queries, grads;  // of each head of the group
  S *keys, *values;                   // transposed
  S *weights, *slopes;                // [64, 64]
  S *query_rows, *key_rows, *grad_rows;
  S *grad_k, *grad_v;  // of a tile
  S *grad_q, *delta;   // of the group's queries

  BackwardBuffers(const Attention& a, Pieces& pieces)
      : queries(a.H / a.G * a.query_tiles(), a.D, pieces), grads(a.H / a.G * a.query_tiles(), a.D, pieces) {
    const int64_t width = padded<V>(a.D), heads = a.H / a.G;
    keys = pieces.take<S>(a.D * kTile), values = pieces.take<S>(a.D * kTile);
    weights = pieces.take<S>(kTile * kTile), slopes = pieces.take<S>(kTile * kTile);
    query_rows = pieces.take<S>(kTile * width), key_rows = pieces.take<S>(kTile * width), grad_rows = pieces.take<S>(kTile * width);
    grad_k = pieces.take<S>(kTile * width), grad_v = pieces.take<S>(kTile * width);
    grad_q = pieces.take<S>(heads * a.query_tiles() * kTile * width);
    delta = pieces.take<S>(heads * a.query_tiles() * kTile);
  }
};

template <class V, class T>
struct Work {
  using S = typename V::scalar;
  const Attention& a;
  const AttentionItem& item;
  const BackwardBuffers<V>& use;
  const int64_t width = padded<V>(a.D), heads = a.H / a.G;

  inline int64_t rows_in(int64_t qt) const { return min_of<int64_t>(kTile, a.L - qt * kTile); }
  inline int64_t place(int64_t head, int64_t qt) const { return head * a.query_tiles() + qt; }
  inline int64_t head_of(int64_t head) const { return item.head * heads + head; }

  // delta = sum over channels of grad * out, less the gradient of lse
  void make_delta(int64_t head, int64_t qt) const {
    const int64_t first = qt * kTile, at = (item.b * a.H + head_of(head)) * a.L + first;
    const T* out = static_cast<const T*>(a.of_out) + at * a.D;
    const S* grad_lse = static_cast<const S*>(a.grad_lse) + at;
    for (int64_t i = 0; i < rows_in(qt); ++i) {
      const T* grad = row_of<T>(a.grad, item.b, head_of(head), first + i);
      V sum = V::zero();
      for (int64_t d = 0; d < a.D; d += V::width) {
        const int64_t some = min_of<int64_t>(V::width, a.D - d);
        sum = fma(V::load_n(grad + d, some), V::load_n(out + i * a.D + d, some), sum);
      }
      use.delta[place(head, qt) * kTile + i] = sum.sum() - grad_lse[i];
    }
  }

  // weights = exp(scores - lse) and slopes = weights * (grad v^T - delta) * scale, both 0 where a query does not see a key.
  void make_slopes(int64_t head, int64_t qt, const TileMask& mask, int64_t keys) const {
    const int64_t rows = rows_in(qt);
    const bool plain = mask.full && keys % V::width == 0;
    const S* lse = static_cast<const S*>(a.of_lse) + (item.b * a.H + head_of(head)) * a.L + qt * kTile;
    const V scale = V::all(S(a.scale));
    for (int64_t i = 0; i < rows; ++i) {
      const uint64_t word = mask.word(i, keys);
      const V base = V::all(lse[i]), delta = V::all(use.delta[place(head, qt) * kTile + i]);
      for (int64_t j = 0; j < keys; j += V::width) {
        S *weights = use.weights + i * kTile + j, *slopes = use.slopes + i * kTile + j;
        V weight = exp_below_zero(V::load(weights) - base);
        V slope = weight * (V::load(slopes) - delta) * scale;
        if (!plain) weight = keep_bits(weight, uint32_t(word >> j)), slope = keep_bits(slope, uint32_t(word >> j));
        weight.store(weights);
        slope.store(slopes);
      }
    }
  }

  // Pair by pair, where a row that somebody must not see is not finite: to[j] += left[i, j] right[i], or to[i] += left[i, j] right[j].
  void add_seen(const TileMask& mask, int64_t rows, int64_t keys, const S* left, const Rows<S>& right, bool by_key, S* to) const {
    for (int64_t i = 0; i < rows; ++i) {
      for (uint64_t word = mask.word(i, keys); word != 0; word &= word - 1) {
        const int64_t j = __builtin_ctzll(word), from = by_key ? i : j, onto = by_key ? j : i;
        for (int64_t d = 0; d < width; ++d) to[onto * width + d] += left[i * kTile + j] * right.data[from * right.stride + d];
      }
    }
  }

  void add_by_key(const TileMask& mask, int64_t rows, int64_t keys, const S* left, const Rows<S>& right, S* to) const {
    if (!mask.full && !all_finite<V>(right, rows, width)) return add_seen(mask, rows, keys, left, right, true, to);
    multiply_strided<V, 1, kTile>(keys, width, rows, left, kTileRows, right.data, right.stride, {to, width, true});
  }
  void add_by_query(const TileMask& mask, int64_t rows, int64_t keys, const S* left, const Rows<S>& right, S* to) const {
    if (!mask.full && !all_finite<V>(right, keys, width)) return add_seen(mask, rows, keys, left, right, false, to);
    multiply_strided<V, kTile, 1>(rows, width, keys, left, kTileRows * kTile, right.data, right.stride, {to, width, true});
  }

  void pair(int64_t head, int64_t qt, int64_t keys, const TileMask& mask, const Rows<S>& key_rows) const {
    const int64_t rows = rows_in(qt), first = qt * kTile, h = head_of(head), at = place(head, qt);
    const T *query = row_of<T>(a.q, item.b, h, first), *grad = row_of<T>(a.grad, item.b, h, first);
    const S* query_tile = use.queries.template get<T>(at, query, a.q.row, rows, a.D, S(a.scale));
    const S* grad_tile = use.grads.template get<T>(at, grad, a.grad.row, rows, a.D, S(1));
    const int64_t columns = round_up(keys, V::width);
    multiply_strided<V, 1, kTile>(rows, columns, a.D, query_tile, kTileRows, use.keys, kTile, {use.weights, kTile, false});
    multiply_strided<V, 1, kTile>(rows, columns, a.D, grad_tile, kTileRows, use.values, kTile, {use.slopes, kTile, false});
    make_slopes(head, qt, mask, keys);
    if (item.grad_kv) {
      const Rows<S> grad_rows = whole_rows<V, T>(grad, a.grad.row, rows, a.D, use.grad_rows);
      add_by_key(mask, rows, keys, use.weights, grad_rows, use.grad_v);
      const Rows<S> query_rows = whole_rows<V, T>(query, a.q.row, rows, a.D, use.query_rows);
      add_by_key(mask, rows, keys, use.slopes, query_rows, use.grad_k);
    }
    if (item.grad_q) add_by_query(mask, rows, keys, use.slopes, key_rows, use.grad_q + at * kTile * width);
  }

  void write(const S* from, int64_t rows, T* to) const {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < a.D; d += V::width) V::load(from + i * width + d).store_n(to + i * a.D + d, min_of<int64_t>(V::width, a.D - d));
    }
  }

  void key_tile(int64_t kt) const {
    const int64_t k0 = kt * kTile, keys = min_of<int64_t>(kTile, a.S - k0);
    const T *key = row_of<T>(a.k, item.b, item.head, k0), *value = row_of<T>(a.v, item.b, item.head, k0);
    transpose_rows<V, T>(key, a.k.row, keys, a.D, S(1), use.keys);
    transpose_rows<V, T>(value, a.v.row, keys, a.D, S(1), use.values);
    const Rows<S> key_rows = whole_rows<V, T>(key, a.k.row, keys, a.D, use.key_rows);
    memset(use.grad_k, 0, size_t(kTile * width) * sizeof(S));
    memset(use.grad_v, 0, size_t(kTile * width) * sizeof(S));
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t qt = item.queries.begin; qt < item.queries.end; ++qt) {
        const TileMask mask = mask_of(a, item.b, head_of(head), qt, kt);
        if (!mask.empty) pair(head, qt, keys, mask, key_rows);
      }
    }
    if (!item.grad_kv) return;
    const int64_t at = ((item.b * a.G + item.head) * a.S + k0) * a.D;
    write(use.grad_k, keys, static_cast<T*>(a.grad_k) + at);
    write(use.grad_v, keys, static_cast<T*>(a.grad_v) + at);
  }

  void run() const {
    use.queries.forget(heads * a.query_tiles());
    use.grads.forget(heads * a.query_tiles());
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t qt = item.queries.begin; qt < item.queries.end; ++qt) {
        make_delta(head, qt);
        if (item.grad_q) memset(use.grad_q + place(head, qt) * kTile * width, 0, size_t(kTile * width) * sizeof(S));
      }
    }
    for (int64_t kt = item.keys.begin; kt < item.keys.end; ++kt) key_tile(kt);
    if (!item.grad_q) return;
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t qt = item.queries.begin; qt < item.queries.end; ++qt) {
        T* to = static_cast<T*>(a.grad_q) + ((item.b * a.H + head_of(head)) * a.L + qt * kTile) * a.D;
        write(use.grad_q + place(head, qt) * kTile * width, rows_in(qt), to);
      }
    }
  }
};

int64_t bytes(const Attention& a) {
  return with_vectors(a.dtype, [&]<class V, class T>() {
    Pieces pieces(nullptr);
    BackwardBuffers<V>(a, pieces);
    return pieces.bytes;
  });
}

void run(const Attention& a, const AttentionItem& item, void* buffer) {
  with_vectors(a.dtype, [&]<class V, class T>() {
    Pieces pieces(buffer);
    const BackwardBuffers<V> use(a, pieces);
    Work<V, T>{a, item, use}.run();
  });
}

}  // namespace

extern const BackwardKernels BackwardKernels_table{&bytes, &run};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
