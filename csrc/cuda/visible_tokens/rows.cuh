// What the row-moving kernels of visible_tokens share: names for messages, where kept rows stand, and the kernel that moves rows.
// B batch, N tokens, K kept slots, P prefix tokens, D channels.
#pragma once

#include "common/ids.cuh"
#include "common/launch.cuh"
#include "math/visible_tokens.h"

namespace maskops {

enum class Function : int { gather, restore, pack, unpack, patchify, unpatchify };

// The public function that a message of a device names.
MASKOPS_HOST_DEVICE inline const char* name_of(Function function) {
  switch (function) {
    case Function::gather: return "gather_tokens";
    case Function::restore: return "restore_tokens";
    case Function::pack: return "pack_tokens";
    case Function::unpack: return "unpack_tokens";
    case Function::patchify: return "patchify";
    default: return "unpatchify";
  }
}

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / 32;

// Where the kept rows of a sample stand: padded, slots [prefix, prefix + num_keep[b]) of its own K, or packed, rows
// [cu_seqlens[b], cu_seqlens[b + 1]) of a common [total, D]. Counts that do not fit (check_slots reports them) read nothing.
struct Slots {
  const std::int64_t* num_keep = nullptr;    // [B], or null
  const std::int32_t* cu_seqlens = nullptr;  // [B + 1], or null
  std::int64_t capacity = 0;                 // K or total
  std::int64_t prefix = 0;

  __device__ __forceinline__ SlotRows of(std::int64_t b) const {
    if (num_keep) {
      const std::int64_t count = load(num_keep + b);
      return {prefix, count <= capacity ? count : 0};
    }
    const std::int64_t first = load(cu_seqlens + b), end = load(cu_seqlens + b + 1);
    return {first, first >= 0 && end <= capacity ? end - first : 0};
  }
};

// The counts of sample b, checked by one thread.
static __device__ __forceinline__ void check_slots(const Slots& slots, std::int64_t b, std::int64_t batch, std::int64_t tokens,
                                                   Function function) {
  (void)batch;
  const char* name = name_of(function);
  if (slots.num_keep) {
    const std::int64_t count = load(slots.num_keep + b), most = slots.capacity < tokens ? slots.capacity : tokens;
    MASKOPS_DEVICE_CHECK(count >= 0 && count <= most, std::invalid_argument, name, "num_keep must fit the slots and the tokens",
                         "num_keep[", b, "] must be in [0, ", most, "], got ", count);
    return;
  }
  const std::int64_t first = load(slots.cu_seqlens + b), end = load(slots.cu_seqlens + b + 1), count = end - first;
  MASKOPS_DEVICE_CHECK(b > 0 || first == 0, std::invalid_argument, name, "cu_seqlens must start at 0",
                       "cu_seqlens[0] must start at 0, got ", first);
  MASKOPS_DEVICE_CHECK(count >= 0 && count <= tokens, std::invalid_argument, name, "row lengths of cu_seqlens must be in [0, N]",
                       "row lengths of cu_seqlens[", b, "] must be in [0, ", tokens, "], got ", count);
  MASKOPS_DEVICE_CHECK(b + 1 < batch || end <= slots.capacity, std::invalid_argument, name, "last cu_seqlens must be at most total",
                       "last cu_seqlens[0] must be at most total = ", slots.capacity, ", got ", end);
}

// All that a restoring kernel checks, in the first check.blocks blocks of its grid.
static __device__ __forceinline__ void check_restore_rows(const IdsCheck& check, const Slots& slots, Function function) {
  const std::int64_t block = blockIdx.x;
  if (threadIdx.x == 0 && block % check.chunks == 0) check_slots(slots, block / check.chunks, check.batch, check.tokens, function);
  check_ids<kRowThreads>(check, block, name_of(function), "ids_restore");
}

// Tokens whose inverse map a block can hold.
constexpr int kMaxChunk = 2048;

// The whole block: slot_of[i] = the slot k with ids[b, k] = base + i, or INT_MAX where no slot names the token. The smallest slot wins,
// so that a second one that names the token finds itself beaten and reports it.
template <typename Shared>
__device__ __forceinline__ void invert_ids(Shared& slot_of, const std::int64_t* ids, std::int64_t b, std::int64_t slots,
                                           std::int64_t tokens, std::int64_t base, int chunk, Function function) {
  const char* name = name_of(function);
  (void)name;
  for (int i = threadIdx.x; i < chunk; i += kRowThreads) slot_of[i] = INT_MAX;
  __syncthreads();
  for (int k = threadIdx.x; k < slots; k += kRowThreads) {
    const std::int64_t id = load(ids + b * slots + k);
    MASKOPS_DEVICE_CHECK(id >= -1 && id < tokens, std::out_of_range, name, "ids must be tokens or -1 for an empty slot", "ids[", b,
                         ", ", k, "] must be in [-1, ", tokens, "), got ", id);
    if (id >= base && id < base + chunk) atomicMin(&slot_of[id - base], k);
  }
  __syncthreads();
  for (int k = threadIdx.x; k < slots; k += kRowThreads) {
    const std::int64_t id = load(ids + b * slots + k);
    if (id < base || id >= base + chunk) continue;
    MASKOPS_DEVICE_CHECK(slot_of[id - base] == k, std::out_of_range, name, "ids must be unique in their row", "ids[", b, ", ", k,
                         "] must be unique in its row, got ", id, " again");
  }
}

// Blocks that share the tokens of one sample: one even where there are none, which then checks the ids.
MASKOPS_HOST_DEVICE inline std::int64_t blocks_of_sample(std::int64_t tokens, int chunk) {
  return tokens > 0 ? (tokens + chunk - 1) / chunk : 1;
}

// Tokens per block: few, for many blocks, but so many that reading K ids costs at most a quarter of writing the rows.
inline int tokens_per_block(std::int64_t slots, std::int64_t row_bytes) {
  if (slots >= INT_MAX) throw std::runtime_error(sentence("maskops: rows of ", slots, " ids are not supported"));
  int chunk = 32;
  while (chunk < kMaxChunk && slots * 8 * 4 > chunk * row_bytes) chunk *= 2;
  return chunk;
}

// One warp copies a row of D channels, or fills it with zeros where there is no source.
template <int W, typename T>
__device__ __forceinline__ void move_row(const T* __restrict__ from, T* __restrict__ to, std::int64_t channels) {
  const std::int64_t begin = static_cast<std::int64_t>(threadIdx.x % 32) * W;
  if (from) {
#pragma unroll 4
    for (std::int64_t c = begin; c < channels; c += 32 * W) store_vec<W>(to + c, load_vec<W>(from + c));
  } else {
#pragma unroll 4
    for (std::int64_t c = begin; c < channels; c += 32 * W) store_vec<W>(to + c, zero_vec<T, W>());
  }
}

// One warp owns one row of the plan's list; plan.find(row, from, to) names the row to copy (null: zeros) and its place (null: none).
// Rows are contiguous in D, so a warp reads and writes 512 neighbouring bytes at a time.
template <typename T, int W, typename Plan>
__global__ void __launch_bounds__(kRowThreads, 4) move_rows_kernel(const Plan plan, const IdsCheck check) {
  if (blockIdx.x < check.blocks) {
    plan.check(check);
    return;
  }
  const std::int64_t row = (blockIdx.x - check.blocks) * kRowWarps + threadIdx.x / 32;
  if (row >= plan.rows) return;
  const T* from = nullptr;
  T* to = nullptr;
  plan.find(row, from, to);
  if (to) move_row<W>(from, to, plan.channels);
}

template <typename T, int W, typename Plan>
void move_rows(const Plan& plan, const IdsCheck& check, cudaStream_t stream) {
  const std::int64_t blocks = check.blocks + ceil_div(plan.rows, kRowWarps);
  launch(move_rows_kernel<T, W, Plan>, grid_for(blocks, 1), dim3(kRowThreads), 0, stream, plan, check);
}

}  // namespace maskops
