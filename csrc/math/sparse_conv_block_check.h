// Input checks of block-masked convolution, pooling and normalisation; maskops/ops/sparse_conv/{block,norm_ops}.py say the same.
#pragma once

#include <optional>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"

namespace maskops {

using Sizes = std::vector<int64_t>;
constexpr int64_t kMostWindow = 7;
constexpr const char* kBlockConv = "block_masked_conv";
constexpr const char* kBlockPool = "block_masked_max_pool";
constexpr const char* kBlockNorm = "sparse_conv_block_norm";
constexpr const char* kBlockLayer = "masked_layer_norm";

inline std::string positions(int64_t H, int64_t W) { return std::to_string(H) + " x " + std::to_string(W) + " positions"; }

inline void check_block_cells(const char* op, const Tensor& x, int64_t B, int64_t H, int64_t W, const Tensor& cells) {
  check_tensor(op, "cells", cells, "[B, h, w]", kBool, {B, kAny, kAny}, x);
  const int64_t h = cells.size(1), w = cells.size(2);
  if (h < 1 || w < 1 || H % h != 0 || W % w != 0) fail(op, "cells", "divide " + positions(H, W), describe(cells));
  const int64_t row = std::max<int64_t>(1, W), image = std::max<int64_t>(1, H);
  if (W > INT32_MAX || H > INT32_MAX / row || B > INT32_MAX / row / image) fail(op, "x", "have fewer than 2^31 positions", describe(x));
}

inline void check_block_cells(const char* op, const Tensor& x, const Tensor& cells) {
  check_tensor(op, "x", x, "[B, C, H, W]", kFloats, {kAny, kAny, kAny, kAny}, x);
  check_block_cells(op, x, x.size(0), x.size(2), x.size(3), cells);
}

struct WindowSizes {
  int64_t H, W;  // of the result
};

inline WindowSizes check_windows(const char* op, int64_t H, int64_t W, const Tensor& cells, const Sizes& kernel, const Sizes& stride,
                                 const Sizes& padding, const char* kernel_of) {
  bool good = kernel.size() == 2;
  for (int64_t k : kernel) good = good && k >= 1 && k <= kMostWindow;
  if (!good) fail(op, kernel_of, "have two kernel sizes from 1 to " + std::to_string(kMostWindow), join_sizes(kernel));
  const int64_t sizes[2] = {H, W}, cell[2] = {H / cells.size(1), W / cells.size(2)};
  good = stride.size() == 2;
  for (int i = 0; good && i < 2; ++i) good = stride[i] >= 1 && cell[i] % stride[i] == 0;
  if (!good) fail(op, "stride", "divide the " + positions(cell[0], cell[1]) + " of a cell", join_sizes(stride));
  good = padding.size() == 2;
  for (int i = 0; good && i < 2; ++i) {
    good = padding[i] >= 0 && padding[i] < kernel[i];
    const int64_t reach = good ? sizes[i] + 2 * padding[i] - kernel[i] : 0;
    good = good && (sizes[i] == 0 || (reach >= 0 && reach / stride[i] + 1 == sizes[i] / stride[i]));
  }
  if (!good) fail(op, "padding", "give " + positions(H / stride[0], W / stride[1]), join_sizes(padding));
  return {H / stride[0], W / stride[1]};
}

inline void check_block_groups(int64_t C, int64_t O, int64_t groups) {
  if (groups < 1 || C % groups != 0 || O % groups != 0) {
    fail(kBlockConv, "groups", "divide " + std::to_string(C) + " and " + std::to_string(O) + " channels", groups);
  }
}

inline Sizes kernel_of(const Tensor& weight) { return {weight.size(2), weight.size(3)}; }

inline WindowSizes check_block_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& cells,
                                    const Sizes& stride, const Sizes& padding, int64_t groups) {
  const char* shape = "[O, C / groups, kh, kw]";
  check_block_cells(kBlockConv, x, cells);
  check_tensor(kBlockConv, "weight", weight, shape, {x.scalar_type()}, {kAny, kAny, kAny, kAny}, x);
  check_block_groups(x.size(1), weight.size(0), groups);
  check_tensor(kBlockConv, "weight", weight, shape, {x.scalar_type()}, {kAny, x.size(1) / groups, kAny, kAny}, x);
  if (bias) check_tensor(kBlockConv, "bias", *bias, "[O]", {x.scalar_type()}, {weight.size(0)}, x);
  return check_windows(kBlockConv, x.size(2), x.size(3), cells, kernel_of(weight), stride, padding, "weight");
}

inline void check_block_grad(const char* op, const Tensor& grad, ScalarType type, int64_t B, int64_t C, WindowSizes sizes) {
  check_tensor(op, "grad", grad, "[B, O, H, W]", {type}, {B, C, sizes.H, sizes.W}, grad);
}

inline void check_block_grad_input(const Tensor& grad, const Tensor& weight, const Tensor& cells, const Sizes& size,
                                   const Sizes& stride, const Sizes& padding, int64_t groups) {
  check_tensor(kBlockConv, "grad", grad, "[B, O, H, W]", kFloats, {kAny, kAny, kAny, kAny}, grad);
  check_tensor(kBlockConv, "weight", weight, "[O, C / groups, kh, kw]", {grad.scalar_type()}, {grad.size(1), kAny, kAny, kAny}, grad);
  check_block_groups(weight.size(1) * std::max<int64_t>(groups, 1), weight.size(0), groups);
  if (size.size() != 2) fail(kBlockConv, "size", "be two numbers", join_sizes(size));
  check_block_cells(kBlockConv, grad, grad.size(0), size[0], size[1], cells);
  const WindowSizes sizes = check_windows(kBlockConv, size[0], size[1], cells, kernel_of(weight), stride, padding, "weight");
  check_block_grad(kBlockConv, grad, grad.scalar_type(), kAny, kAny, sizes);
}

inline void check_block_grad_weight(const Tensor& grad, const Tensor& x, const Tensor& cells, const Sizes& kernel, const Sizes& stride,
                                    const Sizes& padding, int64_t groups) {
  check_block_cells(kBlockConv, x, cells);
  const WindowSizes sizes = check_windows(kBlockConv, x.size(2), x.size(3), cells, kernel, stride, padding, "kernel_size");
  check_block_grad(kBlockConv, grad, x.scalar_type(), x.size(0), kAny, sizes);
  check_block_groups(x.size(1), grad.size(1), groups);
}

inline WindowSizes check_block_pool(int64_t H, int64_t W, const Tensor& cells, const Sizes& kernel, const Sizes& stride,
                                    const Sizes& padding) {
  const WindowSizes sizes = check_windows(kBlockPool, H, W, cells, kernel, stride, padding, "kernel_size");
  if (2 * padding[0] > kernel[0] || 2 * padding[1] > kernel[1]) {
    fail(kBlockPool, "padding", "be at most half of kernel_size", join_sizes(padding));
  }
  return sizes;
}

// ---- normalisation

inline void check_stats(const Tensor& x, const char* name, const Tensor& value, int64_t rows) {
  check_tensor(kBlockNorm, name, value, "[S, C]", {accumulation_type(x.scalar_type())}, {rows, x.size(1)}, x);
}

inline int64_t check_stats_rows(const Tensor& x, const Tensor& cells, const char* name, const Tensor& first) {
  check_block_cells(kBlockNorm, x, cells);
  const bool good = first.dim() > 0 && (first.size(0) == 1 || first.size(0) == x.size(0));
  const std::string got = first.dim() > 0 ? "[" + std::to_string(first.size(0)) + "]" : "[]";
  if (!good) fail(kBlockNorm, name, "have 1 or " + std::to_string(x.size(0)) + " rows", got);
  return first.size(0);
}

inline void check_channels(const char* op, const Tensor& x, const char* name, const std::optional<Tensor>& value) {
  if (value) check_tensor(op, name, *value, "[C]", {accumulation_type(x.scalar_type())}, {x.size(1)}, x);
}

inline void check_same(const char* op, const Tensor& grad, const Tensor& x) {
  check_tensor(op, "grad", grad, "[B, C, H, W]", {x.scalar_type()}, {x.size(0), x.size(1), x.size(2), x.size(3)}, x);
}

}  // namespace maskops
