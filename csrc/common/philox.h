// Philox4x32-10, the counter-based generator of every mask. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
// Plain C++ on host and device: the words depend on (seed, offset, index) only, so every backend draws the same masks.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace maskops {

struct PhiloxWords {
  uint32_t word[4];
};

struct PhiloxKey {
  uint32_t seed_low, seed_high, offset_low, offset_high;

  MASKOPS_HOST_DEVICE static PhiloxKey of(int64_t seed, int64_t offset) {
    const uint64_t s = static_cast<uint64_t>(seed), o = static_cast<uint64_t>(offset);
    return {static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32), static_cast<uint32_t>(o), static_cast<uint32_t>(o >> 32)};
  }
};

// The four words of counter value `index`; word w of index i is number 4 i + w of the stream.
MASKOPS_HOST_DEVICE inline PhiloxWords philox(const PhiloxKey& key, uint64_t index) {
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32);
  uint32_t c2 = key.offset_low, c3 = key.offset_high, k0 = key.seed_low, k1 = key.seed_high;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0, p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t next0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, next2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = next0;
    c2 = next2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace maskops
