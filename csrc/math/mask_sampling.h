// The key of the family mask_sampling: tokens are sorted by (class, noise, index), packed into one 64-bit number.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace maskops {

constexpr int64_t kMaxTokens = int64_t{1} << 30;  // an index has 30 bits of the key

// Tokens that are cells of a grid, `across` of them in a line; the split is that of the grid's patches, high x wide to a cell.
struct Cells {
  int64_t across = 1, high = 1, wide = 1;

  MASKOPS_HOST_DEVICE int64_t area() const { return high * wide; }
  MASKOPS_HOST_DEVICE bool single() const { return high == 1 && wide == 1; }
};

// class 0 real, 1 masked by the given mask, 2 padding.
MASKOPS_HOST_DEVICE inline uint64_t sampling_key(uint32_t token_class, uint32_t noise, int64_t index) {
  return (static_cast<uint64_t>(token_class) << 62) | (static_cast<uint64_t>(noise) << 30) | static_cast<uint64_t>(index);
}

MASKOPS_HOST_DEVICE inline int64_t index_of_key(uint64_t key) { return static_cast<int64_t>(key & (kMaxTokens - 1)); }

// Padding sorts by index alone, so that every padding token keeps its own slot.
MASKOPS_HOST_DEVICE inline uint64_t padding_key(int64_t index) { return sampling_key(2, 0, index); }

// Bits of a float whose unsigned order is the order of the numbers, -0 equal to 0 and NaN last, as torch sorts.
MASKOPS_HOST_DEVICE inline uint32_t ordered_bits(float x) {
  if (x != x) return 0xFFFFFFFFu;
  if (x == 0.0f) x = 0.0f;
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

MASKOPS_HOST_DEVICE inline uint64_t ordered_bits(double x) {
  if (x != x) return 0xFFFFFFFFFFFFFFFFull;
  if (x == 0.0) x = 0.0;
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
}

}  // namespace maskops
