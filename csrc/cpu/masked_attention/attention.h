// masked_attention on the CPU, one table of kernels per instruction set.
//
// A tile is 64 queries by 64 keys; tiles in which nobody sees anybody are not touched. Scores of a tile are kept transposed, a row
// per key, so that softmax runs along the vectors without a sum across one, and keys, values and weights are multiplied where they
// lie; only queries are transposed, once. What belongs to a tile stays in the L1 and L2 caches.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/philox.h"
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
  bool amx;  // products of bfloat16 in AMX tiles
  int64_t B, H, G, L, S, D;  // G heads of k and v; query head h reads head h / (H / G)
  HeadRows q, k, v;
  const int32_t* tiles;  // or null: every query sees every key
  int64_t tiles_batch, tiles_head;
  const uint64_t* words;
  HeadRows bias;  // of [B, H, L, S], strides 0 where shared; data null: none
  double scale;
  uint32_t drop_below;  // a weight is dropped where its random word is smaller; 0: no dropout
  double keep_scale;    // 1 / (1 - dropout_p)
  PhiloxKey key;
  void *out, *lse, *entropy;  // contiguous; entropy null where not asked for
  // where the keys of a head are cut into parts: per part and query the sums [D, whole vectors], highest score, total, entropy
  int64_t parts;
  void* partial;
  // backward
  HeadRows grad;
  const void *grad_lse, *grad_entropy, *of_out, *of_lse, *of_entropy;  // contiguous
  void *grad_q, *grad_k, *grad_v, *grad_bias;                          // contiguous
  int64_t bias_B, bias_H, bias_L;

  inline int64_t query_tiles() const { return (L + kMaskTile - 1) / kMaskTile; }
  inline int64_t key_tiles() const { return (S + kMaskTile - 1) / kMaskTile; }
};

// A part of the work: a head of q in the forward pass, one of k and v in the backward pass, one of the bias in that of its gradient,
// and ranges of tiles.
struct AttentionItem {
  int64_t b, head;
  Range queries, keys;  // tiles
  int64_t part;         // forward
  bool grad_q, grad_kv;
};

struct ForwardKernels {
  int64_t (*bytes)(const Attention&);          // of buffer that a thread needs
  int64_t (*partial_bytes)(const Attention&);  // of Attention::partial for one head and part
  void (*run)(const Attention&, const AttentionItem&, void* buffer);
  void (*merge)(const Attention&, int64_t b, int64_t head, void* buffer);  // the parts of a head
};
MASKOPS_DECLARE_KERNELS(ForwardKernels)

struct BackwardKernels {
  int64_t (*bytes)(const Attention&);
  void (*run)(const Attention&, const AttentionItem&, void* buffer);
  int64_t (*bias_bytes)(const Attention&);
  void (*run_bias)(const Attention&, const AttentionItem&, void* buffer);
};
MASKOPS_DECLARE_KERNELS(BackwardKernels)

}  // namespace maskops
