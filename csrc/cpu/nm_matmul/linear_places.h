// Columns of a compressed weight, sixteen slots at a time (AVX-512).
#pragma once

#include "cpu/nm_matmul/linear.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

// The place of a slot; a damaged one does not leave its group, so that nothing is read outside x.
static inline int64_t place_in_group(const uint8_t* row, int64_t slot, const NmLayout& l) {
  return min_of<int64_t>(read_place(row, slot, l.bits), l.m - 1);
}

#if MASKOPS_ISA_LEVEL == 2

// Shuffles that bring the bits of sixteen slots, from any of the eight bits of a byte on, into sixteen lanes.
struct PlaceReader {
  __m512i bytes[8], shifts[8], ones, last;
  int bits;

  explicit PlaceReader(const NmLayout& l) : ones(_mm512_set1_epi32((1 << l.bits) - 1)), last(_mm512_set1_epi32(int(l.m) - 1)), bits(int(l.bits)) {
    for (int start = 0; start < 8; ++start) {
      alignas(64) int32_t byte[16], shift[16];
      for (int i = 0; i < 16; ++i) {
        const int bit = start + i * bits;
        // Two bytes of the sixteen that are loaded; the upper half of the lane is zero.
        byte[i] = int32_t(0x80800000u | uint32_t(bit / 8 + 1) << 8 | uint32_t(bit / 8));
        shift[i] = bit % 8;
      }
      bytes[start] = _mm512_load_si512(byte);
      shifts[start] = _mm512_load_si512(shift);
    }
  }

  // Places of slots [slot, slot + 16); slots past the end of the row read as 0. Damaged ones do not leave their group.
  inline __m512i read(const uint8_t* row, int64_t row_bytes, int64_t slot) const {
    const int64_t bit = slot * bits, first = bit >> 3, left = row_bytes - first;
    const __m128i packed = left >= 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + first))
                                      : _mm_maskz_loadu_epi8(__mmask16((1u << (left > 0 ? left : 0)) - 1u), row + first);
    const __m512i lanes = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(packed), bytes[bit & 7]);
    return _mm512_min_epu32(_mm512_and_si512(_mm512_srlv_epi32(lanes, shifts[bit & 7]), ones), last);
  }
};

#endif

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
