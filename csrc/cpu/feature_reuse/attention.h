// cached_attention on the CPU, one table of kernels per instruction set.
//
// A tile is up to 64 local queries of one head. Its keys are those of a list, cached tokens that are seen and then real local slots;
// they are brought into blocks of 64, converted to the type of the sums, so that hidden tokens cost nothing and are never read. Scores
// of a block are kept transposed, a row per key: softmax then runs along the vectors. All of it stays in the L1 and L2 caches.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "math/feature_reuse.h"

namespace maskops {

struct TokenRows {
  const void* data;
  TokenStrides strides;  // channel: 1
};

struct CachedAttention {
  int dtype;
  bool amx;  // products of bfloat16 in AMX tiles
  int64_t B, H, U, N, D;
  TokenRows q, k, v, k_cache, v_cache;
  const int32_t* keys;    // [B, N + U]: cached tokens n, local slots N + u
  const int64_t* counts;  // [B] keys in the list
  const int64_t* ids;     // [B, U]
  double scale;
  void *out, *lse;  // contiguous

  int64_t tiles() const { return (U + 63) / 64; }
};

struct CachedAttentionKernels {
  int64_t (*bytes)(const CachedAttention&);                      // of buffer that a thread needs
  void (*run)(const CachedAttention&, int64_t item, void* buffer);  // item: (b, h, tile)
};
MASKOPS_DECLARE_KERNELS(CachedAttentionKernels)

}  // namespace maskops
