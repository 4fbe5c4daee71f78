// Rows of a compressed bfloat16 weight made dense, 32 columns at a time: a table tells which of them are kept, and vpexpandw brings the
// values there. Only where the library found AMX, whose CPUs all have that instruction.
#pragma once

#include <bit>

#include "common/amx.h"
#include "cpu/nm_matmul/linear_places.h"

#if MASKOPS_ISA_LEVEL == 2
namespace maskops {
inline namespace MASKOPS_ISA_NS {

class NmExpander {
 public:
  static constexpr int64_t kColumns = 32;

  explicit NmExpander(const NmLayout& layout) : l_(layout), reader_(layout), in_blocks_(fits(layout)) {
    const int64_t group = l_.n * l_.bits;
    if (!in_blocks_ || group > kMostBits) return;
    int64_t groups = 1;
    while (2 * groups * group <= kFewBits && 2 * groups * l_.m <= kColumns) groups *= 2;
    bits_ = int(groups * group), entries_ = int(kColumns / (groups * l_.m)), kept_ = int(kColumns / l_.m * l_.n);
    whole_ = l_.groups * l_.m / kColumns;
    for (uint32_t entry = 0; entry < 1u << bits_; ++entry) table_[entry] = kept_columns(entry, groups);
  }

  // Whether groups do not reach from one 32 columns into the next.
  static bool fits(const NmLayout& layout) { return kColumns % layout.m == 0; }

  // Columns [32 begin, 32 end), of a layout that fits; zeros from column K on, whatever the slots there hold.
  void blocks(const NmCompressed& w, int64_t output, int64_t begin, int64_t end, bf16* to) const {
    const int64_t whole = max_of(begin, min_of(end, whole_));
    if (l_.n == 2 && l_.m == 4) expand_2_of_4(w, output, begin, whole, to);
    else switch (entries_) {
      case 1: expand<1>(w, output, begin, whole, to); break;
      case 2: expand<2>(w, output, begin, whole, to); break;
      case 4: expand<4>(w, output, begin, whole, to); break;
      default: expand<8>(w, output, begin, whole, to);
    }
    to += (whole - begin) * kColumns, begin = whole;
    const int64_t slots = kColumns / l_.m * l_.n;
    for (; begin < end; ++begin, to += kColumns) {
      scatter(w, output, min_of(l_.slots, begin * slots), min_of(l_.slots, (begin + 1) * slots), kColumns, to);
    }
    const int64_t past = end * kColumns - l_.K;  // less than 32
    if (past > 0) memset(to - past, 0, size_t(past) * sizeof(bf16));
  }

  // All columns; `to` has room for whole groups, and for whole 32 columns.
  void row(const NmCompressed& w, int64_t output, bf16* to) const {
    if (in_blocks_) blocks(w, output, 0, parts_of(l_.groups * l_.m, kColumns), to);
    else scatter(w, output, 0, l_.slots, l_.groups * l_.m, to);
  }

 private:
  static constexpr int kFewBits = 8, kMostBits = 12;  // of an entry that has several groups, and of any

  // The columns of some groups whose places are the bits of `entry`, or 0 where these are not ascending places of the groups.
  uint32_t kept_columns(uint32_t entry, int64_t groups) const {
    uint32_t mask = 0;
    for (int64_t g = 0; g < groups; ++g) {
      int64_t least = 0;
      for (int64_t i = 0; i < l_.n; ++i, entry >>= l_.bits) {
        const int64_t place = entry & ((1u << l_.bits) - 1u);
        if (place < least || place >= l_.m) return 0;
        mask |= 1u << (g * l_.m + place);
        least = place + 1;
      }
    }
    return mask;
  }

  static __m512i expanded(__m512i values, __mmask32 mask) {
    __m512i found;
    asm("vpexpandw %1, %0%{%2%}%{z%}" : "=v"(found) : "v"(values), "Yk"(mask));
    return found;
  }

  // 16 blocks at a time: a shuffle looks up the four columns of every group, whose places are four bits.
  __attribute__((noinline)) void expand_2_of_4(const NmCompressed& w, int64_t output, int64_t begin, int64_t end, bf16* to) const {
    constexpr int64_t kBlocks = 16, kKept = 16, kBytes = 4;  // at a time; of a block
    const __m512i four = _mm512_set1_epi8(15), low_columns = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pairs_)));
    const __m512i high_columns = _mm512_slli_epi16(low_columns, 4);
    const uint8_t* places = w.indices + output * w.indices_stride;
    const bf16* values = static_cast<const bf16*>(w.values) + output * w.values_stride + begin * kKept;
    alignas(64) uint32_t masks[kBlocks];
    for (; begin < end; begin += kBlocks) {
      const int64_t count = min_of(kBlocks, end - begin);
      const __mmask16 some = __mmask16((1u << count) - 1u);
      const __m512i packed = _mm512_maskz_loadu_epi32(some, places + begin * kBytes);
      const __m512i low = _mm512_shuffle_epi8(low_columns, _mm512_and_si512(packed, four));
      const __m512i high = _mm512_shuffle_epi8(high_columns, _mm512_and_si512(_mm512_srli_epi16(packed, 4), four));
      _mm512_store_si512(masks, _mm512_or_si512(low, high));
      const __mmask64 damaged = _mm512_testn_epi8_mask(low, low) | _mm512_testn_epi8_mask(high, high);
      if (count == kBlocks ? damaged != 0 : (damaged & ((__mmask64{1} << (count * kBytes)) - 1)) != 0) {
        scatter(w, output, begin * kKept, (begin + count) * kKept, count * kColumns, to);
        values += count * kKept, to += count * kColumns;
        continue;
      }
      for (int64_t i = 0; i < count; ++i, values += kKept, to += kColumns) {
        const __m512i kept = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
        _mm512_storeu_si512(to, expanded(kept, masks[i]));
      }
    }
  }

  // Blocks that the table can make, of kEntries entries each. A function of its own, or it would want for registers.
  template <int kEntries>
  __attribute__((noinline)) void expand(const NmCompressed& w, int64_t output, int64_t begin, int64_t end, bf16* to) const {
    const uint8_t* places = w.indices + output * w.indices_stride;
    const int64_t row_bytes = l_.row_bytes, kept = kept_, bits = bits_;
    const bf16* values = static_cast<const bf16*>(w.values) + output * w.values_stride + begin * kept;
    const __mmask32 lanes = first_lanes(kept);
    const uint64_t ones = (uint64_t{1} << bits) - 1;
    for (; begin < end; ++begin, values += kept, to += kColumns) {
      const int64_t bit = begin * kEntries * bits, first = bit >> 3;
      uint64_t word = 0;
      if (row_bytes - first >= 8) memcpy(&word, places + first, 8);
      else memcpy(&word, places + first, size_t(row_bytes - first));
      word >>= bit & 7;
      uint32_t mask = 0;
#pragma GCC unroll 8
      for (int e = 0; e < kEntries; ++e, word >>= bits) mask |= table_[word & ones] << (e * kColumns / kEntries);
      if (__builtin_expect(std::popcount(mask) != kept, 0)) {
        scatter(w, output, begin * kept, begin * kept + kept, kColumns, to);  // damaged places
        continue;
      }
      _mm512_storeu_si512(to, expanded(_mm512_maskz_loadu_epi16(lanes, values), mask));
    }
  }

  // Slots [begin, end), which start with a group, into `columns` columns.
  __attribute__((noinline)) void scatter(const NmCompressed& w, int64_t output, int64_t begin, int64_t end, int64_t columns,
                                         bf16* to) const {
    const uint8_t* places = w.indices + output * w.indices_stride;
    const bf16* values = static_cast<const bf16*>(w.values) + output * w.values_stride;
    memset(to, 0, size_t(columns) * sizeof(bf16));
    alignas(64) int32_t place[16];
    int64_t in_group = 0;
    for (int64_t slot = begin; slot < end; slot += 16) {
      _mm512_store_si512(place, reader_.read(places, l_.row_bytes, slot));
      for (int64_t i = 0; i < min_of<int64_t>(16, end - slot); ++i) {
        to[place[i]] = values[slot + i];
        if (++in_group == l_.n) in_group = 0, to += l_.m;
      }
    }
  }

  const NmLayout l_;
  const PlaceReader reader_;
  const bool in_blocks_;
  // The columns of two places of a group of four; 0 where these do not ascend.
  static constexpr uint8_t pairs_[16] = {0, 0, 0, 0, 3, 0, 0, 0, 5, 6, 0, 0, 9, 10, 12, 0};
  int64_t whole_ = 0;                // blocks that the table can make
  int bits_ = 0, entries_ = 1, kept_ = 0;  // of an entry; of a block; values of a block
  uint32_t table_[1 << kMostBits];
};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
#endif
