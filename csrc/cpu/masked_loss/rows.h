// What masked_regression, contrastive_loss and the backward pass of linear_max_pool hand to their kernels.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace maskops {

struct RegressionLoss {
  const void *pred, *target;
  int64_t pred_stride, target_stride, N, D;
  const bool* mask;
  void* loss;  // [N]; backward: the gradient of it, read
  void* grad_pred;
  int kind, dtype;  // 0 l2, 1 l1, 2 smooth_l1, 3 cosine
  double beta, eps;
  bool normalise;
};

struct ContrastLoss {
  const void *query, *keys;  // [M, D], [P, D]
  const int64_t *positive, *negatives;
  void *loss, *lse;    // [M]; backward: grad in loss
  void* slope;         // backward: [M, 1 + K]
  void *grad_query, *grad_keys;
  int64_t query_stride, keys_stride, M, P, K, D;
  double scale;
  bool collide;
  int dtype;
};

struct PoolBackward {
  const void *hidden, *weight, *grad;  // [B, L, D], [V, D], [B, V] sums
  const int64_t* at;                   // [B, V]
  void *grad_hidden, *grad_weight, *grad_bias;
  int64_t B, L, V, D;
  int dtype;
};

struct RowLossKernels {
  void (*regression)(const RegressionLoss&, bool backward, int64_t begin, int64_t end, void* buffer);  // buffer: 2 (D + 64) sums
  void (*contrast)(const ContrastLoss&, int64_t begin, int64_t end, void* buffer);           // buffer: 1 + K sums
  void (*contrast_slope)(const ContrastLoss&, int64_t begin, int64_t end, void* buffer);     // buffer: D + 64 sums
  void (*contrast_keys)(const ContrastLoss&, int64_t begin, int64_t end, void* buffer);      // slices of 64; buffer: 64 P sums
  void (*pool_weight)(const PoolBackward&, int64_t begin, int64_t end, void* buffer);        // classes; buffer: D + 64 sums
  void (*pool_hidden)(const PoolBackward&, int64_t begin, int64_t end, void* buffer);        // slices of 64; buffer: 64 B L sums
};
MASKOPS_DECLARE_KERNELS(RowLossKernels)

}  // namespace maskops
