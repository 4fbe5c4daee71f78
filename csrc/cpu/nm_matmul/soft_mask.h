// Soft masks of a row of the weight, and their gradients, V::width groups at a time: lane g of a vector belongs to group g.
#pragma once

#include "common/simd_philox.h"
#include "cpu/nm_matmul/soft.h"
#include "math/nm_matmul.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

template <class V>
struct SoftMasks {
  using S = typename V::scalar;
  static constexpr int kWidth = V::width;

  const Soft& soft;
  int64_t groups;
  S *noisy, *mask;  // a row of a = logits * scale + noise, and the mask [K]
  uint32_t pattern[kMaxPatterns];

  SoftMasks(const Soft& s, Pieces& pieces)
      : soft(s), groups(s.inputs / s.m), noisy(pieces.take<S>(groups * s.patterns + 64)), mask(pieces.take<S>(s.inputs)) {
    uint32_t next = first_pattern(s.n);
    for (int64_t i = 0; s.exact && i < s.patterns; ++i, next = next_pattern(next, s.m)) pattern[i] = next;
  }

  // noisy of output o. Words come by whole counters, so the first ones may belong to the row before.
  void draw(int64_t o) {
    const int64_t count = groups * soft.patterns, first = o * count, skip = first & 3;
    const S* logits = static_cast<const S*>(soft.logits) + first;
    const S scale = S(soft.scale);
    constexpr int64_t kWords = 4 * kPhiloxCounters;
    alignas(64) uint32_t words[kWords];
    alignas(64) S uniform[kWords];
    for (int64_t i = -skip; i < count; i += kWords) {
      philox_words(soft.key, uint64_t(first + i) >> 2, words);
      for (int64_t w = 0; w < kWords; ++w) uniform[w] = uniform_of<S>(words[w]);
      for (int64_t w = 0; w < kWords; w += kWidth) {
        const V one = log_of_positive(V::load(uniform + w)), two = log_of_positive(V::zero() - one);
        (V::zero() - two).store(uniform + w);
      }
      const int64_t from = max_of<int64_t>(0, -i), stop = min_of(kWords, count - i);
      for (int64_t w = from; w < stop; ++w) noisy[i + w] = logits[i + w] * scale + uniform[w];
    }
  }

  // Value i of every group of [g0, g0 + kWidth); past the last group the last one is read again.
  V load(const S* row, int64_t g0, int64_t per_group, int64_t i) const {
    S lanes[kWidth];
    for (int g = 0; g < kWidth; ++g) lanes[g] = row[min_of(g0 + g, groups - 1) * per_group + i];
    return V::load(lanes);
  }
  void store(V value, int64_t g0, int64_t per_group, int64_t i, S* row) const {
    S lanes[kWidth];
    value.store(lanes);
    for (int64_t g = 0; g < min_of<int64_t>(kWidth, groups - g0); ++g) row[(g0 + g) * per_group + i] = lanes[g];
  }

  // p = softmax(a / tau), in place.
  void softmax(const V* a, int64_t count, V* p) const {
    V most = a[0], sum = V::zero();
    for (int64_t i = 1; i < count; ++i) most = max(most, a[i]);
    for (int64_t i = 0; i < count; ++i) {
      p[i] = exp_below_zero((a[i] - most) * V::all(S(1 / soft.tau)));
      sum = sum + p[i];
    }
    for (int64_t i = 0; i < count; ++i) p[i] = p[i] / sum;
  }

  // The distributions of the groups from g0 on and their mask: exact p [P]; linear p [n][m].
  void distributions(int64_t g0, V* p, V* soft_mask) const {
    const int64_t count = soft.patterns;
    V a[kMaxPatterns];
    for (int64_t i = 0; i < count; ++i) a[i] = load(noisy, g0, count, i);
    for (int k = 0; k < soft.m; ++k) soft_mask[k] = V::zero();
    if (soft.exact) {
      softmax(a, count, p);
      for (int64_t i = 0; i < count; ++i) {
        for (uint32_t rest = pattern[i]; rest != 0; rest &= rest - 1) {
          const int k = __builtin_ctz(rest);
          soft_mask[k] = soft_mask[k] + p[i];
        }
      }
      return;
    }
    for (int step = 0; step < soft.n; ++step, p += soft.m) {
      softmax(a, soft.m, p);
      for (int k = 0; k < soft.m; ++k) {
        soft_mask[k] = soft_mask[k] + p[k];
        a[k] = a[k] + log_of_positive(max(V::all(S(1)) - p[k], V::all(relaxed_eps<S>())));
      }
    }
  }

  // The hard mask of a group: its most likely pattern, or its n largest logits.
  uint32_t hard_mask(int64_t g) const {
    const S* a = noisy + g * soft.patterns;
    using Key = decltype(score_key(S()));
    Key keys[kMaxPatterns];
    for (int64_t i = 0; i < soft.patterns; ++i) keys[i] = score_key(a[i]);
    if (!soft.exact) return largest_keys(keys, soft.m, soft.n);
    int64_t best = 0;
    for (int64_t i = 1; i < soft.patterns; ++i) best = keys[i] > keys[best] ? i : best;
    return pattern[best];
  }

  // mask = the mask of the forward pass for output o.
  void forward(int64_t o) {
    draw(o);
    if (soft.hard) {
      for (int64_t g = 0; g < groups; ++g) {
        const uint32_t kept = hard_mask(g);
        for (int k = 0; k < soft.m; ++k) mask[g * soft.m + k] = S((kept >> k) & 1u);
      }
      return;
    }
    V p[kMaxPatterns > kMaxGroup * kMaxGroup ? kMaxPatterns : kMaxGroup * kMaxGroup], values[kMaxGroup];
    for (int64_t g0 = 0; g0 < groups; g0 += kWidth) {
      distributions(g0, p, values);
      for (int k = 0; k < soft.m; ++k) store(values[k], g0, soft.m, k, mask);
    }
  }

  // grad [N, G, P] or [N, K] of output o from the gradient of its mask [K]; noisy holds the row of o.
  void backward(const S* grad_mask, S* grad) const {
    V p[kMaxGroup * kMaxGroup], values[kMaxGroup], g[kMaxGroup], work[kMaxPatterns];
    const V per_tau = V::all(S(1 / soft.tau)), scale = V::all(S(soft.scale));
    for (int64_t g0 = 0; g0 < groups; g0 += kWidth) {
      distributions(g0, p, values);
      for (int k = 0; k < soft.m; ++k) g[k] = load(grad_mask, g0, soft.m, k);
      if (soft.exact) {
        for (int64_t i = 0; i < soft.patterns; ++i) {
          work[i] = V::zero();
          for (uint32_t rest = pattern[i]; rest != 0; rest &= rest - 1) work[i] = work[i] + g[__builtin_ctz(rest)];
        }
        through_softmax(p, soft.patterns, per_tau, work);
      } else {
        through_steps(p, g, per_tau, work);
      }
      for (int64_t i = 0; i < soft.patterns; ++i) store(work[i] * scale, g0, soft.patterns, i, grad);
    }
  }

  // p * (grad - sum(p * grad)) / tau, in place of grad.
  static void through_softmax(const V* p, int64_t count, V per_tau, V* grad) {
    V mean = V::zero();
    for (int64_t i = 0; i < count; ++i) mean = fma(p[i], grad[i], mean);
    for (int64_t i = 0; i < count; ++i) grad[i] = p[i] * (grad[i] - mean) * per_tau;
  }

  // Back through the relaxed steps; total: the gradient of the noisy logits.
  void through_steps(const V* p, const V* grad_mask, V per_tau, V* total) const {
    const V eps = V::all(relaxed_eps<S>());
    for (int k = 0; k < soft.m; ++k) total[k] = V::zero();
    for (int step = soft.n - 1; step >= 0; --step) {
      const V* now = p + step * soft.m;
      V grad[kMaxGroup];
      for (int k = 0; k < soft.m; ++k) {
        const V left = V::all(S(1)) - now[k];
        grad[k] = grad_mask[k] - where_less(eps, left, total[k] / max(left, eps), V::zero());
      }
      through_softmax(now, soft.m, per_tau, grad);
      for (int k = 0; k < soft.m; ++k) total[k] = total[k] + grad[k];
    }
  }
};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
