// What linear_cross_entropy and linear_sample hand to their kernels: one codebook at a time, the rows that count.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/philox.h"

namespace maskops {

// M rows that count, padded to `stride`; D width, V classes. "Panels" are 64 columns wide, whatever the instruction set.
struct LinearLoss {
  static constexpr int64_t kPanel = 64, kTile = 96, kRanges = 64;  // kTile classes at a time; ranges of tiles with sums of their own
  static constexpr int64_t kRowUnit = 16;                          // of stride

  const void *hidden, *weight, *bias;  // rows of hidden and weight hidden_stride and weight_stride apart; bias [V] or null
  const int64_t* rows;                 // [M] of hidden
  const int64_t* target;               // [M], -1 where this codebook counts nothing
  void *across, *along;                // hidden: [panels of rows][D][64] and [panels of D][stride][64], or in words of two for AMX
  void *highest, *total, *sums;        // [ranges][stride]: highest logit, sum of exponentials beside it, sum of logits
  void *picked, *lse, *slope;          // [stride]: logit of the target, logsumexp, gradient of the loss
  void *logits;                        // of a super tile, then their gradients: per tile [kTile][stride]
  void *panels;                        // weight of a super tile: per tile [panels of D][kTile][64]
  void *grad_hidden;                   // [panels of D][stride][64] sums
  void *grad_weight, *grad_bias;       // [V, D], [V]
  // Where the gradient of the weight is to lie, [V, D]: until then exp(logit - top) of the first `kept` rows, a row per class; and
  // the highest logit of each tile, [tiles][D]. Null: the backward pass multiplies again.
  void *powers, *tops;
  void *best;                          // [ranges][stride]: highest noisy logit,
  int64_t* sample;                     // [ranges][stride]: and its class
  PhiloxKey key;
  int64_t hidden_stride, weight_stride, M, D, V, stride, book, books, kept;
  int64_t together;  // tiles of a super tile
  double scale, smoothing, z_loss, inverse_temperature;
  int dtype;
  bool amx;  // products of bfloat16 in AMX tiles

  int64_t tiles() const { return (V + kTile - 1) / kTile; }
  int64_t ranges() const { return tiles() < kRanges ? tiles() : kRanges; }
  int64_t d_panels() const { return (D + kPanel - 1) / kPanel; }
  int64_t row_panels() const { return (stride + kPanel - 1) / kPanel; }
};

// What the products need: of all rows, of each tile of a super tile, and of a thread.
struct LinearBytes {
  int64_t across, along, grad_hidden, panels, logits, thread;
};

// Samples of linear_max_pool: rows of sample b are [starts[b], starts[b + 1]), whole units of 16, the last filled up with its first row.
struct MaxPool {
  const int64_t *starts, *positions;  // [B + 1], [M]
  void* out;                          // [B, V] sums
  int64_t* at;                        // [B, V]
  int64_t B;
};

struct LinearLossKernels {
  LinearBytes (*bytes)(const LinearLoss&, bool backward);
  void (*pack)(const LinearLoss&, int64_t begin, int64_t end);  // panels of rows
  // Ranges [begin, end): logits tile by tile, of which the highest, the sums, the target's and the sample are kept.
  void (*forward)(const LinearLoss&, bool sampled, int64_t begin, int64_t end, void* buffer);
  void (*finish)(const LinearLoss&, bool sampled, void* loss);  // lse, sample and loss [M] of the ranges
  // Tile `tile`, the i-th of a super tile: the gradient of its logits, of its weight and of its bias.
  void (*tile_gradient)(const LinearLoss&, int64_t i, int64_t tile, void* buffer);
  // Items = block of rows * panels of D + panel: adds what `count` tiles from `first` on give to grad_hidden.
  int64_t (*hidden_items)(const LinearLoss&);
  void (*add_hidden)(const LinearLoss&, int64_t first, int64_t count, int64_t begin, int64_t end);
  void (*pool)(const LinearLoss&, const MaxPool&, int64_t begin, int64_t end, void* buffer);  // tiles
  void (*unpack)(const LinearLoss&, void* grad_hidden, int64_t begin, int64_t end);  // units of kRowUnit rows
};
MASKOPS_DECLARE_KERNELS(LinearLossKernels)

}  // namespace maskops
