// Noise, soft masks and their gradients for a panel of rows of W at a time: row r of the panel is lane r of every vector, so that
// the values of a group are V::width apart from nothing but memory, and no sum runs across lanes.
#pragma once

#include "common/simd_philox.h"
#include "cpu/nm_matmul/soft.h"
#include "math/nm_matmul.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

// ---- noise

// to[i] = scale * logits[i] + Gumbel noise number first + i, for i < count; to has room for whole vectors, words for 4 of them more.
template <class V>
static inline void noisy_logits(const PhiloxKey& key, const typename V::scalar* logits, int64_t first, int64_t count,
                                typename V::scalar scale, uint32_t* words, typename V::scalar* to) {
  typedef uint32_t Word __attribute__((vector_size(V::width * 4)));
  typedef int32_t Signed __attribute__((vector_size(V::width * 4)));
  using S = typename V::scalar;
  const int64_t skipped = first % 4;
  philox_words(key, uint64_t((first - skipped) / 4), count + skipped, words);
  for (int64_t i = 0; i < count; i += V::width) {
    Word word;
    memcpy(&word, words + skipped + i, sizeof(word));
    V number;
    number.v = decltype(number.v)(__builtin_convertvector(Signed(word >> 9), typename FloatFormat<V>::Raw));
    const V uniform = (number + V::all(S(0.5))) * V::all(S(0x1p-23));
    const V exponential = V::zero() - log_of_positive(uniform);
    const V logit = V::load_n(logits + i, min_of<int64_t>(count - i, V::width));
    (logit * V::all(scale) - log_of_positive(exponential)).store(to + i);
  }
}

// 1 / tau as a sum of two numbers: the rounding of one alone would change every exponent in the same direction.
template <class V>
struct InverseTau {
  V high, low;

  static inline InverseTau of(double value) {
    using S = typename V::scalar;
    return {V::all(S(value)), V::all(S(value - double(S(value))))};
  }
  // -inf times a `low` of 0 would be NaN.
  inline V times(V x) const {
    const V least = V::all(typename V::scalar(-1e30)), finite = where_less(x, least, least, x);
    return fma(finite, high, finite * low);
  }
};

// Sum of term(i) for i < count, in four chains: the rounding error grows with the length of a chain.
template <class V, class Term>
static inline V sum_of(int count, const Term& term) {
  if (count < 8) {
    V sum = term(0);
    for (int i = 1; i < count; ++i) sum = sum + term(i);
    return sum;
  }
  V chain[4] = {term(0), term(1), term(2), term(3)};
  int i = 4;
  for (; i + 4 <= count; i += 4) {
    for (int c = 0; c < 4; ++c) chain[c] = chain[c] + term(i + c);
  }
  for (; i < count; ++i) chain[i % 4] = chain[i % 4] + term(i);
  return (chain[0] + chain[1]) + (chain[2] + chain[3]);
}

// ---- masks of a group; a: the group's noisy logits, `stride` values apart

// Replaced by the distribution of the softmax.
template <class V>
static inline void softmax_lanes(typename V::scalar* a, int64_t stride, int count, const InverseTau<V>& inverse_tau) {
  V most = V::load(a);
  for (int i = 1; i < count; ++i) most = max(most, V::load(a + i * stride));
  const V sum = sum_of<V>(count, [&](int i) {
    const V e = exp_below_zero(inverse_tau.times(V::load(a + i * stride) - most));
    e.store(a + i * stride);
    return e;
  });
  const V share = V::all(1) / sum;
  for (int i = 0; i < count; ++i) (V::load(a + i * stride) * share).store(a + i * stride);
}

// A number in the order of the scores of nm_matmul_mask: NaN becomes -inf, and -inf the lowest finite number.
template <class V>
static inline V rank_of(V a) {
  using S = typename V::scalar;
  const S lowest = sizeof(S) == 8 ? S(-0x1.fffffffffffffp1023) : S(-0x1.fffffep127f);
  const V finite = where_less(a, V::all(lowest), V::all(lowest), a), none = V::all(-S(__builtin_inf()));
  return where_less(none, finite, finite, none);
}

// The first of the patterns with the largest value, as zeros and ones.
template <class V>
static inline void best_pattern(const Soft& soft, const typename V::scalar* a, int64_t stride, V* mask) {
  const V zero = V::zero(), one = V::all(1);
  V best = rank_of(V::load(a));
  for (int k = 0; k < soft.m; ++k) mask[k] = k < soft.n ? one : zero;
  for (int i = 1; i < soft.patterns; ++i) {
    const V rank = rank_of(V::load(a + i * stride));
    const int32_t* places = soft.places + i * soft.n;
    for (int k = 0, at = 0; k < soft.m; ++k) {
      const bool kept = at < soft.n && places[at] == k;
      at += kept;
      mask[k] = where_less(best, rank, kept ? one : zero, mask[k]);
    }
    best = where_less(best, rank, rank, best);
  }
}

// The n largest of m, equal ones by index, as zeros and ones.
template <class V>
static inline void best_places(const Soft& soft, const typename V::scalar* a, int64_t stride, V* mask) {
  const V zero = V::zero(), one = V::all(1);
  V rank[kMaxGroup];
  for (int k = 0; k < soft.m; ++k) rank[k] = rank_of(V::load(a + k * stride));
  for (int k = 0; k < soft.m; ++k) {
    V better = zero;
    for (int i = 0; i < k; ++i) better = better + where_less(rank[i], rank[k], zero, one);
    for (int i = k + 1; i < soft.m; ++i) better = better + where_less(rank[k], rank[i], one, zero);
    mask[k] = where_less(better, V::all(soft.n), one, zero);
  }
}

// The mask of the forward pass; a becomes the distribution over patterns.
template <class V>
static inline void mask_of_group(const Soft& soft, typename V::scalar* a, int64_t stride, const InverseTau<V>& inverse_tau, V* mask) {
  if (soft.hard) best_pattern(soft, a, stride, mask);
  softmax_lanes(a, stride, soft.patterns, inverse_tau);
  if (soft.hard) return;
  const int count = soft.patterns * soft.n / soft.m;
  for (int k = 0; k < soft.m; ++k) {
    const int32_t* members = soft.members + k * count;
    mask[k] = sum_of<V>(count, [&](int i) { return V::load(a + members[i] * stride); });
  }
}

// a, the distribution, becomes the gradient of the logits.
template <class V>
static inline void grad_of_group(const Soft& soft, typename V::scalar* a, int64_t stride, V factor, const V* grad_mask) {
  V grad[kMaxPatterns];
  const V mean = sum_of<V>(soft.patterns, [&](int i) {
    const int32_t* places = soft.places + i * soft.n;
    grad[i] = sum_of<V>(soft.n, [&](int at) { return grad_mask[places[at]]; });
    return V::load(a + i * stride) * grad[i];
  });
  for (int i = 0; i < soft.patterns; ++i) (V::load(a + i * stride) * (grad[i] - mean) * factor).store(a + i * stride);
}

// The same for logits in linear space: the relaxed top-n of math/nm_matmul.h. p [n, m] keeps its distributions.
template <class V>
static inline void relaxed_mask_of_group(const Soft& soft, typename V::scalar* a, int64_t stride, const InverseTau<V>& inverse_tau,
                                         typename V::scalar* p, V* mask) {
  using S = typename V::scalar;
  const V eps = V::all(relaxed_eps<S>());
  if (soft.hard) best_places(soft, a, stride, mask);
  for (int k = 0; k < soft.m && !soft.hard; ++k) mask[k] = V::zero();
  for (int step = 0; step < soft.n; ++step, p += soft.m * V::width) {
    for (int k = 0; k < soft.m; ++k) V::load(a + k * stride).store(p + k * V::width);
    softmax_lanes<V>(p, V::width, soft.m, inverse_tau);
    for (int k = 0; k < soft.m; ++k) {
      const V share = V::load(p + k * V::width), left = V::all(1) - share;
      if (!soft.hard) mask[k] = mask[k] + share;
      (V::load(a + k * stride) + log_of_positive(where_less(left, eps, eps, left))).store(a + k * stride);
    }
  }
}

// a becomes the gradient of the logits.
template <class V>
static inline void relaxed_grad_of_group(const Soft& soft, typename V::scalar* a, int64_t stride, const InverseTau<V>& inverse_tau,
                                         V scale, const typename V::scalar* p, const V* grad_mask) {
  using S = typename V::scalar;
  const V eps = V::all(relaxed_eps<S>()), zero = V::zero();
  V grad_r[kMaxGroup], grad[kMaxGroup];
  for (int k = 0; k < soft.m; ++k) grad_r[k] = zero;
  for (int step = soft.n - 1; step >= 0; --step) {  // grad_r: of what the softmax of the next step saw
    const S* now = p + step * soft.m * V::width;
    V mean = zero;
    for (int k = 0; k < soft.m; ++k) {
      const V share = V::load(now + k * V::width), left = V::all(1) - share;
      grad[k] = grad_mask[k] - where_less(eps, left, grad_r[k] / left, zero);
      mean = fma(share, grad[k], mean);
    }
    for (int k = 0; k < soft.m; ++k) {
      grad_r[k] = grad_r[k] + inverse_tau.times(V::load(now + k * V::width) * (grad[k] - mean));
    }
  }
  for (int k = 0; k < soft.m; ++k) (grad_r[k] * scale).store(a + k * stride);
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
