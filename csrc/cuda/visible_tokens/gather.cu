// visible_tokens_gather on CUDA: x [B, N, D], ids [B, K] -> [B, K, D], and its gradient through the inverse map.
#include "common/library.cuh"
#include "cuda/visible_tokens/rows.cuh"
#include "math/visible_tokens_check.h"

namespace maskops {
namespace {

template <typename T>
struct GatherPlan {
  const T* x;  // [B, N, D]
  RowStrides strides;
  const std::int64_t* ids;  // [B, K]
  T* out;                   // [B, K, D]
  std::int64_t rows, slots, tokens, channels;

  __device__ void check(const IdsCheck& ids_check) const {
    check_ids<kRowThreads>(ids_check, blockIdx.x, name_of(Function::gather), "ids");
  }
  __device__ void find(std::int64_t row, const T*& from, T*& to) const {
    const std::int64_t id = load(ids + row);
    if (id >= 0 && id < tokens) from = x + strides.at(row / slots, id);
    to = out + row * channels;
  }
};

// grad_x [B, N, D] of grad [B, K, D]. One block owns `chunk` tokens of one sample: it inverts the ids that fall into them in shared
// memory (K ids are few bytes beside the chunk's rows), then each of its warps copies rows, zeros where nobody gathered.
template <typename T, int W>
__global__ void __launch_bounds__(kRowThreads, 4)
    gather_backward_kernel(const T* __restrict__ grad, RowStrides strides, const std::int64_t* __restrict__ ids, T* __restrict__ grad_x,
                           std::int64_t slots, std::int64_t tokens, std::int64_t channels, int chunk) {
  MASKOPS_SHARED(int, slot_of, kMaxChunk);
  const std::int64_t chunks = blocks_of_sample(tokens, chunk);
  const std::int64_t b = blockIdx.x / chunks, base = blockIdx.x % chunks * chunk;
  invert_ids(slot_of, ids, b, slots, tokens, base, chunk, Function::gather);
  for (std::int64_t t = threadIdx.x / 32; t < chunk && base + t < tokens; t += kRowWarps) {
    const int slot = slot_of[t];
    const T* from = slot == INT_MAX ? nullptr : grad + strides.at(b, slot);
    move_row<W>(from, grad_x + (b * tokens + base + t) * channels, channels);
  }
}

Tensor visible_tokens_gather(const Tensor& x_any, const Tensor& ids_any) {
  check_gather(x_any, ids_any);
  const DeviceScope scope(x_any);
  const Tensor x = with_contiguous_rows(x_any), ids = torch::stable::contiguous(ids_any);
  const std::int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2), slots = ids.size(1);
  Tensor out = empty_like_device(x, {batch, slots, channels});
  const IdsCheck check(const_data<std::int64_t>(ids), batch, slots, tokens, -1);
  dispatch_floats(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const RowStrides strides = row_strides(x);
    const GatherPlan<T> plan{const_data<T>(x), strides, check.ids, data<T>(out), batch * slots, slots, tokens, channels};
    const int width = vector_width<T>({channels, strides.batch, strides.row}, {plan.x, plan.out});
    dispatch_width<T>(width, [&](auto w) { move_rows<T, w()>(plan, check, scope.stream()); });
  });
  return out;
}

Tensor visible_tokens_gather_backward(const Tensor& grad_any, const Tensor& ids_any, std::int64_t tokens) {
  check_gather_backward(grad_any, ids_any, tokens);
  const DeviceScope scope(grad_any);
  const Tensor grad = with_contiguous_rows(grad_any), ids = torch::stable::contiguous(ids_any);
  const std::int64_t batch = grad.size(0), slots = grad.size(1), channels = grad.size(2);
  Tensor grad_x = empty_like_device(grad, {batch, tokens, channels});
  dispatch_floats(grad.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const RowStrides strides = row_strides(grad);
    const int chunk = tokens_per_block(slots, channels * static_cast<std::int64_t>(sizeof(T)));
    const int width = vector_width<T>({channels, strides.batch, strides.row}, {const_data<T>(grad), data<T>(grad_x)});
    dispatch_width<T>(width, [&](auto w) {
      launch(gather_backward_kernel<T, w()>, grid_for(batch * blocks_of_sample(tokens, chunk), 1), dim3(kRowThreads), 0, scope.stream(),
             const_data<T>(grad), strides, const_data<std::int64_t>(ids), data<T>(grad_x), slots, tokens, channels, chunk);
    });
  });
  return grad_x;
}

}  // namespace

MASKOPS_CUDA_LIBRARY(m) {
  m.impl("visible_tokens_gather", TORCH_BOX(&visible_tokens_gather));
  m.impl("_visible_tokens_gather_backward", TORCH_BOX(&visible_tokens_gather_backward));
}

}  // namespace maskops
