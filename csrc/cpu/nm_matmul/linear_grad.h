// The gradients of nm_linear on the CPU. Rows of x and grad are the vector axis: both are packed transposed into panels [columns]
// [kVectors vectors of rows], so that a kept weight is one broadcast and a few multiply-adds. grad_x runs lists per column of the
// outputs that keep a weight there, grad_values takes a dot product over the rows per kept weight; a block of 64 columns of a
// panel stays in the L1 cache.
#pragma once

#include "common/isa.h"
#include "cpu/nm_matmul/product.h"
#include "math/nm_matmul.h"

namespace maskops {

struct NmLinearGrad {
  int dtype;
  NmLayout layout;
  int64_t rows, outputs;              // M, N
  const void* x;                      // [M, K], rows x_stride elements apart
  const void* values;                 // [N, J], rows values_stride apart
  const uint8_t* indices;             // rows indices_stride bytes apart
  const void* grad;                   // [M, N], rows grad_stride apart
  int64_t x_stride, values_stride, indices_stride, grad_stride;
  void* out;                          // grad_x [M, K] or grad_values [N, J]
  void *x_panels, *grad_panels;       // packed transposed
};

struct NmLinearGradKernels {
  int64_t (*panels)(int dtype, int64_t rows);
  int64_t (*panels_bytes)(int dtype, int64_t rows, int64_t columns);
  void (*pack_x)(const NmLinearGrad&, Range panels);
  void (*pack_grad)(const NmLinearGrad&, Range panels);
  int64_t (*scratch)(const NmLinearGrad&, int64_t chunk);  // bytes, for a chunk of either of the two below
  void (*grad_x)(const NmLinearGrad&, Range columns, void* scratch);
  void (*grad_values)(const NmLinearGrad&, Range outputs, void* scratch);
};
MASKOPS_DECLARE_KERNELS(NmLinearGradKernels)

}  // namespace maskops
