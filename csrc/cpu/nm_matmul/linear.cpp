// nm_matmul_linear on the CPU: checks, buffers and threads around the kernels.
#include "cpu/nm_matmul/linear.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <tuple>

#include "common/parallel.h"
#include "common/buffer.h"
#include "math/nm_matmul_check.h"

namespace maskops {
namespace {

int64_t threads() { return torch::stable::get_num_threads(); }

NmMatrix matrix_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.size(0), x.size(1)}; }

NmCompressed compressed_of(const Tensor& values, const Tensor& indices, const NmLayout& layout) {
  return {layout, values.size(0), values.const_data_ptr(), values.stride(0), static_cast<const uint8_t*>(indices.const_data_ptr()),
          indices.stride(0)};
}

// Rows of a matrix whose values have `bytes` bytes.
NmMatrix rows_of(const NmMatrix& a, Range rows, int64_t bytes) {
  return {static_cast<const char*>(a.data) + rows.begin * a.stride * bytes, a.stride, rows.end - rows.begin, a.columns};
}

// Rows packed at a time.
Blocks packed_blocks(int64_t rows) { return Blocks::of(rows, kNmMostRows, 64); }

int64_t packed_bytes(int dtype, const Blocks& blocks, int64_t columns) {
  const NmPanels most = pick_NmProductKernels().panels(dtype, std::min(blocks.size, blocks.count));
  return most.count * most.row_bytes * columns;
}

// A block of rows in panels, packed by all threads.
NmPanels pack(int dtype, const NmMatrix& a, void* to) {
  const NmProductKernels& kernels = pick_NmProductKernels();
  const NmPanels panels = kernels.panels(dtype, a.rows);
  const int64_t pieces = parts_of(a.columns, kNmPackColumns);
  parallel_for(panels.count * pieces, kNmPackColumns * panels.row_bytes * 2, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t panel = item / pieces, first = item % pieces * kNmPackColumns;
      kernels.pack(dtype, a, panels, {panel, panel + 1}, {first, std::min(a.columns, first + kNmPackColumns)}, to);
    }
  });
  return panels;
}

// The rows of product.a, packed before.
void multiply_block(const NmProduct& product, const NmPanels& panels, const void* packed) {
  const NmProductKernels& kernels = pick_NmProductKernels();
  const NmPlan plan = kernels.plan(product, panels, threads());
  const int64_t flops = product.a.rows * product.weight.outputs * product.weight.layout.slots;
  parallel_for(plan.items, flops / std::max<int64_t>(1, plan.items), [&](int64_t begin, int64_t end) {
    const Buffer buffer(plan.buffer_bytes);
    kernels.multiply(product, panels, plan, {begin, end}, packed, buffer.get());
  });
}

// ---- forward

void multiply_few(const NmProduct& product) {
  const NmFewKernels& kernels = pick_NmFewKernels();
  const Buffer x(kernels.x_bytes(product));
  kernels.prepare(product, x.get());
  parallel_for(parts_of(product.weight.outputs, kNmFewOutputs), kNmFewOutputs * product.a.rows * product.weight.layout.slots,
               [&](int64_t begin, int64_t end) {
                 const Buffer buffer(kernels.buffer_bytes(product));
                 kernels.multiply(product, {begin, end}, x.get(), buffer.get());
               });
}

// Whether AMX may multiply the rows: a zero of the weight would carry what is not finite to other results.
bool fits_amx(const NmProduct& product) {
  if (product.dtype != static_cast<int>(Dtype::kBFloat16) || !use_amx()) return false;
  std::atomic<bool> finite{true};
  parallel_for(product.a.rows, product.a.columns * 2, [&](int64_t begin, int64_t end) {
    if (!pick_NmAmxKernels().all_finite(product.a, {begin, end})) finite = false;
  });
  return finite;
}

void multiply_amx_rows(const NmProduct& product) {
  const NmAmxKernels& kernels = pick_NmAmxKernels();
  const Buffer words(kernels.words_bytes(product));
  const int64_t word_items = kernels.word_items(product), items = kernels.row_items(product);
  parallel_for(word_items, product.a.rows * product.a.columns * 4 / std::max<int64_t>(1, word_items),
               [&](int64_t begin, int64_t end) { kernels.make_words(product, {begin, end}, words.get()); });
  const int64_t flops = product.a.rows * product.weight.outputs * product.a.columns / 8;
  parallel_for(items, flops / items + product.a.columns * 16, [&](int64_t begin, int64_t end) {
    const Buffer buffer(kernels.row_bytes(product));
    kernels.multiply_rows(product, {begin, end}, words.get(), buffer.get());
  });
}

void multiply_amx(const NmProduct& product) {
  const NmAmxKernels& kernels = pick_NmAmxKernels();
  if (kernels.by_rows(product)) return multiply_amx_rows(product);
  const Buffer packed(kernels.packed_bytes(product));
  const int64_t strips = kernels.strips(product), columns = product.weight.layout.K;
  parallel_for(strips, columns * 64, [&](int64_t begin, int64_t end) {
    const Buffer buffer(kernels.pack_bytes(product));
    kernels.pack(product, {begin, end}, packed.get(), buffer.get());
  });
  const int64_t items = kernels.items(product), flops = product.a.rows * product.weight.outputs * columns / 8;
  parallel_for(items, flops / std::max<int64_t>(1, items), [&](int64_t begin, int64_t end) {
    const Buffer buffer(kernels.bytes(product));
    kernels.multiply(product, {begin, end}, packed.get(), buffer.get());
  });
}

void multiply_many(NmProduct product, int64_t bytes) {
  const NmMatrix all = product.a;
  char* out = static_cast<char*>(product.out);
  const Blocks blocks = packed_blocks(all.rows);
  const Buffer packed(packed_bytes(product.dtype, blocks, all.columns));
  for (int64_t block = 0; block < blocks.number(); ++block) {
    const Range rows = blocks.at(block);
    product.a = rows_of(all, rows, bytes);
    product.out = out + rows.begin * product.weight.outputs * bytes;
    multiply_block(product, pack(product.dtype, product.a, packed.get()), packed.get());
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
  const NmProduct product{static_cast<int>(dtype_of(x)), false, matrix_of(x), compressed_of(values, indices, layout),
                          bias ? bias->const_data_ptr() : nullptr, y.mutable_data_ptr()};
  const bool few = product.a.rows <= pick_NmFewKernels().most_rows(product);
  const bool amx = product.a.rows >= kNmAmxLeastRows && fits_amx(product);
  if (amx && (!few || pick_NmAmxKernels().by_rows(product))) multiply_amx(product);
  else if (few) multiply_few(product);
  else multiply_many(product, static_cast<int64_t>(x.element_size()));
  return y;
}

// ---- backward

// Both gradients of a block of rows read the packed gradient.
struct Backward {
  NmProduct product;  // grad_x = grad * weight, where wanted
  NmMatrix x;
  NmGradValues values;
  bool need_x, need_values;

  void run(int64_t bytes) {
    const NmMatrix all = product.a, all_x = x;
    const int64_t inputs = product.weight.layout.K;
    char* out = static_cast<char*>(product.out);
    const Blocks blocks = packed_blocks(all.rows);
    const Buffer packed(packed_bytes(product.dtype, blocks, all.columns));
    const Buffer packed_x(need_values ? packed_bytes(product.dtype, blocks, inputs) : 0);
    const bool amx = need_x && fits_amx(product);
    if (amx) multiply_amx(product);
    for (int64_t block = 0; block < blocks.number() && (need_values || !amx); ++block) {
      const Range rows = blocks.at(block);
      product.a = rows_of(all, rows, bytes);
      const NmPanels panels = pack(product.dtype, product.a, packed.get());
      if (need_x && !amx) {
        product.out = out + rows.begin * inputs * bytes;
        multiply_block(product, panels, packed.get());
      }
      if (!need_values) continue;
      pack(product.dtype, rows_of(all_x, rows, bytes), packed_x.get());
      values.panels = panels, values.grad = packed.get(), values.x = packed_x.get(), values.add = block > 0;
      run_values();
    }
  }

  void run_values() const {
    const NmValuesKernels& kernels = pick_NmValuesKernels();
    const int64_t sharing = threads();
    const NmPlan plan = kernels.plan(values, sharing);
    const int64_t flops = product.a.rows * product.weight.outputs * product.weight.layout.slots;
    parallel_for(plan.items, flops / std::max<int64_t>(1, plan.items), [&](int64_t begin, int64_t end) {
      const Buffer buffer(plan.buffer_bytes);
      kernels.grad_values(values, plan, sharing, {begin, end}, buffer.get());
    });
  }
};

// The sums of grad_values, rounded to the dtype of the result.
void narrow(int dtype, const Tensor& sums, Tensor& out) {
  constexpr int64_t kPiece = 4096;
  parallel_for(parts_of(out.numel(), kPiece), kPiece * 6, [&](int64_t begin, int64_t end) {
    pick_NmValuesKernels().narrow(dtype, sums.const_data_ptr(), {begin * kPiece, std::min(end * kPiece, out.numel())},
                                  out.mutable_data_ptr());
  });
}

std::tuple<Tensor, Tensor> linear_backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& values_any,
                                           const Tensor& indices_any, int64_t n, int64_t m, bool need_x, bool need_values) {
  const NmLayout layout = check_nm_linear_backward(grad_any, x_any, values_any, indices_any, n, m);
  const Tensor grad = with_contiguous_rows(grad_any), x = with_contiguous_rows(x_any);
  const Tensor values = with_contiguous_rows(values_any), indices = with_contiguous_rows(indices_any);
  const int64_t rows = x.size(0);
  Tensor grad_x = need_x ? empty_like_device(x, {rows, layout.K}) : empty_like_device(x, {0});
  Tensor grad_values = need_values ? empty_like_device(x, {values.size(0), layout.slots}) : empty_like_device(x, {0});
  if (rows == 0 && grad_values.numel() > 0) {
    std::memset(grad_values.mutable_data_ptr(), 0, static_cast<size_t>(grad_values.numel()) * grad_values.element_size());
  }
  need_x = need_x && grad_x.numel() > 0;
  need_values = need_values && grad_values.numel() > 0;
  if (rows == 0 || !(need_x || need_values)) return {grad_x, grad_values};
  const int dtype = static_cast<int>(dtype_of(x));
  const NmCompressed weight = compressed_of(values, indices, layout);
  const bool wide = accumulation_type(x.scalar_type()) == x.scalar_type();
  const Tensor sums = wide || !need_values
                          ? grad_values
                          : empty_like_device(x, {grad_values.numel()}, accumulation_type(x.scalar_type()));
  void* sums_data = need_values ? sums.mutable_data_ptr() : nullptr;
  Backward backward{{dtype, true, matrix_of(grad), weight, nullptr, grad_x.mutable_data_ptr()}, matrix_of(x),
                    {dtype, weight, {}, nullptr, nullptr, false, sums_data}, need_x, need_values};
  backward.run(static_cast<int64_t>(x.element_size()));
  if (need_values && !wide) narrow(dtype, sums, grad_values);
  return {grad_x, grad_values};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("nm_matmul_linear", TORCH_BOX(&nm_matmul_linear));
  m.impl("_nm_matmul_linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace maskops
#endif
