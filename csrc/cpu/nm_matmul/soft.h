// The kernels of nm_matmul_soft, one table per instruction set.
//     forward       y [M, N] = x (W * mask)^T
//     grad_x        [M, K] = grad (W * mask)
//     grad_logits   grad^T x, times W, through the mask to the logits
// Masks are made from the logits and the noise where they are needed, a panel of rows of W at a time, and are never whole.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/philox.h"
#include "cpu/nm_matmul/product.h"

namespace maskops {

struct Soft {
  int dtype;
  Bf16Products products;
  int64_t rows, outputs, inputs, groups;  // M, N, K, G
  int n, m;
  int patterns;             // P, or 0: logits in linear space, one per weight
  const int32_t* places;    // [P, n] the places that a pattern keeps
  const int32_t* members;   // [m, P n / m] the patterns that keep a place
  const void *x, *weight, *logits, *grad;
  PhiloxKey key;
  double inverse_tau, scale, grad_kept;
  bool hard;
  void* kept;         // [N] sums of (W * mask)^2, in the type of the logits
  void* out;          // y or grad_x
  void* grad_logits;
  int64_t threads;

  int64_t group_logits() const { return patterns > 0 ? patterns : m; }
};

// Units that threads share, and bytes of buffers: of the packed masked weight, and of what each thread needs for itself.
struct SoftPlan {
  int64_t units, packed_bytes, thread_bytes;
};

struct SoftKernels {
  // The masked weight as panels of N columns (by_outputs) or of K columns; units are panels of its rows.
  SoftPlan (*plan_weight)(const Soft&, bool by_outputs);
  void (*pack_weight)(const Soft&, bool by_outputs, Range panels, void* packed, void* buffer);
  // x or grad times the packed weight; units are panels of rows of x.
  SoftPlan (*plan_product)(const Soft&, bool by_outputs);
  void (*product)(const Soft&, bool by_outputs, Range panels, const void* packed, void* buffer);
  // Units are blocks of the gradient of the mask. packed: where the masked weight with K columns goes on the way, or null.
  SoftPlan (*plan_grad_logits)(const Soft&);
  void (*grad_logits)(const Soft&, Range items, void* packed, void* buffer);
};
MASKOPS_DECLARE_KERNELS(SoftKernels)

}  // namespace maskops
