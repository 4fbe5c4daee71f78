// Input checks of the family nm_matmul, shared by the CPU and the CUDA op functions; maskops/ops/nm_matmul says the same sentences.
#pragma once

#include <cstdio>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "math/nm_matmul.h"

namespace maskops {

inline constexpr std::initializer_list<ScalarType> kUint8 = {ScalarType::Byte};

inline void check_pattern(const char* op, int64_t n, int64_t m) {
  if (1 <= n && n < m && m <= kMaxGroup) return;
  fail(op, "n and m", "satisfy 1 <= n < m <= " + std::to_string(kMaxGroup), "(" + std::to_string(n) + ", " + std::to_string(m) + ")");
}

inline void check_places(const char* op, const Tensor& indices, int64_t rows, const NmLayout& layout, const Tensor& like) {
  check_tensor(op, "indices", indices, "[N, ceil(J bits / 8)]", kUint8, {rows, layout.row_bytes}, like);
}

inline void check_compressed(const char* op, const Tensor& values, const Tensor& indices, const NmLayout& layout,
                             std::initializer_list<ScalarType> dtypes, const Tensor& like) {
  check_tensor(op, "values", values, "[N, J]", dtypes, {kAny, layout.slots}, like);
  check_places(op, indices, values.size(0), layout, like);
}

inline void check_output_bias(const char* op, const std::optional<Tensor>& bias, int64_t outputs, const Tensor& x) {
  if (bias) check_tensor(op, "bias", *bias, "[N]", {x.scalar_type()}, {outputs}, x);
}

inline NmLayout check_nm_mask(const Tensor& scores, int64_t n, int64_t m) {
  check_pattern("nm_mask", n, m);
  check_tensor("nm_mask", "scores", scores, "[R, K]", kFloats, {kAny, kAny}, scores);
  return nm_layout(n, m, scores.size(1));
}

inline NmLayout check_nm_compress(const Tensor& weight, int64_t n, int64_t m) {
  check_pattern("nm_compress", n, m);
  check_tensor("nm_compress", "weight", weight, "[N, K]", kFloats, {kAny, kAny}, weight);
  return nm_layout(n, m, weight.size(1));
}

// A group with more than n nonzeros: `contents` are its values, `bad` of `total` groups are like it.
[[noreturn]] inline void fail_crowded_group(int64_t row, int64_t group, const NmLayout& layout, const std::vector<double>& contents,
                                            int64_t bad, int64_t total) {
  std::string got;
  for (double value : contents) {
    char text[32] = "nan";  // printf may write the sign of a NaN
    if (value == value) std::snprintf(text, sizeof text, "%g", value);
    got += (got.empty() ? "[" : ", ") + std::string(text);
  }
  const int64_t start = group * layout.m;
  fail("nm_compress", "weight[" + std::to_string(row) + ", " + std::to_string(start) + ":" +
                          std::to_string(start + static_cast<int64_t>(contents.size())) + "]",
       "have at most " + std::to_string(layout.n) + " nonzeros",
       got + "]; too many in " + std::to_string(bad) + " of " + std::to_string(total) + " groups");
}

inline NmLayout check_nm_decompress(const Tensor& values, const Tensor& indices, int64_t n, int64_t m, int64_t K) {
  const char* op = "nm_decompress";
  check_pattern(op, n, m);
  if (K < 0) fail(op, "K", "be at least 0", K);
  const NmLayout layout = nm_layout(n, m, K);
  check_compressed(op, values, indices, layout, kFloats, values);
  return layout;
}

inline NmLayout check_nm_select(const Tensor& dense, const Tensor& indices, int64_t n, int64_t m) {
  const char* op = "nm_select";
  check_pattern(op, n, m);
  check_tensor(op, "dense", dense, "[N, K]", kFloats, {kAny, kAny}, dense);
  const NmLayout layout = nm_layout(n, m, dense.size(1));
  check_places(op, indices, dense.size(0), layout, dense);
  return layout;
}

inline NmLayout check_nm_linear(const Tensor& x, const Tensor& values, const Tensor& indices, const std::optional<Tensor>& bias,
                                int64_t n, int64_t m) {
  const char* op = "nm_linear";
  check_pattern(op, n, m);
  check_tensor(op, "x", x, "[M, K]", kFloats, {kAny, kAny}, x);
  const NmLayout layout = nm_layout(n, m, x.size(1));
  check_compressed(op, values, indices, layout, {x.scalar_type()}, x);
  check_output_bias(op, bias, values.size(0), x);
  return layout;
}

inline NmLayout check_nm_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& values, const Tensor& indices, int64_t n,
                                         int64_t m) {
  const NmLayout layout = check_nm_linear(x, values, indices, std::nullopt, n, m);
  check_tensor("nm_linear", "grad", grad, "[M, N]", {x.scalar_type()}, {x.size(0), values.size(0)}, x);
  return layout;
}

inline void check_nm_pack(const Tensor& mask) {
  check_tensor("pack_bitmask", "mask", mask, "[R, K]", kBool, {kAny, kAny}, mask);
}

inline void check_bitmask(const Tensor& x, const Tensor& weight, const Tensor& bits, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& scores) {
  const char* op = "bitmask_linear";
  check_tensor(op, "x", x, "[S, M, K]", kFloats, {kAny, kAny, kAny}, x);
  check_tensor(op, "weight", weight, "[N, K]", {x.scalar_type()}, {kAny, x.size(2)}, x);
  const int64_t samples = x.size(0), outputs = weight.size(0), K = weight.size(1);
  check_tensor(op, "bitmask", bits, "[1 or S, N, ceil(K / 8)]", kUint8, {kAny, outputs, (K + 7) / 8}, x);
  if (bits.size(0) != 1 && bits.size(0) != samples) {
    fail(op, "bitmask", "have 1 or S = " + std::to_string(samples) + " masks", describe(bits));
  }
  check_output_bias(op, bias, outputs, x);
  if (scores && scores->dim() == 3) check_tensor(op, "scores", *scores, "[S, N, K]", kFloats, {samples, outputs, K}, x);
  else if (scores) check_tensor(op, "scores", *scores, "[N, K]", kFloats, {outputs, K}, x);
}

inline void check_bitmask_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bits) {
  check_bitmask(x, weight, bits, std::nullopt, std::nullopt);
  check_tensor("bitmask_linear", "grad", grad, "[S, M, N]", {x.scalar_type()}, {x.size(0), x.size(1), weight.size(0)}, x);
}

inline void check_soft(const Tensor& x, const Tensor& weight, const Tensor& logits, const Tensor& seed, int64_t n, int64_t m, double tau) {
  const char* op = "nm_soft_linear";
  check_pattern(op, n, m);
  check_tensor(op, "x", x, "[M, K]", kFloats, {kAny, kAny}, x);
  check_tensor(op, "weight", weight, "[N, K]", {x.scalar_type()}, {kAny, x.size(1)}, x);
  const int64_t outputs = weight.size(0), K = x.size(1), patterns = pattern_count(n, m);
  if (K % m != 0) fail(op, "weight", "have K divisible by m = " + std::to_string(m), describe(weight));
  const ScalarType type = accumulation_type(x.scalar_type());
  if (logits.dim() != 3) {
    check_tensor(op, "logits", logits, "[N, K]", {type}, {outputs, K}, x);
  } else if (patterns > kMaxPatterns) {
    fail(op, "n and m", "have at most " + std::to_string(kMaxPatterns) + " patterns for logits [N, G, P]", patterns);
  } else {
    check_tensor(op, "logits", logits, "[N, G, P]", {type}, {outputs, K / m, patterns}, x);
  }
  check_tensor(op, "seed", seed, "[2]", kInt64, {2}, x);
  if (!(tau > 0)) fail(op, "tau", "be above 0", tau);
}

inline void check_soft_backward(const Tensor& grad, const Tensor& grad_kept, const Tensor& x, const Tensor& weight, const Tensor& logits,
                                const Tensor& seed, int64_t n, int64_t m, double tau) {
  check_soft(x, weight, logits, seed, n, m, tau);
  check_tensor("nm_soft_linear", "grad", grad, "[M, N]", {x.scalar_type()}, {x.size(0), weight.size(0)}, x);
  check_tensor("nm_soft_linear", "grad_kept", grad_kept, "[]", {accumulation_type(x.scalar_type())}, {}, x);
}

}  // namespace maskops
