// nm_matmul_soft and its gradients on the CPU: checks, buffers and threads around the kernels.
#include "cpu/nm_matmul/soft.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "common/parallel.h"
#include "cpu/nm_matmul/buffer.h"
#include "math/nm_matmul_check.h"

namespace maskops {
namespace {

struct Call {
  Tensor x, weight, logits;
  const SoftKernels& kernels = pick_SoftKernels();
  Soft args{};

  Call(const Tensor& x_any, const Tensor& weight_any, const Tensor& logits_any, const Tensor& seed_any, int64_t n, int64_t m, double tau,
       double scale, bool hard)
      : x(contiguous_or_copy(x_any)), weight(contiguous_or_copy(weight_any)), logits(contiguous_or_copy(logits_any)) {
    const Tensor seed = contiguous_or_copy(seed_any);
    const int64_t* words = static_cast<const int64_t*>(seed.const_data_ptr());
    args.dtype = static_cast<int>(dtype_of(x));
    args.n = static_cast<int>(n), args.m = static_cast<int>(m);
    args.exact = logits.dim() == 3, args.hard = hard;
    args.patterns = args.exact ? logits.size(2) : m;
    args.rows = x.size(0), args.outputs = weight.size(0), args.inputs = x.size(1);
    args.tau = tau, args.scale = scale;
    args.key = PhiloxKey::of(words[0], words[1]);
    args.x = x.const_data_ptr(), args.weight = weight.const_data_ptr(), args.logits = logits.const_data_ptr();
  }

};

double sum_of(const Tensor& rows) {
  double total = 0;
  for (int64_t i = 0; i < rows.numel(); ++i) {
    total += rows.scalar_type() == ScalarType::Double ? static_cast<const double*>(rows.const_data_ptr())[i]
                                                      : static_cast<const float*>(rows.const_data_ptr())[i];
  }
  return total;
}

void write_scalar(const Tensor& to, double value) {
  if (to.scalar_type() == ScalarType::Double) *static_cast<double*>(to.mutable_data_ptr()) = value;
  else *static_cast<float*>(to.mutable_data_ptr()) = static_cast<float>(value);
}

double read_scalar(const Tensor& from) {
  if (from.scalar_type() == ScalarType::Double) return *static_cast<const double*>(from.const_data_ptr());
  return *static_cast<const float*>(from.const_data_ptr());
}

// kernel over blocks of rows of x or grad, each with a buffer of its own.
template <class Kernel>
void run_blocks(const Call& call, const SoftPlan& plan, Kernel kernel, const Buffer& packed) {
  const int64_t work = 2 * call.args.rows * call.args.outputs * call.args.inputs / std::max<int64_t>(1, plan.row_blocks);
  parallel_for(plan.row_blocks, work, [&](int64_t begin, int64_t end) {
    const Buffer own(plan.block_bytes);
    kernel(call.args, {begin, end}, packed.get(), own.get());
  });
}

constexpr int64_t kMaskCost = 64;  // flops of a mask per weight, about

std::tuple<Tensor, Tensor> nm_matmul_soft(const Tensor& x, const Tensor& weight, const Tensor& logits, const Tensor& seed, int64_t n,
                                          int64_t m, double tau, double scale, bool hard) {
  check_soft(x, weight, logits, seed, n, m, tau);
  Call call(x, weight, logits, seed, n, m, tau, scale, hard);
  Soft& args = call.args;
  const ScalarType type = accumulation_type(x.scalar_type());
  Tensor y = empty_like_device(x, {args.rows, args.outputs}), kept = empty_like_device(x, {}, type);
  const Tensor kept_rows = empty_like_device(x, {args.outputs}, type);
  if (args.outputs == 0 || args.inputs == 0) {
    if (y.numel() > 0) std::memset(y.mutable_data_ptr(), 0, static_cast<size_t>(y.numel() * static_cast<int64_t>(y.element_size())));
    write_scalar(kept, 0);
    return {y, kept};
  }
  args.out = y.mutable_data_ptr(), args.kept = kept_rows.mutable_data_ptr();
  const SoftPlan plan = call.kernels.plan(args, false);
  const Buffer packed(plan.packed_bytes);
  parallel_for(plan.panels, weight.numel() / plan.panels * kMaskCost, [&](int64_t begin, int64_t end) {
    const Buffer own(plan.pack_bytes);
    call.kernels.pack(args, {begin, end}, packed.get(), own.get());
  });
  write_scalar(kept, sum_of(kept_rows));
  run_blocks(call, plan, call.kernels.forward, packed);
  return {y, kept};
}

std::tuple<Tensor, Tensor> soft_backward(const Tensor& grad_any, const Tensor& grad_kept, const Tensor& x, const Tensor& weight,
                                         const Tensor& logits, const Tensor& seed, int64_t n, int64_t m, double tau, double scale,
                                         bool hard, bool need_x, bool need_logits) {
  check_soft_backward(grad_any, grad_kept, x, weight, logits, seed, n, m, tau);
  Call call(x, weight, logits, seed, n, m, tau, scale, hard);
  Soft& args = call.args;
  const Tensor grad = contiguous_or_copy(grad_any);
  args.grad = grad.const_data_ptr(), args.grad_kept = read_scalar(grad_kept);
  Tensor grad_x = need_x ? empty_like_device(x, {args.rows, args.inputs}) : empty_like_device(x, {0});
  Tensor grad_logits = !need_logits  ? empty_like_device(logits, {0})
                       : args.exact ? empty_like_device(logits, {logits.size(0), logits.size(1), logits.size(2)})
                                    : empty_like_device(logits, {logits.size(0), logits.size(1)});
  const SoftPlan plan = call.kernels.plan(args, true);
  if (grad_x.numel() > 0 && args.outputs == 0) {
    std::memset(grad_x.mutable_data_ptr(), 0, static_cast<size_t>(grad_x.numel() * static_cast<int64_t>(grad_x.element_size())));
  } else if (grad_x.numel() > 0) {
    args.out = grad_x.mutable_data_ptr();
    const Buffer packed(plan.packed_bytes);
    parallel_for(plan.panels, args.inputs * kMaskCost, [&](int64_t begin, int64_t end) {
      const Buffer own(plan.pack_bytes);
      call.kernels.pack_rows(args, {begin, end}, packed.get(), own.get());
    });
    run_blocks(call, plan, call.kernels.grad_x, packed);
  }
  if (grad_logits.numel() > 0) {
    args.grad_logits = grad_logits.mutable_data_ptr();
    parallel_for(plan.chunks, 2 * args.rows * args.inputs * 96 + 1, [&](int64_t begin, int64_t end) {
      const Buffer own(plan.chunk_bytes);
      call.kernels.grad_logits(args, {begin, end}, own.get());
    });
  }
  return {grad_x, grad_logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("nm_matmul_soft", TORCH_BOX(&nm_matmul_soft));
  m.impl("_nm_matmul_soft_backward", TORCH_BOX(&soft_backward));
}

}  // namespace maskops
#endif
