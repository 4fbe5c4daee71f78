// Checks of ids and counts on the CPU, where the values can be looked at before any kernel runs.
#pragma once

#include <vector>

#include "common/check.h"
#include "common/parallel.h"

namespace maskops {

namespace detail {

// The first k of a row whose id came before, or -1. seen: one bit per token, all zero, left all zero.
inline int64_t repeated_id(const int64_t* ids, int64_t slots, std::vector<uint64_t>& seen) {
  int64_t bad = -1, k = 0;
  for (; k < slots && bad < 0; ++k) {
    if (ids[k] < 0) continue;
    uint64_t& word = seen[ids[k] >> 6];
    const uint64_t bit = uint64_t{1} << (ids[k] & 63);
    if (word & bit) bad = k;
    word |= bit;
  }
  for (int64_t j = 0; j < k; ++j) {
    if (ids[j] >= 0) seen[ids[j] >> 6] = 0;
  }
  return bad;
}

inline std::string position(const char* arg, int64_t row, int64_t column) {
  return std::string(arg) + "[" + std::to_string(row) + ", " + std::to_string(column) + "]";
}

}  // namespace detail

// ids [B, K] contiguous: distinct tokens in [low, tokens) per row; -1 (where low = -1) marks an empty slot.
inline void check_ids(const char* op, const char* arg, const int64_t* ids, int64_t batch, int64_t slots, int64_t tokens, int64_t low) {
  FirstFault outside, repeated;
  parallel_for(batch, slots * 16, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> seen((tokens + 63) / 64, 0);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t* row = ids + b * slots;
      bool inside = true;
      for (int64_t k = 0; k < slots; ++k) inside &= row[k] >= low && row[k] < tokens;
      if (!inside) {
        int64_t k = 0;
        while (row[k] >= low && row[k] < tokens) ++k;
        outside.note(b * slots + k);
      } else if (const int64_t k = detail::repeated_id(row, slots, seen); k >= 0) {
        repeated.note(b * slots + k);
      }
    }
  });
  const FirstFault& fault = outside.any() ? outside : repeated;
  if (!fault.any()) return;
  const int64_t row = fault.position() / slots, k = fault.position() % slots;
  const std::string value = std::to_string(ids[fault.position()]);
  if (outside.any()) {
    fail_index(op, detail::position(arg, row, k), "be in [" + std::to_string(low) + ", " + std::to_string(tokens) + ")", value);
  }
  fail_index(op, detail::position(arg, row, k), "be unique in its row", value + " again");
}

// Every value of counts [B] must be in [0, most].
inline void check_counts(const char* op, const char* arg, const int64_t* counts, int64_t batch, int64_t most) {
  for (int64_t b = 0; b < batch; ++b) {
    if (counts[b] < 0 || counts[b] > most) {
      fail(op, std::string(arg) + "[" + std::to_string(b) + "]", "be in [0, " + std::to_string(most) + "]", counts[b]);
    }
  }
}

}  // namespace maskops
