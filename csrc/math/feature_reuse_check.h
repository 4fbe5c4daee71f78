// Input checks of the family feature_reuse, shared by the CPU and the CUDA op functions.
#pragma once

#include <cmath>

#include "common/check.h"
#include "math/feature_reuse.h"

namespace maskops {

constexpr int64_t kMostCachedChannels = 256;

inline TokenStrides token_strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }

inline void check_cache_write(const Tensor& k_cache, const Tensor& v_cache, const Tensor& valid, const Tensor& k, const Tensor& v,
                              const Tensor& ids) {
  const char *op = "ContextCache.write_", *cached = "[B, H, N, D]", *local = "[B, H, U, D]";
  check_tensor(op, "k_cache", k_cache, cached, kFloats, {kAny, kAny, kAny, kAny}, k_cache);
  const int64_t B = k_cache.size(0), H = k_cache.size(1), N = k_cache.size(2), D = k_cache.size(3);
  const ScalarType type = k_cache.scalar_type();
  check_tensor(op, "v_cache", v_cache, cached, {type}, {B, H, N, D}, k_cache);
  check_tensor(op, "valid", valid, "[B, N]", kBool, {B, N}, k_cache);
  check_tensor(op, "k", k, local, {type}, {B, H, kAny, D}, k_cache);
  check_tensor(op, "v", v, local, {type}, {B, H, k.size(2), D}, k_cache);
  check_tensor(op, "ids", ids, "[B, U]", kInt64, {B, k.size(2)}, k_cache);
  const std::pair<const char*, const Tensor*> written[] = {{"k_cache", &k_cache}, {"v_cache", &v_cache}, {"valid", &valid}};
  for (const auto& [name, x] : written) {
    for (int64_t axis = 0; axis < x->dim(); ++axis) {
      if (x->stride(axis) == 0 && x->size(axis) > 1) {
        fail(op, name, "have no expanded axis, as it is written", "stride 0 along axis " + std::to_string(axis));
      }
    }
  }
}

inline void check_cache_exclude(const Tensor& valid, const Tensor& ids) {
  const char* op = "ContextCache.exclude";
  check_tensor(op, "valid", valid, "[L, B, N]", kBool, {kAny, kAny, kAny}, valid);
  check_tensor(op, "ids", ids, "[B, U]", kInt64, {valid.size(1), kAny}, valid);
}

inline void check_cached_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                                   const Tensor& seen, const Tensor& ids) {
  const char *op = "cached_attention", *local = "[B, H, U, D]", *cached = "[B, H, N, D]";
  check_tensor(op, "q_local", q, local, kFloats, {kAny, kAny, kAny, kAny}, q);
  const int64_t B = q.size(0), H = q.size(1), U = q.size(2), D = q.size(3);
  if (D < 1 || D > kMostCachedChannels) {
    fail(op, "q_local", "have 1 to " + std::to_string(kMostCachedChannels) + " channels", describe(q));
  }
  const ScalarType type = q.scalar_type();
  check_tensor(op, "k_local", k, local, {type}, {B, H, U, D}, q);
  check_tensor(op, "v_local", v, local, {type}, {B, H, U, D}, q);
  check_tensor(op, "cached keys", k_cache, cached, {type}, {B, H, kAny, D}, q);
  check_tensor(op, "cached values", v_cache, cached, {type}, {B, H, k_cache.size(2), D}, q);
  check_tensor(op, "seen", seen, "[B, N]", kBool, {B, k_cache.size(2)}, q);
  check_tensor(op, "local_ids", ids, "[B, U]", kInt64, {B, U}, q);
}

inline void check_sample(const Tensor& logits, const Tensor& known, const Tensor& seed, int64_t first_row, double temperature,
                         double noise, bool probs) {
  const char* op = "confidence_select";
  check_tensor(op, "logits", logits, "[B, N, V]", kFloats, {kAny, kAny, kAny}, logits);
  check_tensor(op, "known", known, "[B, N]", kBool, {logits.size(0), logits.size(1)}, logits);
  check_tensor(op, "seed", seed, "[2]", kInt64, {2}, logits);
  if (logits.size(2) < 1) fail(op, "logits", "have V of at least 1", logits.size(2));
  if (first_row < 0 || first_row > INT32_MAX) fail(op, "first_row", "be in [0, 2^31)", first_row);
  if (!(temperature >= 0 && temperature < HUGE_VAL)) {
    fail(op, "sample_temperature", "be finite and at least 0", plain_number(temperature));
  }
  if (probs && temperature != 0 && temperature != 1) {
    fail(op, "sample_temperature", "be 0 or 1 of probabilities", plain_number(temperature));
  }
  if (!(noise >= 0 && noise < HUGE_VAL)) fail(op, "temperature", "be finite and at least 0", plain_number(noise));
}

inline void check_rank(const Tensor& score, const Tensor& known, const std::optional<Tensor>& num_select, double threshold) {
  const char* op = "select_tokens";
  check_tensor(op, "score", score, "[B, N]", {ScalarType::Float, ScalarType::Double}, {kAny, kAny}, score);
  check_tensor(op, "known", known, "[B, N]", kBool, {score.size(0), score.size(1)}, score);
  if (num_select) check_tensor(op, "num_select", *num_select, "[B]", kInt64, {score.size(0)}, score);
  if (threshold != threshold) fail(op, "threshold", "be a number", "nan");
}

inline void check_drift(const Tensor& fresh, const Tensor& cached, int64_t kind) {
  const char* op = "token_drift";
  check_tensor(op, "new", fresh, "[B, N, D]", kFloats, {kAny, kAny, kAny}, fresh);
  check_tensor(op, "cached", cached, "[B, N, D]", {fresh.scalar_type()}, {fresh.size(0), fresh.size(1), fresh.size(2)}, fresh);
  if (kind != kDriftCosine && kind != kDriftL2) fail(op, "kind", "be 0 or 1", kind);
}

}  // namespace maskops
