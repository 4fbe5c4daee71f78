// What the functions of block-masked convolution hand to its kernels.
//
// A row of the product is an active position of the result. source[t, m] is the row of x that kernel place t reads for it, or -1.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace maskops {

constexpr int64_t kMostTaps = 49;  // kernels of up to 7 x 7

struct BlockConvArgs {
  const void* rows;         // of x, in the precision of sums or, where pairs or amx, in bfloat16; row_stride apart
  const int32_t* source;    // [taps, M]
  const int32_t* target;    // [M]: rows of out, or of grad
  const void* weight;
  const void* bias;         // [groups * columns] or null
  void* out;                // storage type, rows out_stride apart
  const void* grad;         // storage type, rows out_stride apart: for the gradient of the weight
  void* packed;             // the weight in panels of columns
  void* partial;            // [chunks, group, panel, taps, depth, panel width], then sums of grad [chunks, groups * columns]
  void* grad_weight;        // [groups * columns, depth, taps]
  void* grad_bias;          // [groups * columns]
  int64_t M, taps, row_stride, out_stride;
  int64_t depth, columns, groups;                  // channels of a group that are summed over, and that come out
  int64_t of_group, of_depth, of_column;           // strides of weight; that of taps is 1
  int dtype;
  bool pairs;  // are multiplied at once, by vdpbf16ps: of channels, or of rows for the gradient of the weight
  bool amx;    // products of bfloat16 in AMX tiles

  // Fixed, as the order of sums depends on it.
  static constexpr int64_t kChunk = 1024, kMostChunks = 16;
  int64_t chunks() const {
    const int64_t wanted = (M + kChunk - 1) / kChunk;
    return wanted < 1 ? 1 : wanted > kMostChunks ? kMostChunks : wanted;
  }
};

struct BlockConvKernels {
  // count rows of storage type, each of `channels`, from x + row[i] * channels.
  void (*widen_rows)(int dtype, const void* x, const int32_t* row, int64_t count, int64_t channels, void* to);
  int64_t (*panels)(const BlockConvArgs&);       // of a group
  int64_t (*packed_bytes)(const BlockConvArgs&);
  void (*pack)(const BlockConvArgs&, int64_t begin, int64_t end);  // panels of all groups
  int64_t (*bytes)(const BlockConvArgs&);        // of the buffer of a thread
  int64_t (*items)(const BlockConvArgs&);
  void (*forward)(const BlockConvArgs&, int64_t item, void* buffer);
  int64_t (*partial_bytes)(const BlockConvArgs&);
  int64_t (*weight_items)(const BlockConvArgs&);
  void (*weight_chunk)(const BlockConvArgs&, int64_t item, void* buffer);  // a chunk of rows, and a part of the weight
  void (*sum_chunks)(const BlockConvArgs&, int64_t begin, int64_t end);    // columns of all groups
  bool has_pairs;
  int64_t few_channels;  // fewer than these are gathered, and not taken as pairs
};
MASKOPS_DECLARE_KERNELS(BlockConvKernels)

// Depthwise: the window of a cell is found once, then gone through channel by channel.
struct DepthwiseArgs {
  const void *x, *weight, *bias, *grad;  // x [B, H, W, C], grad and out [B, H / sy, W / sx, C]
  void *out, *packed, *partial, *grad_weight, *grad_bias;
  const bool* cells;      // [B, h, w]
  const int32_t* active;  // [count] cells
  int64_t count, h, w, H, W, C;
  int64_t kh, kw, sy, sx, py, px;
  int64_t uy, ux;         // x has only every uy-th line and ux-th column of [H, W]: for the gradient through a stride
  bool flipped;           // the weight is, for the gradient of x
  int dtype;
  bool pairs;             // bfloat16 in twos by vdpbf16ps
  static constexpr int64_t kBlock = 32;  // channels, a multiple of every vector

  // Whether there are kernels for this size and stride along a line: see by_line() of block_window.h.
  bool has_line() const { return (sx == 1 && (kw == 3 || kw == 5 || kw == 7)) || (sx == 2 && kw == 3); }
  int64_t taps() const { return kh * kw; }
  int64_t cell_h() const { return H / h / sy; }  // of the result
  int64_t cell_w() const { return W / w / sx; }
  int64_t window_h() const { return (cell_h() - 1) * sy + kh; }
  int64_t window_w() const { return (cell_w() - 1) * sx + kw; }
  static constexpr int64_t kChunk = 8, kMostChunks = 16;
  int64_t chunks() const {
    const int64_t wanted = (count + kChunk - 1) / kChunk;
    return wanted < 1 ? 1 : wanted > kMostChunks ? kMostChunks : wanted;
  }
};

struct DepthwiseKernels {
  int64_t (*packed_bytes)(const DepthwiseArgs&);
  void (*pack)(const DepthwiseArgs&, int64_t begin, int64_t end);  // channels, in blocks of kBlock
  int64_t (*bytes)(const DepthwiseArgs&);
  void (*forward)(const DepthwiseArgs&, int64_t cell, void* buffer);  // the number of an active cell
  int64_t (*partial_bytes)(const DepthwiseArgs&);
  void (*weight_chunk)(const DepthwiseArgs&, int64_t chunk, void* buffer);
  void (*sum_chunks)(const DepthwiseArgs&, int64_t begin, int64_t end);
};
MASKOPS_DECLARE_KERNELS(DepthwiseKernels)

}  // namespace maskops
