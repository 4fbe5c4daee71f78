// Facts of the family feature_reuse that both devices use. B rows, H heads, N cached tokens, U local tokens, D channels of a head.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace maskops {

constexpr int kDriftCosine = 0, kDriftL2 = 1;
constexpr int kUniformBits = 23;  // of a random word: (bits + 1 / 2) / 2^23 is exact in float and never 0 or 1

template <class S>
MASKOPS_HOST_DEVICE inline S uniform_of(uint32_t word) {
  return (S(word >> (32 - kUniformBits)) + S(0.5)) * S(1.0 / (1 << kUniformBits));
}

// Strides, in elements, of a tensor [B, H, N, D].
struct TokenStrides {
  int64_t batch, head, token, channel;

  MASKOPS_HOST_DEVICE int64_t at(int64_t b, int64_t h, int64_t n) const { return b * batch + h * head + n * token; }
};

}  // namespace maskops
