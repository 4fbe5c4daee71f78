// The kernels of mask_sampling that order a short row and write its split, one table per instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace maskops {

constexpr int64_t kMaxOrdered = 256;  // tokens of a row that are sorted in registers

struct OrderKernels {
  // ordered_bits() of math/mask_sampling.h
  void (*keys)(const float* noise, int64_t length, uint32_t* to);
  // to [kMaxOrdered]: the tokens of a row in the order of (mask, noise, index); mask may be null. False, and nothing promised of `to`,
  // where this instruction set does not sort in registers or the row is too long or too uneven for it.
  bool (*order)(const uint32_t* noise, const uint8_t* mask, int64_t length, uint32_t* to);
  // hidden [length]: 0 for the first `keep` tokens of that order, 1 for the others. False as above.
  bool (*mark)(const uint32_t* noise, const uint8_t* mask, int64_t length, int64_t keep, uint8_t* hidden);
  // ids_keep [K], ids_mask [M] and ids_restore [K + M] of a line of cells, for `lines` that are the same.
  void (*repeat)(const int64_t* const (&ids)[3], int64_t keep, int64_t mask, int64_t lines, int64_t* const (&to)[3]);
  // The split of a row whose tokens stand in order: the first `keep` of them are kept.
  void (*ordered_row)(const uint32_t* order, int64_t length, int64_t keep, int64_t* restore, int64_t* kept, int64_t* masked);
  // common/split_row.h
  void (*split_row)(const uint8_t* hidden, int64_t tokens, int64_t num_keep, int64_t* restore, int64_t* kept, int64_t* masked);
};
MASKOPS_DECLARE_KERNELS(OrderKernels)

}  // namespace maskops
