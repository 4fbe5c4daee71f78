// y = x W^T + b without tensor cores: any n:m, any dtype, any chip.
#pragma once

#include "common/tile.cuh"
#include "cuda/nm_matmul/linear.cuh"

namespace maskops {

constexpr int kTiledThreads = 256;
constexpr int kTiledSide = 64;   // of the tile of y, rows and outputs
constexpr int kTiledDepth = 32;  // most columns of a tile: as many whole groups as fit

// Sizes that do not change along K.
struct TiledShape {
  int depth, slots;         // columns and slots of a tile
  int lane_bits;            // 2^lane_bits >= slots threads read the slots of one output
  unsigned row_tiles;       // tiles of y along its rows
  bool wide_y;

  TiledShape(int n, int m, std::int64_t rows, bool wide_y_) : wide_y(wide_y_) {
    const int groups = kTiledDepth / m;
    depth = groups * m;
    slots = groups * n;
    lane_bits = 0;
    while ((1 << lane_bits) < slots) ++lane_bits;
    row_tiles = static_cast<unsigned>(ceil_div(rows, kTiledSide));
  }
};

// Element (k, i) of a tile in shared memory, k-major. Fours of neighbours stay together; the rest of i is mixed with k, so that the
// threads of a warp write different banks both along i and along k.
__device__ __forceinline__ int tiled_index(int k, int i) { return k * kTiledSide + (i ^ (k / 4 % 8 * 4)); }

// What a thread brings of the next tile.
template <typename T, int W>
struct TiledStage {
  Vec<T, W> x[8 / W];
  T value[8];
  unsigned bytes[8];  // around the places of the slot, which begin at bit `shift`
  int shift;
  bool reads;  // whether there is a slot
};

// One block owns 64 x 64 of y; it unpacks the weights of 64 outputs into shared memory, tile by tile along K, and each thread
// accumulates 4 x 4 in registers. A bit per weight says which ones are kept: the others are not multiplied, so NaN and inf of x
// reach exactly the outputs that keep a weight for their column. The next tile is loaded into registers meanwhile.
template <typename T, bool WIDE>
class TiledLinear {
 public:
  using A = Acc<T>;
  static constexpr int W = WIDE ? static_cast<int>(16 / sizeof(T)) : 1;  // columns of x in one load
  static constexpr int V = sizeof(A) == 8 ? 2 : 4;                       // accumulators in 16 bytes of shared memory

  __device__ __forceinline__ TiledLinear(const LinearArgs<T>& args, const TiledShape& shape)
      : a_(args),
        s_(shape),
        tile_(args, shape.row_tiles),
        slot_(static_cast<int>(threadIdx.x) & ((1 << shape.lane_bits) - 1)),
        first_column_(slot_ / args.n * args.m) {}

  // The tile whose first column is k0 and whose first slot is slot0.
  __device__ __forceinline__ void fetch(int k0, int slot0, TiledStage<T, W>& stage) const {
    constexpr int kChunks = kTiledDepth / W;
    const int column = static_cast<int>(threadIdx.x) % kChunks * W, k = k0 + column;
    const bool columns_inside = column < s_.depth && k < a_.inputs;
#pragma unroll
    for (int i = 0; i < 8 / W; ++i) {
      const int row = static_cast<int>(threadIdx.x) / kChunks + i * (kTiledThreads / kChunks);
      stage.x[i] = columns_inside && row < tile_.rows ? load_vec<W>(tile_.x + row * a_.inputs + k) : zero_vec<T, W>();
    }
    const int slot = slot0 + slot_, at = slot * a_.bits;
    stage.reads = slot_ < s_.slots && slot < a_.slots;
    stage.shift = at & 7;
    if (!stage.reads) return;
    const std::uint8_t* byte = tile_.places + (at >> 3);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int output = output_of(i);
      if (output >= tile_.outputs) continue;
      stage.value[i] = load(tile_.values + output * a_.slots + slot);
      stage.bytes[i] = load(byte + output * a_.row_bytes);
    }
    // Only places of 3 or 5 bits come here, and wait for their bytes before the tile is multiplied.
    if (stage.shift + a_.bits <= 8) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (output_of(i) < tile_.outputs) stage.bytes[i] |= static_cast<unsigned>(load(byte + output_of(i) * a_.row_bytes + 1)) << 8;
    }
  }

  template <typename Shared, typename Bits>
  __device__ __forceinline__ void put(const TiledStage<T, W>& stage, Shared& xs, Shared& ws, Bits& kept) const {
    constexpr int kChunks = kTiledDepth / W;
#pragma unroll
    for (int i = 0; i < 8 / W; ++i) {
      const int row = threadIdx.x / kChunks + i * (kTiledThreads / kChunks);
#pragma unroll
      for (int j = 0; j < W; ++j) xs[tiled_index(threadIdx.x % kChunks * W + j, row)] = widen(stage.x[i].v[j]);
    }
    if (!stage.reads) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      // A place that no compressed weight has (its group is narrower) must not leave the tile.
      const int column = first_column_ + static_cast<int>(stage.bytes[i] >> stage.shift & ((1u << a_.bits) - 1));
      if (output_of(i) >= tile_.outputs || column >= s_.depth) continue;
      ws[tiled_index(column, output_of(i))] = widen(stage.value[i]);
      atomicOr(&kept[output_of(i)], 1u << column);
    }
  }

  template <typename Shared, typename Bits>
  __device__ __forceinline__ void accumulate(const Shared& xs, const Shared& ws, const Bits& kept, A (&acc)[4][4]) const {
    const Vec<unsigned, 4> bits = shared_vec<4, unsigned>(kept, 4 * (threadIdx.x % 16));
#pragma unroll 4
    for (int k = 0; k < s_.depth; ++k) {
      A x[4], w[4];
      four(xs, tiled_index(k, 4 * (threadIdx.x / 16)), x);
      four(ws, tiled_index(k, 4 * (threadIdx.x % 16)), w);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!(bits.v[j] >> k & 1)) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[i][j] += x[i] * w[j];
      }
    }
  }

  __device__ __forceinline__ void write(const A (&acc)[4][4]) const {
    const std::int64_t row = tile_.row + 4 * (threadIdx.x / 16), output = tile_.output + 4 * (threadIdx.x % 16);
    A bias[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) bias[j] = a_.bias_of(output + j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; j += V) {
        Vec<T, V> value;
#pragma unroll
        for (int v = 0; v < V; ++v) value.v[v] = narrow<T>(acc[i][j + v] + bias[j + v]);
        store_outputs<V>(a_, row + i, output + j, s_.wide_y, value);
      }
    }
  }

 private:
  __device__ __forceinline__ int output_of(int i) const {
    return (static_cast<int>(threadIdx.x) >> s_.lane_bits) + i * (kTiledThreads >> s_.lane_bits);
  }

  template <typename Shared>
  static __device__ __forceinline__ void four(const Shared& shared, int index, A (&out)[4]) {
#pragma unroll
    for (int c = 0; c < 4; c += V) {
      const Vec<A, V> part = shared_vec<V, A>(shared, index + c);
#pragma unroll
      for (int v = 0; v < V; ++v) out[c + v] = part.v[v];
    }
  }

  const LinearArgs<T>& a_;
  const TiledShape& s_;
  const LinearTile<T, kTiledSide, kTiledSide> tile_;
  const int slot_, first_column_;
};

template <typename T, bool WIDE>
__global__ void __launch_bounds__(kTiledThreads, 2) linear_tiled_kernel(const LinearArgs<T> args, const TiledShape shape) {
  using A = Acc<T>;
  MASKOPS_SHARED(A, xs, kTiledDepth * kTiledSide);
  MASKOPS_SHARED(A, ws, kTiledDepth * kTiledSide);
  MASKOPS_SHARED(unsigned, kept_even, kTiledSide);
  MASKOPS_SHARED(unsigned, kept_odd, kTiledSide);
  const TiledLinear<T, WIDE> linear(args, shape);
  A acc[4][4] = {};
  TiledStage<T, TiledLinear<T, WIDE>::W> stage;
  if (threadIdx.x < kTiledSide) kept_even[threadIdx.x] = 0;
  if (args.inputs > 0) linear.fetch(0, 0, stage);
  bool odd = false;
  for (int k0 = 0, slot0 = 0; k0 < args.inputs; odd = !odd) {
    // Bits of this tile and, cleared one tile ahead, of the next: clearing takes no barrier of its own.
    auto& kept = odd ? kept_odd : kept_even;
    auto& next = odd ? kept_even : kept_odd;
    __syncthreads();
    linear.put(stage, xs, ws, kept);
    if (threadIdx.x < kTiledSide) next[threadIdx.x] = 0;
    __syncthreads();
    k0 += shape.depth;
    slot0 += shape.slots;
    if (k0 < args.inputs) linear.fetch(k0, slot0, stage);
    linear.accumulate(xs, ws, kept, acc);
  }
  linear.write(acc);
}

}  // namespace maskops
