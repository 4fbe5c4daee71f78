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

// Whether all ids >= 0 of a row differ: as many bits set as ids. A pass without branches, for rows that fill their bitmap well.
inline bool all_differ(const int64_t* ids, int64_t slots, std::vector<uint64_t>& seen) {
  int64_t valid = 0, bits = 0;
  for (int64_t k = 0; k < slots; ++k) {
    if (ids[k] < 0) continue;
    seen[ids[k] >> 6] |= uint64_t{1} << (ids[k] & 63);
    ++valid;
  }
  for (uint64_t& word : seen) {
    bits += __builtin_popcountll(word);
    word = 0;
  }
  return bits == valid;
}

inline std::string position(const char* arg, int64_t row, int64_t column) {
  return std::string(arg) + "[" + std::to_string(row) + ", " + std::to_string(column) + "]";
}

}  // namespace detail

// ids [B, K] contiguous: distinct tokens in [low, tokens) per row; -1 (where low = -1) marks an empty slot. Rows are looked at
// from any thread, faults are thrown after the loop.
class IdCheck {
 public:
  IdCheck(const char* op, const char* arg, const int64_t* ids, int64_t slots, int64_t tokens, int64_t low)
      : op_(op), arg_(arg), ids_(ids), slots_(slots), tokens_(tokens), low_(low) {}

  std::vector<uint64_t> scratch() const { return std::vector<uint64_t>((tokens_ + 63) / 64, 0); }

  // Whether row b is good. seen: scratch() of this thread.
  bool row(int64_t b, std::vector<uint64_t>& seen) {
    const int64_t* row = ids_ + b * slots_;
    bool inside = true;
    for (int64_t k = 0; k < slots_; ++k) inside &= row[k] >= low_ && row[k] < tokens_;
    if (!inside) {
      int64_t k = 0;
      while (row[k] >= low_ && row[k] < tokens_) ++k;
      outside_.note(b * slots_ + k);
      return false;
    }
    if (static_cast<int64_t>(seen.size()) <= slots_ && detail::all_differ(row, slots_, seen)) return true;
    const int64_t k = detail::repeated_id(row, slots_, seen);
    if (k >= 0) repeated_.note(b * slots_ + k);
    return k < 0;
  }

  void raise() const {
    const FirstFault& fault = outside_.any() ? outside_ : repeated_;
    if (!fault.any()) return;
    const std::string at = detail::position(arg_, fault.position() / slots_, fault.position() % slots_);
    const std::string value = std::to_string(ids_[fault.position()]);
    if (outside_.any()) fail_index(op_, at, "be in [" + std::to_string(low_) + ", " + std::to_string(tokens_) + ")", value);
    fail_index(op_, at, "be unique in its row", value + " again");
  }

 private:
  const char *op_, *arg_;
  const int64_t* ids_;
  int64_t slots_, tokens_, low_;
  FirstFault outside_, repeated_;
};

inline void check_ids(const char* op, const char* arg, const int64_t* ids, int64_t batch, int64_t slots, int64_t tokens, int64_t low) {
  IdCheck check(op, arg, ids, slots, tokens, low);
  parallel_for(batch, slots * 16, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> seen = check.scratch();
    for (int64_t b = begin; b < end; ++b) check.row(b, seen);
  });
  check.raise();
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
