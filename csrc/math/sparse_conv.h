// Geometry of the family sparse_conv, the same on every device: which place a kernel place reads, and the hash of places.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace maskops {

constexpr int kConvAxes = 3;  // fewer axes are led by ones: sizes 1, stride 1, padding 0

struct Place {
  int32_t batch, at[kConvAxes];
};

struct ConvGeometry {
  int32_t size[kConvAxes], stride[kConvAxes], padding[kConvAxes], dilation[kConvAxes];
  bool divides;  // places of the question are divided by the stride, not multiplied

  MASKOPS_HOST_DEVICE int64_t places() const { return static_cast<int64_t>(size[0]) * size[1] * size[2]; }
  // Whether the kernel places of an axis read neighbours side by side.
  MASKOPS_HOST_DEVICE bool is_run(int axis) const { return !divides && dilation[axis] == 1; }
  // The place on one axis that kernel place k reads for place `at`; false where there is none (also past 32 bits).
  MASKOPS_HOST_DEVICE bool source(int axis, int32_t at, int32_t k, int32_t* place) const {
    const int64_t shift = static_cast<int64_t>(k) * dilation[axis] - padding[axis];
    int64_t found = at;
    if (divides) {
      found -= shift;
      const int64_t quotient = found >= 0 ? found / stride[axis] : -((stride[axis] - 1 - found) / stride[axis]);
      if (quotient * stride[axis] != found) return false;
      found = quotient;
    } else {
      found = found * stride[axis] + shift;
    }
    *place = static_cast<int32_t>(found);
    return *place == found;
  }
};

MASKOPS_HOST_DEVICE inline uint64_t mix_bits(uint64_t x) {
  x ^= x >> 31;
  x *= 0x9e3779b97f4a7c15ull;
  x ^= x >> 29;
  x *= 0xbf58476d1ce4e5b9ull;
  return x ^ (x >> 32);
}

MASKOPS_HOST_DEVICE inline uint64_t hash_of(int32_t a, int32_t b, int32_t c, int32_t d) {
  const uint64_t low = static_cast<uint64_t>(static_cast<uint32_t>(a)) << 32 | static_cast<uint32_t>(b);
  const uint64_t high = static_cast<uint64_t>(static_cast<uint32_t>(c)) << 32 | static_cast<uint32_t>(d);
  return mix_bits(low ^ mix_bits(high + 0x632be59bd9b4e019ull));
}

}  // namespace maskops
