// The logarithms of math/mask_sampling_draw.h in vectors: to the bit for sixteen numbers at a time, and in floats for the many draws that
// are so clear that a bound on the error decides them.
#pragma once

#include "common/simd_math.h"
#include "math/mask_sampling_draw.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

#if MASKOPS_ISA_LEVEL == 2

// Two vectors of eight numbers at a time: each step of a polynomial waits for the one before, and two are done in the time of one.
struct Pair {
  __m512i a, b;

  template <class Step>
  static inline Pair of(const Step& step) { return {step(0), step(1)}; }
  inline __m512i operator[](int i) const { return i == 0 ? a : b; }
};

// log2_fraction(f + 2^31): all factors have at most 32 bits.
static inline Pair log2_fraction16(const Pair& f) {
  constexpr int64_t c[] = {-45835024, 121388650, -211833397, 296051740, -384859663, 516142836, -774533280, 1549081959};
  Pair r{_mm512_set1_epi64(8138037), _mm512_set1_epi64(8138037)};
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512i next = _mm512_set1_epi64(c[i]);
    r = Pair::of([&](int v) { return _mm512_add_epi64(_mm512_srai_epi64(_mm512_mul_epi32(r[v], f[v]), 31), next); });
  }
  return Pair::of([&](int v) { return _mm512_srai_epi64(_mm512_mul_epi32(r[v], f[v]), 31 + 4); });
}

// fixed_log2: a double, rounded towards zero, has the exponent and the 32 highest bits that it reads.
static inline Pair fixed_log2_16(const Pair& x) {
  const Pair bits = Pair::of([&](int v) {
    return _mm512_castpd_si512(_mm512_cvt_roundepi64_pd(x[v], _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC));
  });
  const Pair part = log2_fraction16(Pair::of([&](int v) {
    return _mm512_and_si512(_mm512_srli_epi64(bits[v], 21), _mm512_set1_epi64(0x7FFFFFFF));
  }));
  return Pair::of([&](int v) {
    const __m512i exponent = _mm512_sub_epi64(_mm512_srli_epi64(bits[v], 52), _mm512_set1_epi64(1023));
    return _mm512_add_epi64(_mm512_slli_epi64(exponent, kLogBits), part[v]);
  });
}

// exponential56 of sixteen words.
static inline Pair exponential56_16(const Pair& word) {
  const Pair x = Pair::of([&](int i) { return _mm512_or_si512(word[i], _mm512_set1_epi64(1)); });
  const Pair v = Pair::of([&](int i) { return _mm512_sub_epi64(_mm512_set1_epi64(int64_t{1} << 32), x[i]); });
  auto step = [](__m512i product, int64_t c) { return _mm512_add_epi64(_mm512_srai_epi64(product, 32), _mm512_set1_epi64(c)); };
  // Where v < 2^31, that is where it is taken, the sums have 32 bits but for two at the start: the second is negative, its size has 32.
  Pair r = Pair::of([&](int i) { return step(_mm512_mul_epu32(_mm512_set1_epi64(2234586229), v[i]), -2631372645); });
  r = Pair::of([&](int i) {
    const __m512i size = _mm512_sub_epi64(_mm512_setzero_si512(), r[i]);
    return step(_mm512_sub_epi64(_mm512_setzero_si512(), _mm512_mul_epu32(size, v[i])), 1951859503);
  });
  constexpr int64_t c[] = {-316848838, 418019985, 376077536, 516932629, 774529857, 1549082040};
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) r = Pair::of([&](int i) { return step(_mm512_mul_epi32(r[i], v[i]), c[j]); });
  const Pair log = fixed_log2_16(x);
  return Pair::of([&](int i) {
    const __m512i near_one = _mm512_srli_epi64(_mm512_mul_epu32(r[i], v[i]), 6);
    const __m512i far = _mm512_slli_epi64(_mm512_sub_epi64(_mm512_set1_epi64(int64_t{32} << kLogBits), log[i]), 30);
    return _mm512_mask_mov_epi64(far, _mm512_cmplt_epi64_mask(v[i], _mm512_set1_epi64(int64_t{1} << 31)), near_one);
  });
}

// race_key of sixteen words and weights.
static inline __m512 race_key16(__m512i words, __m512i weight) {
  auto wide = [](__m512i x) { return Pair{_mm512_cvtepu32_epi64(_mm512_castsi512_si256(x)), _mm512_cvtepu32_epi64(_mm512_extracti32x8_epi32(x, 1))}; };
  const Pair word = wide(words), bits = wide(_mm512_and_si512(weight, _mm512_set1_epi32(0x7FFFFFFF)));
  const Pair exponent = Pair::of([&](int v) { return _mm512_srli_epi64(bits[v], 23); });
  const Pair part = log2_fraction16(Pair::of([&](int v) {
    return _mm512_slli_epi64(_mm512_and_si512(bits[v], _mm512_set1_epi64(0x7FFFFF)), 8);
  }));
  const Pair log = fixed_log2_16(exponential56_16(word));
  auto key = [&](int v) {
    const __m512i whole = _mm512_slli_epi64(_mm512_sub_epi64(exponent[v], _mm512_set1_epi64(127)), kLogBits);
    const __m512i gumbel = _mm512_sub_epi64(_mm512_set1_epi64(int64_t{56} << kLogBits), log[v]);
    const __m512i sum = _mm512_add_epi64(_mm512_add_epi64(whole, part[v]), gumbel);
    const __m512i none = _mm512_add_epi64(_mm512_set1_epi64(int64_t{1} << 40), _mm512_slli_epi64(word[v], 8));
    const __mmask8 zero = _mm512_testn_epi64_mask(exponent[v], exponent[v]);
    return _mm512_cvtepi64_ps(_mm512_mask_mov_epi64(_mm512_sub_epi64(_mm512_setzero_si512(), sum), zero, none));
  };
  return _mm512_insertf32x8(_mm512_castps256_ps512(key(0)), key(1), 1);
}

#endif

// ---------------------------------------------------------------- gates that floats decide

typedef uint32_t Words __attribute__((vector_size(sizeof(VecF))));

static inline VecF float_of(Words x) {
  VecF r;
  r.v = decltype(r.v)(__builtin_convertvector(x, typename FloatFormat<VecF>::Raw));
  return r;
}

// 1 where the gate is open, else 0; near: raised above 0 where rounding might decide otherwise than gate_open.
//
// log2(a / b) is the distance between the two sides of gate_open's comparison. All its errors, those of gate_open included, are below
// 2e-6, a fifth of what counts as near.
template <bool kGumbel>
static inline VecF gate_open_or_near(const uint32_t* word, const float* logit, VecF& near) {
  Words x;
  memcpy(&x, word, sizeof x);
  x = x | 1u;
  const VecF up = float_of(x), down = float_of(0u - x);  // of 2^32, the part below the word and the part above
  const VecF bounded = min(max(VecF::load(logit), VecF::all(-64.0f)), VecF::all(64.0f));  // NaN is -64
  const VecF level = bounded * VecF::all(96817624.0f) * VecF::all(0x1p-26f);
  const VecF power = exp2_below_zero(VecF::zero() - abs(level));
  VecF left = down, right = up;
  if constexpr (kGumbel) {
    const VecF u = up * VecF::all(0x1p-32f), close = VecF::all(0.70710678f);
    const VecF from_one = log_near_one(max(down * VecF::all(-0x1p-32f), VecF::all(-0.2929f)));
    left = VecF::zero() - where_less(close, u, from_one, log_of_positive(u));
    right = VecF::all(1.0f);
  }
  const VecF a = where_less(VecF::zero(), level, left * power, left), b = where_less(VecF::zero(), level, right, right * power);
  const VecF one = VecF::all(1.0f), gap = abs(a - b);
  near = max(near, where_less(gap, max(a, b) * VecF::all(1e-5f), one, VecF::zero()));
  return where_less(a, b, one, VecF::zero());
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
