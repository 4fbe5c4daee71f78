// nm_matmul_bitmask and nm_matmul_pack on the CPU: checks, buffers and threads around the kernels.
#include "cpu/nm_matmul/bitmask.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "common/buffer.h"
#include "math/nm_matmul_check.h"

namespace maskops {
namespace {

// ---- pack

Tensor nm_matmul_pack(const Tensor& mask_any) {
  check_nm_pack(mask_any);
  const Tensor mask = with_contiguous_rows(mask_any);
  const int64_t columns = mask.size(1), row_bytes = (columns + 7) / 8;
  Tensor bits = empty_like_device(mask, {mask.size(0), row_bytes}, ScalarType::Byte);
  uint8_t* to = static_cast<uint8_t*>(bits.mutable_data_ptr());
  const uint8_t* from = static_cast<const uint8_t*>(mask.const_data_ptr());
  const BitmaskKernels& kernels = pick_BitmaskKernels();
  parallel_for(mask.size(0), columns / 8, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      kernels.pack_bits(from + r * mask.stride(0), columns, to + r * row_bytes);
    }
  });
  return bits;
}

// ---- products

// The arguments of the kernels, and the tensors they point into.
struct Call {
  Tensor x, weight, bits;
  const BitmaskKernels& kernels = pick_BitmaskKernels();
  Bitmask args{};

  // one_by_one: the samples are told apart although they share a mask.
  Call(const Tensor& x_any, const Tensor& weight_any, const Tensor& bits_any, bool one_by_one)
      : x(contiguous_or_copy(x_any)), weight(contiguous_or_copy(weight_any)), bits(contiguous_or_copy(bits_any)) {
    args.dtype = static_cast<int>(dtype_of(x));
    args.products = bf16_products();
    args.samples = x.size(0), args.rows = x.size(1);
    args.threads = torch::stable::get_num_threads();
    args.outputs = weight.size(0), args.inputs = weight.size(1);
    args.mask_row = bits.size(2);
    args.mask_sample = bits.size(0) == 1 ? 0 : bits.size(1) * bits.size(2);
    if (args.mask_sample == 0 && !one_by_one) {
      args.rows *= args.samples;
      args.samples = std::min<int64_t>(args.samples, 1);
    }
    args.x = x.const_data_ptr(), args.weight = weight.const_data_ptr();
    args.bits = static_cast<const uint8_t*>(bits.const_data_ptr());
  }

  // Of one work item among `items` of a product with so many flops.
  int64_t item_work(int64_t items) const {
    return 2 * args.samples * args.rows * args.outputs * args.inputs / std::max<int64_t>(1, items);
  }
};

Tensor nm_matmul_bitmask(const Tensor& x, const Tensor& weight, const Tensor& bits, std::optional<Tensor> bias_any,
                         std::optional<Tensor> scores) {
  check_bitmask(x, weight, bits, bias_any, scores);
  Call call(x, weight, bits, false);
  std::optional<Tensor> bias;
  if (bias_any) bias = contiguous_or_copy(*bias_any);
  Bitmask& args = call.args;
  Tensor y = empty_like_device(x, {x.size(0), x.size(1), args.outputs});
  if (y.numel() == 0) return y;
  args.bias = bias ? bias->const_data_ptr() : nullptr;
  args.out = y.mutable_data_ptr();
  const BitmaskPlan plan = call.kernels.plan_forward(args);
  const Buffer packed(plan.packed_bytes);
  parallel_for(plan.panels, weight.numel() * 4 / plan.panels,
               [&](int64_t begin, int64_t end) { call.kernels.pack_weight(args, {begin, end}, packed.get()); });
  parallel_for(plan.items, call.item_work(plan.items), [&](int64_t begin, int64_t end) {
    const Buffer own(plan.thread_bytes);
    call.kernels.forward(args, {begin, end}, packed.get(), own.get());
  });
  return y;
}

void run_grad_x(Call& call, const Tensor& grad_x) {
  if (grad_x.numel() == 0) return;
  call.args.out = grad_x.mutable_data_ptr();
  const BitmaskPlan plan = call.kernels.plan_grad_x(call.args);
  parallel_for(plan.items, call.item_work(plan.items), [&](int64_t begin, int64_t end) {
    const Buffer own(plan.thread_bytes);
    call.kernels.grad_x(call.args, {begin, end}, own.get());
  });
}

std::tuple<Tensor, Tensor, Tensor> bitmask_backward(const Tensor& grad_any, const Tensor& x, const Tensor& weight, const Tensor& bits,
                                                    bool need_x, bool need_weight, bool need_scores, bool scores_per_sample) {
  check_bitmask_backward(grad_any, x, weight, bits);
  Call call(x, weight, bits, need_scores && scores_per_sample);
  Bitmask& args = call.args;
  const Tensor grad = contiguous_or_copy(grad_any);
  args.grad = grad.const_data_ptr();
  const int64_t samples = x.size(0), outputs = args.outputs, inputs = args.inputs;
  auto empty = [&](bool needed, std::initializer_list<int64_t> sizes) {
    return needed ? empty_like_device(x, sizes) : empty_like_device(x, {0});
  };
  Tensor grad_x = empty(need_x, {samples, x.size(1), inputs}), grad_weight = empty(need_weight, {outputs, inputs});
  Tensor grad_scores = scores_per_sample ? empty(need_scores, {samples, outputs, inputs}) : empty(need_scores, {outputs, inputs});
  if (need_x) run_grad_x(call, grad_x);
  if (grad_weight.numel() + grad_scores.numel() > 0) {
    args.grad_weight = need_weight ? grad_weight.mutable_data_ptr() : nullptr;
    args.grad_scores = need_scores ? grad_scores.mutable_data_ptr() : nullptr;
    args.scores_per_sample = scores_per_sample;
    const BitmaskPlan plan = call.kernels.plan_grad_weight(args);
    // Without samples there are still zeros to write.
    parallel_for(plan.items, call.item_work(plan.items) + 1, [&](int64_t begin, int64_t end) {
      const Buffer own(plan.thread_bytes);
      call.kernels.grad_weight(args, {begin, end}, own.get());
    });
  }
  return {grad_x, grad_weight, grad_scores};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("nm_matmul_pack", TORCH_BOX(&nm_matmul_pack));
  m.impl("nm_matmul_bitmask", TORCH_BOX(&nm_matmul_bitmask));
  m.impl("_nm_matmul_bitmask_backward", TORCH_BOX(&bitmask_backward));
}

}  // namespace maskops
#endif
