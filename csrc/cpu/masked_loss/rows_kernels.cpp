// Kernels over single rows: each needs every value once or twice, from memory or the L2 cache. Sums that rows share (gradients of
// keys, of hidden tokens) are made slice by slice of 64 channels, each in the order of its rows, so threads change nothing.
#include "common/gemm.h"
#include "common/simd_math.h"
#include "cpu/masked_loss/rows.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

constexpr int64_t kSlice = 64;

// Sum over d of term(first, count): vectors of `count` valid elements from `first` on. Invalid lanes must give 0.
template <class V, class Term>
typename V::scalar sum_of(int64_t D, const Term& term) {
  V sums[2] = {V::zero(), V::zero()};
  int64_t d = 0;
  for (; d + 2 * V::width <= D; d += 2 * V::width) {
    sums[0] = sums[0] + term(d, V::width);
    sums[1] = sums[1] + term(d + V::width, V::width);
  }
  for (; d < D; d += V::width) sums[0] = sums[0] + term(d, min_of<int64_t>(V::width, D - d));
  return (sums[0] + sums[1]).sum();
}

template <class V, class T>
typename V::scalar dot(const T* a, const T* b, int64_t D) {
  return sum_of<V>(D, [&](int64_t d, int64_t n) { return V::load_n(a + d, n) * V::load_n(b + d, n); });
}

template <class V, class T>
void widen(const T* from, int64_t D, typename V::scalar* to) {  // and zeros up to a whole vector
  for (int64_t d = 0; d < D; d += V::width) V::load_n(from + d, min_of<int64_t>(V::width, D - d)).store(to + d);
}

// ---- masked_regression

template <class T>
void regression_row(const RegressionLoss& a, bool backward, int64_t n, typename VecFor<T>::type::scalar* buffer) {
  using V = typename VecFor<T>::type;
  using S = typename V::scalar;
  const int64_t D = a.D;
  S* out = static_cast<S*>(a.loss) + n;
  T* grad = backward ? static_cast<T*>(a.grad_pred) + n * D : nullptr;
  if (!a.mask[n]) {
    if (backward) memset(grad, 0, size_t(D) * sizeof(T));
    else *out = 0;
    return;
  }
  S *pred = buffer, *wanted = buffer + round_up(D, 64);
  widen<V>(static_cast<const T*>(a.pred) + n * a.pred_stride, D, pred);
  widen<V>(static_cast<const T*>(a.target) + n * a.target_stride, D, wanted);
  if (a.normalise) {
    // Differences from the first value: a constant row is exact.
    const V first = V::all(D > 0 ? wanted[0] : S(0));
    const S shift = sum_of<V>(D, [&](int64_t d, int64_t n) {
      S rest[V::width] = {};
      (V::load(wanted + d) - first).store_n(rest, n);
      return V::load(rest);
    }) / S(D);
    const V mean = first + V::all(shift);
    const S squares = sum_of<V>(D, [&](int64_t d, int64_t n) {
      S rest[V::width] = {};
      (V::load(wanted + d) - mean).store_n(rest, n);
      return V::load(rest) * V::load(rest);
    });
    const V rstd = V::all(S(1 / __builtin_sqrt(double(squares) / double(D) + a.eps)));
    for (int64_t d = 0; d < D; d += V::width) ((V::load(wanted + d) - mean) * rstd).store_n(wanted + d, min_of<int64_t>(V::width, D - d));
  }
  if (a.kind == 3) {
    const double product = dot<V>(pred, wanted, D), square = dot<V>(pred, pred, D), other = dot<V>(wanted, wanted, D);
    const double size = __builtin_sqrt(square) * __builtin_sqrt(other), lengths = size < 1e-8 ? 1e-8 : size;
    if (!backward) {
      *out = S(1 - product / lengths);
      return;
    }
    const V along = V::all(size > 1e-8 ? S(product / square) : S(0)), by = V::all(S(double(*out) / lengths));
    for (int64_t d = 0; d < D; d += V::width) {
      ((along * V::load(pred + d) - V::load(wanted + d)) * by).store_n(grad + d, min_of<int64_t>(V::width, D - d));
    }
    return;
  }
  const V beta = V::all(S(a.beta)), half = V::all(S(0.5 * a.beta)), one = V::all(1), minus = V::all(-1), zero = V::zero();
  if (!backward) {
    const S total = sum_of<V>(D, [&](int64_t d, int64_t) {  // zero past the end: both are zero there
      const V error = V::load(pred + d) - V::load(wanted + d), size = abs(error);
      if (a.kind == 0) return error * error;
      return a.kind == 1 ? size : where_less(size, beta, V::all(0.5f) * error * error / beta, size - half);
    });
    *out = total / S(D > 0 ? D : 1);
    return;
  }
  const V by = V::all(*out / S(D));
  for (int64_t d = 0; d < D; d += V::width) {
    const V error = V::load(pred + d) - V::load(wanted + d);
    V slope = error + error;
    if (a.kind != 0) {
      const V scaled = error / beta;  // a comparison with NaN is false, so NaN is what is left over
      slope = a.kind == 1 ? where_less(zero, error, one, where_less(error, zero, minus, error))
                          : where_less(one, scaled, one, where_less(scaled, minus, minus, scaled));
    }
    (slope * by).store_n(grad + d, min_of<int64_t>(V::width, D - d));
  }
}

// ---- contrastive_loss

template <class T>
struct Contrast {
  using V = typename VecFor<T>::type;
  using S = typename V::scalar;
  const ContrastLoss& a;

  const T* key(int64_t id) const { return static_cast<const T*>(a.keys) + id * a.keys_stride; }
  const T* query(int64_t m) const { return static_cast<const T*>(a.query) + m * a.query_stride; }
  int64_t id(int64_t m, int64_t k) const { return k == 0 ? a.positive[m] : a.negatives[m * a.K + k - 1]; }

  bool same_values(const T* x, const T* y) const {
    for (int64_t d = 0; d < a.D; ++d) {
      if (!(to_float(x[d]) == to_float(y[d]))) return false;
    }
    return true;
  }

  // Logits [1 + K] of a query that counts, -inf where there is no key or one that collides with the positive.
  void logits(int64_t m, S* to) const {
    const S none = S(-__builtin_inff());
    for (int64_t k = 0; k <= a.K; ++k) {
      const int64_t i = id(m, k);
      if (k < a.K && id(m, k + 1) >= 0) {
        const char* next = reinterpret_cast<const char*>(key(id(m, k + 1)));
        for (int64_t b = 0; b < a.D * int64_t(sizeof(T)); b += 64) __builtin_prefetch(next + b);
      }
      to[k] = i < 0 ? none : dot<V>(query(m), key(i), a.D) * S(a.scale);
      // Equal keys have equal logits, NaN aside.
      if (k > 0 && a.collide && i >= 0 && to[k] == to[0] && same_values(key(i), key(id(m, 0)))) to[k] = none;
    }
  }

  void forward(int64_t m, S* buffer) const {
    S *loss = static_cast<S*>(a.loss) + m, *lse = static_cast<S*>(a.lse) + m;
    *loss = *lse = 0;
    if (a.positive[m] < 0) return;
    logits(m, buffer);
    double top = buffer[0], total = 0;
    for (int64_t k = 1; k <= a.K; ++k) top = buffer[k] > top ? double(buffer[k]) : top;
    for (int64_t k = 0; k <= a.K; ++k) total += __builtin_exp(double(buffer[k]) - top);
    const double all = top + __builtin_log(total);
    *lse = S(all), *loss = S(all - double(buffer[0]));
  }

  void slope(int64_t m, S* sums) const {
    S* slope = static_cast<S*>(a.slope) + m * (a.K + 1);
    memset(sums, 0, size_t(round_up(a.D, V::width)) * sizeof(S));
    if (a.positive[m] < 0) {
      memset(slope, 0, size_t(a.K + 1) * sizeof(S));
    } else {
      logits(m, slope);
      const S grad = static_cast<const S*>(a.loss)[m] * S(a.scale), lse = static_cast<const S*>(a.lse)[m];
      for (int64_t k = 0; k <= a.K; ++k) {
        slope[k] = S(__builtin_exp(double(slope[k] - lse)) - (k == 0)) * grad;
        if (id(m, k) < 0) continue;
        const V by = V::all(slope[k]);
        const T* from = key(id(m, k));
        for (int64_t d = 0; d < a.D; d += V::width) {
          fma(by, V::load_n(from + d, min_of<int64_t>(V::width, a.D - d)), V::load(sums + d)).store(sums + d);
        }
      }
    }
    T* out = static_cast<T*>(a.grad_query) + m * a.D;
    for (int64_t d = 0; d < a.D; d += V::width) V::load(sums + d).store_n(out + d, min_of<int64_t>(V::width, a.D - d));
  }

  void keys(int64_t slice, S* sums) const {
    const int64_t first = slice * kSlice, count = min_of(kSlice, a.D - first);
    memset(sums, 0, size_t(a.P * kSlice) * sizeof(S));
    alignas(64) S row[kSlice];
    for (int64_t m = 0; m < a.M; ++m) {
      if (a.positive[m] < 0) continue;
      widen<V>(query(m) + first, count, row);
      const S* slope = static_cast<const S*>(a.slope) + m * (a.K + 1);
      for (int64_t k = 0; k <= a.K; ++k) {
        if (id(m, k) < 0) continue;
        S* to = sums + id(m, k) * kSlice;
        const V by = V::all(slope[k]);
        for (int64_t d = 0; d < count; d += V::width) fma(by, V::load(row + d), V::load(to + d)).store(to + d);
      }
    }
    for (int64_t p = 0; p < a.P; ++p) {
      T* out = static_cast<T*>(a.grad_keys) + p * a.D + first;
      for (int64_t d = 0; d < count; d += V::width) V::load(sums + p * kSlice + d).store_n(out + d, min_of<int64_t>(V::width, count - d));
    }
  }
};

// ---- linear_max_pool, backward

template <class T>
void pool_weight(const PoolBackward& a, int64_t v, typename VecFor<T>::type::scalar* sums) {
  using V = typename VecFor<T>::type;
  using S = typename V::scalar;
  memset(sums, 0, size_t(round_up(a.D, V::width)) * sizeof(S));
  S bias = 0;
  for (int64_t b = 0; b < a.B; ++b) {
    const int64_t at = a.at[b * a.V + v];
    if (at < 0) continue;
    const S grad = static_cast<const S*>(a.grad)[b * a.V + v];
    const T* row = static_cast<const T*>(a.hidden) + (b * a.L + at) * a.D;
    const V by = V::all(grad);
    bias += grad;
    for (int64_t d = 0; d < a.D; d += V::width) fma(by, V::load_n(row + d, min_of<int64_t>(V::width, a.D - d)), V::load(sums + d)).store(sums + d);
  }
  T* out = static_cast<T*>(a.grad_weight) + v * a.D;
  for (int64_t d = 0; d < a.D; d += V::width) V::load(sums + d).store_n(out + d, min_of<int64_t>(V::width, a.D - d));
  from_float(bias, static_cast<T*>(a.grad_bias) + v);
}

template <class T>
void pool_hidden(const PoolBackward& a, int64_t slice, typename VecFor<T>::type::scalar* sums) {
  using V = typename VecFor<T>::type;
  using S = typename V::scalar;
  const int64_t first = slice * kSlice, count = min_of(kSlice, a.D - first), tokens = a.B * a.L;
  memset(sums, 0, size_t(tokens * kSlice) * sizeof(S));
  alignas(64) S row[kSlice];
  for (int64_t v = 0; v < a.V; ++v) {
    widen<V>(static_cast<const T*>(a.weight) + v * a.D + first, count, row);
    for (int64_t b = 0; b < a.B; ++b) {
      const int64_t at = a.at[b * a.V + v];
      if (at < 0) continue;
      S* to = sums + (b * a.L + at) * kSlice;
      const V by = V::all(static_cast<const S*>(a.grad)[b * a.V + v]);
      for (int64_t d = 0; d < count; d += V::width) fma(by, V::load(row + d), V::load(to + d)).store(to + d);
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    T* out = static_cast<T*>(a.grad_hidden) + t * a.D + first;
    for (int64_t d = 0; d < count; d += V::width) V::load(sums + t * kSlice + d).store_n(out + d, min_of<int64_t>(V::width, count - d));
  }
}

// ---- the table

template <class Body>
void with_type(int dtype, const Body& body) {  // codes of common/dispatch.h
  switch (dtype) {
    case 0: return body.template operator()<float>();
    case 1: return body.template operator()<double>();
    case 2: return body.template operator()<bf16>();
    default: return body.template operator()<f16>();
  }
}

template <class T>
using SumOf = typename VecFor<T>::type::scalar;

void regression(const RegressionLoss& a, bool backward, int64_t begin, int64_t end, void* buffer) {
  with_type(a.dtype, [&]<class T>() {
    for (int64_t n = begin; n < end; ++n) regression_row<T>(a, backward, n, static_cast<SumOf<T>*>(buffer));
  });
}
void contrast(const ContrastLoss& a, int64_t begin, int64_t end, void* buffer) {
  with_type(a.dtype, [&]<class T>() {
    for (int64_t m = begin; m < end; ++m) Contrast<T>{a}.forward(m, static_cast<SumOf<T>*>(buffer));
  });
}
void contrast_slope(const ContrastLoss& a, int64_t begin, int64_t end, void* buffer) {
  with_type(a.dtype, [&]<class T>() {
    for (int64_t m = begin; m < end; ++m) Contrast<T>{a}.slope(m, static_cast<SumOf<T>*>(buffer));
  });
}
void contrast_keys(const ContrastLoss& a, int64_t begin, int64_t end, void* buffer) {
  with_type(a.dtype, [&]<class T>() {
    for (int64_t s = begin; s < end; ++s) Contrast<T>{a}.keys(s, static_cast<SumOf<T>*>(buffer));
  });
}
void pool_weights(const PoolBackward& a, int64_t begin, int64_t end, void* buffer) {
  with_type(a.dtype, [&]<class T>() {
    for (int64_t v = begin; v < end; ++v) pool_weight<T>(a, v, static_cast<SumOf<T>*>(buffer));
  });
}
void pool_hiddens(const PoolBackward& a, int64_t begin, int64_t end, void* buffer) {
  with_type(a.dtype, [&]<class T>() {
    for (int64_t s = begin; s < end; ++s) pool_hidden<T>(a, s, static_cast<SumOf<T>*>(buffer));
  });
}

}  // namespace

extern const RowLossKernels RowLossKernels_table{&regression, &contrast, &contrast_slope, &contrast_keys, &pool_weights, &pool_hiddens};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
