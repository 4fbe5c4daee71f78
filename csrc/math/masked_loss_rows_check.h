// Input checks of masked_regression, contrastive_loss and linear_max_pool.
#pragma once

#include <optional>
#include <string>

#include "common/check.h"

namespace maskops {

inline int check_regression(const Tensor& pred, const Tensor& target, const Tensor& mask, const std::string& kind, double beta, double eps) {
  const char* op = "masked_regression";
  check_tensor(op, "pred", pred, "[N, D]", kFloats, {kAny, kAny}, pred);
  check_tensor(op, "target", target, "[N, D]", {pred.scalar_type()}, {pred.size(0), pred.size(1)}, pred);
  check_tensor(op, "mask", mask, "[N]", kBool, {pred.size(0)}, pred);
  if (!(beta > 0)) fail(op, "beta", "be above 0", beta);
  if (!(eps > 0)) fail(op, "eps", "be above 0", eps);
  if (kind == "l2") return 0;
  if (kind == "l1") return 1;
  if (kind == "smooth_l1") return 2;
  if (kind == "cosine") return 3;
  fail(op, "kind", "be one of ('l2', 'l1', 'smooth_l1', 'cosine')", "'" + kind + "'");
}

inline void check_contrast(const Tensor& query, const Tensor& keys, const Tensor& positive, const Tensor& negatives, double scale) {
  const char* op = "contrastive_loss";
  check_tensor(op, "query", query, "[M, D]", kFloats, {kAny, kAny}, query);
  check_tensor(op, "keys", keys, "[P, D]", {query.scalar_type()}, {kAny, query.size(1)}, query);
  check_tensor(op, "positives", positive, "[M]", kInt64, {query.size(0)}, query);
  check_tensor(op, "negatives_ids", negatives, "[M, K]", kInt64, {query.size(0), kAny}, query);
  if (!(scale > 0)) fail(op, "scale", "be above 0", scale);
}

inline void check_contrast_ids(const int64_t* positive, const int64_t* negatives, int64_t M, int64_t K, int64_t P) {
  const std::string range = "be in [-1, " + std::to_string(P) + ")";
  for (int64_t m = 0; m < M; ++m) {
    if (positive[m] < -1 || positive[m] >= P) {
      fail_index("contrastive_loss", "positives[" + std::to_string(m) + "]", range, std::to_string(positive[m]));
    }
  }
  for (int64_t i = 0; i < M * K; ++i) {
    if (negatives[i] >= -1 && negatives[i] < P) continue;
    const std::string place = "negatives_ids[" + std::to_string(i / K) + ", " + std::to_string(i % K) + "]";
    fail_index("contrastive_loss", place, range, std::to_string(negatives[i]));
  }
}

inline void check_max_pool(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* op = "linear_max_pool";
  check_tensor(op, "hidden", hidden, "[B, L, D]", kFloats, {kAny, kAny, kAny}, hidden);
  check_tensor(op, "weight", weight, "[V, D]", {hidden.scalar_type()}, {kAny, hidden.size(2)}, hidden);
  if (bias) check_tensor(op, "bias", *bias, "[V]", {hidden.scalar_type()}, {weight.size(0)}, hidden);
}

}  // namespace maskops
