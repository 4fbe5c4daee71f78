// confidence_select and token_drift on the CPU, one table of kernels per instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/philox.h"
#include "math/feature_reuse.h"

namespace maskops {

// One token per row of logits. The weights exp((x - highest) / temperature) are summed in blocks, each relative to its own highest
// value, in one pass over memory; the block that the random number falls into is looked at once more.
struct TokenSample {
  int dtype;
  int64_t rows, tokens, values;  // B N, N, V
  const void* logits;
  int64_t stride_batch, stride_token;  // in elements
  const bool* known;                   // contiguous
  PhiloxKey key;
  int64_t first_row;
  double temperature, noise;
  bool probs;
  int64_t* ids;
  void* confidence;

  int64_t block() const {  // values of a block, 512 blocks at most
    const int64_t least = (values + 511) / 512;
    return least < 64 ? 64 : (least + 63) / 64 * 64;
  }
  int64_t blocks() const { return (values + block() - 1) / block(); }
};

struct TokenDrift {
  int dtype, kind;
  int64_t tokens, channels;
  const void *fresh, *cached;
  int64_t fresh_batch, fresh_token, cached_batch, cached_token;  // strides in elements
  void* out;
};

struct SelectKernels {
  int64_t (*bytes)(const TokenSample&);
  void (*sample)(const TokenSample&, int64_t begin, int64_t end, void* buffer);
  void (*drift)(const TokenDrift&, int64_t begin, int64_t end);
};
MASKOPS_DECLARE_KERNELS(SelectKernels)

}  // namespace maskops
