// What is drawn per element. Where there are no vectors by hand, loops over whole numbers without branches, which the compiler turns
// into vectors of each instruction set.
#include "cpu/mask_sampling/draw.h"

#include <algorithm>
#include <type_traits>

#include "common/simd_philox.h"
#include "cpu/mask_sampling/draw_logs.h"

namespace maskops {
namespace MASKOPS_ISA_NS {
namespace {

void below_limit(const uint32_t* word, uint32_t limit, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = word[i] < limit;
}

bool race(const uint32_t* word, const float* weight, int64_t count, float* to) {
  bool valid = true;
  for (int64_t i = 0; i < count; ++i) valid &= (weight[i] >= 0.0f) & (weight[i] < __builtin_inff());
#if MASKOPS_ISA_LEVEL == 2
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 real = count - i >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (count - i)) - 1u);
    const __m512i words = _mm512_maskz_loadu_epi32(real, word + i);
    _mm512_mask_storeu_ps(to + i, real, race_key16(words, _mm512_maskz_loadu_epi32(real, weight + i)));
  }
#else
  for (int64_t i = 0; i < count; ++i) to[i] = race_key(word[i], weight[i]);
#endif
  return valid;
}

void corrupt(const uint32_t* word, const int64_t* ids, const uint8_t* mask, int64_t count, const Corruption& law, int64_t* to) {
#if MASKOPS_ISA_LEVEL == 2
  const __m512i low = _mm512_set1_epi64(law.low), range = _mm512_set1_epi64(law.high - law.low), hidden = _mm512_set1_epi64(law.mask_id);
  for (int64_t i = 0; i < count; i += 8) {
    const __mmask8 real = count - i >= 8 ? __mmask8(0xFF) : __mmask8((1u << (count - i)) - 1u);
    const __m512i words = _mm512_maskz_loadu_epi64(real, word + 2 * i);  // the action below, the other word above
    const __m512i action = _mm512_and_si512(words, _mm512_set1_epi64(0xFFFFFFFF));
    const __m128i bytes = _mm_maskz_loadu_epi8(real, mask + i);
    const __mmask8 masked = __mmask8(_mm_test_epi8_mask(bytes, bytes));
    const __mmask8 swap = _mm512_mask_cmplt_epi64_mask(masked, action, _mm512_set1_epi64(law.swap));
    const __mmask8 hide = _mm512_mask_cmplt_epi64_mask(masked, action, _mm512_set1_epi64(law.hide));
    const __m512i other = _mm512_srli_epi64(_mm512_mul_epu32(_mm512_srli_epi64(words, 32), range), 32);
    const __m512i id = _mm512_mask_add_epi64(_mm512_maskz_loadu_epi64(real, ids + i), swap, other, low);
    _mm512_mask_storeu_epi64(to + i, real, _mm512_mask_mov_epi64(id, hide, hidden));
  }
#else
  for (int64_t i = 0; i < count; ++i) {
    to[i] = mask[i] ? corrupted(word[2 * i], word[2 * i + 1], ids[i], law.mask_id, law.low, law.high, law.hide, law.swap) : ids[i];
  }
#endif
}

// In runs of vectors: one in which any draw is near its threshold, one of a thousand, is drawn again in whole numbers.
template <bool kGumbel>
void gates_of(const uint32_t* word, const float* logits, int64_t count, float* to) {
  constexpr int64_t run = 128;
  for (int64_t first = 0; first < count; first += run) {
    const int64_t end = min_of(count, first + run);
    VecF near = VecF::zero();
    int64_t i = first;
    for (; i + VecF::width <= end; i += VecF::width) gate_open_or_near<kGumbel>(word + i, logits + i, near).store(to + i);
    const int64_t again = near.highest() > 0 ? first : i;
    for (i = again; i < end; ++i) to[i] = gate_open(word[i], logits[i], kGumbel);
  }
}

void gates(const uint32_t* word, const float* logits, int64_t count, bool gumbel, float* to) {
  if (gumbel) gates_of<true>(word, logits, count, to);
  else gates_of<false>(word, logits, count, to);
}

typedef FloatFormat<VecF>::Int Lanes;

// Of each lane the lower half times that of `taps` plus the upper half times that of `taps`, as signed numbers of 16 bits.
inline Lanes products_of_halves(Lanes x, int32_t taps) {
#if MASKOPS_ISA_LEVEL == 2
  return Lanes(_mm512_madd_epi16(__m512i(x), _mm512_set1_epi32(taps)));
#elif MASKOPS_ISA_LEVEL == 1
  return Lanes(_mm256_madd_epi16(__m256i(x), _mm256_set1_epi32(taps)));
#else
  return ((x << 16) >> 16) * int32_t(int16_t(taps)) + (x >> 16) * (taps >> 16);
#endif
}

// Sums over t of taps[t] times number x + t, for a vector of columns x, from the first tap that is not zero to the last.
struct Taps {
  static constexpr int64_t columns = VecF::width;

  const int32_t* taps;
  int64_t first, last;  // [first, last)
  bool even;
  int32_t pairs[32];

  Taps(const int32_t* given, int64_t width) : taps(given), first(0), last(width), even(true) {
    while (first < last && taps[first] == 0) ++first;
    while (first < last && taps[last - 1] == 0) --last;
    for (int64_t t = 0; t < width / 2; ++t) even = even && taps[t] == taps[width - 1 - t];
    for (int64_t t = first; t < last; t += 2) {
      const int32_t after = t + 1 < last ? taps[t + 1] : 0;
      pairs[(t - first) / 2] = int32_t(uint32_t(taps[t] & 0xFFFF) | uint32_t(after) << 16);
    }
  }

  // Of K rows, `stride` apart. Each number of `from` holds its own half below and that of the next column above.
  template <int K>
  inline void sums_of_halves(const int32_t* from, int64_t stride, Lanes (&total)[K]) const {
    for (int64_t t = first; t < last; t += 2) {
      const int32_t both = pairs[(t - first) / 2];
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) total[k] += products_of_halves(lanes(from + k * stride + t), both);
    }
  }

  // Down the rows. Where the taps read the same from both ends, numbers that share one are added first.
  template <int K>
  inline void sums(const int32_t* from, int64_t stride, Lanes (&total)[K]) const {
    int64_t t = first, end = last;
    for (; even && t + 1 < end; ++t) {
      --end;
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) total[k] += taps[t] * (lanes(from + (k + t) * stride) + lanes(from + (k + end) * stride));
    }
    for (; t < end; ++t) {
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) total[k] += taps[t] * lanes(from + (k + t) * stride);
    }
  }

  static inline Lanes lanes(const int32_t* from) {
    Lanes x;
    memcpy(&x, from, sizeof x);
    return x;
  }
};

// body(rows, y): four rows at a time, so that a tap is read once for them, and the rest one by one.
template <class Body>
inline void in_blocks(int64_t rows, const Body& body) {
  int64_t y = 0;
  for (; y + 4 <= rows; y += 4) body(std::integral_constant<int, 4>(), y);
  for (; y < rows; ++y) body(std::integral_constant<int, 1>(), y);
}

// Rows of the field and of what is filtered have room for whole vectors; what is past their ends is noise that no result reads.
void colour(const PhiloxKey& key, int64_t row, const Filter& filter, int32_t* buffer, float* to) {
  constexpr int64_t step = Taps::columns;
  const int64_t fh = filter.field_h(), fw = filter.field_w(), stride = filter.stride(), padded = filter.padded_w();
  uint32_t* drawn = reinterpret_cast<uint32_t*>(buffer);
  int32_t* field = buffer + filter.words() + kWordsSlack;
  int32_t *across = field + fh * stride, *totals = across + fh * padded;  // filters meet as whole numbers, rounded once
  philox_words(key, row_counter(row), filter.words(), drawn);
  for (int64_t y = 0; y < fh; ++y) {
    for (int64_t x = 0; x < fw; x += step) {
      uint16_t halves[step], next[step];  // noise_of: a word's lower half comes first
      static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
      memcpy(halves, reinterpret_cast<const char*>(drawn) + 2 * (y * fw + x), sizeof halves);
      memcpy(next, reinterpret_cast<const char*>(drawn) + 2 * (y * fw + x + 1), sizeof next);
      for (int64_t i = 0; i < step; ++i) field[y * stride + x + i] = int32_t((halves[i] | uint32_t(next[i]) << 16) ^ 0x80008000u);
    }
  }
  for (int64_t s = 0; s < filter.filters; ++s) {
    const Taps taps(filter.taps + s * filter.width, filter.width);
    in_blocks(fh, [&](auto rows, int64_t y) {
      for (int64_t x = 0; x < padded; x += step) {
        Lanes line[rows()]{};
        taps.sums_of_halves(field + y * stride + x, stride, line);
        for (int k = 0; k < rows(); ++k) line[k] >>= 6, memcpy(across + (y + k) * padded + x, &line[k], sizeof line[k]);
      }
    });
    in_blocks(filter.h, [&](auto rows, int64_t y) {
      for (int64_t x = 0; x < padded; x += step) {
        Lanes line[rows()]{};
        taps.sums(across + y * padded + x, padded, line);
        for (int k = 0; k < rows(); ++k) {
          int32_t* to = totals + (y + k) * padded + x;
          const Lanes before = s > 0 ? Taps::lanes(to) : Lanes{};
          line[k] = s % 2 ? before + line[k] : before - line[k];
          memcpy(to, &line[k], sizeof line[k]);
        }
      }
    });
  }
  for (int64_t y = 0; y < filter.h; ++y) {
    for (int64_t x = 0; x < filter.w; x += step) {
      Lanes line;
      memcpy(&line, totals + y * padded + x, sizeof line);
      VecF value;
      value.v = decltype(value.v)(__builtin_convertvector(line, typename FloatFormat<VecF>::Raw));
      value.store_n(to + y * filter.w + x, min_of(step, filter.w - x));
    }
  }
}

}  // namespace

extern const DrawKernels DrawKernels_table{&philox_words, &below_limit, &race, &corrupt, &gates, &colour};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
