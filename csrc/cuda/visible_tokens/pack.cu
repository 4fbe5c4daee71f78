// visible_tokens_pack and _unpack on CUDA: kept rows [B, N, D] <-> [total, D] along cu_seqlens.
#include "cuda/visible_tokens/restore.cuh"

namespace maskops {
namespace {

// packed [total, D] of x [B, N, D]. The list of rows: B N tokens (a kept one is copied to its packed row), then total packed rows
// (those behind the last sample become zero).
template <typename T>
struct PackPlan {
  const T* x;
  RowStrides strides;
  Slots slots;
  const std::int64_t* ids_restore;  // [B, N]
  T* packed;
  Function function;
  std::int64_t rows, batch, tokens, channels;

  __device__ void check(const IdsCheck& ids_check) const { check_restore_rows(ids_check, slots, function); }
  __device__ void find(std::int64_t row, const T*& from, T*& to) const {
    if (row >= batch * tokens) {
      const std::int64_t packed_row = row - batch * tokens;
      if (packed_row >= load(slots.cu_seqlens + batch)) to = packed + packed_row * channels;
      return;
    }
    const std::int64_t b = row / tokens, slot = load(ids_restore + row);
    const SlotRows kept = slots.of(b);
    if (slot < 0 || slot >= kept.count) return;
    from = x + strides.at(b, row % tokens);
    to = packed + (kept.first + slot) * channels;
  }
};

Tensor pack_rows(const Tensor& x, const Tensor& ids_restore, const Tensor& cu_seqlens, std::int64_t total, Function function,
                 cudaStream_t stream) {
  const std::int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  Tensor packed = empty_like_device(x, {total, channels});
  const IdsCheck check(const_data<std::int64_t>(ids_restore), batch, tokens, tokens, 0);
  const Slots slots{nullptr, const_data<std::int32_t>(cu_seqlens), total, 0};
  dispatch_floats(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const RowStrides strides = row_strides(x);
    const PackPlan<T> plan{const_data<T>(x), strides, slots, check.ids, data<T>(packed), function,
                           batch * tokens + total, batch, tokens, channels};
    const int width = vector_width<T>({channels, strides.batch, strides.row}, {plan.x, plan.packed});
    dispatch_width<T>(width, [&](auto w) { move_rows<T, w()>(plan, check, stream); });
  });
  return packed;
}

Tensor visible_tokens_pack(const Tensor& x, const Tensor& ids_restore, const Tensor& cu_seqlens, std::int64_t total) {
  check_pack(x, ids_restore, cu_seqlens, total);
  const DeviceScope scope(x);
  return pack_rows(with_contiguous_rows(x), torch::stable::contiguous(ids_restore), torch::stable::contiguous(cu_seqlens), total,
                   Function::pack, scope.stream());
}

Tensor visible_tokens_unpack(const Tensor& packed_any, const Tensor& ids_any, const Tensor& cu_any, const Tensor& fill_any) {
  check_unpack(packed_any, ids_any, cu_any, fill_any);
  const DeviceScope scope(packed_any);
  const Tensor packed = with_contiguous_rows(packed_any), ids_restore = torch::stable::contiguous(ids_any);
  const Tensor cu_seqlens = torch::stable::contiguous(cu_any), fill = torch::stable::contiguous(fill_any);
  Tensor out = empty_like_device(packed, {ids_restore.size(0), ids_restore.size(1), packed.size(1)});
  const Slots slots{nullptr, const_data<std::int32_t>(cu_seqlens), packed.size(0), 0};
  restore_rows(packed, ids_restore, slots, fill, std::nullopt, out, Function::unpack, scope.stream());
  return out;
}

std::tuple<Tensor, Tensor> visible_tokens_unpack_backward(const Tensor& grad_any, const Tensor& ids_any, const Tensor& cu_any,
                                                          std::int64_t total, std::int64_t fill_dim, bool need_packed,
                                                          bool need_fill) {
  check_unpack_backward(grad_any, ids_any, cu_any, total, fill_dim);
  const DeviceScope scope(grad_any);
  const Tensor grad = with_contiguous_rows(grad_any), ids_restore = torch::stable::contiguous(ids_any);
  const Tensor cu_seqlens = torch::stable::contiguous(cu_any);
  Tensor grad_packed = need_packed ? pack_rows(grad, ids_restore, cu_seqlens, total, Function::unpack, scope.stream())
                                   : empty_like_device(grad, {0});
  const Slots slots{nullptr, const_data<std::int32_t>(cu_seqlens), total, 0};
  auto [grad_fill, grad_pos] =
      fill_and_pos_gradient({grad, ids_restore, slots, Function::unpack, fill_dim, need_fill, false}, scope.stream());
  return {grad_packed, grad_fill};
}

}  // namespace

MASKOPS_CUDA_LIBRARY(m) {
  m.impl("visible_tokens_pack", TORCH_BOX(&visible_tokens_pack));
  m.impl("visible_tokens_unpack", TORCH_BOX(&visible_tokens_unpack));
  m.impl("_visible_tokens_unpack_backward", TORCH_BOX(&visible_tokens_unpack_backward));
}

}  // namespace maskops
