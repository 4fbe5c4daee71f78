// Input checks of linear_cross_entropy and linear_sample.
#pragma once

#include <optional>
#include <string>

#include "common/check.h"

namespace maskops {

inline void check_linear_loss(const char* op, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                              const Tensor& target, double scale, double smoothing, double z_loss) {
  check_tensor(op, "hidden", hidden, "[N, D]", kFloats, {kAny, kAny}, hidden);
  const ScalarType type = hidden.scalar_type();
  check_tensor(op, "weight", weight, "[G, V, D]", {type}, {kAny, kAny, hidden.size(1)}, hidden);
  if (bias) check_tensor(op, "bias", *bias, "[G, V]", {type}, {weight.size(0), weight.size(1)}, hidden);
  check_tensor(op, "target", target, "[N, G]", kInt64, {hidden.size(0), weight.size(0)}, hidden);
  if (!(smoothing >= 0 && smoothing <= 1)) fail(op, "label_smoothing", "be in [0, 1]", smoothing);
  if (!(z_loss >= 0)) fail(op, "z_loss", "be at least 0", z_loss);
  if (!(scale > 0)) fail(op, "scale", "be above 0", scale);
}

inline void check_linear_target(const char* op, const int64_t* target, int64_t rows, int64_t books, int64_t ignore, int64_t classes) {
  for (int64_t i = 0; i < rows * books; ++i) {
    if (target[i] == ignore || (target[i] >= 0 && target[i] < classes)) continue;
    const std::string place = "target[" + std::to_string(i / books) + ", " + std::to_string(i % books) + "]";
    fail_index(op, place, "be in [0, " + std::to_string(classes) + ") or " + std::to_string(ignore), std::to_string(target[i]));
  }
}

}  // namespace maskops
