// Input checks of the family mask_sampling, shared by the CPU and the CUDA op functions.
#pragma once

#include "common/check.h"
#include "math/mask_sampling.h"

namespace maskops {

inline void check_sampling_counts(const Tensor& num_keep, const std::optional<Tensor>& lengths, int64_t batch, int64_t max_keep,
                                  int64_t max_mask) {
  const char* op = "random_masking";
  check_tensor(op, "num_keep", num_keep, "[B]", kInt64, {batch}, num_keep);
  if (lengths) check_tensor(op, "lengths", *lengths, "[B]", kInt64, {num_keep.size(0)}, num_keep);
  if (max_keep < 0) fail(op, "max_keep", "be at least 0", max_keep);
  if (max_mask < 0) fail(op, "max_mask", "be at least 0", max_mask);
}

inline void check_sampling_uniform(const Tensor& seed, const Tensor& num_keep, const std::optional<Tensor>& lengths,
                                   const std::optional<Tensor>& mask, int64_t tokens, int64_t max_keep, int64_t max_mask,
                                   bool ascending, const Cells& cells) {
  const char* op = "random_masking";
  check_sampling_counts(num_keep, lengths, kAny, max_keep, max_mask);
  check_tensor(op, "seed", seed, "[2]", kInt64, {2}, num_keep);
  if (mask) check_tensor(op, "mask", *mask, "[B, N]", kBool, {num_keep.size(0), tokens}, num_keep);
  auto check_in = [&](const char* name, int64_t value) {
    if (value < 0 || value >= kMaxTokens) fail(op, name, "be in [0, 2^30)", value);
  };
  check_in("N", tokens);
  check_in("high", cells.high);
  check_in("wide", cells.wide);
  if (cells.single()) return;
  const std::string text = std::to_string(cells.high) + " and " + std::to_string(cells.wide);
  check_in("high wide", cells.area());
  check_in("high wide N", cells.area() * tokens);
  check_in("max_keep", max_keep);
  check_in("max_mask", max_mask);
  if (cells.across < 1 || tokens % cells.across != 0) fail(op, "across", "divide N = " + std::to_string(tokens), cells.across);
  if (lengths) fail(op, "high and wide", "be 1 where lengths are given", text);
  if (!ascending) fail(op, "high and wide", "be 1 in random order", text);
}

inline void check_sampling_rank(const Tensor& noise, const Tensor& num_keep, const std::optional<Tensor>& lengths,
                                int64_t max_keep, int64_t max_mask) {
  const char* op = "random_masking";
  check_tensor(op, "noise", noise, "[B, N]", {ScalarType::Float, ScalarType::Double}, {kAny, kAny}, noise);
  check_sampling_counts(num_keep, lengths, noise.size(0), max_keep, max_mask);
  if (device_name(num_keep) != device_name(noise)) {
    fail(op, "num_keep", "be on " + device_name(noise), "a tensor on " + device_name(num_keep));
  }
  if (noise.size(1) >= kMaxTokens) fail(op, "N", "be in [0, 2^30)", noise.size(1));
}

inline void check_sampling_top(const Tensor& score, int64_t count) {
  const char* op = "guided_masking";
  check_tensor(op, "score", score, "[B, N]", {ScalarType::Float, ScalarType::Double}, {kAny, kAny}, score);
  if (score.size(1) >= kMaxTokens) fail(op, "N", "be in [0, " + std::to_string(kMaxTokens - 1) + "]", score.size(1));
  if (count < 0 || count > score.size(1)) fail(op, "num_hard", "be in [0, " + std::to_string(score.size(1)) + "]", count);
}

}  // namespace maskops
