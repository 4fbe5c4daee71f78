// What the kernels of nm_matmul_linear share. M rows of x, N outputs, K inputs, J kept slots per output.
#pragma once

#include "common/launch.cuh"
#include "math/nm_matmul.h"

namespace maskops {

// A block counts its own rows, outputs and columns in 32 bits.
constexpr std::int64_t kMaxInputs = (std::int64_t{1} << 24) - 1;

template <typename T>
struct LinearArgs {
  const T* x;                  // [M, K]
  const T* values;             // [N, J]
  const std::uint8_t* places;  // [N, row_bytes]
  const T* bias;               // [N], or null
  T* y;                        // [M, N]
  std::int64_t rows, outputs;
  int inputs, slots, row_bytes, groups, n, m, bits;

  __device__ __forceinline__ Acc<T> bias_of(std::int64_t output) const {
    return bias && output < outputs ? widen(load(bias + output)) : Acc<T>(0);
  }
};

// The part of a problem that a block owns: R rows of x and N outputs, fewer at the edges.
template <typename T, int R, int N>
struct LinearTile {
  std::int64_t row, output;
  int rows, outputs;
  const T *x, *values;
  const std::uint8_t* places;

  __device__ __forceinline__ LinearTile(const LinearArgs<T>& a, unsigned row_tiles)
      : row(static_cast<std::int64_t>(blockIdx.x % row_tiles) * R),
        output(static_cast<std::int64_t>(blockIdx.x / row_tiles) * N),
        rows(a.rows - row < R ? static_cast<int>(a.rows - row) : R),
        outputs(a.outputs - output < N ? static_cast<int>(a.outputs - output) : N),
        x(a.x + row * a.inputs),
        values(a.values + output * a.slots),
        places(a.places + output * a.row_bytes) {}
};

// W neighbouring outputs of a row, as far as there are so many; `wide`: rows of y are made of such chunks.
template <int W, typename T>
__device__ __forceinline__ void store_outputs(const LinearArgs<T>& a, std::int64_t row, std::int64_t output, bool wide,
                                              const Vec<T, W>& value) {
  if (row >= a.rows) return;
  T* to = a.y + row * a.outputs + output;
  if (wide) {
    if (output < a.outputs) store_vec<W>(to, value);
    return;
  }
#pragma unroll
  for (int i = 0; i < W; ++i) {
    if (output + i < a.outputs) store(to + i, value.v[i]);
  }
}

}  // namespace maskops
