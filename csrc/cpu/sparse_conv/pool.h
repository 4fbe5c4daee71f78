// What the functions of pooling hand to their kernels.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace maskops {

struct PoolArgs {
  const void* x;           // [N, C], rows x_stride apart; of the gradient of a maximum: the gradient
  const int32_t* map;      // [K, M] of rows, or -1
  const int32_t* order;    // rows, segment by segment
  const int32_t* begin;    // [M] of a segment in order
  const int32_t* count;    // [M] rows of a segment
  const void* read_scale;  // [N] or null, in the type of sums
  const void* scale;       // [M] or null
  const int32_t* from;     // arg of the maximum: [N, C], for its gradient
  void* out;               // [M, C]
  int32_t* arg;            // [M, C]
  int64_t x_stride, N, M, K, C;
  int dtype;
};

struct PoolKernels {
  int64_t (*bytes)(const PoolArgs&);  // of the buffer of a thread
  // Rows [begin, end) of the result; false if the map holds a row that x lacks.
  bool (*sum)(const PoolArgs&, int64_t begin, int64_t end, void* buffer);
  bool (*max)(const PoolArgs&, int64_t begin, int64_t end, void* buffer);
  bool (*max_backward)(const PoolArgs&, int64_t begin, int64_t end, void* buffer);
  // Segments [begin, end), whose rows are known to exist.
  void (*segment_sum)(const PoolArgs&, int64_t begin, int64_t end, void* buffer);
  void (*segment_max)(const PoolArgs&, int64_t begin, int64_t end, void* buffer);
  // Of one long segment: part [first, last) of its rows into sums (and args) in the type of sums, and the parts joined into out.
  void (*part_sum)(const PoolArgs&, int64_t segment, int64_t first, int64_t last, void* sums);
  void (*join_sums)(const PoolArgs&, int64_t segment, int64_t parts, void* sums);
  void (*part_max)(const PoolArgs&, int64_t segment, int64_t first, int64_t last, void* best, int32_t* arg, void* buffer);
  void (*join_maxima)(const PoolArgs&, int64_t segment, int64_t parts, void* best, int32_t* args);
};
MASKOPS_DECLARE_KERNELS(PoolKernels)

}  // namespace maskops
