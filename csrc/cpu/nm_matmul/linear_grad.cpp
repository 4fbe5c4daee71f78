// The gradients of nm_linear on the CPU: checks, buffers, and how the work is cut for the threads.
#include "cpu/nm_matmul/linear_grad.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "cpu/nm_matmul/buffer.h"
#include "math/nm_matmul_check.h"

namespace maskops {
namespace {

// One call: its tensors with contiguous rows, which must outlive the arguments made from them.
struct Call {
  Tensor x, values, indices;
  const NmLinearGradKernels& kernels = pick_NmLinearGradKernels();
  NmLinearGrad args{};

  Call(const NmLayout& layout, const Tensor& x_any, const Tensor& values_any, const Tensor& indices_any)
      : x(with_contiguous_rows(x_any)), values(with_contiguous_rows(values_any)), indices(with_contiguous_rows(indices_any)) {
    args.dtype = static_cast<int>(dtype_of(x));
    args.layout = layout;
    args.rows = x.size(0), args.outputs = values.size(0);
    args.x = x.const_data_ptr(), args.x_stride = x.stride(0);
    args.values = values.const_data_ptr(), args.values_stride = values.stride(0);
    args.indices = static_cast<const uint8_t*>(indices.const_data_ptr()), args.indices_stride = indices.stride(0);
  }

  using Pack = void (*)(const NmLinearGrad&, Range);
  void pack(Pack kernel, int64_t columns) const {
    const int64_t panels = kernels.panels(args.dtype, args.rows);
    parallel_for(panels, args.rows / std::max<int64_t>(1, panels) * columns * 8,
                 [&](int64_t begin, int64_t end) { kernel(args, {begin, end}); });
  }

  // kernel over chunks of `count` outputs or columns; a chunk starts at a multiple of `unit`.
  using Kernel = void (*)(const NmLinearGrad&, Range, void*);
  void run(Kernel kernel, int64_t count, int64_t unit) const {
    constexpr int64_t kTasks = 8, kMost = 256, kLeast = 16;  // chunks do not depend on the number of threads
    const int64_t fair = std::clamp((count + kTasks - 1) / kTasks, kLeast, kMost);
    const int64_t chunk = (fair + unit - 1) / unit * unit, chunks = (count + chunk - 1) / chunk;
    const int64_t bytes = kernels.scratch(args, chunk);
    parallel_for(chunks, chunk * (args.rows * args.layout.slots / 8 + args.layout.slots), [&](int64_t begin, int64_t end) {
      const Buffer scratch(bytes);
      for (int64_t i = begin; i < end; ++i) kernel(args, {i * chunk, std::min(count, (i + 1) * chunk)}, scratch.get());
    });
  }
};

void zero(const Tensor& x) {
  if (x.numel() > 0) std::memset(x.mutable_data_ptr(), 0, static_cast<size_t>(x.numel()) * static_cast<size_t>(x.element_size()));
}

std::tuple<Tensor, Tensor> linear_backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& values, const Tensor& indices,
                                           int64_t n, int64_t m, bool need_x, bool need_values) {
  const NmLayout layout = check_nm_linear_backward(grad_any, x_any, values, indices, n, m);
  Call call(layout, x_any, values, indices);
  NmLinearGrad& args = call.args;
  const Tensor grad = with_contiguous_rows(grad_any);
  args.grad = grad.const_data_ptr(), args.grad_stride = grad.stride(0);
  Tensor grad_x = need_x ? empty_like_device(call.x, {args.rows, layout.K}) : empty_like_device(call.x, {0});
  Tensor grad_values = need_values ? empty_like_device(call.x, {args.outputs, layout.slots}) : empty_like_device(call.x, {0});
  if (args.rows == 0 || args.outputs == 0 || layout.K == 0) {
    zero(grad_x), zero(grad_values);
    return {grad_x, grad_values};
  }
  const Buffer grad_panels(call.kernels.panels_bytes(args.dtype, args.rows, args.outputs));
  args.grad_panels = grad_panels.get();
  call.pack(call.kernels.pack_grad, args.outputs);
  if (need_x) {
    args.out = grad_x.mutable_data_ptr();
    call.run(call.kernels.grad_x, layout.K, layout.m);
  }
  if (need_values) {
    const Buffer x_panels(call.kernels.panels_bytes(args.dtype, args.rows, layout.K));
    args.x_panels = x_panels.get(), args.out = grad_values.mutable_data_ptr();
    call.pack(call.kernels.pack_x, layout.K);
    call.run(call.kernels.grad_values, args.outputs, 1);
  }
  return {grad_x, grad_values};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("_nm_matmul_linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace maskops
#endif
