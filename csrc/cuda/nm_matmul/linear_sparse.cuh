// y = x W^T + b for 2:4 and 16-bit floats, on the sparse tensor cores of sm_80 and newer.
#pragma once

#include "common/mma_sparse.cuh"
#include "common/tile.cuh"
#include "cuda/nm_matmul/linear.cuh"

namespace maskops {

constexpr int kSparseThreads = 128;
constexpr int kSparseOutputs = 128;  // of a block: the rows of the sparse operand
constexpr int kSparseRows = 64;      // rows of x of a block: the columns of the dense operand
constexpr int kSparseDepth = 64;     // columns of x of one stage
constexpr int kSparseKept = kSparseDepth / 2;
constexpr int kSparseStage = kSparseOutputs * kSparseKept;
static_assert(kSparseStage == kSparseRows * kSparseDepth, "both operands and the results fill the same space");
static_assert(kSparseOutputs * kSparseRows <= 2 * kSparseStage);

// Where 8 neighbours stand in shared memory. The chunks of a row are permuted by its number, so that eight rows at the same column,
// which ldmatrix reads together, lie in different banks.
__device__ __forceinline__ int values_index(int stage, int output, int chunk) {
  return stage * kSparseStage + output * kSparseKept + 8 * (chunk ^ (output / 2 % 4));
}
__device__ __forceinline__ int inputs_index(int stage, int row, int chunk) {
  return stage * kSparseStage + row * kSparseDepth + 8 * (chunk ^ (row % 8));
}
// Results, of which a warp writes single ones of rows 0, 2, 4, 6 at the same outputs, and reads chunks.
__device__ __forceinline__ int results_index(int row, int output) {
  return row * kSparseOutputs + 8 * (output / 8 ^ (row / 2 % 4)) + output % 8;
}

// The instruction's sparse operand is the left one: a block computes y^T = W x^T for 128 outputs and 64 rows, a warp 64 x 32 of it.
// Values and inputs are copied in the background into one of two stages while the other one is multiplied; the places come straight
// from memory, as packed bytes are the metadata of the instruction, a stage ahead. The results are turned in shared memory.
// WIDE: K is a multiple of 16 and all rows begin at 16 bytes (places: at 2). Otherwise elements are copied one by one.
template <typename T, bool WIDE>
class SparseLinear {
 public:
  __device__ __forceinline__ SparseLinear(const LinearArgs<T>& args, unsigned row_tiles)
      : a_(args),
        tile_(args, row_tiles),
        lane_(threadIdx.x % 32),
        warp_outputs_(threadIdx.x / 32 % 2 * 64),
        warp_rows_(threadIdx.x / 64 * 32) {}

  template <typename Shared>
  __device__ __forceinline__ void copy(AsyncCopies& copies, Shared& values, Shared& inputs, int stage, int k0) const {
    constexpr int kUnroll = WIDE ? 4 : 1;
    const int slot = threadIdx.x % 4, k = threadIdx.x % 8;  // chunks
#pragma unroll kUnroll
    for (int i = 0; i < 4; ++i) {
      const int output = threadIdx.x / 4 + 32 * i, left = output < tile_.outputs ? a_.slots - (k0 / 2 + 8 * slot) : 0;
      copy_chunk(copies, values, values_index(stage, output, slot), tile_.values, output * a_.slots + k0 / 2 + 8 * slot, left);
    }
#pragma unroll kUnroll
    for (int i = 0; i < 4; ++i) {
      const int row = threadIdx.x / 8 + 16 * i, left = row < tile_.rows ? a_.inputs - (k0 + 8 * k) : 0;
      copy_chunk(copies, inputs, inputs_index(stage, row, k), tile_.x, row * a_.inputs + k0 + 8 * k, left);
    }
  }

  // Halves of the metadata for two pairs of 16 outputs and two steps of 32 columns. The first and second two lanes of four hold the
  // first and second 16 outputs of a pair; odd lanes the second 16 columns. The halves are put together when they are needed: doing
  // it here would wait for them.
  __device__ __forceinline__ void fetch_metadata(int k0, unsigned (&halves)[2][2][2]) const {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const int output = warp_outputs_ + 32 * pair + lane_ % 4 / 2 * 16 + lane_ / 4;
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int byte = k0 / 8 + 4 * step + lane_ % 2 * 2;
        halves[pair][step][0] = places_of(output, byte);
        halves[pair][step][1] = places_of(output + 8, byte);
      }
    }
  }

  template <typename Shared>
  __device__ __forceinline__ void multiply(const Shared& values, const Shared& inputs, int stage, const unsigned (&metadata)[2][2],
                                           float (&acc)[4][4][4]) const {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      unsigned b[4][4];
#pragma unroll
      for (int r = 0; r < 4; ++r)
        load_matrices<T>(b[r], inputs, inputs_index(stage, warp_rows_ + 8 * r + lane_ % 8, 4 * step + lane_ / 8));
#pragma unroll
      for (int o = 0; o < 4; ++o) {
        unsigned a[4];
        load_matrices<T>(a, values, values_index(stage, warp_outputs_ + 16 * o + lane_ % 16, 2 * step + lane_ / 16));
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          if (o % 2 == 0) mma_sparse<T, 0>(acc[o][r], a, b[r], metadata[o / 2][step]);
          else mma_sparse<T, 1>(acc[o][r], a, b[r], metadata[o / 2][step]);
        }
      }
    }
  }

  template <typename Shared>
  __device__ __forceinline__ void turn(const float (&acc)[4][4][4], Shared& results) const {
#pragma unroll
    for (int o = 0; o < 4; ++o) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int output = warp_outputs_ + 16 * o + 8 * half + lane_ / 4;
        const float bias = a_.bias_of(tile_.output + output);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int row = warp_rows_ + 8 * r + lane_ % 4 * 2;
          results[results_index(row, output)] = narrow<T>(acc[o][r][2 * half] + bias);
          results[results_index(row + 1, output)] = narrow<T>(acc[o][r][2 * half + 1] + bias);
        }
      }
    }
  }

  template <typename Shared>
  __device__ __forceinline__ void write(const Shared& results, bool wide_y) const {
#pragma unroll 2
    for (int i = threadIdx.x; i < kSparseRows * kSparseOutputs / 8; i += kSparseThreads) {
      const int row = i / (kSparseOutputs / 8), output = i % (kSparseOutputs / 8) * 8;
      store_outputs<8>(a_, tile_.row + row, tile_.output + output, wide_y, shared_vec<8, T>(results, results_index(row, output)));
    }
  }

 private:
  // 8 elements from an offset on, of which `left` are inside.
  template <typename Shared>
  static __device__ __forceinline__ void copy_chunk(AsyncCopies& copies, Shared& to, int index, const T* base, int offset, int left) {
    if constexpr (WIDE) {
      copies.copy(to, index, base + (left > 0 ? offset : 0), left > 0);
    } else {
      Vec<T, 8> value = zero_vec<T, 8>();
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < left) value.v[i] = load(base + offset + i);
      }
      set_shared_vec<8>(to, index, value);
    }
  }

  // The places of 16 columns. What does not exist keeps places 0 and 1 of every group: equal places would be undefined behaviour.
  __device__ __forceinline__ unsigned places_of(int output, int byte) const {
    constexpr unsigned kNone = 0x4444;
    const int left = output < tile_.outputs ? a_.row_bytes - byte : 0;
    const std::uint8_t* from = tile_.places + output * a_.row_bytes + byte;
    if constexpr (WIDE) {
      return left > 0 ? load(reinterpret_cast<const std::uint16_t*>(from)) : kNone;
    } else {
      // A last group alone in its byte leaves the upper half of it.
      const auto one = [&](int i) -> unsigned {
        if (i >= left) return kNone & 0xff;
        const bool half = 2 * (byte + i) + 1 == a_.groups;
        return load(from + i) | (half ? kNone & 0xf0 : 0);
      };
      return one(0) | one(1) << 8;
    }
  }

  const LinearArgs<T>& a_;
  const LinearTile<T, kSparseRows, kSparseOutputs> tile_;
  const int lane_, warp_outputs_, warp_rows_;
};

template <typename T, bool WIDE>
__global__ void __launch_bounds__(kSparseThreads, 4)
    linear_sparse_kernel(const LinearArgs<T> args, unsigned row_tiles, bool wide_y) {
#if defined(MASKOPS_EMULATE) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800)
  MASKOPS_SHARED(T, values, 2 * kSparseStage);
  MASKOPS_SHARED(T, inputs, 2 * kSparseStage);
  const SparseLinear<T, WIDE> linear(args, row_tiles);
  AsyncCopies copies;
  float acc[4][4][4] = {};
  unsigned metadata[2][2], next[2][2][2];
  if (args.inputs > 0) {
    linear.copy(copies, values, inputs, 0, 0);
    linear.fetch_metadata(0, next);
  }
  copies.commit();
  int stage = 0;
#pragma unroll 1
  for (int k0 = 0; k0 < args.inputs; k0 += kSparseDepth, stage ^= 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) metadata[i / 2][i % 2] = next[i / 2][i % 2][0] | next[i / 2][i % 2][1] << 16;
    copies.wait<0>();
    __syncthreads();  // this stage is there for all, and nobody reads the other one any more
    if (k0 + kSparseDepth < args.inputs) {
      linear.copy(copies, values, inputs, stage ^ 1, k0 + kSparseDepth);
      linear.fetch_metadata(k0 + kSparseDepth, next);
    }
    copies.commit();
    linear.multiply(values, inputs, stage, metadata, acc);
  }
  __syncthreads();
  linear.turn(acc, inputs);
  __syncthreads();
  linear.write(inputs, wide_y);
#endif
}

}  // namespace maskops
