// nm_matmul_linear on the CPU: checks, buffers and threads around the kernels.
#include "cpu/nm_matmul/linear.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "cpu/nm_matmul/buffer.h"
#include "math/nm_matmul_check.h"

namespace maskops {
namespace {

int64_t element_bytes(int dtype) { return dtype == static_cast<int>(Dtype::kDouble) ? 8 : 4; }

NmMatrix matrix_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.size(0), x.size(1)}; }

NmCompressed compressed_of(const Tensor& values, const Tensor& indices, const NmLayout& layout) {
  return {layout, values.size(0), values.const_data_ptr(), values.stride(0), static_cast<const uint8_t*>(indices.const_data_ptr()), indices.stride(0)};
}

// Rows [begin, end) of a matrix whose values are `bytes` long.
NmMatrix rows_of(const NmMatrix& a, int64_t begin, int64_t end, int64_t bytes) {
  return {static_cast<const char*>(a.data) + begin * a.stride * bytes, a.stride, end - begin, a.columns};
}

// The panels of a block of rows, packed by all threads.
void pack_panels(int dtype, const NmMatrix& a, const NmPanels& panels, void* to) {
  const NmProductKernels& kernels = pick_NmProductKernels();
  const int64_t pieces = parts_of(a.columns, kNmPackColumns);
  parallel_for(panels.count * pieces, kNmPackColumns * panels.row_bytes * 2, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t panel = item / pieces, first = item % pieces * kNmPackColumns;
      kernels.pack(dtype, a, panels, {panel, panel + 1}, {first, std::min(a.columns, first + kNmPackColumns)}, to);
    }
  });
}

// out = a * weight^T + bias, or a * weight, for all rows of a.
void multiply(NmProduct product, int64_t value_bytes) {
  const NmProductKernels& kernels = pick_NmProductKernels();
  const NmMatrix all = product.a;
  const int64_t width = product.transposed ? product.weight.layout.K : product.weight.outputs;
  char* out = static_cast<char*>(product.out);
  const Blocks blocks = Blocks::of(all.rows, kNmMostRows, 64);
  const NmPanels most = kernels.panels(product.dtype, blocks.size);
  const Buffer packed(most.count * most.row_bytes * all.columns);
  for (int64_t block = 0; block < blocks.number(); ++block) {
    const Range rows = blocks.at(block);
    product.a = rows_of(all, rows.begin, rows.end, value_bytes);
    product.out = out + rows.begin * width * value_bytes;
    const NmPanels panels = kernels.panels(product.dtype, product.a.rows);
    pack_panels(product.dtype, product.a, panels, packed.get());
    const NmPlan plan = kernels.plan(product, panels, torch::stable::get_num_threads());
    const int64_t work = product.a.rows * width * product.weight.layout.slots / std::max<int64_t>(1, plan.items);
    parallel_for(plan.items, work, [&](int64_t begin, int64_t end) {
      const Buffer buffer(plan.buffer_bytes);
      kernels.multiply(product, panels, plan, {begin, end}, packed.get(), buffer.get());
    });
  }
}

Tensor nm_matmul_linear(const Tensor& x_any, const Tensor& values_any, const Tensor& indices_any, std::optional<Tensor> bias_any,
                        int64_t n, int64_t m) {
  const NmLayout layout = check_nm_linear(x_any, values_any, indices_any, bias_any, n, m);
  const Tensor x = with_contiguous_rows(x_any), values = with_contiguous_rows(values_any), indices = with_contiguous_rows(indices_any);
  std::optional<Tensor> bias;
  if (bias_any) bias = contiguous_or_copy(*bias_any);
  Tensor y = empty_like_device(x, {x.size(0), values.size(0)});
  if (y.numel() == 0) return y;
  const int dtype = static_cast<int>(dtype_of(x));
  multiply({dtype, false, matrix_of(x), compressed_of(values, indices, layout), bias ? bias->const_data_ptr() : nullptr, y.mutable_data_ptr()},
           static_cast<int64_t>(x.element_size()));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("nm_matmul_linear", TORCH_BOX(&nm_matmul_linear));
}

}  // namespace maskops
#endif
