// Loops over whole numbers without branches, which the compiler turns into vectors of each instruction set.
#include "cpu/mask_sampling/draw.h"

#include <algorithm>

#include "common/simd_philox.h"
#include "math/mask_sampling_draw.h"

namespace maskops {
namespace MASKOPS_ISA_NS {
namespace {

void words(const PhiloxKey& key, uint64_t counter, int64_t count, uint32_t* to) {
  for (int64_t i = 0; i < count; i += 4 * kPhiloxCounters) philox_words(key, counter + static_cast<uint64_t>(i / 4), to + i);
}

void race(const uint32_t* word, const float* weight, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = race_key(word[i], weight[i]);
}

void gates(const uint32_t* word, const float* logits, int64_t count, bool gumbel, float* to) {
  if (gumbel) {
    for (int64_t i = 0; i < count; ++i) to[i] = gate_open(word[i], logits[i], true);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = gate_open(word[i], logits[i], false);
  }
}

// to[x] += tap * from[x], whole vectors.
inline void add_row(int32_t tap, const int32_t* from, int64_t padded, int32_t* to) {
  for (int64_t x = 0; x < padded; x += 16) {
    for (int64_t i = 0; i < 16; ++i) to[x + i] += tap * from[x + i];
  }
}

void colour(const PhiloxKey& key, int64_t row, const Filter& filter, int32_t* buffer, float* to) {
  const int64_t fh = filter.field_h(), fw = filter.field_w(), stride = filter.stride(), padded = filter.padded_w();
  uint32_t* drawn = reinterpret_cast<uint32_t*>(buffer);
  int32_t* field = buffer + filter.words() + kWordsSlack;
  int32_t* across = field + fh * stride;
  int32_t *sum = across + fh * padded, *totals = sum + padded;  // filters meet as whole numbers, rounded once
  words(key, row_counter(row), filter.words(), drawn);
  for (int64_t y = 0; y < fh; ++y) {
    for (int64_t x = 0; x < fw; ++x) field[y * stride + x] = noise_of(drawn[(y * fw + x) >> 1], y * fw + x);
    std::fill(field + y * stride + fw, field + (y + 1) * stride, 0);
  }
  for (int64_t s = 0; s < filter.filters; ++s) {
    const int32_t* taps = filter.taps + s * filter.width;
    for (int64_t y = 0; y < fh; ++y) {
      int32_t* line = across + y * padded;
      std::fill(line, line + padded, 0);
      for (int64_t t = 0; t < filter.width; ++t) add_row(taps[t], field + y * stride + t, padded, line);
      for (int64_t x = 0; x < padded; ++x) line[x] >>= 6;
    }
    const int32_t sign = s % 2 ? -1 : 1;
    for (int64_t y = 0; y < filter.h; ++y) {
      std::fill(sum, sum + padded, 0);
      for (int64_t t = 0; t < filter.width; ++t) add_row(sign * taps[t], across + (y + t) * padded, padded, sum);
      int32_t* line = totals + y * filter.w;
      for (int64_t x = 0; x < filter.w; ++x) line[x] = s == 0 ? sum[x] : line[x] + sum[x];
    }
  }
  for (int64_t i = 0; i < filter.h * filter.w; ++i) to[i] = static_cast<float>(totals[i]);
}

}  // namespace

extern const DrawKernels DrawKernels_table{&words, &race, &gates, &colour};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
