// The kernels of mask_sampling that draw per element, one table per instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/philox.h"

namespace maskops {

constexpr int64_t kWordsSlack = 32;  // words are made in blocks: a buffer has room for so many more

// Noise of h x w pixels through separable filters taps [S, T], added with alternating signs, - + -: the smallest are kept.
struct Filter {
  const int32_t* taps;
  int64_t filters, width, h, w;

  int64_t field_h() const { return h + width - 1; }
  int64_t field_w() const { return w + width - 1; }
  int64_t words() const { return (field_h() * field_w() + 1) / 2; }
  int64_t padded_w() const { return (w + 15) / 16 * 16; }
  int64_t stride() const { return padded_w() + width - 1; }  // of a row of the field
  // int32 numbers of a thread's buffer: words, field, one filtered field, the result.
  int64_t buffer() const { return words() + kWordsSlack + field_h() * (stride() + padded_w()) + h * padded_w(); }
};

struct Corruption {
  int64_t mask_id, low, high, hide, swap;
};

struct DrawKernels {
  // Words [4 counter, 4 counter + count) of the stream.
  void (*words)(const PhiloxKey& key, uint64_t counter, int64_t count, uint32_t* to);
  // to[i] = words[i] < limit
  void (*below_limit)(const uint32_t* words, uint32_t limit, int64_t count, uint8_t* to);
  // Whether all weights are finite and at least 0.
  bool (*race)(const uint32_t* words, const float* weight, int64_t count, float* to);
  // corrupted() of [count] tokens, with two words each
  void (*corrupt)(const uint32_t* words, const int64_t* ids, const uint8_t* mask, int64_t count, const Corruption& law, int64_t* to);
  void (*gates)(const uint32_t* words, const float* logits, int64_t count, bool gumbel, float* to);
  void (*colour)(const PhiloxKey& key, int64_t row, const Filter& filter, int32_t* buffer, float* to);
};
MASKOPS_DECLARE_KERNELS(DrawKernels)

}  // namespace maskops
