// Writing one row of a token split: ids_keep [K], ids_mask [M] and ids_restore [N], from a class per token or from a slot per token.
#pragma once

#include "common/reduce.cuh"

namespace maskops {

struct SplitRow {
  std::int64_t* ids_keep;     // [K]
  std::int64_t* ids_mask;     // [M]
  std::int64_t* ids_restore;  // [N]
  std::int64_t max_keep, max_mask, tokens;
  std::int64_t num_keep, length;  // tokens [length, N) are padding and keep their own slot

  // Counts that do not fit have been reported; nothing is written outside.
  __device__ __forceinline__ void place(std::int64_t slot, std::int64_t n) const {
    if (slot < num_keep) {
      if (slot < max_keep) store(ids_keep + slot, n);
    } else if (slot < length && slot - num_keep < max_mask) {
      store(ids_mask + slot - num_keep, n);
    }
  }
};

// -1 in the empty slots of ids_keep and ids_mask. The whole block.
template <int THREADS>
__device__ __forceinline__ void pad_split_row(const SplitRow& row) {
  for (std::int64_t k = row.num_keep + threadIdx.x; k < row.max_keep; k += THREADS) store(row.ids_keep + k, std::int64_t(-1));
  for (std::int64_t m = row.length - row.num_keep + threadIdx.x; m < row.max_mask; m += THREADS)
    store(row.ids_mask + m, std::int64_t(-1));
}

// Compaction in index order: hidden(n) says whether token n is masked. The block walks over the row in tiles of its width; the rank
// of a token among the hidden ones comes from ballots, so a tile costs two barriers. `scratch`: THREADS / 32 ints of shared memory.
template <int THREADS, typename Hidden, typename Scratch>
__device__ __forceinline__ void write_ascending_row(const SplitRow& row, const Hidden& hidden, Scratch& scratch) {
  std::int64_t hidden_before = 0;
  for (std::int64_t tile = 0; tile < row.tokens; tile += THREADS) {
    const std::int64_t n = tile + threadIdx.x;
    const bool is_hidden = n < row.length && hidden(n);
    int in_tile = 0;
    const std::int64_t rank = hidden_before + block_rank<THREADS / 32>(is_hidden, scratch, in_tile);
    hidden_before += in_tile;
    if (n >= row.tokens) continue;
    const std::int64_t slot = n >= row.length ? n : is_hidden ? row.num_keep + rank : n - rank;
    store(row.ids_restore + n, slot);
    row.place(slot, n);
  }
  pad_split_row<THREADS>(row);
}

}  // namespace maskops
