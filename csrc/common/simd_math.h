// Logarithm, exponential, and selection by bits for the vectors of simd.h: one source for every instruction set.
//
// Errors against the exact function, relative: below 2e-7 for floats, 1e-15 for doubles, with or without FMA.
#pragma once

#include "common/simd.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

template <class V>
struct FloatFormat;
template <>
struct FloatFormat<VecF> {
  typedef float Raw __attribute__((vector_size(sizeof(VecF))));
  typedef int32_t Int __attribute__((vector_size(sizeof(VecF))));
  static constexpr int fraction = 23;
  static constexpr int32_t bias = 127, sqrt_half = 0x3f3504f3;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: what is added to it becomes an integer in the low bits
  static constexpr float lowest_exp = -86.5f;  // exp of less is not a normal number
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // n * ln2_high is exact for |n| < 2^14
  static constexpr int exp_terms = 8;
};
template <>
struct FloatFormat<VecD> {
  typedef double Raw __attribute__((vector_size(sizeof(VecD))));
  typedef int64_t Int __attribute__((vector_size(sizeof(VecD))));
  static constexpr int fraction = 52;
  static constexpr int64_t bias = 1023, sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr double round = 6755399441055744.0;
  static constexpr double lowest_exp = -707.0;
  static constexpr double ln2_high = 0x1.62e42fefa0000p-1, ln2_low = 0x1.cf79abc9e3b3ap-40;
  static constexpr int exp_terms = 14;
};

template <class V>
static inline typename FloatFormat<V>::Int bits_of(V x) {
  return typename FloatFormat<V>::Int(x.v);
}
template <class V>
static inline V of_bits(typename FloatFormat<V>::Int bits) {
  V x;
  x.v = decltype(x.v)(bits);
  return x;
}

// x where bit i of `kept` is set for lane i, else zero, whatever x holds.
#if MASKOPS_ISA_LEVEL == 2
static inline VecF keep_bits(VecF x, uint32_t kept) { return {_mm512_maskz_mov_ps(__mmask16(kept), x.v)}; }
static inline VecD keep_bits(VecD x, uint32_t kept) { return {_mm512_maskz_mov_pd(__mmask8(kept), x.v)}; }
#else
template <class V>
static inline V keep_bits(V x, uint32_t kept) {
  using Int = typename FloatFormat<V>::Int;
  Int lane;
  for (int i = 0; i < V::width; ++i) lane[i] = 1 << i;
  const Int all = Int{} + decltype(lane[0] + 0)(kept & ((1u << V::width) - 1u));
  return of_bits<V>(bits_of(x) & ((all & lane) != 0));
}
#endif

// x where bit i of `kept` is set for lane i, else y.
#if MASKOPS_ISA_LEVEL == 2
static inline VecF choose_bits(VecF x, VecF y, uint32_t kept) { return {_mm512_mask_mov_ps(y.v, __mmask16(kept), x.v)}; }
static inline VecD choose_bits(VecD x, VecD y, uint32_t kept) { return {_mm512_mask_mov_pd(y.v, __mmask8(kept), x.v)}; }
#else
template <class V>
static inline V choose_bits(V x, V y, uint32_t kept) {
  const V one = keep_bits(x, kept), other = keep_bits(y, ~kept);
  return of_bits<V>(bits_of(one) | bits_of(other));
}
#endif

// ---- exponential

// exp(x) for x <= 0; 0 below FloatFormat::lowest_exp; NaN stays NaN.
template <class V>
static inline V exp_below_zero(V x) {
  using F = FloatFormat<V>;
  using S = typename V::scalar;
  const V lowest = V::all(F::lowest_exp);
  const V within = where_less(x, lowest, lowest, x);
  const V shifted = fma(within, V::all(S(1.4426950408889634)), V::all(F::round));
  const V n = shifted - V::all(F::round);
  const V r = fma(n, V::all(-F::ln2_low), fma(n, V::all(-F::ln2_high), within));
  // 1 + r (1 + r/2 (1 + r/3 (...))), |r| <= ln(2) / 2
  constexpr S inverse[] = {S(1),      S(1.0 / 2), S(1.0 / 6), S(1.0 / 24), S(1.0 / 120), S(1.0 / 720), S(1.0 / 5040), S(1.0 / 40320),
                           S(1.0 / 362880), S(1.0 / 3628800), S(1.0 / 39916800), S(1.0 / 479001600), S(1.0 / 6227020800.0),
                           S(1.0 / 87178291200.0)};
  V sum = V::all(inverse[F::exp_terms - 1]);
#pragma GCC unroll 16
  for (int i = F::exp_terms - 2; i >= 0; --i) sum = fma(sum, r, V::all(inverse[i]));
  const V value = fma(sum, r, V::all(S(1)));
  const V scale = of_bits<V>((bits_of(shifted) + F::bias) << F::fraction);
  return where_less(x, lowest, V::zero(), value * scale);
}

// 2^r for |r| <= 1/2: for floats the polynomial of least relative error, 2e-9, for doubles the power series.
static inline VecF exp2_near_zero(VecF r) {
  constexpr float c[] = {0.6931472f, 0.24022648f, 0.055503324f, 0.009618437f, 0.0013398875f, 0.00015353362f};
  VecF sum = VecF::all(c[5]);
#pragma GCC unroll 8
  for (int i = 4; i >= 0; --i) sum = fma(sum, r, VecF::all(c[i]));
  return fma(sum, r, VecF::all(1.0f));
}
static inline VecD exp2_near_zero(VecD r) {
  constexpr double c[] = {1.0, 0x1.62e42fefa39efp-1, 0x1.ebfbdff82c58fp-3, 0x1.c6b08d704a0cp-5, 0x1.3b2ab6fba4e77p-7,
                          0x1.5d87fe78a6731p-10, 0x1.430912f86c787p-13, 0x1.ffcbfc588b0c7p-17, 0x1.62c0223a5c824p-20,
                          0x1.b5253d395e7c4p-24, 0x1.e4cf5158b8ecap-28, 0x1.e8cac7351bb25p-32, 0x1.c3bd650fc2986p-36};
  VecD sum = VecD::all(c[12]);
#pragma GCC unroll 16
  for (int i = 11; i >= 0; --i) sum = fma(sum, r, VecD::all(c[i]));
  return sum;
}

// 2^x for x <= 0; what is not a normal number may be 0; NaN stays NaN.
#if MASKOPS_ISA_LEVEL == 2
static inline VecF rounded(VecF x) { return {_mm512_roundscale_ps(x.v, 0)}; }
static inline VecD rounded(VecD x) { return {_mm512_roundscale_pd(x.v, 0)}; }
static inline VecF exp2_below_zero(VecF x) { return {_mm512_scalef_ps(exp2_near_zero(VecF{_mm512_reduce_ps(x.v, 0)}).v, rounded(x).v)}; }
static inline VecD exp2_below_zero(VecD x) { return {_mm512_scalef_pd(exp2_near_zero(VecD{_mm512_reduce_pd(x.v, 0)}).v, rounded(x).v)}; }
#else
template <class V>
static inline V exp2_below_zero(V x) {
  using F = FloatFormat<V>;
  const V lowest = V::all(typename V::scalar(2 - F::bias));
  const V within = where_less(x, lowest, lowest, x);
  const V shifted = within + V::all(F::round);
  const V scale = of_bits<V>((bits_of(shifted) + F::bias) << F::fraction);
  return where_less(x, lowest, V::zero(), exp2_near_zero(within - (shifted - V::all(F::round))) * scale);
}
#endif

// ---- logarithm

// log(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1]
static inline VecF log_near_one(VecF f) {
  // (log(1 + f) - f + f^2 / 2) / f^3 by a polynomial of the least relative error in log(1 + f), 6e-9
  constexpr float c[] = {0.3333333f, -0.25000823f, 0.20001227f, -0.16623357f, 0.14201762f, -0.13160194f, 0.1276155f, -0.0763443f};
  const VecF square = f * f, fourth = square * square;
  const VecF c01 = fma(VecF::all(c[1]), f, VecF::all(c[0])), c23 = fma(VecF::all(c[3]), f, VecF::all(c[2]));
  const VecF c45 = fma(VecF::all(c[5]), f, VecF::all(c[4])), c67 = fma(VecF::all(c[7]), f, VecF::all(c[6]));
  const VecF sum = fma(fourth, fma(c67, square, c45), fma(c23, square, c01));
  return fma(square, fma(f, sum, VecF::all(-0.5f)), f);
}
static inline VecD log_near_one(VecD f) {
  // 2 atanh(s) of s = f / (2 + f), |s| < 0.172
  const VecD s = f / (f + VecD::all(2)), square = s * s;
  VecD sum = VecD::all(1.0 / 21);
#pragma GCC unroll 16
  for (int i = 9; i >= 1; --i) sum = fma(sum, square, VecD::all(1.0 / (2 * i + 1)));
  const VecD twice = s + s;
  return fma(twice * square, sum, twice);
}

// log(x) for positive normal x; for all others, NaN among them, some finite number.
template <class V>
static inline V log_of_positive(V x) {
  using F = FloatFormat<V>;
  const auto exponent = (bits_of(x) - F::sqrt_half) >> F::fraction;
  const V f = of_bits<V>(bits_of(x) - (exponent << F::fraction)) - V::all(1);
  V e;
  e.v = decltype(e.v)(__builtin_convertvector(exponent, typename F::Raw));
  return fma(e, V::all(F::ln2_high), fma(e, V::all(F::ln2_low), log_near_one(f)));
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
