// A row of up to 256 tokens sorted in vector registers by a bitonic network, on AVX-512.
//
// A lane holds the highest bits of a token's key, of which the row's lowest is taken away, above the token's index: 16 tokens a
// register, a quarter of what whole keys with indices need. Tokens that agree in those bits are then put in order one by one.
#include "cpu/mask_sampling/order.h"

#include "common/split_row.h"

namespace maskops {
namespace MASKOPS_ISA_NS {
namespace {

#if MASKOPS_ISA_LEVEL == 2

constexpr int kIndexBits = 8;
constexpr uint32_t kIndex = (1u << kIndexBits) - 1u;
constexpr int kLanes = 16;

// Lane i meets lane i ^ kWith; the smaller one goes to the lane without the highest bit of kWith.
template <int kWith>
inline __m512i exchanged(__m512i x) {
  __m512i other;
  if constexpr (kWith == 1) other = _mm512_shuffle_epi32(x, _MM_PERM_CDAB);
  else if constexpr (kWith == 2) other = _mm512_shuffle_epi32(x, _MM_PERM_BADC);
  else if constexpr (kWith == 3) other = _mm512_shuffle_epi32(x, _MM_PERM_ABCD);
  else if constexpr (kWith == 4) other = _mm512_shuffle_i32x4(x, x, 0xB1);
  else if constexpr (kWith == 8) other = _mm512_shuffle_i32x4(x, x, 0x4E);
  else {
    static_assert(kWith == 7 || kWith == 15);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    other = _mm512_permutexvar_epi32(_mm512_xor_si512(lane, _mm512_set1_epi32(kWith)), x);
  }
  constexpr __mmask16 upper = kWith == 1 ? 0xAAAA : kWith < 4 ? 0xCCCC : kWith < 8 ? 0xF0F0 : 0xFF00;
  return _mm512_mask_max_epu32(_mm512_min_epu32(x, other), upper, x, other);
}

inline void exchange(__m512i& a, __m512i& b) {
  const __m512i low = _mm512_min_epu32(a, b);
  b = _mm512_max_epu32(a, b);
  a = low;
}

// A network of 16 registers whose last are the largest numbers: every exchange leaves the larger one where it was or behind, so that
// those of registers R and beyond do nothing and are left out.
template <int R>
inline void sort(__m512i (&x)[R]) {
  const __m512i backwards = _mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    x[i] = exchanged<1>(x[i]);
    x[i] = exchanged<1>(exchanged<3>(x[i]));
    x[i] = exchanged<1>(exchanged<2>(exchanged<7>(x[i])));
    x[i] = exchanged<1>(exchanged<2>(exchanged<4>(exchanged<15>(x[i]))));
  }
  // Runs of `run` registers, in order, are merged in pairs: each register meets, turned round, the one as far from the other end.
#pragma GCC unroll 4
  for (int run = 1; run < R; run *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const int other = i ^ (2 * run - 1);
      if (i > other || other >= R) continue;
      x[other] = _mm512_permutexvar_epi32(backwards, x[other]);
      exchange(x[i], x[other]);
    }
#pragma GCC unroll 4
    for (int apart = run / 2; apart > 0; apart /= 2) {
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        if (!(i & apart) && i + apart < R) exchange(x[i], x[i + apart]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) x[i] = exchanged<1>(exchanged<2>(exchanged<4>(exchanged<8>(x[i]))));
  }
}

// Bit i of alike[]: the tokens in places i and i + 1 agree in all bits that were sorted by. Whether there are any.
template <int R>
bool sort_row(const uint32_t* keys, int64_t length, uint32_t* to, uint16_t* alike) {
  __m512i x[R];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) x[i] = _mm512_loadu_si512(keys + kLanes * i);
  sort(x);
  unsigned any = 0;
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    // The lane after each; after the last one of all, none.
    const __m512i next = _mm512_alignr_epi32(i + 1 < R ? x[(i + 1) % R] : _mm512_setzero_si512(), x[i], 1);
    const int64_t pairs = length - 1 - kLanes * i;
    const __mmask16 real = pairs >= kLanes ? 0xFFFF : pairs <= 0 ? 0 : __mmask16((1u << pairs) - 1u);
    any |= alike[i] = _mm512_mask_cmple_epu32_mask(real, _mm512_xor_si512(x[i], next), _mm512_set1_epi32(kIndex));
    _mm512_storeu_si512(to + kLanes * i, _mm512_and_si512(x[i], _mm512_set1_epi32(kIndex)));
  }
  return any != 0;
}

// The tokens are in order but for those that agree in their highest bits. False where they are too many to be moved one by one.
bool mend(const uint32_t* noise, const uint8_t* mask, int64_t length, const uint16_t* alike, uint32_t* order) {
  auto key = [&](uint32_t n) { return uint64_t(mask && mask[n]) << 40 | uint64_t(noise[n]) << 8 | n; };
  int64_t moves = 0;
  for (int64_t at = 0; at < length; at += kLanes) {
    for (unsigned rest = alike[at / kLanes]; rest; rest &= rest - 1) {
      const int64_t i = at + __builtin_ctz(rest) + 1;
      const uint32_t token = order[i];
      const uint64_t own = key(token);
      int64_t j = i;
      for (; j > 0 && own < key(order[j - 1]); --j) order[j] = order[j - 1];
      order[j] = token;
      moves += i - j;
    }
    if (moves > 4 * length) return false;
  }
  return true;
}

// What is sorted instead of a row, in whole registers: lanes past the row's end are the largest number. Returns the registers' lanes.
int64_t pack(const uint32_t* noise, const uint8_t* mask, int64_t length, uint32_t* keys) {
  auto first = [&](int64_t i) { return length - i >= kLanes ? __mmask16(0xFFFF) : __mmask16((1u << (length - i)) - 1u); };
  __m512i lowest = _mm512_set1_epi32(-1), highest = _mm512_setzero_si512();
  for (int64_t i = 0; i < length; i += kLanes) {
    const __m512i x = _mm512_maskz_loadu_epi32(first(i), noise + i);
    lowest = _mm512_mask_min_epu32(lowest, first(i), lowest, x);
    highest = _mm512_max_epu32(highest, x);
  }
  const uint32_t low = _mm512_reduce_min_epu32(lowest), range = _mm512_reduce_max_epu32(highest) - low;
  const int shift = length == 0 || range == 0 ? 0 : __builtin_clz(range);
  const int64_t wanted = length <= 16 ? 16 : length <= 32 ? 32 : length <= 64 ? 64 : length <= 128 ? 128 : length <= 208 ? 208 : 256;
  __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < wanted; i += kLanes) {
    const __mmask16 real = i < length ? first(i) : __mmask16(0);
    __m512i x = _mm512_sub_epi32(_mm512_maskz_loadu_epi32(real, noise + i), _mm512_set1_epi32(int32_t(low)));
    x = _mm512_slli_epi32(x, unsigned(shift));
    if (mask) {
      const __m128i masked = _mm_maskz_loadu_epi8(real, mask + i);
      const __mmask16 last = _mm_test_epi8_mask(masked, masked);
      x = _mm512_srli_epi32(x, 1);
      x = _mm512_mask_or_epi32(x, last, x, _mm512_set1_epi32(INT32_MIN));
    }
    x = _mm512_ternarylogic_epi32(_mm512_set1_epi32(kIndex), index, x, 0xCA);  // the index below, the key above
    _mm512_storeu_si512(keys + i, _mm512_mask_mov_epi32(_mm512_set1_epi32(-1), real, x));
    index = _mm512_add_epi32(index, _mm512_set1_epi32(kLanes));
  }
  return wanted;
}

bool order(const uint32_t* noise, const uint8_t* mask, int64_t length, uint32_t* to) {
  if (length > kMaxOrdered) return false;
  uint32_t keys[kMaxOrdered];
  const int64_t wanted = pack(noise, mask, length, keys);
  uint16_t alike[kMaxOrdered / kLanes];
  const bool any = wanted == 16    ? sort_row<1>(keys, length, to, alike)
                   : wanted == 32  ? sort_row<2>(keys, length, to, alike)
                   : wanted == 64  ? sort_row<4>(keys, length, to, alike)
                   : wanted == 128 ? sort_row<8>(keys, length, to, alike)
                   : wanted == 208 ? sort_row<13>(keys, length, to, alike)  // 196 patches
                                   : sort_row<16>(keys, length, to, alike);
  return !any || mend(noise, mask, length, alike, to);
}

// How many of the keys are at most this.
template <int R>
inline int64_t count_to(const __m512i (&x)[R], uint32_t limit) {
  const __m512i most = _mm512_set1_epi32(int32_t(limit));
  int64_t count = 0;
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) count += __builtin_popcount(_mm512_cmple_epu32_mask(x[i], most));
  return count;
}

// Halves an interval until it finds a limit that `keep` of the keys do not exceed, 0 < keep < length. False where tokens that agree in
// all bits of their keys are on both sides. Steps that guess from the counts are fewer but take longer.
template <int R>
bool mark_row(const uint32_t* keys, int64_t length, int64_t keep, uint8_t* hidden) {
  __m512i x[R];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) x[i] = _mm512_loadu_si512(keys + kLanes * i);
  uint32_t low = 0, high = UINT32_MAX, limit = 0;  // up to `high` are `keep` or more, below `low` fewer
  for (int64_t count = -1; count != keep;) {
    limit = low + (high - low) / 2;
    count = count_to(x, limit);
    if (count < keep) low = limit + 1;
    else high = limit;
  }
  const int64_t before = limit > kIndex ? count_to(x, (limit & ~kIndex) - 1) : 0;
  if (before < keep && count_to(x, limit | kIndex) > keep) return false;
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    const int64_t left = length - kLanes * i;
    if (left <= 0) break;
    const __mmask16 real = left >= kLanes ? 0xFFFF : __mmask16((1u << left) - 1u);
    const __mmask16 away = _mm512_cmpgt_epu32_mask(x[i], _mm512_set1_epi32(int32_t(limit)));
    _mm_mask_storeu_epi8(hidden + kLanes * i, real, _mm_maskz_set1_epi8(away, 1));
  }
  return true;
}

bool mark(const uint32_t* noise, const uint8_t* mask, int64_t length, int64_t keep, uint8_t* hidden) {
  if (length > kMaxOrdered) return false;
  if (keep == 0 || keep == length) {
    for (int64_t n = 0; n < length; ++n) hidden[n] = keep == 0;
    return true;
  }
  uint32_t keys[kMaxOrdered];
  const int64_t wanted = pack(noise, mask, length, keys);
  return wanted == 16    ? mark_row<1>(keys, length, keep, hidden)
         : wanted == 32  ? mark_row<2>(keys, length, keep, hidden)
         : wanted == 64  ? mark_row<4>(keys, length, keep, hidden)
         : wanted == 128 ? mark_row<8>(keys, length, keep, hidden)
         : wanted == 208 ? mark_row<13>(keys, length, keep, hidden)
                         : mark_row<16>(keys, length, keep, hidden);
}

#else

bool mark(const uint32_t*, const uint8_t*, int64_t, int64_t, uint8_t*) { return false; }

bool order(const uint32_t*, const uint8_t*, int64_t, uint32_t*) { return false; }

#endif

// In whole numbers, without branches, so that it becomes vectors.
void keys(const float* noise, int64_t length, uint32_t* to) {
  for (int64_t i = 0; i < length; ++i) {
    uint32_t bits;
    memcpy(&bits, noise + i, sizeof bits);
    const uint32_t negative = bits >> 31, size = bits & 0x7FFFFFFFu;
    const uint32_t key = size == 0 ? 0x80000000u : negative ? ~bits : bits | 0x80000000u;
    to[i] = size > 0x7F800000u ? 0xFFFFFFFFu : key;
  }
}

void row(const uint8_t* hidden, int64_t tokens, int64_t num_keep, int64_t* restore, int64_t* kept, int64_t* masked) {
  split_row(hidden, tokens, num_keep, restore, kept, masked);
}

void repeat(const int64_t* const (&ids)[3], int64_t keep, int64_t mask, int64_t lines, int64_t* const (&to)[3]) {
  const int64_t tokens = keep + mask;
  for (int64_t t = 0; t < lines && tokens > 0; ++t) {
    int64_t *kept = to[0] + t * keep, *masked = to[1] + t * mask, *restore = to[2] + t * tokens;
    for (int64_t k = 0; k < keep; ++k) kept[k] = ids[0][k] + t * tokens;
    for (int64_t m = 0; m < mask; ++m) masked[m] = ids[1][m] + t * tokens;
    for (int64_t n = 0; n < tokens; ++n) restore[n] = ids[2][n] + (ids[2][n] < keep ? t * keep : (lines - 1) * keep + t * mask);
  }
}

void ordered_row(const uint32_t* order, int64_t length, int64_t keep, int64_t* restore, int64_t* kept, int64_t* masked) {
  for (int64_t slot = 0; slot < length; ++slot) restore[order[slot]] = slot;
  for (int64_t slot = 0; slot < keep; ++slot) kept[slot] = order[slot];
  for (int64_t slot = keep; slot < length; ++slot) masked[slot - keep] = order[slot];
}

}  // namespace

extern const OrderKernels OrderKernels_table{&keys, &order, &mark, &repeat, &ordered_row, &row};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
