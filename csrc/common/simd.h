// The vector vocabulary of the CPU kernels, written once per instruction set.
//
// VecF holds VecF::width floats, VecD VecD::width doubles. Memory may hold float, bf16 or f16 (VecF) or double (VecD);
// loads widen, stores round to nearest even. `load_n` / `store_n` touch only the first n elements, 0 <= n <= width, and
// a partial load fills the rest with zeros. Arithmetic on bf16 and f16 data is always done in float.
// No standard library header is included here: its inline functions would be compiled for the wide instruction sets.
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/isa.h"

#if MASKOPS_ISA_LEVEL > 0
#include <immintrin.h>
#endif

namespace maskops {

// Storage types, the same at every level; their values are read through the functions below only.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline namespace MASKOPS_ISA_NS {

template <class T>
static inline T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
static inline T max_of(T a, T b) {
  return a < b ? b : a;
}

// ---- scalars ----------------------------------------------------------------------------------------------------

static inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline float to_float(float x) { return x; }
static inline double to_float(double x) { return x; }
static inline float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
static inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));  // inf, NaN
  // Moving the exponent field and scaling by 2^112 is exact and turns half subnormals into normal floats.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

static inline void from_float(float x, float* to) { *to = x; }
static inline void from_float(double x, double* to) { *to = x; }
static inline void from_float(float x, bf16* to) {
  const uint32_t bits = float_to_bits(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = uint16_t(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
static inline void from_float(float x, f16* to) {
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u;
  uint32_t rest = bits & 0x7fffffffu, half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // half subnormal: adding 0.5 leaves the rounded mantissa in the low bits
    half = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  }
  to->bits = uint16_t(sign | half);
}

// The type in which values of T are computed.
template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

// ---- vectors of floats ------------------------------------------------------------------------------------------

#if MASKOPS_ISA_LEVEL == 2

struct VecF {
  static constexpr int width = 16;
  using scalar = float;
  __m512 v;

  static inline VecF zero() { return {_mm512_setzero_ps()}; }
  static inline VecF all(float x) { return {_mm512_set1_ps(x)}; }
  static inline __mmask16 first(int64_t n) { return __mmask16((1u << n) - 1u); }
  static inline VecF widen(__m256i x, bf16) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
  }
  static inline VecF widen(__m256i x, f16) { return {_mm512_cvtph_ps(x)}; }
  inline __m256i narrow(bf16) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  }
  inline __m256i narrow(f16) const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  static inline VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static inline VecF load_n(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  template <class H>
  static inline VecF load(const H* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), H{});
  }
  template <class H>
  static inline VecF load_n(const H* p, int64_t n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p), H{});
  }
  inline void store(float* p) const { _mm512_storeu_ps(p, v); }
  inline void store_n(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  template <class H>
  inline void store(H* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(H{}));
  }
  template <class H>
  inline void store_n(H* p, int64_t n) const {
    _mm256_mask_storeu_epi16(p, first(n), narrow(H{}));
  }
  inline void stream(float* p) const { _mm512_stream_ps(p, v); }
  template <class H>
  inline void stream(H* p) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(H{}));
  }
  inline float sum() const { return _mm512_reduce_add_ps(v); }
  inline float highest() const { return _mm512_reduce_max_ps(v); }
};

static inline VecF operator+(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline VecF operator-(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline VecF operator*(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline VecF operator/(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline VecF max(VecF a, VecF b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline VecF min(VecF a, VecF b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline VecF abs(VecF a) { return {_mm512_abs_ps(a.v)}; }
static inline VecF sqrt(VecF a) { return {_mm512_sqrt_ps(a.v)}; }
// a < b ? x : y per element; false where a or b is NaN.
static inline VecF where_less(VecF a, VecF b, VecF x, VecF y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}

struct VecD {
  static constexpr int width = 8;
  using scalar = double;
  __m512d v;

  static inline VecD zero() { return {_mm512_setzero_pd()}; }
  static inline VecD all(double x) { return {_mm512_set1_pd(x)}; }
  static inline __mmask8 first(int64_t n) { return __mmask8((1u << n) - 1u); }
  static inline VecD load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static inline VecD load_n(const double* p, int64_t n) { return {_mm512_maskz_loadu_pd(first(n), p)}; }
  inline void store(double* p) const { _mm512_storeu_pd(p, v); }
  inline void store_n(double* p, int64_t n) const { _mm512_mask_storeu_pd(p, first(n), v); }
  inline void stream(double* p) const { _mm512_stream_pd(p, v); }
  inline double sum() const { return _mm512_reduce_add_pd(v); }
  inline double highest() const { return _mm512_reduce_max_pd(v); }
};

static inline VecD operator+(VecD a, VecD b) { return {_mm512_add_pd(a.v, b.v)}; }
static inline VecD operator-(VecD a, VecD b) { return {_mm512_sub_pd(a.v, b.v)}; }
static inline VecD operator*(VecD a, VecD b) { return {_mm512_mul_pd(a.v, b.v)}; }
static inline VecD operator/(VecD a, VecD b) { return {_mm512_div_pd(a.v, b.v)}; }
static inline VecD fma(VecD a, VecD b, VecD c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
static inline VecD max(VecD a, VecD b) { return {_mm512_max_pd(a.v, b.v)}; }
static inline VecD min(VecD a, VecD b) { return {_mm512_min_pd(a.v, b.v)}; }
static inline VecD abs(VecD a) { return {_mm512_abs_pd(a.v)}; }
static inline VecD sqrt(VecD a) { return {_mm512_sqrt_pd(a.v)}; }
static inline VecD where_less(VecD a, VecD b, VecD x, VecD y) {
  return {_mm512_mask_blend_pd(_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}

#else

// AVX2 and portable: GCC / Clang vector types of 32 and 16 bytes; arithmetic operators come with them.
#if MASKOPS_ISA_LEVEL == 1
constexpr int kVectorBytes = 32;
static inline __m256 multiply_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
static inline __m256d multiply_add(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
#else
constexpr int kVectorBytes = 16;
template <class Raw>
static inline Raw multiply_add(Raw a, Raw b, Raw c) {
  return a * b + c;  // two roundings: the baseline instruction sets have no FMA to rely on
}
#endif

template <class S, class Bits>
struct VecOf {
  static constexpr int width = kVectorBytes / int(sizeof(S));
  using scalar = S;
  typedef S Raw __attribute__((vector_size(kVectorBytes)));
  typedef Bits Mask __attribute__((vector_size(kVectorBytes)));
  Raw v;

  static inline VecOf zero() { return {Raw{}}; }
  static inline VecOf all(S x) { return {x - Raw{}}; }
  static inline VecOf load(const S* p) {
    VecOf r;
    memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  inline void store(S* p) const { memcpy(p, &v, sizeof(v)); }
  inline void stream(S* p) const {
#if MASKOPS_ISA_LEVEL == 1
    typedef long long Words __attribute__((vector_size(32)));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), __m256i(Words(v)));
#else
    store(p);
#endif
  }

  // Narrow storage: converted in place on AVX2, one element at a time in the portable build.
  template <class H>
  static inline VecOf load(const H* p) {
#if MASKOPS_ISA_LEVEL == 1
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {Raw(widen(x, H{}))};
#else
    S buffer[width];
    for (int i = 0; i < width; ++i) buffer[i] = to_float(p[i]);
    return load(buffer);
#endif
  }
  template <class H>
  inline void store(H* p) const {
#if MASKOPS_ISA_LEVEL == 1
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(__m256(v), H{}));
#else
    for (int i = 0; i < width; ++i) from_float(v[i], p + i);
#endif
  }
  template <class H>
  inline void stream(H* p) const {
#if MASKOPS_ISA_LEVEL == 1
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(__m256(v), H{}));
#else
    store(p);
#endif
  }
  template <class T>
  static inline VecOf load_n(const T* p, int64_t n) {
    if (n >= width) return load(p);
    T buffer[width] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    return load(buffer);
  }
  template <class T>
  inline void store_n(T* p, int64_t n) const {
    if (n >= width) return store(p);
    T buffer[width];
    store(buffer);
    for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
  }
  inline S sum() const {
    S total = v[0];
    for (int i = 1; i < width; ++i) total += v[i];
    return total;
  }
  inline S highest() const {
    S best = v[0];
    for (int i = 1; i < width; ++i) best = best < v[i] ? v[i] : best;
    return best;
  }

#if MASKOPS_ISA_LEVEL == 1
  static inline __m256 widen(__m128i x, bf16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  static inline __m256 widen(__m128i x, f16) { return _mm256_cvtph_ps(x); }
  static inline __m128i narrow(__m256 x, bf16) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  static inline __m128i narrow(__m256 x, f16) {
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#endif

  // Friends, so that overload resolution finds them for VecF and VecD alike.
  friend inline VecOf operator+(VecOf a, VecOf b) { return {a.v + b.v}; }
  friend inline VecOf operator-(VecOf a, VecOf b) { return {a.v - b.v}; }
  friend inline VecOf operator*(VecOf a, VecOf b) { return {a.v * b.v}; }
  friend inline VecOf operator/(VecOf a, VecOf b) { return {a.v / b.v}; }
  friend inline VecOf fma(VecOf a, VecOf b, VecOf c) { return {multiply_add(a.v, b.v, c.v)}; }
  friend inline VecOf max(VecOf a, VecOf b) { return {a.v > b.v ? a.v : b.v}; }
  friend inline VecOf min(VecOf a, VecOf b) { return {a.v < b.v ? a.v : b.v}; }
  friend inline VecOf abs(VecOf a) { return {Raw(Mask(a.v) & ~Mask(-Raw{}))}; }  // clears the sign bit
  friend inline VecOf sqrt(VecOf a) {
    VecOf r;
    for (int i = 0; i < width; ++i) r.v[i] = sizeof(S) == 4 ? __builtin_sqrtf(a.v[i]) : __builtin_sqrt(a.v[i]);
    return r;
  }
  friend inline VecOf where_less(VecOf a, VecOf b, VecOf x, VecOf y) { return {a.v < b.v ? x.v : y.v}; }
};

using VecF = VecOf<float, int32_t>;
using VecD = VecOf<double, int64_t>;

#endif

// The vector in which values of storage type T are computed.
template <class T>
struct VecFor {
  using type = VecF;
};
template <>
struct VecFor<double> {
  using type = VecD;
};

// ---- across vectors ---------------------------------------------------------------------------------------------

// a0 b0 a1 b1 ... of the lower (kHalf = 0) or the upper halves of two vectors.
template <int kHalf, class V>
static inline V interleave(V a, V b) {
  constexpr int w = V::width, h = kHalf * w / 2;
  if constexpr (w == 2) {
    return {__builtin_shufflevector(a.v, b.v, h, w + h)};
  } else if constexpr (w == 4) {
    return {__builtin_shufflevector(a.v, b.v, h, w + h, h + 1, w + h + 1)};
  } else if constexpr (w == 8) {
    return {__builtin_shufflevector(a.v, b.v, h, w + h, h + 1, w + h + 1, h + 2, w + h + 2, h + 3, w + h + 3)};
  } else {
    return {__builtin_shufflevector(a.v, b.v, h, w + h, h + 1, w + h + 1, h + 2, w + h + 2, h + 3, w + h + 3, h + 4,
                                    w + h + 4, h + 5, w + h + 5, h + 6, w + h + 6, h + 7, w + h + 7)};
  }
}

// The upper half of the elements in front of the lower half.
template <class V>
static inline V swap_halves(V a) {
  if constexpr (V::width == 2) {
    return {__builtin_shufflevector(a.v, a.v, 1, 0)};
  } else if constexpr (V::width == 4) {
    return {__builtin_shufflevector(a.v, a.v, 2, 3, 0, 1)};
  } else if constexpr (V::width == 8) {
    return {__builtin_shufflevector(a.v, a.v, 4, 5, 6, 7, 0, 1, 2, 3)};
  } else {
    return {__builtin_shufflevector(a.v, a.v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)};
  }
}

// Element i of vector j and element j of vector i change places. Each round moves one bit of the row's number to the column's.
template <class V>
static inline void transpose(V (&rows)[V::width]) {
  constexpr int w = V::width;
#pragma GCC unroll 4
  for (int round = 1; round < w; round *= 2) {
    V next[w];
#pragma GCC unroll 8
    for (int i = 0; i < w / 2; ++i) {
      next[2 * i] = interleave<0>(rows[i], rows[i + w / 2]);
      next[2 * i + 1] = interleave<1>(rows[i], rows[i + w / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) rows[i] = next[i];
  }
}

// x, loaded once where several operations follow: compilers like to repeat the load as an operand of each of them.
template <class V>
static inline V loaded_once(V x) {
#if MASKOPS_ISA_LEVEL == 2
  asm("" : "+v"(x.v));
#elif defined(__x86_64__)
  asm("" : "+x"(x.v));
#endif
  return x;
}

// Lane c of the result: the sum of all elements of v[c], for C <= width vectors, C a power of two; the other lanes are
// undefined. Vectors are merged in pairs, half of the lanes for either.
template <class V, int C>
static inline V sum_each(V (&v)[C]) {
#pragma GCC unroll 4
  for (int half = C / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) v[i] = interleave<0>(v[i], v[i + half]) + interleave<1>(v[i], v[i + half]);
  }
  if constexpr (V::width == 2 * C) v[0] = v[0] + swap_halves(v[0]);
  static_assert(C <= V::width && V::width <= 2 * C, "pad with zeros");
  return v[0];
}

// base[at[0]], base[at[1]], ...
static inline VecF gather(const float* base, const int32_t* at) {
#if MASKOPS_ISA_LEVEL == 2
  return {_mm512_i32gather_ps(_mm512_loadu_si512(at), base, 4)};
#elif MASKOPS_ISA_LEVEL == 1
  return {_mm256_i32gather_ps(base, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)), 4)};
#else
  float buffer[VecF::width];
  for (int i = 0; i < VecF::width; ++i) buffer[i] = base[at[i]];
  return VecF::load(buffer);
#endif
}
static inline VecD gather(const double* base, const int32_t* at) {
  double buffer[VecD::width];
  for (int i = 0; i < VecD::width; ++i) buffer[i] = base[at[i]];
  return VecD::load(buffer);
}

// Streaming stores of V to T memory need this alignment of the address; call stream_fence() after the last of them.
template <class V, class T>
static inline bool can_stream(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (V::width * sizeof(T)) == 0;
}
static inline void stream_fence() {
#if MASKOPS_ISA_LEVEL > 0
  _mm_sfence();
#endif
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
