// Per-element formulas of the family masked_loss, for every device.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace maskops {

enum class LossKind : int { kL2 = 0, kL1 = 1, kSmoothL1 = 2 };
enum class LossOn : int { kMasked = 0, kVisible = 1, kAll = 2 };

constexpr double kVarianceEps = 1e-6;

// error = pred - target
template <class T>
MASKOPS_HOST_DEVICE inline T loss_value(LossKind kind, T error, T beta) {
  if (kind == LossKind::kL2) return error * error;
  const T size = error < T(0) ? -error : error;
  if (kind == LossKind::kL1) return size;
  return size < beta ? T(0.5) * error * error / beta : size - T(0.5) * beta;
}

template <class T>
MASKOPS_HOST_DEVICE inline T loss_slope(LossKind kind, T error, T beta) {
  if (kind == LossKind::kL2) return T(2) * error;
  if (kind == LossKind::kL1) return error != error ? error : (error > T(0) ? T(1) : error < T(0) ? T(-1) : T(0));
  const T slope = error / beta;
  return slope > T(1) ? T(1) : slope < T(-1) ? T(-1) : slope;
}

MASKOPS_HOST_DEVICE inline bool loss_selects(LossOn on, int64_t slot, int64_t num_keep, int64_t num_mask) {
  if (on == LossOn::kVisible) return slot < num_keep;
  return slot < num_keep + num_mask && (on == LossOn::kAll || slot >= num_keep);
}

}  // namespace maskops
