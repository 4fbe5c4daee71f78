// Parts of counts and of buffers.
#pragma once

#include <cstdint>

#include "common/gemm.h"

namespace maskops {

struct Range {
  int64_t begin, end;
};

inline namespace MASKOPS_ISA_NS {

static inline int64_t parts_of(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

// Cuts a buffer into aligned pieces; without a buffer it only counts the bytes.
struct Pieces {
  char* base;
  int64_t bytes = 0;

  explicit Pieces(void* buffer) : base(static_cast<char*>(buffer)) {}
  template <class T>
  inline T* take(int64_t count) {
    const int64_t at = bytes;
    bytes += round_up(count * int64_t(sizeof(T)), 64);
    return base == nullptr ? nullptr : reinterpret_cast<T*>(base + at);
  }
};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
