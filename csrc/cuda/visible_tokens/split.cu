// visible_tokens_split on CUDA: mask [B, N] -> the ids of kept and masked tokens, by counting and compaction, without a sort.
#include "common/library.cuh"
#include "common/split_row.cuh"
#include "math/visible_tokens_check.h"

namespace maskops {
namespace {

constexpr int kSplitThreads = 256;

struct SplitOutputs {
  std::int64_t *ids_keep, *ids_mask, *ids_restore;  // [B, K], [B, M], [B, N]
  std::int64_t* num_keep;                           // [B]
  std::int64_t max_keep, max_mask, tokens;
};

// One block owns one row: it counts the masked tokens, then walks over the row once more (now in cache) and writes the slots.
__global__ void __launch_bounds__(kSplitThreads, 4) split_kernel(const unsigned char* __restrict__ mask, const SplitOutputs out) {
  MASKOPS_SHARED(int, scratch, kSplitThreads / 32);
  const std::int64_t b = blockIdx.x;
  const unsigned char* row_mask = mask + b * out.tokens;
  int mine = 0;
  for (std::int64_t n = threadIdx.x; n < out.tokens; n += kSplitThreads) mine += load(row_mask + n) != 0;
  const std::int64_t masked = block_sum<kSplitThreads / 32>(mine, scratch), kept = out.tokens - masked;
  if (threadIdx.x == 0) {
    MASKOPS_DEVICE_CHECK(kept <= out.max_keep, std::invalid_argument, "split_tokens", "kept tokens must be at most max_seqlen",
                         "kept tokens of mask[", b, "] must be at most max_seqlen = ", out.max_keep, ", got ", kept);
    MASKOPS_DEVICE_CHECK(masked <= out.max_mask, std::invalid_argument, "split_tokens", "masked tokens must be at most max_masked",
                         "masked tokens of mask[", b, "] must be at most max_masked = ", out.max_mask, ", got ", masked);
    store(out.num_keep + b, kept);
  }
  const SplitRow row{out.ids_keep + b * out.max_keep, out.ids_mask + b * out.max_mask, out.ids_restore + b * out.tokens,
                     out.max_keep, out.max_mask, out.tokens, kept, out.tokens};
  write_ascending_row<kSplitThreads>(row, [&](std::int64_t n) { return load(row_mask + n) != 0; }, scratch);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> visible_tokens_split(const Tensor& mask_any, std::int64_t max_keep,
                                                                        std::int64_t max_mask) {
  check_split(mask_any, max_keep, max_mask);
  const DeviceScope scope(mask_any);
  const Tensor mask = torch::stable::contiguous(mask_any);
  const std::int64_t batch = mask.size(0), tokens = mask.size(1);
  Tensor ids_keep = empty_like_device(mask, {batch, max_keep}, ScalarType::Long);
  Tensor ids_mask = empty_like_device(mask, {batch, max_mask}, ScalarType::Long);
  Tensor ids_restore = empty_like_device(mask, {batch, tokens}, ScalarType::Long);
  Tensor num_keep = empty_like_device(mask, {batch}, ScalarType::Long);
  Tensor cu_seqlens = empty_like_device(mask, {batch + 1}, ScalarType::Int);
  const SplitOutputs out{data<std::int64_t>(ids_keep), data<std::int64_t>(ids_mask), data<std::int64_t>(ids_restore),
                         data<std::int64_t>(num_keep), max_keep, max_mask, tokens};
  launch(split_kernel, grid_for(batch, 1), dim3(kSplitThreads), 0, scope.stream(), const_data<unsigned char>(mask), out);
  exclusive_cumsum(out.num_keep, data<std::int32_t>(cu_seqlens), batch, scope.stream());
  return {ids_keep, ids_mask, ids_restore, num_keep, cu_seqlens};
}

}  // namespace

MASKOPS_CUDA_LIBRARY(m) { m.impl("visible_tokens_split", TORCH_BOX(&visible_tokens_split)); }

}  // namespace maskops
