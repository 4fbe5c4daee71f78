// The kernels of select.h.
#include "cpu/feature_reuse/select.h"

#include "common/pieces.h"
#include "common/simd_math.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

constexpr float kLowest = -__builtin_inff();

template <class Run>
auto with_vectors(int dtype, const Run& run) {
  switch (dtype) {
    case 0: return run.template operator()<VecF, float>();
    case 1: return run.template operator()<VecD, double>();
    case 2: return run.template operator()<VecF, bf16>();
    default: return run.template operator()<VecF, f16>();
  }
}

// The n <= width values at p, others `fill`.
template <class V, class T>
V load_some(const T* p, int64_t n, V fill) {
  return n >= V::width ? V::load(p) : choose_bits(V::load_n(p, n), fill, (1u << n) - 1u);
}

template <class V>
struct Blocks {
  using S = typename V::scalar;
  S *top, *sum, *weights;  // [blocks], [blocks], [values of a block]

  Blocks(const TokenSample& a, Pieces& pieces)
      : top(pieces.take<S>(round_up(a.blocks(), V::width))), sum(pieces.take<S>(round_up(a.blocks(), V::width))),
        weights(pieces.take<S>(a.block())) {}
};

template <class V, class T>
struct Row {
  using S = typename V::scalar;
  const TokenSample& a;
  const T* x;
  S inverse;  // of the temperature
  Blocks<V> use;
  S top = S(kLowest), total = 0;

  Row(const TokenSample& all, int64_t row, const Blocks<V>& buffers)
      : a(all), x(static_cast<const T*>(all.logits) + row / all.tokens * all.stride_batch + row % all.tokens * all.stride_token),
        inverse(S(1 / (all.temperature > 0 ? all.temperature : 1.0))), use(buffers) {}

  int64_t length(int64_t block) const { return min_of(a.block(), a.values - block * a.block()); }

  // The weights of n values, relative to `highest`; those past the last are 0. A negative probability is NaN, which spreads.
  V weight(const T* at, int64_t n, S highest) const {
    if (a.probs) {
      const V weights = load_some<V, T>(at, n, V::zero());
      return where_less(weights, V::zero(), V::all(S(__builtin_nanf(""))), weights);
    }
    return exp_below_zero((load_some<V, T>(at, n, V::all(S(kLowest))) - V::all(highest)) * V::all(inverse));
  }

  void sum_block(int64_t block) {
    const T* at = x + block * a.block();
    const int64_t n = length(block);
    V high[2] = {V::all(S(kLowest)), V::all(S(kLowest))}, sum[2] = {V::zero(), V::zero()};
    int64_t i = 0;
    for (; i + 2 * V::width <= n; i += 2 * V::width) {
      high[0] = max(V::load(at + i), high[0]);
      high[1] = max(V::load(at + i + V::width), high[1]);
    }
    for (; i < n; i += V::width) high[0] = max(load_some<V, T>(at + i, n - i, V::all(S(kLowest))), high[0]);
    const S highest = max(high[0], high[1]).highest();
    // Nothing above -inf: 0, or NaN where one of the values is.
    const S base = highest > S(kLowest) ? highest : S(0);
    for (i = 0; i + 2 * V::width <= n; i += 2 * V::width) {
      sum[0] = sum[0] + weight(at + i, V::width, base);
      sum[1] = sum[1] + weight(at + i + V::width, V::width, base);
    }
    for (; i < n; i += V::width) sum[0] = sum[0] + weight(at + i, n - i, base);
    use.top[block] = highest, use.sum[block] = (sum[0] + sum[1]).sum();
  }

  // All blocks, then their sums relative to the highest value of all.
  void sum_all() {
    const int64_t blocks = a.blocks(), whole = round_up(blocks, V::width);
    for (int64_t b = 0; b < blocks; ++b) sum_block(b), top = max_of(top, use.top[b]);
    for (int64_t b = blocks; b < whole; ++b) use.top[b] = S(kLowest), use.sum[b] = 0;
    for (int64_t b = 0; b < whole && !a.probs; b += V::width) {
      (V::load(use.sum + b) * exp_below_zero((V::load(use.top + b) - V::all(top)) * V::all(inverse))).store(use.sum + b);
    }
    for (int64_t b = 0; b < blocks; ++b) total += use.sum[b];
  }

  // The weights of a block, relative to the highest value of all, into the buffer.
  void make_weights(int64_t block) {
    const T* at = x + block * a.block();
    for (int64_t i = 0; i < length(block); i += V::width) weight(at + i, min_of<int64_t>(V::width, length(block) - i), top).store(use.weights + i);
  }

  // The first value at which the running sum of weights is above `target`; where rounding finds none, the last with a weight.
  int64_t draw(S target, S* found) {
    S below = 0, next = 0;
    int64_t block = -1;
    for (int64_t b = 0; b < a.blocks() && !(next > target); ++b) {
      if (!(use.sum[b] > 0)) continue;
      block = b, below = next, next = below + use.sum[b];
    }
    make_weights(block);
    int64_t last = 0;
    for (int64_t i = 0; i < length(block); ++i) {
      if (!(use.weights[i] > 0)) continue;
      last = i;
      below += use.weights[i];
      if (below > target) break;
    }
    *found = use.weights[last];
    return block * a.block() + last;
  }

  int64_t likeliest(S* found) {
    int64_t block = 0;
    while (!(use.top[block] == top)) ++block;
    const T* at = x + block * a.block();
    int64_t i = 0;
    while (!(S(to_float(at[i])) == top)) ++i;
    *found = a.probs ? top : S(1);
    return block * a.block() + i;
  }
};

template <class V, class T>
void sample_row(const TokenSample& a, int64_t row, const Blocks<V>& use) {
  using S = typename V::scalar;
  S* confidence = static_cast<S*>(a.confidence) + row;
  a.ids[row] = -1, *confidence = a.known[row] ? S(-kLowest) : S(kLowest);
  if (a.known[row]) return;
  Row<V, T> all(a, row, use);
  all.sum_all();
  if (!(all.total > 0 && all.total < S(-kLowest))) return;
  const PhiloxWords words = philox(a.key, uint64_t(a.first_row * a.tokens + row));
  S weight;
  if (a.temperature > 0) a.ids[row] = all.draw(uniform_of<S>(words.word[0]) * all.total, &weight);
  else a.ids[row] = all.likeliest(&weight);
  const S gumbel = a.noise == 0 ? S(0) : S(-__builtin_log(-__builtin_log(double(uniform_of<S>(words.word[1])))));
  *confidence = S(__builtin_log(double(weight / all.total))) + S(a.noise) * gumbel;
}

int64_t bytes(const TokenSample& a) {
  return with_vectors(a.dtype, [&]<class V, class T>() {
    Pieces pieces(nullptr);
    Blocks<V>(a, pieces);
    return pieces.bytes;
  });
}

void sample(const TokenSample& a, int64_t begin, int64_t end, void* buffer) {
  with_vectors(a.dtype, [&]<class V, class T>() {
    Pieces pieces(buffer);
    const Blocks<V> use(a, pieces);
    for (int64_t row = begin; row < end; ++row) sample_row<V, T>(a, row, use);
  });
}

template <class V, class T>
void drift_rows(const TokenDrift& a, int64_t begin, int64_t end) {
  using S = typename V::scalar;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.fresh) + row / a.tokens * a.fresh_batch + row % a.tokens * a.fresh_token;
    const T* y = static_cast<const T*>(a.cached) + row / a.tokens * a.cached_batch + row % a.tokens * a.cached_token;
    V xx = V::zero(), yy = V::zero(), xy = V::zero();
    for (int64_t d = 0; d < a.channels; d += V::width) {
      const int64_t n = min_of<int64_t>(V::width, a.channels - d);
      const V p = load_some<V, T>(x + d, n, V::zero()), q = load_some<V, T>(y + d, n, V::zero());
      if (a.kind == kDriftL2) {
        xx = fma(p - q, p - q, xx);
      } else {
        xx = fma(p, p, xx), yy = fma(q, q, yy), xy = fma(p, q, xy);
      }
    }
    S* out = static_cast<S*>(a.out) + row;
    const S first = S(__builtin_sqrt(double(xx.sum()))), lengths = first * S(__builtin_sqrt(double(yy.sum())));
    if (a.kind == kDriftL2) *out = first;
    else if (lengths == 0) *out = first != 0 || yy.sum() != 0;  // of rows so short that the product vanishes too
    else *out = S(1) - xy.sum() / lengths;
  }
}

void drift(const TokenDrift& a, int64_t begin, int64_t end) {
  with_vectors(a.dtype, [&]<class V, class T>() { drift_rows<V, T>(a, begin, end); });
}

}  // namespace

extern const SelectKernels SelectKernels_table{&bytes, &sample, &drift};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
