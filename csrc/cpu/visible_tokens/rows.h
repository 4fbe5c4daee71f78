// The row kernels of visible_tokens: copy rows by a map, restore rows, and the gradient of restore. One table per instruction
// set. A map holds, per output row, the offset of its source in elements or -1 for a row of its own kind (zero, or fill).
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace maskops {

struct CopyRows {
  const char* source;
  const int64_t* map;  // [rows], offset in bytes, -1: zero row
  char* out;           // [rows, row_bytes] contiguous
  int64_t row_bytes;
  bool stream;         // out is larger than the caches
};

// out[b, r] = (source row, or fill row) + pos row, over rows r of P + N.
struct RestoreRows {
  int dtype;
  const void* source;
  const int64_t* map;  // [B * R], offset in elements, -1: fill
  const void* fill;
  int64_t fill_batch, fill_row;  // strides in elements
  const void* pos;               // [R, D] or null
  void* out;                     // [B, R, D]
  int64_t rows, prefix, channels;
  bool stream;
};

// Sums over the batch for fill and pos, and the rows of grad_x, in one reading of grad. Works on chunks of kChunk positions.
struct RestoreGradient {
  static constexpr int64_t kChunk = 8;
  int dtype;
  const void* grad;  // [B, R, D], strides in elements
  int64_t grad_batch, grad_row;
  const int64_t* map;  // [B * R], offset of the row in grad_x in elements, -1: a filled row
  void* grad_x;        // null: not needed
  void* grad_fill;     // fill_dim 2: [N, D], 3: [B, N, D]; fill_dim 1: null, partial is used
  void* partial;       // fill_dim 1: accumulation dtype [chunks, D]
  void* grad_pos;      // [R, D] or null
  bool sums_fill_rows;  // fill_dim 2
  int64_t batch, rows, prefix, channels;
};

struct RowKernels {
  void (*copy)(const CopyRows&, int64_t begin, int64_t end);
  void (*restore)(const RestoreRows&, int64_t begin, int64_t end);
  void (*restore_gradient)(const RestoreGradient&, void* scratch, int64_t chunk_begin, int64_t chunk_end);
  void (*sum_partials)(int dtype, const void* partial, int64_t chunks, int64_t channels, void* out);
};
MASKOPS_DECLARE_KERNELS(RowKernels)

}  // namespace maskops
