// What the functions of sparse_conv hand to its kernels.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace maskops {

struct ConvArgs {
  const void* x;       // [N, C], rows x_stride apart
  const void* weight;  // [K, C / G, D]
  const void* bias;    // [D] or null
  const int32_t* map;  // [K, M]
  void* out;           // [M, D]
  const void* grad;    // [M, D], rows grad_stride apart: for the gradient of the weight, whose partial sums go to `partial`
  void* packed;        // the weight as the kernels read it, where it must be packed
  void* partial;       // [chunks, K, C / G, D], both as they are summed
  int64_t x_stride, grad_stride, N, M, K, C, D, groups;
  int dtype;
  bool amx, pairs;     // multiplied in its tiles, or bfloat16 in twos by vdpbf16ps

  // Rows of the result that are summed at a time: fixed, as sums over the chunks of the weight's gradient depend on it.
  static constexpr int64_t kChunk = 8192, kMostChunks = 16;
  int64_t chunks() const {
    const int64_t wanted = (M + kChunk - 1) / kChunk;
    return wanted < 1 ? 1 : wanted > kMostChunks ? kMostChunks : wanted;
  }
};

struct ConvKernels {
  int64_t (*packed_bytes)(const ConvArgs&);                        // 0 where the weight serves as it is
  void (*pack)(const ConvArgs&, int64_t k_begin, int64_t k_end);
  int64_t (*tile_rows)(const ConvArgs&);
  int64_t (*bytes)(const ConvArgs&);                               // of the buffer of a thread
  // Tiles [begin, end) of the result; false if the map holds a row that x lacks.
  bool (*forward)(const ConvArgs&, int64_t begin, int64_t end, void* buffer);
  int64_t (*partial_bytes)(const ConvArgs&);
  int64_t (*weight_places)(const ConvArgs&);                        // that a thread takes at a time, where there are enough
  bool (*weight_chunk)(const ConvArgs&, int64_t chunk, int64_t k_begin, int64_t k_end, void* buffer);
  void (*sum_chunks)(const ConvArgs&, int64_t k_begin, int64_t k_end);
};
MASKOPS_DECLARE_KERNELS(ConvKernels)

}  // namespace maskops
