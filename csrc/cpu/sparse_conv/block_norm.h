// What the functions of masked normalisation and pooling hand to their kernels: rows [B, H, W, C], cells [B, h, w].
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace maskops {

struct BlockNormArgs {
  const void *x, *grad;  // storage type
  void* out;
  // Precision of sums: [S, C], S = 1 or B; weight and bias [C] or null.
  const void *mean, *of_grad, *of_x, *constant, *weight, *bias;
  void* partial;  // [B * chunks, 2, C]
  int64_t* seen;  // [B * chunks]: active positions
  void *first, *second;  // sums [S, C]
  const bool* cells;
  int64_t B, h, w, H, W, C, S;
  double eps;
  int dtype;

  // Lines of an image that are summed together: fixed, as sums depend on it.
  int64_t chunk_lines() const {
    const int64_t lines = W > 0 ? 512 / W : 1;
    return lines < 1 ? 1 : lines;
  }
  int64_t chunks() const { return (H + chunk_lines() - 1) / chunk_lines(); }
};

struct BlockNormKernels {
  void (*normalise)(const BlockNormArgs&, int64_t begin, int64_t end);   // lines of all images: (x - mean) of_grad + bias
  void (*moments)(const BlockNormArgs&, int64_t begin, int64_t end);     // chunks of all images, into partial
  void (*join_moments)(const BlockNormArgs&);                            // mean and sum of squares, in order
  void (*sums)(const BlockNormArgs&, int64_t begin, int64_t end);        // sum of grad, and of grad (x - mean)
  void (*join_sums)(const BlockNormArgs&);
  void (*backward)(const BlockNormArgs&, int64_t begin, int64_t end);    // grad of_grad + (x - mean) of_x + constant
  void (*layer)(const BlockNormArgs&, int64_t begin, int64_t end);
  void (*layer_backward)(const BlockNormArgs&, int64_t begin, int64_t end);  // chunks; sums of grad y and grad into partial
};
MASKOPS_DECLARE_KERNELS(BlockNormKernels)

struct BlockPoolArgs {
  const void *x, *grad;
  void* out;
  uint8_t* taps;
  const bool* cells;
  int64_t B, h, w, H, W, C;  // of the finer grid
  int64_t kh, kw, sy, sx, py, px;
  int dtype;
};

struct BlockPoolKernels {
  void (*forward)(const BlockPoolArgs&, int64_t begin, int64_t end);   // lines of the result of all images
  void (*backward)(const BlockPoolArgs&, int64_t begin, int64_t end);  // lines of the finer grid
};
MASKOPS_DECLARE_KERNELS(BlockPoolKernels)

}  // namespace maskops
