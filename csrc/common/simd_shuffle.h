// What moves elements across vectors: transposes, interleaving, gathers. Written over simd.h, once for every instruction set.
#pragma once

#include "common/simd.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

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

// An address that the compiler may not take apart, nor compute together with others in a vector.
template <class S>
static inline const S* in_register(const S* p) {
  asm("" : "+r"(p));
  return p;
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

// to[3 i + c] = element i of plane c: three planes of pixels become one row of colours.
template <class V>
static inline void store_interleaved(V red, V green, V blue, typename V::scalar* to) {
  typename V::scalar planes[3][V::width];
  red.store(planes[0]), green.store(planes[1]), blue.store(planes[2]);
  for (int i = 0; i < V::width; ++i) {
    for (int c = 0; c < 3; ++c) to[3 * i + c] = planes[c][i];
  }
}
#if MASKOPS_ISA_LEVEL == 2
struct InterleaveTables {
  alignas(64) int32_t first_two[3][16] = {}, third[3][16] = {};
  uint16_t is_third[3] = {};
  constexpr InterleaveTables() {
    for (int at = 0; at < 48; ++at) {
      const int i = at / 3, c = at % 3;
      first_two[at / 16][at % 16] = c == 1 ? 16 + i : i;
      third[at / 16][at % 16] = i;
      if (c == 2) is_third[at / 16] = uint16_t(is_third[at / 16] | 1u << (at % 16));
    }
  }
};
static inline void store_interleaved(VecF red, VecF green, VecF blue, float* to) {
  static constexpr InterleaveTables kTables;
  for (int part = 0; part < 3; ++part) {
    const __m512 two = _mm512_permutex2var_ps(red.v, _mm512_load_si512(kTables.first_two[part]), green.v);
    _mm512_storeu_ps(to + 16 * part,
                     _mm512_mask_permutexvar_ps(two, kTables.is_third[part], _mm512_load_si512(kTables.third[part]), blue.v));
  }
}
#endif

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
