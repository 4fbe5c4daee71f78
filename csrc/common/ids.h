// Checks of ids and counts on the CPU, where the values can be looked at before any kernel runs.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "common/check.h"
#include "common/parallel.h"

namespace maskops {

namespace detail {

inline std::string position(const char* arg, int64_t row, int64_t column) {
  return std::string(arg) + "[" + std::to_string(row) + ", " + std::to_string(column) + "]";
}

}  // namespace detail

// For each token the last row in which it was seen, so that nothing has to be cleared between rows. calloc: of many tokens only
// the pages that ids reach cost anything.
class TokenMarks {
 public:
  explicit TokenMarks(int64_t tokens)
      : rows_(static_cast<uint32_t*>(std::calloc(static_cast<size_t>(tokens) + 1, sizeof(uint32_t))), &std::free) {
    if (!rows_) throw std::bad_alloc();
  }
  uint32_t next_row(int64_t tokens) {
    if (++row_ == 0) {  // after 2^32 rows the oldest marks would look new
      std::fill_n(rows_.get(), tokens + 1, 0u);
      row_ = 1;
    }
    return row_;
  }
  uint32_t& operator[](int64_t token) { return rows_.get()[token]; }

 private:
  std::unique_ptr<uint32_t, decltype(&std::free)> rows_;
  uint32_t row_ = 0;
};

// ids [B, K] contiguous: distinct tokens in [low, tokens) per row; -1 (where low = -1) marks an empty slot. Rows are looked at
// from any thread, faults are thrown after the loop.
class IdCheck {
 public:
  IdCheck(const char* op, const char* arg, const int64_t* ids, int64_t slots, int64_t tokens, int64_t low)
      : op_(op), arg_(arg), ids_(ids), slots_(slots), tokens_(tokens), low_(low) {}

  TokenMarks scratch() const { return TokenMarks(tokens_); }

  // Whether row b is good, in one pass without branches. marks: scratch() of this thread.
  bool row(int64_t b, TokenMarks& marks) {
    const int64_t* row = ids_ + b * slots_;
    const uint32_t now = marks.next_row(tokens_);
    bool bad = false;
    for (int64_t k = 0; k < slots_; ++k) {
      const bool inside = static_cast<uint64_t>(row[k]) < static_cast<uint64_t>(tokens_);
      uint32_t& mark = marks[inside ? row[k] : tokens_];  // one mark more, for ids outside
      bad |= inside ? mark == now : row[k] < low_ || row[k] >= 0;
      mark = now;
    }
    if (bad) note_fault(b, marks);
    return !bad;
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
  void note_fault(int64_t b, TokenMarks& marks) {
    const int64_t* row = ids_ + b * slots_;
    int64_t k = 0;
    while (k < slots_ && row[k] >= low_ && row[k] < tokens_) ++k;
    if (k < slots_) return outside_.note(b * slots_ + k);
    const uint32_t now = marks.next_row(tokens_);
    for (k = 0; row[k] < 0 || marks[row[k]] != now; ++k) {
      if (row[k] >= 0) marks[row[k]] = now;
    }
    repeated_.note(b * slots_ + k);
  }

  const char *op_, *arg_;
  const int64_t* ids_;
  int64_t slots_, tokens_, low_;
  FirstFault outside_, repeated_;
};

inline void check_ids(const char* op, const char* arg, const int64_t* ids, int64_t batch, int64_t slots, int64_t tokens, int64_t low) {
  IdCheck check(op, arg, ids, slots, tokens, low);
  parallel_for(batch, slots * 16, [&](int64_t begin, int64_t end) {
    TokenMarks marks = check.scratch();
    for (int64_t b = begin; b < end; ++b) check.row(b, marks);
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
