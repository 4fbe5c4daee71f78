// The laws of mask_sampling that draw per element on CUDA: a thread owns a counter, which is four words, or two tokens to corrupt.
// Filtered noise: a block owns an image, whose noise and half filtered noise stand in shared memory.
#include "common/library.cuh"
#include "common/philox.h"
#include "math/mask_sampling_law_check.h"

namespace maskops {
namespace {

constexpr int kDrawThreads = 256;

struct Stream {
  const std::int64_t* seed;  // [2] = (seed, offset)

  __device__ __forceinline__ PhiloxKey key() const { return PhiloxKey::of(load(seed), load(seed + 1)); }
};

// body(i, word): element i of [0, total) and its word, for the four elements of this thread.
template <typename Body>
__device__ __forceinline__ void for_my_words(const Stream& stream, std::int64_t total, const Body& body) {
  const std::int64_t counter = static_cast<std::int64_t>(blockIdx.x) * kDrawThreads + threadIdx.x;
  if (4 * counter >= total) return;
  const PhiloxWords words = philox(stream.key(), static_cast<std::uint64_t>(counter));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (4 * counter + i < total) body(4 * counter + i, words.word[i]);
  }
}

__global__ void __launch_bounds__(kDrawThreads) words_kernel(const Stream stream, std::int64_t* out, std::int64_t total) {
  for_my_words(stream, total, [&](std::int64_t i, std::uint32_t word) { store(out + i, static_cast<std::int64_t>(word)); });
}

// threshold[b * down + n * across]
__global__ void __launch_bounds__(kDrawThreads)
    bernoulli_kernel(const Stream stream, const std::int64_t* threshold, std::int64_t down, std::int64_t across, bool* out,
                     std::int64_t tokens, std::int64_t total) {
  for_my_words(stream, total, [&](std::int64_t i, std::uint32_t word) {
    store(out + i, static_cast<std::int64_t>(word) < load(threshold + i / tokens * down + i % tokens * across));
  });
}

__global__ void __launch_bounds__(kDrawThreads, 4)
    race_kernel(const Stream stream, const float* weight, float* out, std::int64_t tokens, std::int64_t total) {
  const char* name = "weighted_masking";
  (void)name;
  for_my_words(stream, total, [&](std::int64_t i, std::uint32_t word) {
    const float w = load(weight + i);
    MASKOPS_DEVICE_CHECK(w >= 0.0f && w <= 3.4028235e38f, std::invalid_argument, name, "weight must be finite and at least 0", "weight[",
                         i / tokens, ", ", i % tokens, "] must be finite and at least 0, got ", w);
    store(out + i, race_key(word, w));
  });
}

__global__ void __launch_bounds__(kDrawThreads)
    gate_kernel(const Stream stream, const float* logits, bool gumbel, float* out, std::int64_t total) {
  for_my_words(stream, total,
               [&](std::int64_t i, std::uint32_t word) { store(out + i, gate_open(word, load(logits + i), gumbel) ? 1.0f : 0.0f); });
}

struct Corruption {
  std::int64_t mask_id, low, high, hide, swap;
};

__global__ void __launch_bounds__(kDrawThreads)
    corrupt_kernel(const Stream stream, const std::int64_t* ids, const unsigned char* mask, const Corruption law, std::int64_t* out,
                   std::int64_t total) {
  const std::int64_t counter = static_cast<std::int64_t>(blockIdx.x) * kDrawThreads + threadIdx.x;
  if (2 * counter >= total) return;
  const PhiloxWords words = philox(stream.key(), static_cast<std::uint64_t>(counter));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::int64_t at = 2 * counter + i;
    if (at >= total) continue;
    const std::int64_t id = load(ids + at);
    const bool masked = load(mask + at) != 0;
    store(out + at, masked ? corrupted(words.word[2 * i], words.word[2 * i + 1], id, law.mask_id, law.low, law.high, law.hide, law.swap)
                           : id);
  }
}

// ---------------------------------------------------------------- filtered noise

struct FilterSizes {
  int filters, width, h, w;
};

__global__ void __launch_bounds__(kDrawThreads, 4)
    colour_kernel(const Stream stream, const std::int32_t* taps, const FilterSizes sizes, float* out) {
  MASKOPS_DYNAMIC_SHARED(std::int32_t, numbers);  // field [fh, fw], then across [fh, w]
  const int fh = sizes.h + sizes.width - 1, fw = sizes.w + sizes.width - 1, pixels = fh * fw, cells = sizes.h * sizes.w;
  const std::int64_t b = blockIdx.x;
  const char* name = "colour_masking";
  (void)name;
  if (static_cast<int>(threadIdx.x) < sizes.filters) {
    std::int64_t sum = 0;
    for (int t = 0; t < sizes.width; ++t) {
      const std::int64_t tap = load(taps + threadIdx.x * sizes.width + t);
      sum += tap < 0 ? -tap : tap;
    }
    MASKOPS_DEVICE_CHECK(sum <= 1024, std::invalid_argument, name, "sum of |taps| must be at most 1024", "sum of |taps|[", threadIdx.x,
                         "] must be at most 1024, got ", sum);
  }
  const PhiloxKey key = stream.key();
  for (int i = threadIdx.x; 8 * i < pixels; i += kDrawThreads) {
    const PhiloxWords words = philox(key, row_counter(b) + static_cast<std::uint64_t>(i));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (8 * i + j < pixels) numbers[8 * i + j] = noise_of(words.word[j / 2], j);
    }
  }
  for (int s = 0; s < sizes.filters; ++s) {
    const std::int32_t* own = taps + s * sizes.width;
    __syncthreads();
    for (int i = threadIdx.x; i < fh * sizes.w; i += kDrawThreads) {
      const int y = i / sizes.w, x = i % sizes.w;
      std::int32_t sum = 0;
      for (int t = 0; t < sizes.width; ++t) sum += load(own + t) * numbers[y * fw + x + t];
      numbers[pixels + i] = sum >> 6;
    }
    __syncthreads();
    // A pixel is summed by the same thread for every filter: the whole number waits in the bits of the result.
    for (int i = threadIdx.x; i < cells; i += kDrawThreads) {
      const int y = i / sizes.w, x = i % sizes.w;
      std::int32_t sum = 0;
      for (int t = 0; t < sizes.width; ++t) sum += load(own + t) * numbers[pixels + (y + t) * sizes.w + x];
      std::int32_t* total = reinterpret_cast<std::int32_t*>(out) + b * cells + i;
      sum = s == 0 ? sum : s % 2 ? *total - sum : *total + sum;
      if (s + 1 < sizes.filters) store(total, sum);
      else store(out + b * cells + i, static_cast<float>(-sum));
    }
  }
}

// ---------------------------------------------------------------- ops

template <typename Kernel, typename... Args>
void launch_words(Kernel kernel, std::int64_t counters, const DeviceScope& scope, const Args&... args) {
  launch(kernel, grid_for(counters, kDrawThreads), dim3(kDrawThreads), 0, scope.stream(), args...);
}

Tensor mask_sampling_words(const Tensor& seed_any, std::int64_t count) {
  check_words(seed_any, count);
  const DeviceScope scope(seed_any);
  const Tensor seed = torch::stable::contiguous(seed_any);
  Tensor out = empty_like_device(seed, {count});
  launch_words(words_kernel, ceil_div(count, 4), scope, Stream{const_data<std::int64_t>(seed)}, data<std::int64_t>(out), count);
  return out;
}

Tensor mask_sampling_bernoulli(const Tensor& seed_any, const Tensor& threshold_any, std::int64_t batch, std::int64_t tokens) {
  check_bernoulli(seed_any, threshold_any, batch, tokens);
  const DeviceScope scope(seed_any);
  const Tensor seed = torch::stable::contiguous(seed_any), threshold = torch::stable::contiguous(threshold_any);
  Tensor out = empty_like_device(seed, {batch, tokens}, ScalarType::Bool);
  const std::int64_t down = threshold.size(0) == 1 ? 0 : threshold.size(1), across = threshold.size(1) == 1 ? 0 : 1;
  launch_words(bernoulli_kernel, ceil_div(batch * tokens, 4), scope, Stream{const_data<std::int64_t>(seed)},
               const_data<std::int64_t>(threshold), down, across, data<bool>(out), tokens, batch * tokens);
  return out;
}

Tensor mask_sampling_race(const Tensor& seed_any, const Tensor& weight_any) {
  check_race(seed_any, weight_any);
  const DeviceScope scope(seed_any);
  const Tensor seed = torch::stable::contiguous(seed_any), weight = torch::stable::contiguous(weight_any);
  Tensor out = empty_like_device(weight, {weight.size(0), weight.size(1)});
  launch_words(race_kernel, ceil_div(weight.numel(), 4), scope, Stream{const_data<std::int64_t>(seed)}, const_data<float>(weight),
               data<float>(out), weight.size(1), weight.numel());
  return out;
}

Tensor mask_sampling_corrupt(const Tensor& seed_any, const Tensor& ids_any, const Tensor& mask_any, std::int64_t mask_id,
                             std::int64_t low, std::int64_t high, std::int64_t hide, std::int64_t swap) {
  check_corrupt(seed_any, ids_any, mask_any, low, high, hide, swap);
  const DeviceScope scope(seed_any);
  const Tensor seed = torch::stable::contiguous(seed_any), ids = torch::stable::contiguous(ids_any);
  const Tensor mask = torch::stable::contiguous(mask_any);
  Tensor out = empty_like_device(ids, {ids.size(0), ids.size(1)});
  launch_words(corrupt_kernel, ceil_div(ids.numel(), 2), scope, Stream{const_data<std::int64_t>(seed)}, const_data<std::int64_t>(ids),
               const_data<unsigned char>(mask), Corruption{mask_id, low, high, hide, swap}, data<std::int64_t>(out), ids.numel());
  return out;
}

Tensor mask_sampling_gate(const Tensor& seed_any, const Tensor& logits_any, bool gumbel) {
  check_gate(seed_any, logits_any);
  const DeviceScope scope(seed_any);
  const Tensor seed = torch::stable::contiguous(seed_any), logits = torch::stable::contiguous(logits_any);
  Tensor out = empty_like_device(logits, {logits.size(0)});
  launch_words(gate_kernel, ceil_div(logits.numel(), 4), scope, Stream{const_data<std::int64_t>(seed)}, const_data<float>(logits),
               gumbel, data<float>(out), logits.numel());
  return out;
}

Tensor mask_sampling_colour(const Tensor& seed_any, const Tensor& taps_any, std::int64_t batch, std::int64_t h, std::int64_t w) {
  check_colour(seed_any, taps_any, batch, h, w);
  const DeviceScope scope(seed_any);
  const Tensor seed = torch::stable::contiguous(seed_any), taps = torch::stable::contiguous(taps_any);
  Tensor out = empty_like_device(seed, {batch, h * w}, ScalarType::Float);
  const FilterSizes sizes{static_cast<int>(taps.size(0)), static_cast<int>(taps.size(1)), static_cast<int>(h), static_cast<int>(w)};
  const std::size_t bytes = static_cast<std::size_t>((h + sizes.width - 1) * (2 * w + sizes.width - 1)) * sizeof(std::int32_t);
  if (h * w > 0)
    launch(colour_kernel, grid_for(batch, 1), dim3(kDrawThreads), bytes, scope.stream(), Stream{const_data<std::int64_t>(seed)},
           const_data<std::int32_t>(taps), sizes, data<float>(out));
  return out;
}

}  // namespace

MASKOPS_CUDA_LIBRARY(m) {
  m.impl("mask_sampling_words", TORCH_BOX(&mask_sampling_words));
  m.impl("mask_sampling_bernoulli", TORCH_BOX(&mask_sampling_bernoulli));
  m.impl("mask_sampling_race", TORCH_BOX(&mask_sampling_race));
  m.impl("mask_sampling_corrupt", TORCH_BOX(&mask_sampling_corrupt));
  m.impl("mask_sampling_gate", TORCH_BOX(&mask_sampling_gate));
  m.impl("mask_sampling_colour", TORCH_BOX(&mask_sampling_colour));
}

}  // namespace maskops
