// masked_attention_map on CUDA: the rules of a mask, tile by tile, a word of 64 keys per query.
// A warp evaluates a tile, two queries per lane, on a stack of words in registers. As on the CPU every tile is evaluated twice: once to
// tell empty and full tiles and to count the others per line of tiles, once, when their places are known, to write those.
#include "common/library.cuh"
#include "common/reduce.cuh"
#include "math/masked_attention.h"
#include "math/masked_attention_check.h"

namespace maskops {
namespace {

constexpr int kMapThreads = 256, kMapWarps = kMapThreads / 32;

struct MaskMap {
  const std::int64_t* program;
  int rules;  // instructions
  MaskData data;
  std::int64_t heads, queries, keys, rows, columns;  // rows and columns of tiles
};

// The words of the queries `lane` and `lane + 32` of a tile.
struct LaneWords {
  std::uint64_t low, high;
};

__device__ __forceinline__ LaneWords evaluate_tile(const MaskMap& map, std::int64_t line, std::int64_t column) {
  const std::int64_t head = line / map.rows, b = head / map.heads, h = head % map.heads;
  const std::int64_t q = line % map.rows * kMaskTile + threadIdx.x % 32, k0 = column * kMaskTile;
  const std::int64_t left = map.keys - k0, keys = left < kMaskTile ? left : kMaskTile;
  // The top is [0]. Never indexed by a variable: that would put it into local memory.
  LaneWords s0{0, 0}, s1{0, 0}, s2{0, 0}, s3{0, 0};
  for (int r = 0; r < map.rules; ++r) {
    std::int64_t rule[kRuleWidth];
#pragma unroll
    for (int i = 0; i < kRuleWidth; ++i) rule[i] = load(map.program + r * kRuleWidth + i);
    if (rule[0] == kRuleNot) {
      s0 = {~s0.low, ~s0.high};
    } else if (rule[0] == kRuleAnd || rule[0] == kRuleOr) {
      const bool both = rule[0] == kRuleAnd;
      s0.low = both ? s0.low & s1.low : s0.low | s1.low;
      s0.high = both ? s0.high & s1.high : s0.high | s1.high;
      s1 = s2, s2 = s3;
    } else {
      s3 = s2, s2 = s1, s1 = s0;
      // Not unrolled: the code of all rules twice takes more registers than there are.
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        const std::uint64_t word = q + 32 * half < map.queries ? word_of_rule(rule, map.data, b, h, q + 32 * half, k0, keys) : 0;
        s0 = {half == 0 ? word : s0.low, word};
      }
    }
  }
  const std::uint64_t inside = bits_between(0, keys);
  return {q < map.queries ? s0.low & inside : 0, q + 32 < map.queries ? s0.high & inside : 0};
}

// One block owns a line of tiles, states [B, H, rows] x columns, a warp a column at a time: kMaskEmpty, kMaskFull, or 0 where a tile is
// neither, and counts[line] of those.
__global__ void __launch_bounds__(kMapThreads, 2)
    mask_state_kernel(const MaskMap map, std::int32_t* __restrict__ states, std::int64_t* __restrict__ counts) {
  MASKOPS_SHARED(int, scratch, kMapWarps);
  const std::int64_t line = blockIdx.x;
  const int lane = threadIdx.x % 32;
  const std::int64_t q = line % map.rows * kMaskTile + lane;
  int partial = 0;
  for (std::int64_t column = threadIdx.x / 32; column < map.columns; column += kMapWarps) {
    const LaneWords words = evaluate_tile(map, line, column);
    const std::uint64_t inside = bits_between(0, map.keys - column * kMaskTile);
    const bool some = words.low != 0 || words.high != 0;
    const bool misses = (q < map.queries && words.low != inside) || (q + 32 < map.queries && words.high != inside);
    const bool any = __ballot_sync(kFullWarp, some) != 0, hole = __ballot_sync(kFullWarp, misses) != 0;
    if (lane == 0) {
      store(states + line * map.columns + column, !any ? kMaskEmpty : hole ? 0 : kMaskFull);
      partial += any && hole;
    }
  }
  const int count = block_sum<kMapWarps>(partial, scratch);
  if (threadIdx.x == 0) store(counts + line, std::int64_t(count));
}

// tiles = states, but with the place of each tile that is neither empty nor full, first[line] and up, and words [P, 64] of those. One
// block owns a line: its threads rank the columns, then each warp evaluates some of them.
__global__ void __launch_bounds__(kMapThreads, 2)
    mask_write_kernel(const MaskMap map, const std::int32_t* __restrict__ first, std::int32_t* __restrict__ tiles,
                      std::int64_t* __restrict__ words) {
  MASKOPS_SHARED(int, scratch, kMapWarps);
  MASKOPS_SHARED(int, places, kMapThreads);
  const std::int64_t line = blockIdx.x;
  const int lane = threadIdx.x % 32;
  int next = load(first + line);
  if (next == load(first + line + 1)) return;
  for (std::int64_t begin = 0; begin < map.columns; begin += kMapThreads) {
    const std::int64_t mine = begin + threadIdx.x;
    // Read and written here, by the same thread: no load(), which promises memory that nobody writes.
    std::int32_t* tile = tiles + line * map.columns + mine;
    const bool partial = mine < map.columns && *tile == 0;
    int count = 0;
    const int place = next + block_rank<kMapWarps>(partial, scratch, count);
    next += count;
    if (partial) store(tile, place);
    places[threadIdx.x] = partial ? place : -1;
    __syncthreads();
    const std::int64_t rest = map.columns - begin, chunk = rest < kMapThreads ? rest : kMapThreads;
    for (int i = threadIdx.x / 32; i < chunk; i += kMapWarps) {
      const int at = places[i];
      if (at < 0) continue;
      const LaneWords found = evaluate_tile(map, line, begin + i);
      std::int64_t* to = words + std::int64_t(at) * kMaskTile + lane;
      store(to, static_cast<std::int64_t>(found.low));
      store(to + 32, static_cast<std::int64_t>(found.high));
    }
    __syncthreads();
  }
}

// A few integers on the device.
Tensor to_device(std::vector<std::int64_t>& values, const Tensor& like) {
  const std::int64_t size = static_cast<std::int64_t>(values.size());
  const Tensor host = torch::stable::from_blob(values.data(), {size}, {1}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                               ScalarType::Long);
  Tensor copy = empty_like_device(like, {size}, ScalarType::Long);
  torch::stable::copy_(copy, host);
  return copy;
}

// The last entry of a tensor of the device: the one time that this op waits for it.
std::int64_t last_of(const Tensor& x) {
  std::int32_t value = 0;
  Tensor host = torch::stable::from_blob(&value, {1}, {1}, torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Int);
  Tensor source = x;
  torch::stable::copy_(host, torch::stable::narrow(source, 0, x.size(0) - 1, 1));
  return value;
}

std::tuple<Tensor, Tensor> masked_attention_map(const Tensor& ints_any, const Tensor& bytes_any, std::vector<std::int64_t> program,
                                                std::int64_t B, std::int64_t H, std::int64_t L, std::int64_t S) {
  check_mask_map(ints_any, bytes_any, program, B, H, L, S);
  const DeviceScope scope(ints_any);
  const Tensor ints = torch::stable::contiguous(ints_any), bytes = torch::stable::contiguous(bytes_any);
  const std::int64_t rows = mask_tiles(L), columns = mask_tiles(S), lines = B * H * rows;
  Tensor tiles = empty_like_device(ints, {B, H, rows, columns}, ScalarType::Int);
  if (tiles.numel() == 0) return {tiles, empty_like_device(ints, {0, kMaskTile}, ScalarType::Long)};
  const Tensor steps = to_device(program, ints);
  const MaskMap map{const_data<std::int64_t>(steps), static_cast<int>(program.size() / kRuleWidth),
                    {const_data<std::int32_t>(ints), const_data<std::uint8_t>(bytes)}, H, L, S, rows, columns};
  Tensor counts = empty_like_device(ints, {lines}, ScalarType::Long), first = empty_like_device(ints, {lines + 1}, ScalarType::Int);
  const dim3 grid = grid_for(lines, 1), block(kMapThreads);
  launch(mask_state_kernel, grid, block, 0, scope.stream(), map, data<std::int32_t>(tiles), data<std::int64_t>(counts));
  exclusive_cumsum(const_data<std::int64_t>(counts), data<std::int32_t>(first), lines, scope.stream());
  Tensor words = empty_like_device(ints, {last_of(first), kMaskTile}, ScalarType::Long);
  launch(mask_write_kernel, grid, block, 0, scope.stream(), map, const_data<std::int32_t>(first), data<std::int32_t>(tiles),
         data<std::int64_t>(words));
  return {tiles, words};
}

}  // namespace

MASKOPS_CUDA_LIBRARY(m) { m.impl("masked_attention_map", TORCH_BOX(&masked_attention_map)); }

}  // namespace maskops
