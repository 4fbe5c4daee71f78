// nm_matmul_soft on the CPU: checks, tables of the patterns, buffers and threads around the kernels.
#include "cpu/nm_matmul/soft.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "common/buffer.h"
#include "math/nm_matmul_check.h"

namespace maskops {
namespace {

// The arguments of the kernels, and what they point into.
struct Call {
  Tensor x, weight, logits;
  std::vector<int32_t> places, members;
  const SoftKernels& kernels = pick_SoftKernels();
  Soft args{};

  Call(const Tensor& x_any, const Tensor& weight_any, const Tensor& logits_any, const Tensor& seed, int64_t n, int64_t m, double tau,
       double scale, bool hard)
      : x(contiguous_or_copy(x_any)), weight(contiguous_or_copy(weight_any)), logits(contiguous_or_copy(logits_any)) {
    args.dtype = static_cast<int>(dtype_of(x));
    args.products = bf16_products();
    args.rows = x.size(0), args.outputs = weight.size(0), args.inputs = weight.size(1);
    args.groups = args.inputs / m;
    args.threads = torch::stable::get_num_threads();
    args.n = static_cast<int>(n), args.m = static_cast<int>(m);
    if (logits.dim() == 3) list_patterns();
    args.x = x.const_data_ptr(), args.weight = weight.const_data_ptr(), args.logits = logits.const_data_ptr();
    const Tensor words = contiguous_or_copy(seed);
    const int64_t* numbers = static_cast<const int64_t*>(words.const_data_ptr());
    args.key = PhiloxKey::of(numbers[0], numbers[1]);
    args.inverse_tau = 1 / tau, args.scale = scale, args.hard = hard;
  }

  void list_patterns() {
    args.patterns = static_cast<int>(pattern_count(args.n, args.m));
    std::vector<std::vector<int32_t>> keeping(args.m);
    int32_t index = 0;
    for (uint32_t pattern = first_pattern(args.n); pattern != 0; pattern = next_pattern(pattern, args.m), ++index) {
      for (int32_t place = 0; place < args.m; ++place) {
        if (((pattern >> place) & 1u) == 0) continue;
        places.push_back(place);
        keeping[place].push_back(index);
      }
    }
    for (const auto& list : keeping) members.insert(members.end(), list.begin(), list.end());
    args.places = places.data(), args.members = members.data();
  }

  // The masked weight, packed for the product with x or with the gradient.
  void pack_weight(bool by_outputs, const Buffer& packed) const {
    const SoftPlan plan = kernels.plan_weight(args, by_outputs);
    const int64_t work = logits.numel() * 64 / std::max<int64_t>(1, plan.units);
    parallel_for(plan.units, work, [&](int64_t begin, int64_t end) {
      const Buffer own(plan.thread_bytes);
      kernels.pack_weight(args, by_outputs, {begin, end}, packed.get(), own.get());
    });
  }

  // args.out = x or grad times the packed weight.
  void multiply(bool by_outputs, const Buffer& packed) const {
    const SoftPlan plan = kernels.plan_product(args, by_outputs);
    const int64_t work = 2 * args.rows * args.outputs * args.inputs / std::max<int64_t>(1, plan.units);
    parallel_for(plan.units, work, [&](int64_t begin, int64_t end) {
      const Buffer own(plan.thread_bytes);
      kernels.product(args, by_outputs, {begin, end}, packed.get(), own.get());
    });
  }
};

template <class S>
void sum_kept(const void* rows, int64_t count, void* to) {
  double sum = 0;
  for (int64_t n = 0; n < count; ++n) sum += static_cast<const S*>(rows)[n];
  *static_cast<S*>(to) = static_cast<S>(sum);
}

std::tuple<Tensor, Tensor> nm_matmul_soft(const Tensor& x, const Tensor& weight, const Tensor& logits, const Tensor& seed, int64_t n,
                                          int64_t m, double tau, double scale, bool hard) {
  check_soft(x, weight, logits, seed, n, m, tau);
  Call call(x, weight, logits, seed, n, m, tau, scale, hard);
  Soft& args = call.args;
  Tensor y = empty_like_device(x, {args.rows, args.outputs}), kept = empty_like_device(logits, {});
  const Buffer kept_rows(args.outputs * static_cast<int64_t>(sizeof(double)));
  args.kept = kept_rows.get();
  args.out = y.mutable_data_ptr();
  const Buffer packed(call.kernels.plan_weight(args, true).packed_bytes);
  call.pack_weight(true, packed);
  call.multiply(true, packed);
  const auto sum = dtype_of(logits) == Dtype::kDouble ? &sum_kept<double> : &sum_kept<float>;
  sum(args.kept, args.outputs, kept.mutable_data_ptr());
  return {y, kept};
}

double number_of(const Tensor& x) {
  return dtype_of(x) == Dtype::kDouble ? *static_cast<const double*>(x.const_data_ptr()) : *static_cast<const float*>(x.const_data_ptr());
}

std::tuple<Tensor, Tensor> soft_backward(const Tensor& grad_any, const Tensor& grad_kept, const Tensor& x, const Tensor& weight,
                                         const Tensor& logits, const Tensor& seed, int64_t n, int64_t m, double tau, double scale,
                                         bool hard, bool need_x, bool need_logits) {
  check_soft_backward(grad_any, grad_kept, x, weight, logits, seed, n, m, tau);
  Call call(x, weight, logits, seed, n, m, tau, scale, hard);
  Soft& args = call.args;
  const Tensor grad = contiguous_or_copy(grad_any);
  args.grad = grad.const_data_ptr();
  args.grad_kept = number_of(grad_kept);
  Tensor grad_x = empty_like_device(x, {0}), grad_logits = empty_like_device(logits, {0});
  // The masks are made once: the gradient of the logits leaves the masked weight behind for the gradient of x.
  const SoftPlan weight_plan = call.kernels.plan_weight(args, false);
  Buffer packed(need_x ? weight_plan.packed_bytes : 0);
  if (need_logits) {
    grad_logits = logits.dim() == 3 ? empty_like_device(logits, {args.outputs, args.groups, args.patterns})
                                    : empty_like_device(logits, {args.outputs, args.inputs});
    args.grad_logits = grad_logits.mutable_data_ptr();
    const SoftPlan plan = call.kernels.plan_grad_logits(args);
    const int64_t work = (args.rows + 64) * logits.numel() / std::max<int64_t>(1, plan.units);
    parallel_for(plan.units, work, [&](int64_t begin, int64_t end) {
      const Buffer own(plan.thread_bytes);
      call.kernels.grad_logits(args, {begin, end}, need_x ? packed.get() : nullptr, own.get());
    });
  } else if (need_x) {
    call.pack_weight(false, packed);
  }
  if (need_x) {
    grad_x = empty_like_device(x, {args.rows, args.inputs});
    args.out = grad_x.mutable_data_ptr();
    call.multiply(false, packed);
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
