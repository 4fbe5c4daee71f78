// What the kernels of nm_matmul share: groups of m columns in registers, places out of packed bytes, rows of flat numbers.
// R rows, K columns, G groups of m columns, J = G * n kept slots per row.
#pragma once

#include "common/launch.cuh"
#include "math/nm_matmul.h"

namespace maskops {

constexpr int kGroupThreads = 256;

// Flat number -> row and rest, in 32-bit arithmetic where all of them fit.
struct RowSplit {
  FastDivisor fast;
  std::int64_t columns = 1;
  bool small = true;

  RowSplit(std::int64_t rows, std::int64_t columns_) : columns(columns_ > 0 ? columns_ : 1), small(rows * columns <= 0x7fffffff) {
    if (small) fast = FastDivisor(columns);
  }
  // `flat` becomes the rest, the row is returned.
  __device__ __forceinline__ std::int64_t split(std::int64_t& flat) const {
    if (small) {
      std::uint32_t rest = static_cast<std::uint32_t>(flat);
      const std::uint32_t row = fast.split(rest);
      flat = rest;
      return row;
    }
    const std::int64_t row = flat / columns;
    flat -= row * columns;
    return row;
  }
};

// A group of up to M columns, all of it in registers: M is a constant and every loop over it is unrolled.
template <typename T, int M>
struct Group {
  T v[M];
};

// WIDE: M columns in accesses of up to 16 bytes. Otherwise `width` columns one by one, the others are zero.
template <bool WIDE, typename T, int M>
__device__ __forceinline__ void load_group(const T* from, int width, Group<T, M>& group) {
  if constexpr (WIDE) {
    constexpr int V = M * sizeof(T) <= 16 ? M : static_cast<int>(16 / sizeof(T));
#pragma unroll
    for (int c = 0; c < M; c += V) {
      const Vec<T, V> part = load_vec<V>(from + c);
#pragma unroll
      for (int i = 0; i < V; ++i) group.v[c + i] = part.v[i];
    }
  } else {
#pragma unroll
    for (int c = 0; c < M; ++c) group.v[c] = c < width ? load(from + c) : T(0.0f);
  }
}

template <bool WIDE, typename T, int M>
__device__ __forceinline__ void store_group(T* to, int width, const Group<T, M>& group) {
  if constexpr (WIDE) {
    constexpr int V = M * sizeof(T) <= 16 ? M : static_cast<int>(16 / sizeof(T));
#pragma unroll
    for (int c = 0; c < M; c += V) {
      Vec<T, V> part;
#pragma unroll
      for (int i = 0; i < V; ++i) part.v[i] = group.v[c + i];
      store_vec<V>(to + c, part);
    }
  } else {
#pragma unroll
    for (int c = 0; c < M; ++c) {
      if (c < width) store(to + c, group.v[c]);
    }
  }
}

__device__ __forceinline__ int group_width(const NmLayout& layout, std::int64_t group) {
  const std::int64_t left = layout.K - group * layout.m;
  return left < layout.m ? static_cast<int>(left) : layout.m;
}

// body(M, WIDE) with the smallest M of 2, 4, ..., 32 that holds a group. WIDE: groups of exactly M columns that fill the row and
// start at multiples of their own size (or of 16 bytes) in each pointer of `aligned`, whose elements are of T or smaller.
template <typename T, typename Body>
void dispatch_group(const NmLayout& layout, std::initializer_list<const void*> aligned, const Body& body) {
  std::uintptr_t bits = 0;
  for (const void* pointer : aligned) bits |= reinterpret_cast<std::uintptr_t>(pointer);
  const auto run = [&](auto size) {
    constexpr std::uintptr_t kBytes = size() * sizeof(T) < 16 ? size() * sizeof(T) : 16;
    if (layout.m == size() && layout.K % size() == 0 && bits % kBytes == 0) return body(size, std::true_type{});
    body(size, std::false_type{});
  };
  if (layout.m <= 2) return run(std::integral_constant<int, 2>{});
  if (layout.m <= 4) return run(std::integral_constant<int, 4>{});
  if (layout.m <= 8) return run(std::integral_constant<int, 8>{});
  if (layout.m <= 16) return run(std::integral_constant<int, 16>{});
  run(std::integral_constant<int, 32>{});
}

// The places of a row from some slot on, each byte read once and only when it is needed.
struct PlaceReader {
  const std::uint8_t* next_byte;
  unsigned word;
  int filled, bits;

  __device__ __forceinline__ PlaceReader(const std::uint8_t* row, std::int64_t slot, int bits_) : bits(bits_) {
    const std::int64_t at = slot * bits;
    const int shift = static_cast<int>(at & 7);
    next_byte = row + (at >> 3);
    word = load(next_byte++) >> shift;
    filled = 8 - shift;
  }
  __device__ __forceinline__ int next() {
    if (filled < bits) {
      word |= static_cast<unsigned>(load(next_byte++)) << filled;
      filled += 8;
    }
    const int place = static_cast<int>(word & ((1u << bits) - 1));
    word >>= bits;
    filled -= bits;
    return place;
  }
};

}  // namespace maskops
