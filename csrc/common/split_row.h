// One row of a split on the CPU, from bytes that say which tokens are hidden: used wherever a mask becomes ids in index order.
#pragma once

#include "common/simd.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

// restore[n]: the slot of token n, kept tokens first. kept [num_keep] and masked [tokens - num_keep] get the tokens, ascending;
// num_keep is the number of zero bytes. Nothing is written past any of them.
#if MASKOPS_ISA_LEVEL == 2
static inline void split_row(const uint8_t* hidden, int64_t tokens, int64_t num_keep, int64_t* restore, int64_t* kept, int64_t* masked) {
  const __m512i eight = _mm512_set1_epi64(8);
  const __m512i counting = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  __m512i token = counting;
  int64_t next_keep = 0, next_mask = 0;
  for (int64_t first = 0; first < tokens; first += 64) {
    const int64_t left = tokens - first;
    const uint64_t real = left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
    const __m512i bytes = _mm512_maskz_loadu_epi8(real, hidden + first);
    uint64_t away = _mm512_test_epi8_mask(bytes, bytes), stay = ~away & real;
    for (int64_t n = first; n < tokens && n < first + 64; n += 8, away >>= 8, stay >>= 8) {
      const __mmask8 go = __mmask8(away), keep = __mmask8(stay);
      const int kept_here = __builtin_popcount(keep), masked_here = __builtin_popcount(go);
      const __m512i keep_slots = _mm512_add_epi64(counting, _mm512_set1_epi64(next_keep));
      const __m512i mask_slots = _mm512_add_epi64(counting, _mm512_set1_epi64(num_keep + next_mask));
      const __m512i slots = _mm512_mask_expand_epi64(_mm512_maskz_expand_epi64(keep, keep_slots), go, mask_slots);
      _mm512_mask_storeu_epi64(restore + n, __mmask8(go | keep), slots);
      _mm512_mask_storeu_epi64(kept + next_keep, __mmask8((1u << kept_here) - 1u), _mm512_maskz_compress_epi64(keep, token));
      _mm512_mask_storeu_epi64(masked + next_mask, __mmask8((1u << masked_here) - 1u), _mm512_maskz_compress_epi64(go, token));
      next_keep += kept_here;
      next_mask += masked_here;
      token = _mm512_add_epi64(token, eight);
    }
  }
}
#else
static inline void split_row(const uint8_t* hidden, int64_t tokens, int64_t num_keep, int64_t* restore, int64_t* kept, int64_t* masked) {
  int64_t next_keep = 0, next_mask = 0;
  for (int64_t n = 0; n < tokens; ++n) {
    const bool away = hidden[n] != 0;
    restore[n] = away ? num_keep + next_mask : next_keep;
    int64_t* to = away ? masked + next_mask : kept + next_keep;  // chosen, not branched on: masks are random
    *to = n;
    next_mask += away;
    next_keep += !away;
  }
}
#endif

// How many of these bytes are not zero.
static inline int64_t count_hidden(const uint8_t* hidden, int64_t tokens) {
  int64_t count = 0;
#if MASKOPS_ISA_LEVEL == 2
  for (int64_t n = 0; n < tokens; n += 64) {
    const __m512i bytes = _mm512_maskz_loadu_epi8(tokens - n >= 64 ? ~uint64_t{0} : (uint64_t{1} << (tokens - n)) - 1, hidden + n);
    count += __builtin_popcountll(_mm512_test_epi8_mask(bytes, bytes));
  }
#else
  for (int64_t n = 0; n < tokens; ++n) count += hidden[n] != 0;
#endif
  return count;
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
