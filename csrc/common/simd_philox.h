// Philox of common/philox.h, several counters at a time: the same words in the same order.
#pragma once

#include "common/philox.h"
#include "common/simd.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

// The key of each round, ready in memory: read from there, it costs the arithmetic units nothing.
struct PhiloxRounds {
  uint64_t even[10], odd[10];

  explicit PhiloxRounds(const PhiloxKey& key) {
    uint32_t k0 = key.seed_low, k1 = key.seed_high;
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) even[round] = k0, odd[round] = k1;
  }
};

#if MASKOPS_ISA_LEVEL > 0

// The low halves of 64-bit lanes are the numbers; the high halves hold what multiplications left there and no step reads.
#if MASKOPS_ISA_LEVEL == 2
struct Lanes64 {
  static constexpr int count = 8;
  __m512i v;

  static inline Lanes64 all(uint64_t x) { return {_mm512_set1_epi64(int64_t(x))}; }
  static inline Lanes64 counting(uint64_t from) {
    return {_mm512_add_epi64(_mm512_set1_epi64(int64_t(from)), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7))};
  }
  inline Lanes64 times(Lanes64 factor) const { return {_mm512_mul_epu32(v, factor.v)}; }
  inline Lanes64 high() const { return {_mm512_shuffle_epi32(v, _MM_PERM_DDBB)}; }  // not a shift: it would wait for the multiplier
  static inline Lanes64 xor3(Lanes64 a, Lanes64 b, Lanes64 c) { return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)}; }
  // Low halves a0 b0 c0 d0 a1 b1 c1 d1 ...
  static inline void store(Lanes64 a, Lanes64 b, Lanes64 c, Lanes64 d, uint32_t* to) {
    const __m512i ab = _mm512_mask_blend_epi32(0xAAAA, a.v, _mm512_slli_epi64(b.v, 32));
    const __m512i cd = _mm512_mask_blend_epi32(0xAAAA, c.v, _mm512_slli_epi64(d.v, 32));
    const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi64(ab, first, cd));
    _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi64(ab, second, cd));
  }
};
#else
struct Lanes64 {
  static constexpr int count = 4;
  __m256i v;

  static inline Lanes64 all(uint64_t x) { return {_mm256_set1_epi64x(int64_t(x))}; }
  static inline Lanes64 counting(uint64_t from) {
    return {_mm256_add_epi64(_mm256_set1_epi64x(int64_t(from)), _mm256_setr_epi64x(0, 1, 2, 3))};
  }
  inline Lanes64 times(Lanes64 factor) const { return {_mm256_mul_epu32(v, factor.v)}; }
  inline Lanes64 high() const { return {_mm256_shuffle_epi32(v, 0xF5)}; }
  static inline Lanes64 xor3(Lanes64 a, Lanes64 b, Lanes64 c) { return {_mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v)}; }
  static inline void store(Lanes64 a, Lanes64 b, Lanes64 c, Lanes64 d, uint32_t* to) {
    const __m256i ab = _mm256_blend_epi32(a.v, _mm256_slli_epi64(b.v, 32), 0xAA);
    const __m256i cd = _mm256_blend_epi32(c.v, _mm256_slli_epi64(d.v, 32), 0xAA);
    const __m256i even = _mm256_unpacklo_epi64(ab, cd), odd = _mm256_unpackhi_epi64(ab, cd);  // counters 0 2 and 1 3
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), _mm256_permute2x128_si256(even, odd, 0x31));
  }
};
#endif

constexpr int kPhiloxCounters = Lanes64::count;

// The 4 * kPhiloxCounters words of counters [index, index + kPhiloxCounters).
static inline void philox_block(const PhiloxKey& key, const PhiloxRounds& keys, uint64_t index, uint32_t* to) {
  const Lanes64 m0 = Lanes64::all(0xD2511F53u), m1 = Lanes64::all(0xCD9E8D57u);
  Lanes64 c0 = Lanes64::counting(index), c1 = c0.high(), c2 = Lanes64::all(key.offset_low), c3 = Lanes64::all(key.offset_high);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Lanes64 p0 = c0.times(m0), p1 = c2.times(m1);
    c0 = Lanes64::xor3(p1.high(), c1, Lanes64::all(keys.even[round]));
    c2 = Lanes64::xor3(p0.high(), c3, Lanes64::all(keys.odd[round]));
    c1 = p1;
    c3 = p0;
  }
  Lanes64::store(c0, c1, c2, c3, to);
}

#else

constexpr int kPhiloxCounters = 1;

static inline void philox_block(const PhiloxKey& key, const PhiloxRounds& keys, uint64_t index, uint32_t* to) {
  uint32_t c0 = uint32_t(index), c1 = uint32_t(index >> 32), c2 = key.offset_low, c3 = key.offset_high;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ uint32_t(keys.even[round]);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ uint32_t(keys.odd[round]);
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
  }
  to[0] = c0, to[1] = c1, to[2] = c2, to[3] = c3;
}

#endif

// At least `count` words from counter `index` on, in whole blocks of 4 * kPhiloxCounters.
static inline void philox_words(const PhiloxKey& key, uint64_t index, int64_t count, uint32_t* to) {
  const PhiloxRounds keys(key);
  for (int64_t i = 0; i < count; i += 4 * kPhiloxCounters) philox_block(key, keys, index + uint64_t(i / 4), to + i);
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
