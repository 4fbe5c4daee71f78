// The kernels of nm_matmul_bitmask, one table per instruction set. The weight is packed once for all samples; each sample's mask
// is applied while a panel of it is copied for the product, so that no masked weight is ever whole.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "cpu/nm_matmul/product.h"

namespace maskops {

struct Bitmask {
  int dtype;
  Bf16Products products;
  int64_t samples, rows, outputs, inputs;  // S, M, N, K
  int64_t mask_sample, mask_row;           // bytes from one mask, from one row of a mask, to the next; 0: all samples share one
  const void *x, *weight, *bias, *grad;    // bias may be null
  const uint8_t* bits;
  void* out;          // y, or in the gradient for x that gradient
  void* grad_weight;  // [N, K] or null
  void* grad_scores;  // [N, K] or [S, N, K] or null
  bool scores_per_sample;
  int64_t threads;
};

// Items that threads share, and bytes of buffers: of the packed weight, and of what each thread needs for itself.
struct BitmaskPlan {
  int64_t panels, items, packed_bytes, thread_bytes;
};

struct BitmaskKernels {
  void (*pack_bits)(const uint8_t* bools, int64_t count, uint8_t* bits);
  BitmaskPlan (*plan_forward)(const Bitmask&);
  void (*pack_weight)(const Bitmask&, Range panels, void* packed);
  void (*forward)(const Bitmask&, Range items, const void* packed, void* buffer);
  BitmaskPlan (*plan_grad_x)(const Bitmask&);
  void (*grad_x)(const Bitmask&, Range items, void* buffer);
  BitmaskPlan (*plan_grad_weight)(const Bitmask&);
  void (*grad_weight)(const Bitmask&, Range items, void* buffer);
};
MASKOPS_DECLARE_KERNELS(BitmaskKernels)

}  // namespace maskops
