// Input checks of pooling in the family sparse_conv, in the words of maskops/ops/sparse_conv/pool.py.
#pragma once

#include "common/dispatch.h"
#include "math/sparse_conv_check.h"

namespace maskops {

inline void check_pool_map(const char* op, const Tensor& x, const Tensor& map, const std::optional<Tensor>& reverse) {
  check_tensor(op, "features", x, "[N, C]", kFloats, {kAny, kAny}, x);
  if (x.size(0) > kMostRows) fail(op, "features", "have fewer than 2^31 rows", describe(x));
  check_tensor(op, "map", map, "[K, M]", kInt32, {kAny, kAny}, x);
  if (reverse) check_tensor(op, "reverse", *reverse, "[K, N]", kInt32, {map.size(0), x.size(0)}, x);
}

inline void check_scale(const char* op, const char* name, const std::optional<Tensor>& scale, int64_t rows, const char* shape,
                        const Tensor& x) {
  if (scale) check_tensor(op, name, *scale, shape, {accumulation_type(x.scalar_type())}, {rows}, x);
}

inline void check_max_backward(const Tensor& grad, const Tensor& arg, const Tensor& reverse) {
  const char* op = "_sparse_conv_max_backward";
  check_tensor(op, "grad", grad, "[M, C]", kFloats, {kAny, kAny}, grad);
  check_tensor(op, "arg", arg, "[M, C]", kInt32, {grad.size(0), grad.size(1)}, grad);
  check_tensor(op, "reverse", reverse, "[K, N]", kInt32, {kAny, kAny}, grad);
}

inline void check_segments(const char* op, const Tensor& x, const Tensor& order, const Tensor& begin, const Tensor& count,
                           const Tensor& inverse) {
  check_tensor(op, "features", x, "[N, C]", kFloats, {kAny, kAny}, x);
  if (x.size(0) > kMostRows) fail(op, "features", "have fewer than 2^31 rows", describe(x));
  check_tensor(op, "order", order, "[R]", kInt32, {kAny}, x);
  check_tensor(op, "begin", begin, "[S]", kInt32, {kAny}, x);
  check_tensor(op, "count", count, "[S]", kInt32, {begin.size(0)}, x);
  check_tensor(op, "inverse", inverse, "[N]", kInt32, {x.size(0)}, x);
}

inline void check_spread(const Tensor& x, const Tensor& order, const Tensor& begin, const Tensor& count, const Tensor& inverse) {
  const char* op = "sparse_conv_segment_spread";
  check_tensor(op, "x", x, "[S, C]", kFloats, {kAny, kAny}, x);
  check_tensor(op, "order", order, "[R]", kInt32, {kAny}, x);
  check_tensor(op, "begin", begin, "[S]", kInt32, {x.size(0)}, x);
  check_tensor(op, "count", count, "[S]", kInt32, {x.size(0)}, x);
  check_tensor(op, "inverse", inverse, "[N]", kInt32, {kAny}, x);
}

inline void check_fill(const Tensor& x, const Tensor& mask, int64_t iterations, double eps) {
  const char* op = "neighbour_fill";
  check_tensor(op, "x", x, "[B, C, H, W]", kFloats, {kAny, kAny, kAny, kAny}, x);
  check_tensor(op, "mask", mask, "[B, 1, H, W]", kBool, {x.size(0), 1, x.size(2), x.size(3)}, x);
  if (x.size(3) > 0 && x.size(2) > kMostRows / x.size(3)) fail(op, "x", "have fewer than 2^31 places", describe(x));
  if (iterations < 0) fail(op, "iterations", "be at least 0", iterations);
  if (!(eps >= 0 && eps < 1e300)) fail(op, "eps", "be at least 0 and below 1e300", plain_number(eps));
}

inline void check_voxelize(const Tensor& points, const std::optional<Tensor>& batch_index, const std::vector<double>& voxel_size,
                           const std::vector<double>& low, const Sizes& shape, int64_t batch_size) {
  const char* op = "voxelize";
  check_tensor(op, "points", points, "[P, axes + *]", kFloats, {kAny, kAny}, points);
  if (points.size(0) > kMostRows) fail(op, "points", "have fewer than 2^31 rows", describe(points));
  const int64_t axes = static_cast<int64_t>(shape.size());
  if (axes < 1 || axes > kConvAxes || points.size(1) < axes) {
    fail(op, "shape", "be one to three sizes, one for each of the first columns of points", join_sizes(shape));
  }
  check_each(op, "shape", shape, axes, 1);
  auto finite = [&](const std::vector<double>& values, double least) {
    bool good = static_cast<int64_t>(values.size()) == axes;
    for (double value : values) good = good && value > least && value < 1e300;
    return good;
  };
  if (!finite(voxel_size, 0)) fail(op, "voxel_size", "be " + std::to_string(axes) + " numbers above 0", "others");
  if (!finite(low, -1e300)) fail(op, "low", "be " + std::to_string(axes) + " finite numbers", "others");
  if (batch_size < 1 || batch_size > INT32_MAX) fail(op, "batch_size", "be in [1, 2^31)", batch_size);
  int64_t room = (INT64_C(1) << 62) / batch_size;
  for (int64_t size : shape) room /= size;
  if (room < 1) fail(op, "shape", "have at most 2^62 cells in all samples", join_sizes(shape));
  if (batch_index) check_tensor(op, "batch_index", *batch_index, "[P]", kInt32, {points.size(0)}, points);
}

}  // namespace maskops
