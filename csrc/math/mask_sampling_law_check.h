// Input checks of the laws of mask_sampling, shared by the CPU and the CUDA op functions. What values may be, the kernels check.
#pragma once

#include "common/check.h"
#include "math/mask_sampling_draw.h"

namespace maskops {

inline constexpr std::initializer_list<ScalarType> kFloat32 = {ScalarType::Float};

inline void check_seed(const char* op, const Tensor& seed) { check_tensor(op, "seed", seed, "[2]", kInt64, {2}, seed); }

inline void check_in(const char* op, const char* arg, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) fail(op, arg, "be in [" + std::to_string(low) + ", " + std::to_string(high) + "]", value);
}

inline void check_batch(const char* op, int64_t batch) { check_in(op, "B", batch, 0, (int64_t{1} << 31) - 1); }

inline void check_words(const Tensor& seed, int64_t count) {
  check_seed("random_words", seed);
  check_in("random_words", "count", count, 0, int64_t{1} << 40);
}

inline void check_bernoulli(const Tensor& seed, const Tensor& threshold, int64_t batch, int64_t tokens) {
  const char* op = "bernoulli_masking";
  check_seed(op, seed);
  check_in(op, "B", batch, 0, int64_t{1} << 40);
  check_in(op, "N", tokens, 0, int64_t{1} << 40);
  check_tensor(op, "threshold", threshold, "[1 or B, 1 or N]", kInt64, {kAny, kAny}, seed);
  const bool rows = threshold.size(0) == 1 || threshold.size(0) == batch, columns = threshold.size(1) == 1 || threshold.size(1) == tokens;
  if (!rows || !columns)
    fail(op, "threshold", "have shape [1 or B, 1 or N] = [1 or " + std::to_string(batch) + ", 1 or " + std::to_string(tokens) + "]",
         describe(threshold));
}

inline void check_race(const Tensor& seed, const Tensor& weight) {
  check_seed("weighted_masking", seed);
  check_tensor("weighted_masking", "weight", weight, "[B, N]", kFloat32, {kAny, kAny}, seed);
}

inline void check_corrupt(const Tensor& seed, const Tensor& ids, const Tensor& mask, int64_t low, int64_t high, int64_t hide,
                          int64_t swap) {
  const char* op = "corrupt_tokens";
  check_seed(op, seed);
  check_tensor(op, "ids", ids, "[B, N]", kInt64, {kAny, kAny}, seed);
  check_tensor(op, "mask", mask, "[B, N]", kBool, {ids.size(0), ids.size(1)}, seed);
  check_in(op, "hide", hide, 0, int64_t{1} << 32);
  check_in(op, "swap", swap, hide, int64_t{1} << 32);
  check_in(op, "high - low", high - low, swap > hide ? 1 : 0, (int64_t{1} << 31) - 1);
}

inline void check_gate(const Tensor& seed, const Tensor& logits) {
  check_seed("sample_gates", seed);
  check_tensor("sample_gates", "logits", logits, "[M]", kFloat32, {kAny}, seed);
}

constexpr int64_t kMaxFiltered = 12288;  // a row's noise and half filtered noise, 48 KiB

inline void check_colour(const Tensor& seed, const Tensor& taps, int64_t batch, int64_t h, int64_t w) {
  const char* op = "colour_masking";
  check_seed(op, seed);
  check_batch(op, batch);
  check_in(op, "h", h, 0, 4096);
  check_in(op, "w", w, 0, 4096);
  check_tensor(op, "taps", taps, "[S, T]", kInt32, {kAny, kAny}, seed);
  check_in(op, "S", taps.size(0), 1, 3);
  if (taps.size(1) % 2 != 1 || taps.size(1) > 63) fail(op, "T", "be odd and at most 63", taps.size(1));
  const int64_t around = taps.size(1) - 1, numbers = (h + around) * (2 * w + around);
  if (numbers > kMaxFiltered) fail(op, "(h + T - 1) (2 w + T - 1)", "be at most " + std::to_string(kMaxFiltered), numbers);
}

inline void check_sides(const char* op, int64_t h, int64_t w) {
  check_in(op, "h", h, 0, kMaxSide);
  check_in(op, "w", w, 0, kMaxSide);
}

inline void check_blocks(const Tensor& seed, const Tensor& num_mask, const Tensor& shapes, int64_t h, int64_t w, int64_t smallest,
                         int64_t largest, int64_t tries) {
  const char* op = "block_masking";
  check_seed(op, seed);
  check_tensor(op, "num_mask", num_mask, "[B]", kInt64, {kAny}, seed);
  check_tensor(op, "shapes", shapes, "[A, 2]", kInt32, {kAny, 2}, seed);
  check_in(op, "A", shapes.size(0), 1, 1 << 20);
  check_sides(op, h, w);
  check_in(op, "smallest", smallest, 1, 4096);
  check_in(op, "largest", largest, 1, 4096);
  check_in(op, "tries", tries, 1, 1000);
}

inline void check_multiblock(const Tensor& seed, const Tensor& target_sizes, const Tensor& context_sizes, int64_t batch, int64_t h,
                             int64_t w, int64_t targets, int64_t min_keep) {
  const char* op = "multiblock_masking";
  check_seed(op, seed);
  check_tensor(op, "target_sizes", target_sizes, "[A, 2]", kInt32, {kAny, 2}, seed);
  check_tensor(op, "context_sizes", context_sizes, "[A, 2]", kInt32, {kAny, 2}, seed);
  check_in(op, "A", target_sizes.size(0), 1, 1 << 20);
  check_in(op, "A", context_sizes.size(0), 1, 1 << 20);
  check_batch(op, batch);
  check_sides(op, h, w);
  check_in(op, "targets", targets, 1, 64);
  check_in(op, "min_keep", min_keep, 0, 4096);
}

inline void check_spans(const Tensor& seed, const Tensor& num_spans, const Tensor& num_starts, const Tensor& lengths, int64_t tokens,
                        int64_t span) {
  const char* op = "span_masking";
  check_seed(op, seed);
  check_tensor(op, "num_spans", num_spans, "[B]", kInt64, {kAny}, seed);
  check_tensor(op, "num_starts", num_starts, "[B]", kInt64, {num_spans.size(0)}, seed);
  check_tensor(op, "lengths", lengths, "[B]", kInt64, {num_spans.size(0)}, seed);
  check_in(op, "N", tokens, 0, int64_t{1} << 18);
  check_in(op, "span", span, 1, int64_t{1} << 18);
}

inline void check_groups(const Tensor& order, const Tensor& groups, const Tensor& budgets) {
  const char* op = "group_masking";
  check_tensor(op, "order", order, "[B, G]", kInt64, {kAny, kAny}, order);
  check_tensor(op, "groups", groups, "[1 or B, N]", kInt64, {kAny, kAny}, order);
  if (groups.size(0) != 1 && groups.size(0) != order.size(0))
    fail(op, "groups", "have shape [1 or B, N] = [1 or " + std::to_string(order.size(0)) + ", *]", describe(groups));
  check_tensor(op, "budgets", budgets, "[B, L]", kInt64, {order.size(0), kAny}, order);
  check_in(op, "G", order.size(1), 0, 4096);
  check_in(op, "L", budgets.size(1), 1, 254);
}

inline void check_intervals(const Tensor& seed, const Tensor& num_spans, const Tensor& lengths, int64_t max_spans) {
  const char* op = "draw_spans";
  check_seed(op, seed);
  check_tensor(op, "num_spans", num_spans, "[B]", kInt64, {kAny}, seed);
  check_tensor(op, "lengths", lengths, "[B]", kInt64, {num_spans.size(0)}, seed);
  check_in(op, "max_spans", max_spans, 1, 64);
}

}  // namespace maskops
