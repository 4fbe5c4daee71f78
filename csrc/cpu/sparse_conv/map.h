// What the building of kernel maps hands to its kernels.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace maskops {

// 64 neighbours on the last axis, those before and those after: which are there, and their rows in ascending order. Lists may be read
// kColumnSlack rows further than they go.
struct NearColumns {
  uint64_t bits[3];
  const int32_t* rows[3];
};
constexpr int64_t kColumnSlack = 16;

struct ConvMapKernels {
  // For the places `own` of the middle column, ascending, which row stands at first + k places from each, or -1: out[k * stride] and on,
  // for k in [0, count). |first + k| < 64.
  void (*find_line)(const NearColumns& near, uint64_t own, int32_t first, int32_t count, int32_t* out, int64_t stride);
};
MASKOPS_DECLARE_KERNELS(ConvMapKernels)

}  // namespace maskops
