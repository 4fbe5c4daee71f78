// The kernels of embed_patches, one table per instruction set. Three matrix products, each with one operand packed once for
// all threads (B) and the other packed block by block (A); patches are read straight from the image.
//     forward       out [rows, E] = patches [rows, V] * weight^T       rows = B * K, one per slot
//     weight        grad_weight [E, V] = grad^T [E, rows] * patches
//     images        grad patches [rows, V] = grad * weight, written to the pixels they came from
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace maskops {

struct Embed {
  int dtype;
  Bf16Products products;
  int64_t rows, embed, values, run;
  const int64_t* starts;  // [rows] offset of the patch's first pixel in images, -1: empty slot
  const int64_t* tokens;  // [rows] its place in the grid, -1: empty slot
  const int64_t* runs;    // [V / run] offsets, from the first pixel, of the `run` neighbouring pixels of a patch line
  const void* images;
  const void* weight;  // [E, V]
  const void* bias;    // [E] or null
  const void* pos;     // [N, E] or null
  const void* grad;    // [rows, E], backward only
  void* out;           // [rows, E], or in the gradient for images their gradient
};

// Rows [begin, end) of a sum over slots: a part of fixed size, so that threads do not change the order of additions.
struct Span {
  int64_t begin, end;
};

// Units in which threads share the work and sizes of the buffers in bytes, for C [m, n] with sums over k, which is `steps` packed.
struct GemmPlan {
  int64_t panel_rows, panel_cols, steps;
  int64_t a_bytes, b_bytes, partial_bytes;
};

struct Buffers {
  void *a, *b, *partial, *lines;  // lines: kEmbedLines rows of the widest operand, gathered before they are packed
};

constexpr int64_t kEmbedLines = 32;

struct EmbedKernels {
  GemmPlan (*plan)(const Embed&, int64_t m, int64_t n, int64_t k);
  void (*pack_weight)(const Embed&, Span panels, const Buffers&);
  void (*forward)(const Embed&, Span rows, const Buffers&);
  void (*pack_patches)(const Embed&, Span slots, Span steps, const Buffers&);
  void (*grad_weight)(const Embed&, Span slots, Span channels, const Buffers&, void* sums);  // slots.begin > 0: adds
  void (*pack_weight_rows)(const Embed&, Span steps, const Buffers&);
  void (*grad_images)(const Embed&, Span rows, const Buffers&);
  void (*sum_slots)(const Embed&, const int64_t* row_of, int64_t batch, int64_t grid, Span tokens, void* sums);
  void (*sum_rows)(const Embed&, const void* sums, int64_t grid, Span channels, void* out);
  void (*narrow)(const Embed&, const void* sums, Span values, void* out);
};
MASKOPS_DECLARE_KERNELS(EmbedKernels)

}  // namespace maskops
