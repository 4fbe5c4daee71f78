// The kernel of kernel maps, compiled once per instruction set: a column of places against its neighbours, as sets of bits.
#include "cpu/sparse_conv/map.h"

#include "common/simd.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

// Place p of the middle column meets bit p + by of a column: as bits of the one, and of the other.
inline uint64_t bits_met(uint64_t bits, int32_t by) { return by >= 0 ? bits >> by : bits << -by; }
inline uint64_t bits_meeting(uint64_t own, int32_t by) { return by >= 0 ? own << by : own >> -by; }

#if MASKOPS_ISA_LEVEL == 2

// Rows of the places `some` of a column, side by side.
inline void pick_rows(const int32_t* rows, uint64_t column, uint64_t some, int32_t* to) {
  uint64_t picked = _pext_u64(some, column);
  for (; picked != 0; picked >>= 16, rows += 16) {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(__mmask16(picked), _mm512_loadu_si512(rows)));
    to += __builtin_popcount(unsigned(picked & 0xffff));
  }
}

// What `own` reads `shift` places on; buffer: for the rows of a column and 16 more.
inline void find_place(const NearColumns& near, uint64_t own, int64_t places, int32_t shift, int32_t* buffer, int32_t* out) {
  uint64_t lanes[3];
  int32_t* rows[3];
  int64_t columns = 0;
  // Few places have neighbours in another column than the middle one.
  for (int32_t side = 0; side < 3; ++side) {
    const int32_t by = shift - 64 * (side - 1);
    if (by <= -64 || by >= 64) continue;
    const uint64_t seen = own & bits_met(near.bits[side], by);
    if (seen == 0) continue;
    lanes[columns] = _pext_u64(seen, own);
    rows[columns] = buffer + columns * 80;
    pick_rows(near.rows[side], near.bits[side], bits_meeting(seen, by), rows[columns]);
    ++columns;
  }
  for (int64_t i = 0; i < places; i += 16, out += 16) {
    __m512i found = _mm512_set1_epi32(-1);
    for (int64_t c = 0; c < columns; ++c) {
      const __mmask16 some = __mmask16(lanes[c] >> i);
      __m512i next = _mm512_loadu_si512(rows[c]);
      asm("" : "+v"(next));  // from memory it is microcode on AMD
      found = _mm512_mask_expand_epi32(found, some, next);
      rows[c] += __builtin_popcount(some);
    }
    if (places - i >= 16) _mm512_storeu_si512(out, found);
    else _mm512_mask_storeu_epi32(out, VecF::first(places - i), found);
  }
}

void find_line(const NearColumns& near, uint64_t own, int32_t first, int32_t count, int32_t* out, int64_t stride) {
  alignas(64) int32_t buffer[3 * 80];
  const int64_t places = __builtin_popcountll(own);
  for (int32_t k = 0; k < count; ++k, out += stride) {
    __builtin_prefetch(out + places + 16, 1);
    __builtin_prefetch(out + places + 32, 1);
    find_place(near, own, places, first + k, buffer, out);
  }
}

#else

void find_line(const NearColumns& near, uint64_t own, int32_t first, int32_t count, int32_t* out, int64_t stride) {
  for (; own != 0; own &= own - 1, ++out) {
    const int32_t place = int32_t(__builtin_ctzll(own)) + first + 64;
    for (int32_t k = 0; k < count; ++k) {
      const int32_t side = (place + k) >> 6;
      const uint64_t bits = near.bits[side], bit = uint64_t{1} << ((place + k) & 63);
      out[k * stride] = bits & bit ? near.rows[side][__builtin_popcountll(bits & (bit - 1))] : -1;
    }
  }
}

#endif

}  // namespace

extern const ConvMapKernels ConvMapKernels_table{&find_line};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
