// nm_matmul_soft on the CPU. The soft mask is made row by row, where the product packs its weight, and made again for the gradients:
// nothing of the size of groups x patterns is stored, and no masked weight is ever whole.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/philox.h"
#include "cpu/nm_matmul/product.h"

namespace maskops {

struct Soft {
  int dtype, n, m;
  bool exact, hard;                  // logits [N, G, P], else [N, K]
  int64_t patterns;                  // P, or m of the linear parameterisation: logits per group
  int64_t rows, outputs, inputs;     // M, N, K
  double tau, scale, grad_kept;
  PhiloxKey key;
  const void *x, *weight, *logits, *grad;  // contiguous
  void* out;                         // y [M, N] or grad_x [M, K]
  void* kept;                        // [N], in the accumulation dtype: the squares of a masked row
  void* grad_logits;
};

struct SoftPlan {
  int64_t panels, row_blocks, packed_bytes, pack_bytes, block_bytes;  // of a product
  int64_t chunks, chunk_bytes;                                        // of the gradient for the logits
};

struct SoftKernels {
  SoftPlan (*plan)(const Soft&, bool backward);
  void (*pack)(const Soft&, Range panels, void* packed, void* buffer);       // forward: masked rows into panels, and kept
  void (*pack_rows)(const Soft&, Range steps, void* packed, void* buffer);   // gradient for x: masked rows as rows of B
  void (*forward)(const Soft&, Range blocks, const void* packed, void* buffer);
  void (*grad_x)(const Soft&, Range blocks, const void* packed, void* buffer);
  void (*grad_logits)(const Soft&, Range chunks, void* buffer);
};
MASKOPS_DECLARE_KERNELS(SoftKernels)

}  // namespace maskops
