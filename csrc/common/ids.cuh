// Checks of ids on the device, in extra blocks at the front of the grid of the kernel that uses them: no launch of their own.
#pragma once

#include <climits>

#include "common/launch.cuh"

namespace maskops {

constexpr int kIdsChunk = 4096;  // tokens that one checking block owns, 16 KiB of shared memory

// ids [B, K]: distinct tokens in [low, tokens) per row, where -1 marks an empty slot (low = -1).
struct IdsCheck {
  const std::int64_t* ids = nullptr;
  std::int64_t batch = 0, slots = 0, tokens = 0, low = 0;
  std::int64_t chunks = 0, blocks = 0;

  IdsCheck() = default;  // nothing to check: no blocks
  IdsCheck(const std::int64_t* ids_, std::int64_t batch_, std::int64_t slots_, std::int64_t tokens_, std::int64_t low_)
      : ids(ids_), batch(batch_), slots(slots_), tokens(tokens_), low(low_) {
    if (slots >= INT_MAX) throw std::runtime_error(sentence("maskops: rows of ", slots, " ids are not supported"));
    chunks = tokens > 0 ? ceil_div(tokens, kIdsChunk) : 1;
    blocks = slots > 0 ? batch * chunks : 0;
  }
};

// One block looks at one row for the tokens of one chunk. first_slot[token] is the first slot that names the token, so a slot that
// finds another one there comes second. THREADS = blockDim.x.
template <int THREADS>
__device__ __forceinline__ void check_ids(const IdsCheck& check, std::int64_t block, const char* function, const char* name) {
  MASKOPS_SHARED(int, first_slot, kIdsChunk);
  (void)name;
  const std::int64_t b = block / check.chunks, base = block % check.chunks * kIdsChunk;
  for (int i = threadIdx.x; i < kIdsChunk; i += THREADS) first_slot[i] = INT_MAX;
  __syncthreads();
  for (int k = threadIdx.x; k < check.slots; k += THREADS) {
    const std::int64_t id = load(check.ids + b * check.slots + k);
    MASKOPS_DEVICE_CHECK(id >= check.low && id < check.tokens, std::out_of_range, function, "ids must be tokens or -1 for an empty slot",
                         name, "[", b, ", ", k, "] must be in [", check.low, ", ", check.tokens, "), got ", id);
    if (id >= base && id < base + kIdsChunk) atomicMin(&first_slot[id - base], k);
  }
  __syncthreads();
  for (int k = threadIdx.x; k < check.slots; k += THREADS) {
    const std::int64_t id = load(check.ids + b * check.slots + k);
    if (id < base || id >= base + kIdsChunk) continue;
    MASKOPS_DEVICE_CHECK(first_slot[id - base] == k, std::out_of_range, function, "ids must be unique in their row", name, "[", b,
                         ", ", k, "] must be unique in its row, got ", id, " again");
  }
}

}  // namespace maskops
