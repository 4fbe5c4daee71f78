// Spans, groups and intervals of sequences on CUDA: a block owns a row, and what is drawn stands in its shared memory. What a draw
// changes for the next one is one thread's work; the words are made, and the masks written, by all.
#include "common/library.cuh"
#include "common/reduce.cuh"
#include "math/mask_sampling_law_check.h"

namespace maskops {
namespace {

constexpr int kRowThreads = 128;
constexpr int kWarp = 32;
constexpr int kMaxGroups = 4096;

struct Spans {
  const std::int64_t *seed, *num_spans, *num_starts, *lengths;  // [2], [B], [B], [B]
  std::int64_t tokens, span;
  bool replacement;
};

// Whether one of the bits (n - span, n] is set.
template <typename Bits>
__device__ __forceinline__ bool any_start(const Bits& taken, std::int64_t n, std::int64_t span) {
  const std::int64_t first = n - span + 1 > 0 ? n - span + 1 : 0;
  for (std::int64_t word = first / 32; word <= n / 32; ++word) {
    unsigned bits = taken[word];
    if (word == first / 32) bits &= 0xffffffffu << (first % 32);
    if (word == n / 32) bits &= 0xffffffffu >> (31 - n % 32);
    if (bits != 0) return true;
  }
  return false;
}

__global__ void __launch_bounds__(kRowThreads, 4) spans_kernel(const Spans law, bool* out) {
  MASKOPS_DYNAMIC_SHARED(unsigned, taken);  // a bit per token
  MASKOPS_SHARED(std::uint32_t, words, kRowThreads);
  const std::int64_t b = blockIdx.x;
  const char* name = "span_masking";
  (void)name;
  const std::int64_t length = load(law.lengths + b), starts = load(law.num_starts + b), wanted = load(law.num_spans + b);
  MASKOPS_DEVICE_CHECK(length >= 0 && length <= law.tokens, std::invalid_argument, name, "lengths must be in [0, N]", "lengths[", b,
                       "] must be in [0, ", law.tokens, "], got ", length);
  MASKOPS_DEVICE_CHECK(starts >= 0 && starts <= length, std::invalid_argument, name, "num_starts must be in [0, length]", "num_starts[",
                       b, "] must be in [0, length], got ", starts);
  MASKOPS_DEVICE_CHECK(wanted >= 0 && wanted <= (1 << 20), std::invalid_argument, name, "num_spans must be in [0, 2^20]", "num_spans[",
                       b, "] must be in [0, 2^20], got ", wanted);
  const std::int64_t count = starts == 0 ? 0 : law.replacement || wanted < starts ? wanted : starts;
  const PhiloxKey key = PhiloxKey::of(load(law.seed), load(law.seed + 1));
  for (std::int64_t i = threadIdx.x; i < (law.tokens + 31) / 32; i += kRowThreads) taken[i] = 0;
  for (std::int64_t first = 0; first < count; first += kRowThreads) {
    __syncthreads();
    words[threadIdx.x] = row_word(key, b, first + threadIdx.x);
    __syncthreads();
    if (threadIdx.x != 0) continue;
    for (std::int64_t i = first; i < count && i < first + kRowThreads; ++i) {
      const std::int64_t newest = starts - count + i;
      std::int64_t start = below(words[i - first], law.replacement ? starts : newest + 1);
      if (!law.replacement && (taken[start / 32] >> (start % 32) & 1u)) start = newest;
      taken[start / 32] = taken[start / 32] | 1u << (start % 32);
    }
  }
  __syncthreads();
  for (std::int64_t n = threadIdx.x; n < law.tokens; n += kRowThreads)
    store(out + b * law.tokens + n, n < length && any_start(taken, n, law.span));
}

struct Groups {
  const std::int64_t *order, *groups, *budgets;  // [B, G], [1 or B, N], [B, L]
  std::int64_t count, tokens, levels, stride;
  bool by_tokens;
};

__global__ void __launch_bounds__(kRowThreads, 4) groups_kernel(const Groups law, unsigned char* out) {
  MASKOPS_SHARED(int, sizes, kMaxGroups);
  MASKOPS_SHARED(unsigned char, level, kMaxGroups);
  const std::int64_t b = blockIdx.x;
  const std::int64_t *order = law.order + b * law.count, *group = law.groups + b * law.stride;
  const char* name = "group_masking";
  (void)name;
  for (std::int64_t g = threadIdx.x; g < law.count; g += kRowThreads) {
    sizes[g] = 0;
    level[g] = static_cast<unsigned char>(law.levels);
    const std::int64_t id = load(order + g);
    MASKOPS_DEVICE_CHECK(id >= -1 && id < law.count, std::invalid_argument, name, "order must be in [-1, G)", "order[", b, ", ", g,
                         "] must be in [-1, ", law.count, "), got ", id);
  }
  __syncthreads();
  for (std::int64_t n = threadIdx.x; n < law.tokens; n += kRowThreads) {
    const std::int64_t g = load(group + n);
    MASKOPS_DEVICE_CHECK(g >= -1 && g < law.count, std::invalid_argument, name, "groups must be in [-1, G)", "groups[", b, ", ", n,
                         "] must be in [-1, ", law.count, "), got ", g);
    if (g >= 0) atomicAdd(&sizes[g], 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    std::int64_t used = 0;
    for (std::int64_t l = 0; l < law.levels; ++l) {
      const std::int64_t budget = load(law.budgets + b * law.levels + l);
      for (std::int64_t i = 0; i < law.count && used < budget; ++i) {
        const std::int64_t g = load(order + i);
        if (g < 0 || sizes[g] == 0 || level[g] < law.levels) continue;
        const std::int64_t cost = law.by_tokens ? sizes[g] : 1;
        if (used + cost > budget) continue;
        used += cost;
        level[g] = static_cast<unsigned char>(l);
      }
    }
  }
  __syncthreads();
  for (std::int64_t n = threadIdx.x; n < law.tokens; n += kRowThreads) {
    const std::int64_t g = load(group + n);
    unsigned char found = static_cast<unsigned char>(law.levels);
    if (g >= 0) found = level[g];
    store(out + b * law.tokens + n, found);
  }
}

// A warp owns a row. All lanes draw the same candidate, each compares it with two of the spans that are taken.
__global__ void __launch_bounds__(kWarp, 8)
    intervals_kernel(const std::int64_t* seed, const std::int64_t* num_spans, const std::int64_t* lengths, std::int64_t max_spans,
                     std::int64_t* out) {
  MASKOPS_SHARED(std::int64_t, begins, 64);
  MASKOPS_SHARED(std::int64_t, ends, 64);
  const std::int64_t b = blockIdx.x, lane = threadIdx.x, wanted = load(num_spans + b), length = load(lengths + b);
  const char* name = "draw_spans";
  (void)name;
  MASKOPS_DEVICE_CHECK(length >= 0 && length < (std::int64_t(1) << 31), std::invalid_argument, name, "lengths must be in [0, 2^31)",
                       "lengths[", b, "] must be in [0, 2^31), got ", length);
  MASKOPS_DEVICE_CHECK(wanted >= 0 && wanted <= max_spans, std::invalid_argument, name, "num_spans must be in [0, max_spans]",
                       "num_spans[", b, "] must be in [0, ", max_spans, "], got ", wanted);
  const PhiloxKey key = PhiloxKey::of(load(seed), load(seed + 1));
  std::int64_t count = 0;
  for (std::int64_t c = 0; c < wanted * wanted && count < wanted; ++c) {
    const Interval x = candidate(philox(key, row_counter(b) + static_cast<std::uint64_t>(c)), length);
    bool clash = x.begin >= x.end;
    for (std::int64_t i = lane; i < count; i += kWarp) clash = clash || (x.end > begins[i] && ends[i] > x.begin);
    if (__ballot_sync(kFullWarp, clash) != 0) continue;
    if (lane == 0) {
      begins[count] = x.begin;
      ends[count] = x.end;
    }
    ++count;
    __syncthreads();
  }
  __syncthreads();
  std::int64_t* row = out + b * max_spans * 2;
  for (std::int64_t i = lane; i < max_spans; i += kWarp) {
    std::int64_t rank = i, begin = -1, end = -1;
    if (i < count) {
      begin = begins[i], end = ends[i], rank = 0;
      for (std::int64_t j = 0; j < count; ++j) rank += begins[j] < begin;
    }
    store(row + 2 * rank, begin);
    store(row + 2 * rank + 1, end);
  }
}

Tensor mask_sampling_spans(const Tensor& seed_any, const Tensor& spans_any, const Tensor& starts_any, const Tensor& lengths_any,
                           std::int64_t tokens, std::int64_t span, bool replacement) {
  check_spans(seed_any, spans_any, starts_any, lengths_any, tokens, span);
  const DeviceScope scope(seed_any);
  const Tensor seed = torch::stable::contiguous(seed_any), num_spans = torch::stable::contiguous(spans_any);
  const Tensor num_starts = torch::stable::contiguous(starts_any), lengths = torch::stable::contiguous(lengths_any);
  Tensor out = empty_like_device(seed, {num_spans.size(0), tokens}, ScalarType::Bool);
  const Spans law{const_data<std::int64_t>(seed), const_data<std::int64_t>(num_spans), const_data<std::int64_t>(num_starts),
                  const_data<std::int64_t>(lengths), tokens, span, replacement};
  const std::size_t bytes = static_cast<std::size_t>((tokens + 31) / 32) * sizeof(unsigned) + sizeof(unsigned);
  launch(spans_kernel, grid_for(num_spans.size(0), 1), dim3(kRowThreads), bytes, scope.stream(), law, data<bool>(out));
  return out;
}

Tensor mask_sampling_groups(const Tensor& order_any, const Tensor& groups_any, const Tensor& budgets_any, bool by_tokens) {
  check_groups(order_any, groups_any, budgets_any);
  const DeviceScope scope(order_any);
  const Tensor order = torch::stable::contiguous(order_any), groups = torch::stable::contiguous(groups_any);
  const Tensor budgets = torch::stable::contiguous(budgets_any);
  const std::int64_t tokens = groups.size(1);
  Tensor out = empty_like_device(order, {order.size(0), tokens}, ScalarType::Byte);
  const Groups law{const_data<std::int64_t>(order), const_data<std::int64_t>(groups), const_data<std::int64_t>(budgets), order.size(1),
                   tokens, budgets.size(1), groups.size(0) == 1 ? 0 : tokens, by_tokens};
  launch(groups_kernel, grid_for(order.size(0), 1), dim3(kRowThreads), 0, scope.stream(), law, data<unsigned char>(out));
  return out;
}

Tensor mask_sampling_intervals(const Tensor& seed_any, const Tensor& spans_any, const Tensor& lengths_any, std::int64_t max_spans) {
  check_intervals(seed_any, spans_any, lengths_any, max_spans);
  const DeviceScope scope(seed_any);
  const Tensor seed = torch::stable::contiguous(seed_any), num_spans = torch::stable::contiguous(spans_any);
  const Tensor lengths = torch::stable::contiguous(lengths_any);
  Tensor out = empty_like_device(seed, {num_spans.size(0), max_spans, 2});
  launch(intervals_kernel, grid_for(num_spans.size(0), 1), dim3(kWarp), 0, scope.stream(), const_data<std::int64_t>(seed),
         const_data<std::int64_t>(num_spans), const_data<std::int64_t>(lengths), max_spans, data<std::int64_t>(out));
  return out;
}

}  // namespace

MASKOPS_CUDA_LIBRARY(m) {
  m.impl("mask_sampling_spans", TORCH_BOX(&mask_sampling_spans));
  m.impl("mask_sampling_groups", TORCH_BOX(&mask_sampling_groups));
  m.impl("mask_sampling_intervals", TORCH_BOX(&mask_sampling_intervals));
}

}  // namespace maskops
