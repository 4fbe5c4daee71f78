// A set of places, found by a hash of columns: 64 neighbours on the last axis share an entry, whose bits say which are there. So the
// places of a kernel along the last axis cost one look-up, and a set takes 32 bytes for a column, however far apart places lie.
#pragma once

#include <bit>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#include "math/sparse_conv.h"

namespace maskops {

// By arithmetic: std::popcount is a call into a table where the instruction may be missing.
inline int64_t count_bits(uint64_t x) {
  x -= x >> 1 & 0x5555555555555555ull;
  x = (x & 0x3333333333333333ull) + (x >> 2 & 0x3333333333333333ull);
  return static_cast<int64_t>(((x + (x >> 4)) & 0x0f0f0f0f0f0f0f0full) * 0x0101010101010101ull >> 56);
}

struct Column {
  int32_t batch, high, middle, word;  // word: the place on the last axis / 64, rounded down
  uint64_t bits;                      // 0: an empty entry of the table
  int64_t first;                      // of its places among all places in the order of the table
};

class Columns {
 public:
  // expected: columns, for a good size to begin with.
  explicit Columns(int64_t expected) {
    int64_t size = 16;
    while (size < 2 * expected) size *= 2;
    reset(size);
  }

  static int32_t word_of(int32_t last) { return last >> 6; }
  static uint64_t bit_of(int32_t last) { return uint64_t{1} << (last & 63); }

  // The entry of a column, or the empty one where it belongs.
  Column* at(int32_t batch, int32_t high, int32_t middle, int32_t word) {
    const Column* found = static_cast<const Columns*>(this)->at(batch, high, middle, word);
    return const_cast<Column*>(found);
  }
  const Column* at(int32_t batch, int32_t high, int32_t middle, int32_t word) const {
    int64_t i = static_cast<int64_t>(hash_of(batch, high, middle, word)) & mask_;
    for (;; i = (i + 1) & mask_) {
      const Column& column = table_.get()[i];
      const bool same = column.batch == batch && column.high == high && column.middle == middle && column.word == word;
      if (column.bits == 0 || same) return &column;
    }
  }

  // Whether the place is new. In ascending order the column is most often that of the place before.
  bool insert(const Place& place) {
    Column* column = last_;
    if (column == nullptr || !holds(*column, place)) column = at(place.batch, place.at[0], place.at[1], word_of(place.at[2]));
    const uint64_t bit = bit_of(place.at[2]);
    if (column->bits == 0) {
      if (2 * ++count_ > mask_) {  // half of the table stays empty
        grow();
        column = at(place.batch, place.at[0], place.at[1], word_of(place.at[2]));
      }
      column->batch = place.batch;
      column->high = place.at[0];
      column->middle = place.at[1];
      column->word = word_of(place.at[2]);
    }
    const bool fresh = (column->bits & bit) == 0;
    column->bits |= bit;
    last_ = column;
    return fresh;
  }
  static bool holds(const Column& column, const Place& place) {
    return column.bits != 0 && column.word == word_of(place.at[2]) && column.middle == place.at[1] && column.high == place.at[0] &&
           column.batch == place.batch;
  }

  // To be called once all places are in. Returns their number.
  int64_t number() {
    int64_t next = 0;
    for (int64_t i = 0; i <= mask_; ++i) {
      table_.get()[i].first = next;
      next += count_bits(table_.get()[i].bits);
    }
    return next;
  }

  // The number of a place that is there.
  static int64_t number_of(const Column& column, uint64_t bit) { return column.first + count_bits(column.bits & (bit - 1)); }

  template <class Visit>
  void each(const Visit& visit) const {
    for (int64_t i = 0; i <= mask_; ++i) {
      if (table_.get()[i].bits != 0) visit(table_.get()[i]);
    }
  }

 private:
  void reset(int64_t size) {
    mask_ = size - 1;
    table_.reset(static_cast<Column*>(std::calloc(static_cast<size_t>(size), sizeof(Column))));
    if (!table_) throw std::bad_alloc();
  }
  void grow() {
    const auto old = std::move(table_);
    const int64_t size = mask_ + 1;
    reset(2 * size);
    for (int64_t i = 0; i < size; ++i) {
      const Column& column = old.get()[i];
      if (column.bits != 0) *at(column.batch, column.high, column.middle, column.word) = column;
    }
  }

  int64_t mask_ = 0, count_ = 0;
  Column* last_ = nullptr;
  std::unique_ptr<Column, decltype(&std::free)> table_{nullptr, &std::free};
};

}  // namespace maskops
