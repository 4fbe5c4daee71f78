// Forward: for each tile of queries the keys tile by tile, with the maximum and the sum of the weights so far (online softmax).
#include "cpu/masked_attention/tiles.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

template <class V>
struct ForwardBuffers {
  using S = typename V::scalar;
  TransposedTiles<V> keys;
  S *queries, *scores, *sums, *values;
  S *top, *total, *decay, *added;  // of each query

  ForwardBuffers(const Attention& a, Pieces& pieces) : keys(a.key_tiles(), a.D, pieces) {
    const int64_t width = padded<V>(a.D);
    queries = pieces.take<S>(a.D * kTile);
    scores = pieces.take<S>(kTile * kTile);
    sums = pieces.take<S>(kTile * width);
    values = pieces.take<S>(kTile * width);
    top = pieces.take<S>(4 * kTile);
    total = top + kTile, decay = total + kTile, added = decay + kTile;
  }
};

// Scores to weights exp(score - top), with a new top where one is higher.
template <class V, bool kMasked>
void soften(const ForwardBuffers<V>& use, const TileMask& mask, int64_t rows, int64_t keys) {
  using S = typename V::scalar;
  const V lowest = V::all(-__builtin_inff());
  for (int64_t i = 0; i < rows; ++i) {
    S* row = use.scores + i * kTile;
    V high = lowest;
    const uint64_t word = kMasked ? mask.word(i, keys) : 0;
    for (int64_t j = 0; j < keys; j += V::width) {
      V x = V::load(row + j);
      if constexpr (kMasked) {
        x = choose_bits(x, lowest, uint32_t(word >> j));
        x.store(row + j);
      }
      high = max(high, x);
    }
    const S found = high.highest(), before = use.top[i];
    const S now = found > before ? found : before;
    const S base = now == -__builtin_inff() ? S(0) : now;
    use.top[i] = now;
    use.decay[i] = before - base;
    V sum = V::zero();
    for (int64_t j = 0; j < keys; j += V::width) {
      const V weight = exp_below_zero(V::load(row + j) - V::all(base));
      weight.store(row + j);
      sum = sum + weight;
    }
    use.added[i] = sum.sum();
  }
  for (int64_t i = 0; i < rows; i += V::width) {
    const V decay = exp_below_zero(V::load(use.decay + i));
    decay.store(use.decay + i);
    fma(V::load(use.total + i), decay, V::load(use.added + i)).store(use.total + i);
  }
}

template <class V>
void decay_sums(const ForwardBuffers<V>& use, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    if (use.decay[i] == 1) continue;
    const V decay = V::all(use.decay[i]);
    for (int64_t d = 0; d < width; d += V::width) (V::load(use.sums + i * width + d) * decay).store(use.sums + i * width + d);
  }
}

// Where values that some queries must not see are not finite: pair by pair.
template <class V>
void add_seen(const ForwardBuffers<V>& use, const TileMask& mask, const Rows<typename V::scalar>& values, int64_t rows, int64_t width,
              int64_t keys) {
  for (int64_t i = 0; i < rows; ++i) {
    for (uint64_t word = mask.word(i, keys); word != 0; word &= word - 1) {
      const int64_t j = __builtin_ctzll(word);
      for (int64_t d = 0; d < width; ++d) use.sums[i * width + d] += use.scores[i * kTile + j] * values.data[j * values.stride + d];
    }
  }
}

template <class V, class T>
void write_rows(const Attention& a, const ForwardBuffers<V>& use, int64_t b, int64_t h, int64_t first, int64_t rows) {
  using S = typename V::scalar;
  const int64_t width = padded<V>(a.D), at = (b * a.H + h) * a.L + first;
  T* out = static_cast<T*>(a.out) + at * a.D;
  S* lse = static_cast<S*>(a.lse) + at;
  for (int64_t i = 0; i < rows; ++i, out += a.D) {
    const S total = use.total[i];
    lse[i] = total == 0 ? -__builtin_inff() : use.top[i] + S(__builtin_log(double(total)));
    const V inverse = V::all(total == 0 ? S(0) : 1 / total);
    for (int64_t d = 0; d < a.D; d += V::width) {
      const V value = total == 0 ? V::zero() : V::load(use.sums + i * width + d) * inverse;
      value.store_n(out + d, min_of<int64_t>(V::width, a.D - d));
    }
  }
}

template <class V, class T>
void query_tile(const Attention& a, const ForwardBuffers<V>& use, int64_t b, int64_t h, int64_t qt) {
  using S = typename V::scalar;
  const int64_t first = qt * kTile, rows = min_of<int64_t>(kTile, a.L - first), width = padded<V>(a.D), group = h / (a.H / a.G);
  transpose_rows<V, T>(row_of<T>(a.q, b, h, first), a.q.row, rows, a.D, S(a.scale), use.queries);
  for (int64_t i = 0; i < kTile; ++i) use.top[i] = -__builtin_inff(), use.total[i] = 0, use.decay[i] = 0, use.added[i] = 0;
  bool some = false;
  for (int64_t kt = 0; kt < a.key_tiles(); ++kt) {
    const TileMask mask = mask_of(a, b, h, qt, kt);
    if (mask.empty) continue;
    const int64_t k0 = kt * kTile, keys = min_of<int64_t>(kTile, a.S - k0);
    const S* key_tile = use.keys.template get<T>(kt, row_of<T>(a.k, b, group, k0), a.k.row, keys, a.D, S(1));
    multiply_strided<V, 1, kTile>(rows, round_up(keys, V::width), a.D, use.queries, kTileRows, key_tile, kTile, {use.scores, kTile, false});
    if (mask.full && keys % V::width == 0) soften<V, false>(use, mask, rows, keys);
    else soften<V, true>(use, mask, rows, keys);
    const Rows<S> values = whole_rows<V, T>(row_of<T>(a.v, b, group, k0), a.v.row, keys, a.D, use.values);
    if (!some) memset(use.sums, 0, size_t(rows * width) * sizeof(S));
    else decay_sums(use, rows, width);
    if (mask.full || all_finite<V>(values, keys, width)) {
      multiply_strided<V, kTile, 1>(rows, width, keys, use.scores, kTileRows * kTile, values.data, values.stride, {use.sums, width, true});
    } else {
      add_seen(use, mask, values, rows, width, keys);
    }
    some = true;
  }
  write_rows<V, T>(a, use, b, h, first, rows);
}

int64_t bytes(const Attention& a) {
  return with_vectors(a.dtype, [&]<class V, class T>() {
    Pieces pieces(nullptr);
    ForwardBuffers<V>(a, pieces);
    return pieces.bytes;
  });
}

void run(const Attention& a, const AttentionItem& item, void* buffer) {
  with_vectors(a.dtype, [&]<class V, class T>() {
    Pieces pieces(buffer);
    const ForwardBuffers<V> use(a, pieces);
    use.keys.forget(a.key_tiles());
    for (int64_t qt = item.queries.begin; qt < item.queries.end; ++qt) query_tile<V, T>(a, use, item.b, item.head, qt);
  });
}

}  // namespace

extern const ForwardKernels ForwardKernels_table{&bytes, &run};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
