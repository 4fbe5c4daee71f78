// The laws of mask_sampling that draw per element: words, Bernoulli, races, 80/10/10, gates, filtered noise.
#include "cpu/mask_sampling/draw.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "common/parallel.h"
#include "math/mask_sampling_law_check.h"

namespace maskops {
namespace {

constexpr int64_t kPiece = 2048;  // words that a thread makes at a time

PhiloxKey key_of(const Tensor& seed_any) {
  const Tensor seed = contiguous_or_copy(seed_any);
  const int64_t* words = static_cast<const int64_t*>(seed.const_data_ptr());
  return PhiloxKey::of(words[0], words[1]);
}

template <class T>
const T* read(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* write(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// A number as Python writes it.
std::string as_python(double x) {
  if (std::isnan(x)) return "nan";
  if (std::isinf(x)) return x < 0 ? "-inf" : "inf";
  std::array<char, 32> text{};
  const std::string digits(text.data(), std::to_chars(text.data(), text.data() + text.size(), x).ptr);
  return digits.find_first_of(".e") == std::string::npos ? digits + ".0" : digits;
}

// body(first, count, words): pieces of the words [0, total) of the stream.
template <class Body>
void for_words(const Tensor& seed, int64_t total, int64_t cost, const Body& body) {
  const PhiloxKey key = key_of(seed);
  const DrawKernels& kernels = pick_DrawKernels();
  parallel_for((total + kPiece - 1) / kPiece, kPiece * cost, [&](int64_t begin, int64_t end) {
    uint32_t words[kPiece + kWordsSlack];
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece * kPiece, count = std::min(kPiece, total - first);
      kernels.words(key, static_cast<uint64_t>(first / 4), count, words);
      body(first, count, words);
    }
  });
}

Tensor mask_sampling_words(const Tensor& seed, int64_t count) {
  check_words(seed, count);
  Tensor out = empty_like_device(seed, {count});
  int64_t* to = write<int64_t>(out);
  for_words(seed, count, 16, [&](int64_t first, int64_t n, const uint32_t* words) { std::copy(words, words + n, to + first); });
  return out;
}

Tensor mask_sampling_bernoulli(const Tensor& seed, const Tensor& threshold_any, int64_t batch, int64_t tokens) {
  check_bernoulli(seed, threshold_any, batch, tokens);
  const Tensor threshold = contiguous_or_copy(threshold_any);
  Tensor out = empty_like_device(seed, {batch, tokens}, ScalarType::Bool);
  const int64_t* limits = read<int64_t>(threshold);
  uint8_t* to = write<uint8_t>(out);
  const int64_t down = threshold.size(0) == 1 ? 0 : threshold.size(1), across = threshold.size(1) == 1 ? 0 : 1;
  const DrawKernels& kernels = pick_DrawKernels();
  for_words(seed, batch * tokens, 4, [&](int64_t first, int64_t count, const uint32_t* words) {
    if (!down && !across) {
      if (*limits <= 0 || *limits > UINT32_MAX) std::fill(to + first, to + first + count, static_cast<uint8_t>(*limits > 0));
      else kernels.below_limit(words, static_cast<uint32_t>(*limits), count, to + first);
      return;
    }
    // Row by row, so that a row's own threshold is one number.
    for (int64_t i = 0; i < count;) {
      const int64_t b = (first + i) / tokens, n = (first + i) % tokens, stop = std::min(count, i + tokens - n);
      const int64_t* limit = limits + b * down + n * across;
      if (across) {
        for (int64_t j = 0; i < stop; ++i, ++j) to[first + i] = static_cast<int64_t>(words[i]) < limit[j];
      } else {
        const int64_t one = *limit;
        for (; i < stop; ++i) to[first + i] = static_cast<int64_t>(words[i]) < one;
      }
    }
  });
  return out;
}

Tensor mask_sampling_race(const Tensor& seed, const Tensor& weight_any) {
  check_race(seed, weight_any);
  const Tensor weight = contiguous_or_copy(weight_any);
  const float* weights = read<float>(weight);
  FirstFault fault;
  Tensor out = empty_like_device(weight, {weight.size(0), weight.size(1)});
  float* to = write<float>(out);
  const DrawKernels& kernels = pick_DrawKernels();
  for_words(seed, weight.numel(), 64, [&](int64_t first, int64_t count, const uint32_t* words) {
    if (kernels.race(words, weights + first, count, to + first)) return;
    for (int64_t i = first; i < first + count; ++i) {
      if (!(weights[i] >= 0.0f && weights[i] < INFINITY)) fault.note(i);
    }
  });
  if (fault.any()) {
    const int64_t b = fault.position() / weight.size(1), n = fault.position() % weight.size(1);
    fail("weighted_masking", "weight[" + std::to_string(b) + ", " + std::to_string(n) + "]", "be finite and at least 0",
         as_python(weights[fault.position()]));
  }
  return out;
}

Tensor mask_sampling_corrupt(const Tensor& seed, const Tensor& ids_any, const Tensor& mask_any, int64_t mask_id, int64_t low,
                             int64_t high, int64_t hide, int64_t swap) {
  check_corrupt(seed, ids_any, mask_any, low, high, hide, swap);
  const Tensor ids = contiguous_or_copy(ids_any), mask = contiguous_or_copy(mask_any);
  Tensor out = empty_like_device(ids, {ids.size(0), ids.size(1)});
  const int64_t* from = read<int64_t>(ids);
  const uint8_t* masked = read<uint8_t>(mask);
  int64_t* to = write<int64_t>(out);
  const Corruption law{mask_id, low, high, hide, swap};
  const DrawKernels& kernels = pick_DrawKernels();
  for_words(seed, 2 * ids.numel(), 16, [&](int64_t first, int64_t count, const uint32_t* words) {
    kernels.corrupt(words, from + first / 2, masked + first / 2, count / 2, law, to + first / 2);
  });
  return out;
}

Tensor mask_sampling_gate(const Tensor& seed, const Tensor& logits_any, bool gumbel) {
  check_gate(seed, logits_any);
  const Tensor logits = contiguous_or_copy(logits_any);
  Tensor out = empty_like_device(logits, {logits.size(0)});
  const float* from = read<float>(logits);
  float* to = write<float>(out);
  const DrawKernels& kernels = pick_DrawKernels();
  for_words(seed, logits.numel(), 64, [&](int64_t first, int64_t count, const uint32_t* words) {
    kernels.gates(words, from + first, count, gumbel, to + first);
  });
  return out;
}

Tensor mask_sampling_colour(const Tensor& seed, const Tensor& taps_any, int64_t batch, int64_t h, int64_t w) {
  check_colour(seed, taps_any, batch, h, w);
  const Tensor taps = contiguous_or_copy(taps_any);
  const Filter filter{read<int32_t>(taps), taps.size(0), taps.size(1), h, w};
  for (int64_t s = 0; s < filter.filters; ++s) {
    int64_t sum = 0;
    for (int64_t t = 0; t < filter.width; ++t) sum += std::abs(static_cast<int64_t>(filter.taps[s * filter.width + t]));
    if (sum > 1024) fail("colour_masking", "sum of |taps|[" + std::to_string(s) + "]", "be at most 1024", sum);
  }
  Tensor out = empty_like_device(seed, {batch, h * w}, ScalarType::Float);
  float* to = write<float>(out);
  const PhiloxKey key = key_of(seed);
  const DrawKernels& kernels = pick_DrawKernels();
  if (h * w == 0) return out;
  parallel_for(batch, filter.field_h() * filter.field_w() * filter.width * filter.filters, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> buffer(filter.buffer());
    for (int64_t b = begin; b < end; ++b) kernels.colour(key, b, filter, buffer.data(), to + b * h * w);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("mask_sampling_words", TORCH_BOX(&mask_sampling_words));
  m.impl("mask_sampling_bernoulli", TORCH_BOX(&mask_sampling_bernoulli));
  m.impl("mask_sampling_race", TORCH_BOX(&mask_sampling_race));
  m.impl("mask_sampling_corrupt", TORCH_BOX(&mask_sampling_corrupt));
  m.impl("mask_sampling_gate", TORCH_BOX(&mask_sampling_gate));
  m.impl("mask_sampling_colour", TORCH_BOX(&mask_sampling_colour));
}

}  // namespace maskops
#endif
