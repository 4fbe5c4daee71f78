// masked_attention on the CPU, one table of kernels per instruction set.
//
// A tile is 64 queries by 64 keys; tiles in which nobody sees anybody are not touched. Scores of a tile, its weights and its part of
// the result stay in the L1 and L2 caches; keys are packed transposed, once per head where they fit a buffer.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/pieces.h"
#include "math/masked_attention.h"

namespace maskops {

// A matrix per batch entry and head whose rows have contiguous channels.
struct HeadRows {
  const void* data;
  int64_t batch, head, row;  // strides in elements
};

struct Attention {
  int dtype;
  int64_t B, H, G, L, S, D;  // G heads of k and v; query head h reads head h / (H / G)
  HeadRows q, k, v;
  const int32_t* tiles;  // or null: every query sees every key
  int64_t tiles_batch, tiles_head;
  const uint64_t* words;
  double scale;
  void *out, *lse;  // contiguous
  // backward
  HeadRows grad;
  const void *grad_lse, *of_out, *of_lse;  // contiguous
  void *grad_q, *grad_k, *grad_v;          // contiguous

  inline int64_t query_tiles() const { return (L + kMaskTile - 1) / kMaskTile; }
  inline int64_t key_tiles() const { return (S + kMaskTile - 1) / kMaskTile; }
};

// A part of the work: a head of q in the forward pass, one of k and v in the backward pass, and ranges of tiles.
struct AttentionItem {
  int64_t b, head;
  Range queries, keys;  // tiles
  bool grad_q, grad_kv;
};

struct ForwardKernels {
  int64_t (*bytes)(const Attention&);  // of buffer that a thread needs
  void (*run)(const Attention&, const AttentionItem&, void* buffer);
};
MASKOPS_DECLARE_KERNELS(ForwardKernels)

struct BackwardKernels {
  int64_t (*bytes)(const Attention&);
  void (*run)(const Attention&, const AttentionItem&, void* buffer);
};
MASKOPS_DECLARE_KERNELS(BackwardKernels)

}  // namespace maskops
