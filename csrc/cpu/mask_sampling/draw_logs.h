// The logarithms of math/mask_sampling_draw.h in vectors: to the bit for eight numbers at a time, and in floats for the many draws that
// are so clear that a bound on the error decides them.
#pragma once

#include "common/simd_math.h"
#include "math/mask_sampling_draw.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

#if MASKOPS_ISA_LEVEL == 2

// log2_fraction(f + 2^31): all factors have at most 32 bits.
static inline __m512i log2_fraction8(__m512i f) {
  constexpr int64_t c[] = {-45835024, 121388650, -211833397, 296051740, -384859663, 516142836, -774533280, 1549081959};
  __m512i r = _mm512_set1_epi64(8138037);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r = _mm512_add_epi64(_mm512_srai_epi64(_mm512_mul_epi32(r, f), 31), _mm512_set1_epi64(c[i]));
  return _mm512_srai_epi64(_mm512_mul_epi32(r, f), 31 + 4);
}

// fixed_log2: a double, rounded towards zero, has the exponent and the 32 highest bits that it reads.
static inline __m512i fixed_log2_8(__m512i x) {
  const __m512i bits = _mm512_castpd_si512(_mm512_cvt_roundepi64_pd(x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC));
  const __m512i exponent = _mm512_sub_epi64(_mm512_srli_epi64(bits, 52), _mm512_set1_epi64(1023));
  const __m512i f = _mm512_and_si512(_mm512_srli_epi64(bits, 21), _mm512_set1_epi64(0x7FFFFFFF));
  return _mm512_add_epi64(_mm512_slli_epi64(exponent, kLogBits), log2_fraction8(f));
}

// exponential56 of eight words.
static inline __m512i exponential56_8(__m512i word) {
  const __m512i x = _mm512_or_si512(word, _mm512_set1_epi64(1)), v = _mm512_sub_epi64(_mm512_set1_epi64(int64_t{1} << 32), x);
  auto step = [](__m512i product, int64_t c) { return _mm512_add_epi64(_mm512_srai_epi64(product, 32), _mm512_set1_epi64(c)); };
  // Where v < 2^31, that is where it is taken, the sums have 32 bits but for two at the start: the second is negative, its size has 32.
  __m512i r = step(_mm512_mul_epu32(_mm512_set1_epi64(2234586229), v), -2631372645);
  r = step(_mm512_sub_epi64(_mm512_setzero_si512(), _mm512_mul_epu32(_mm512_sub_epi64(_mm512_setzero_si512(), r), v)), 1951859503);
  constexpr int64_t c[] = {-316848838, 418019985, 376077536, 516932629, 774529857, 1549082040};
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) r = step(_mm512_mul_epi32(r, v), c[i]);
  const __m512i near_one = _mm512_srli_epi64(_mm512_mul_epu32(r, v), 6);
  const __m512i far = _mm512_slli_epi64(_mm512_sub_epi64(_mm512_set1_epi64(int64_t{32} << kLogBits), fixed_log2_8(x)), 30);
  return _mm512_mask_mov_epi64(far, _mm512_cmplt_epi64_mask(v, _mm512_set1_epi64(int64_t{1} << 31)), near_one);
}

// race_key of eight words and weights.
static inline __m256 race_key8(__m256i words, __m256 weight) {
  const __m512i word = _mm512_cvtepu32_epi64(words);
  const __m512i bits = _mm512_and_si512(_mm512_cvtepu32_epi64(_mm256_castps_si256(weight)), _mm512_set1_epi64(0x7FFFFFFF));
  const __m512i exponent = _mm512_srli_epi64(bits, 23);
  const __m512i f = _mm512_slli_epi64(_mm512_and_si512(bits, _mm512_set1_epi64(0x7FFFFF)), 8);
  const __m512i whole = _mm512_slli_epi64(_mm512_sub_epi64(exponent, _mm512_set1_epi64(127)), kLogBits);
  const __m512i log_weight = _mm512_add_epi64(whole, log2_fraction8(f));
  const __m512i gumbel = _mm512_sub_epi64(_mm512_set1_epi64(int64_t{56} << kLogBits), fixed_log2_8(exponential56_8(word)));
  const __m512i key = _mm512_sub_epi64(_mm512_setzero_si512(), _mm512_add_epi64(log_weight, gumbel));
  const __m512i none = _mm512_add_epi64(_mm512_set1_epi64(int64_t{1} << 40), _mm512_slli_epi64(word, 8));
  return _mm512_cvtepi64_ps(_mm512_mask_mov_epi64(key, _mm512_testn_epi64_mask(exponent, exponent), none));
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
