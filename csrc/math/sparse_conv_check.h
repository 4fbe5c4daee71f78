// Input checks of the family sparse_conv, shared by the CPU and the CUDA op functions.
#pragma once

#include <vector>

#include "common/check.h"
#include "math/sparse_conv.h"

namespace maskops {

using Sizes = std::vector<int64_t>;
constexpr int64_t kMostRows = INT32_MAX;
constexpr const char* kKernelMap = "kernel_map";

inline void check_each(const char* op, const char* name, const Sizes& values, int64_t axes, int64_t least) {
  bool good = static_cast<int64_t>(values.size()) == axes;
  for (int64_t value : values) good = good && value >= least && value <= INT32_MAX;
  if (!good) fail(op, name, "be " + std::to_string(axes) + " numbers from " + std::to_string(least) + " to 2^31 - 1", join_sizes(values));
}

inline void check_coords(const char* op, const char* name, const Tensor& coords, int64_t columns, const Tensor& like) {
  check_tensor(op, name, coords, "[N, 1 + axes]", kInt32, {kAny, columns}, like);
  if (coords.size(0) > kMostRows) fail(op, name, "have fewer than 2^31 rows", describe(coords));
}

inline void check_geometry(const char* op, const Tensor& coords, const Sizes& kernel_size, const Sizes& stride, const Sizes& padding,
                           const Sizes& dilation) {
  check_coords(op, "coords", coords, kAny, coords);
  const int64_t axes = coords.size(1) - 1;
  if (axes < 1 || axes > kConvAxes) fail(op, "coords", "have 2 to 4 columns: batch and one to three axes", describe(coords));
  check_each(op, "kernel_size", kernel_size, axes, 1);
  int64_t places = 1;
  for (int64_t k : kernel_size) {
    if (k > INT32_MAX / places) fail(op, "kernel_size", "have fewer than 2^31 places", join_sizes(kernel_size));
    places *= k;
  }
  check_each(op, "stride", stride, axes, 1);
  check_each(op, "padding", padding, axes, 0);
  check_each(op, "dilation", dilation, axes, 1);
}

inline void check_conv_map(const Tensor& coords, const Tensor& out_coords, const Sizes& kernel_size, const Sizes& stride,
                           const Sizes& padding, const Sizes& dilation) {
  check_geometry(kKernelMap, coords, kernel_size, stride, padding, dilation);
  check_coords(kKernelMap, "out_coords", out_coords, coords.size(1), coords);
}

inline void check_conv_outputs(const Tensor& coords, const Sizes& out_shape, const Sizes& kernel_size, const Sizes& stride,
                               const Sizes& padding, const Sizes& dilation) {
  check_geometry(kKernelMap, coords, kernel_size, stride, padding, dilation);
  check_each(kKernelMap, "out_shape", out_shape, coords.size(1) - 1, 0);
}

inline void check_conv_reverse(const Tensor& map, int64_t rows) {
  check_tensor(kKernelMap, "map", map, "[K, M]", kInt32, {kAny, kAny}, map);
  if (rows < 0 || rows > kMostRows) fail(kKernelMap, "rows", "be in [0, 2^31)", rows);
}

inline void check_groups(const Tensor& x, int64_t columns, int64_t groups) {
  if (groups < 1 || x.size(1) % groups != 0 || columns % groups != 0) {
    fail("sparse_conv", "groups", "divide " + std::to_string(x.size(1)) + " and " + std::to_string(columns) + " channels", groups);
  }
}

inline void check_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& map,
                       const std::optional<Tensor>& reverse, int64_t groups) {
  const char* op = "sparse_conv";
  check_tensor(op, "features", x, "[N, C]", kFloats, {kAny, kAny}, x);
  check_tensor(op, "weight", weight, "[K, C / groups, D]", {x.scalar_type()}, {kAny, kAny, kAny}, x);
  check_groups(x, weight.size(2), groups);
  check_tensor(op, "weight", weight, "[K, C / groups, D]", {x.scalar_type()}, {kAny, x.size(1) / groups, kAny}, x);
  if (bias) check_tensor(op, "bias", *bias, "[D]", {x.scalar_type()}, {weight.size(2)}, x);
  check_tensor(op, "map", map, "[K, M]", kInt32, {weight.size(0), kAny}, x);
  if (reverse) check_tensor(op, "reverse", *reverse, "[K, N]", kInt32, {weight.size(0), x.size(0)}, x);
}

inline void check_conv_grad_weight(const Tensor& grad, const Tensor& x, const Tensor& map, int64_t groups) {
  const char* op = "sparse_conv";
  check_tensor(op, "features", x, "[N, C]", kFloats, {kAny, kAny}, x);
  check_tensor(op, "map", map, "[K, M]", kInt32, {kAny, kAny}, x);
  check_tensor(op, "grad", grad, "[M, D]", {x.scalar_type()}, {map.size(1), kAny}, x);
  check_groups(x, grad.size(1), groups);
}

inline ConvGeometry geometry_of(const Sizes& kernel_size, const Sizes& stride, const Sizes& padding, const Sizes& dilation, bool divides) {
  ConvGeometry g{};
  const int64_t lead = kConvAxes - static_cast<int64_t>(kernel_size.size());
  for (int64_t axis = 0; axis < kConvAxes; ++axis) {
    const bool real = axis >= lead;
    auto value = [&](const Sizes& from, int64_t otherwise) { return static_cast<int32_t>(real ? from[axis - lead] : otherwise); };
    g.size[axis] = value(kernel_size, 1);
    g.stride[axis] = value(stride, 1);
    g.padding[axis] = value(padding, 0);
    g.dilation[axis] = value(dilation, 1);
  }
  g.divides = divides;
  return g;
}

}  // namespace maskops
