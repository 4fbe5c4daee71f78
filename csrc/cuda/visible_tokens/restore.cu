// visible_tokens_restore on CUDA: kept rows back to their places, the rest filled, position added; and its gradient.
#include "cuda/visible_tokens/restore.cuh"

namespace maskops {
namespace {

// grad_x [B, P + K, D] of grad [B, P + N, D]. The list of rows of one sample: P prefix rows (copied), N tokens (a kept one is copied
// to its slot, which no other token has), K slots (the empty ones become zero).
template <typename T>
struct GradKeptPlan {
  const T* grad;
  RowStrides strides;
  Slots slots;
  const std::int64_t* ids_restore;  // [B, N]
  T* grad_x;
  std::int64_t rows, tokens, channels;

  __device__ void check(const IdsCheck& ids_check) const { check_restore_rows(ids_check, slots, Function::restore); }
  __device__ void find(std::int64_t row, const T*& from, T*& to) const {
    const std::int64_t prefix = slots.prefix, tokens_end = prefix + tokens, in_sample = tokens_end + slots.capacity;
    const std::int64_t b = row / in_sample, p = row % in_sample;
    T* sample = grad_x + b * (prefix + slots.capacity) * channels;
    if (p < prefix) {
      from = grad + strides.at(b, p);
      to = sample + p * channels;
      return;
    }
    const std::int64_t count = slots.of(b).count;
    if (p >= tokens_end) {
      const std::int64_t slot = p - tokens_end;
      if (slot >= count) to = sample + (prefix + slot) * channels;
      return;
    }
    const std::int64_t slot = load(ids_restore + b * tokens + p - prefix);
    if (slot < 0 || slot >= count) return;
    from = grad + strides.at(b, p);
    to = sample + (prefix + slot) * channels;
  }
};

Tensor visible_tokens_restore(const Tensor& x_keep, const Tensor& ids_any, const Tensor& num_keep_any, const Tensor& fill_any,
                              std::optional<Tensor> pos_any, std::int64_t prefix) {
  check_restore(x_keep, ids_any, num_keep_any, fill_any, pos_any, prefix);
  const DeviceScope scope(x_keep);
  const Tensor x = with_contiguous_rows(x_keep), ids_restore = torch::stable::contiguous(ids_any);
  const Tensor num_keep = torch::stable::contiguous(num_keep_any), fill = torch::stable::contiguous(fill_any);
  Tensor out = empty_like_device(x, {x.size(0), prefix + ids_restore.size(1), x.size(2)});
  const Slots slots{const_data<std::int64_t>(num_keep), nullptr, x.size(1) - prefix, prefix};
  restore_rows(x, ids_restore, slots, fill, contiguous(pos_any), out, Function::restore, scope.stream());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> visible_tokens_restore_backward(const Tensor& grad_any, const Tensor& ids_any,
                                                                   const Tensor& num_keep_any, std::int64_t num_slots,
                                                                   std::int64_t prefix, std::int64_t fill_dim, bool need_x,
                                                                   bool need_fill, bool need_pos) {
  check_restore_backward(grad_any, ids_any, num_keep_any, prefix, fill_dim, num_slots);
  const DeviceScope scope(grad_any);
  const Tensor grad = with_contiguous_rows(grad_any), ids_restore = torch::stable::contiguous(ids_any);
  const Tensor num_keep = torch::stable::contiguous(num_keep_any);
  const std::int64_t batch = grad.size(0), tokens = ids_restore.size(1), channels = grad.size(2);
  const Slots slots{const_data<std::int64_t>(num_keep), nullptr, num_slots, prefix};
  Tensor grad_x = need_x ? empty_like_device(grad, {batch, prefix + num_slots, channels}) : empty_like_device(grad, {0});
  if (need_x) {
    const IdsCheck check(const_data<std::int64_t>(ids_restore), batch, tokens, tokens, 0);
    dispatch_floats(grad.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      const RowStrides strides = row_strides(grad);
      const GradKeptPlan<T> plan{const_data<T>(grad), strides, slots, check.ids, data<T>(grad_x),
                                 batch * (prefix + tokens + num_slots), tokens, channels};
      const int width = vector_width<T>({channels, strides.batch, strides.row}, {plan.grad, plan.grad_x});
      dispatch_width<T>(width, [&](auto w) { move_rows<T, w()>(plan, check, scope.stream()); });
    });
  }
  auto [grad_fill, grad_pos] =
      fill_and_pos_gradient({grad, ids_restore, slots, Function::restore, fill_dim, need_fill, need_pos}, scope.stream());
  return {grad_x, grad_fill, grad_pos};
}

}  // namespace

MASKOPS_CUDA_LIBRARY(m) {
  m.impl("visible_tokens_restore", TORCH_BOX(&visible_tokens_restore));
  m.impl("_visible_tokens_restore_backward", TORCH_BOX(&visible_tokens_restore_backward));
}

}  // namespace maskops
