// Normalisation and max pooling over the active positions of dense images, on the CPU.
#include "cpu/sparse_conv/block_norm.h"

#include "cpu/sparse_conv/block_host.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/buffer.h"
#include "common/dispatch.h"
#include "math/sparse_conv_block_check.h"

namespace maskops {
namespace {

using MaybeTensor = std::optional<Tensor>;

MaybeTensor contiguous_or_none(const MaybeTensor& x) { return x ? MaybeTensor(contiguous_or_copy(*x)) : std::nullopt; }
const void* data_or_null(const MaybeTensor& x) { return x ? x->const_data_ptr() : nullptr; }

BlockNormArgs args_of(const Tensor& x, const Cells& cells) {
  BlockNormArgs args{};
  args.x = x.const_data_ptr();
  args.cells = cells.data;
  args.B = cells.B, args.h = cells.h, args.w = cells.w, args.H = x.size(1), args.W = x.size(2), args.C = x.size(3);
  args.dtype = static_cast<int>(dtype_of(x));
  return args;
}

Tensor stats_like(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return empty_like_device(x, sizes, accumulation_type(x.scalar_type()));
}

// Partial sums of chunks: what each of them needs.
struct Partial {
  Buffer sums;
  std::vector<int64_t> seen;

  explicit Partial(BlockNormArgs& args) : sums(args.B * args.chunks() * 2 * args.C * 8), seen(args.B * args.chunks()) {
    args.partial = sums.get(), args.seen = seen.data();
  }
};

template <class Kernel>
void over_lines(const BlockNormArgs& args, const Kernel& kernel) {
  parallel_for(args.B * args.H, args.W * args.C * 4, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}
template <class Kernel>
void over_chunks(const BlockNormArgs& args, const Kernel& kernel) {
  const int64_t work = args.chunk_lines() * args.W * args.C * 4;
  parallel_for(args.B * args.chunks(), work, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

std::tuple<Tensor, Tensor> moments(const Tensor& x_any, const Tensor& cells_any, bool per_sample) {
  check_block_cells(kBlockNorm, x_any, cells_any);
  const Tensor x = as_rows(x_any);
  const Cells cells(cells_any);
  BlockNormArgs args = args_of(x, cells);
  args.S = per_sample ? args.B : 1;
  Tensor mean = stats_like(x, {args.S, args.C}), square = stats_like(x, {args.S, args.C});
  args.first = mean.mutable_data_ptr(), args.second = square.mutable_data_ptr();
  const Partial partial(args);
  over_chunks(args, pick_BlockNormKernels().moments);
  pick_BlockNormKernels().join_moments(args);
  return {mean, square};
}

Tensor norm(const Tensor& x_any, const Tensor& mean_any, const Tensor& rstd_any, MaybeTensor weight_any, MaybeTensor bias_any,
            const Tensor& cells_any, MaybeTensor count, int64_t groups, std::string) {
  const int64_t S = check_stats_rows(x_any, cells_any, "mean", mean_any);
  check_stats(x_any, "mean", mean_any, S);
  check_stats(x_any, "rstd", rstd_any, S);
  check_channels(kBlockNorm, x_any, "weight", weight_any);
  check_channels(kBlockNorm, x_any, "bias", bias_any);
  if (count) check_tensor(kBlockNorm, "count", *count, "[S]", {mean_any.scalar_type()}, {S}, x_any);
  if (groups < 1 || x_any.size(1) % groups != 0) {
    fail(kBlockNorm, "groups", "divide " + std::to_string(x_any.size(1)) + " channels", groups);
  }
  const Tensor x = as_rows(x_any), mean = contiguous_or_copy(mean_any), rstd = contiguous_or_copy(rstd_any);
  const MaybeTensor weight = contiguous_or_none(weight_any), bias = contiguous_or_none(bias_any);
  const Cells cells(cells_any);
  Tensor out = empty_images(x, x.size(0), x.size(3), x.size(1), x.size(2));
  cells.clear_hidden(out);
  BlockNormArgs args = args_of(x, cells);
  args.S = S, args.out = out.mutable_data_ptr();
  args.mean = mean.const_data_ptr(), args.of_grad = rstd.const_data_ptr();
  args.weight = data_or_null(weight), args.bias = data_or_null(bias);
  over_lines(args, pick_BlockNormKernels().normalise);
  return out;
}

Tensor norm_sums(const Tensor& grad_any, const Tensor& x_any, const Tensor& mean_any, const Tensor& cells_any) {
  const int64_t S = check_stats_rows(x_any, cells_any, "mean", mean_any);
  check_stats(x_any, "mean", mean_any, S);
  check_same(kBlockNorm, grad_any, x_any);
  const Tensor grad = as_rows(grad_any), x = as_rows(x_any), mean = contiguous_or_copy(mean_any);
  const Cells cells(cells_any);
  BlockNormArgs args = args_of(x, cells);
  args.S = S, args.grad = grad.const_data_ptr(), args.mean = mean.const_data_ptr();
  Tensor sums = stats_like(x, {2, S, args.C});
  args.first = sums.mutable_data_ptr();
  args.second = static_cast<char*>(args.first) + S * args.C * static_cast<int64_t>(sums.element_size());
  const Partial partial(args);
  over_chunks(args, pick_BlockNormKernels().sums);
  pick_BlockNormKernels().join_sums(args);
  return sums;
}

Tensor norm_backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& mean_any, const Tensor& of_grad_any,
                     const Tensor& of_x_any, const Tensor& constant_any, const Tensor& cells_any) {
  const int64_t S = check_stats_rows(x_any, cells_any, "mean", mean_any);
  check_stats(x_any, "mean", mean_any, S);
  check_stats(x_any, "of_grad", of_grad_any, S);
  check_stats(x_any, "of_x", of_x_any, S);
  check_stats(x_any, "constant", constant_any, S);
  check_same(kBlockNorm, grad_any, x_any);
  const Tensor grad = as_rows(grad_any), x = as_rows(x_any), mean = contiguous_or_copy(mean_any);
  const Tensor of_grad = contiguous_or_copy(of_grad_any), of_x = contiguous_or_copy(of_x_any), constant = contiguous_or_copy(constant_any);
  const Cells cells(cells_any);
  Tensor out = empty_images(x, x.size(0), x.size(3), x.size(1), x.size(2));
  cells.clear_hidden(out);
  BlockNormArgs args = args_of(x, cells);
  args.S = S, args.grad = grad.const_data_ptr(), args.out = out.mutable_data_ptr();
  args.mean = mean.const_data_ptr(), args.of_grad = of_grad.const_data_ptr();
  args.of_x = of_x.const_data_ptr(), args.constant = constant.const_data_ptr();
  over_lines(args, pick_BlockNormKernels().backward);
  return out;
}

Tensor layer_norm(const Tensor& x_any, MaybeTensor weight_any, MaybeTensor bias_any, const Tensor& cells_any, double eps) {
  check_block_cells(kBlockLayer, x_any, cells_any);
  check_channels(kBlockLayer, x_any, "weight", weight_any);
  check_channels(kBlockLayer, x_any, "bias", bias_any);
  const Tensor x = as_rows(x_any);
  const MaybeTensor weight = contiguous_or_none(weight_any), bias = contiguous_or_none(bias_any);
  const Cells cells(cells_any);
  Tensor out = empty_images(x, x.size(0), x.size(3), x.size(1), x.size(2));
  cells.clear_hidden(out);
  BlockNormArgs args = args_of(x, cells);
  args.out = out.mutable_data_ptr(), args.weight = data_or_null(weight), args.bias = data_or_null(bias), args.eps = eps;
  over_lines(args, pick_BlockNormKernels().layer);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_any, const Tensor& x_any, MaybeTensor weight_any,
                                                       const Tensor& cells_any, double eps) {
  check_block_cells(kBlockLayer, x_any, cells_any);
  check_channels(kBlockLayer, x_any, "weight", weight_any);
  check_same(kBlockLayer, grad_any, x_any);
  const Tensor grad = as_rows(grad_any), x = as_rows(x_any);
  const MaybeTensor weight = contiguous_or_none(weight_any);
  const Cells cells(cells_any);
  Tensor out = empty_images(x, x.size(0), x.size(3), x.size(1), x.size(2));
  cells.clear_hidden(out);
  BlockNormArgs args = args_of(x, cells);
  args.grad = grad.const_data_ptr(), args.out = out.mutable_data_ptr(), args.weight = data_or_null(weight), args.eps = eps;
  args.S = 1;
  Tensor of_weight = stats_like(x, {args.C}), of_bias = stats_like(x, {args.C});
  args.first = of_weight.mutable_data_ptr(), args.second = of_bias.mutable_data_ptr();
  const Partial partial(args);
  over_chunks(args, pick_BlockNormKernels().layer_backward);
  pick_BlockNormKernels().join_sums(args);
  return {out, of_weight, of_bias};
}

// ---- max pooling

BlockPoolArgs pool_args(const Cells& cells, int64_t H, int64_t W, int64_t C, const Sizes& kernel, const Sizes& stride, const Sizes& padding,
                        const Tensor& like) {
  BlockPoolArgs args{};
  args.cells = cells.data, args.B = cells.B, args.h = cells.h, args.w = cells.w, args.H = H, args.W = W, args.C = C;
  args.kh = kernel[0], args.kw = kernel[1], args.sy = stride[0], args.sx = stride[1], args.py = padding[0], args.px = padding[1];
  args.dtype = static_cast<int>(dtype_of(like));
  return args;
}

std::tuple<Tensor, Tensor> max_pool(const Tensor& x_any, const Tensor& cells_any, Sizes kernel, Sizes stride, Sizes padding) {
  check_block_cells(kBlockPool, x_any, cells_any);
  const WindowSizes sizes = check_block_pool(x_any.size(2), x_any.size(3), cells_any, kernel, stride, padding);
  const Tensor x = as_rows(x_any);
  const Cells cells(cells_any);
  BlockPoolArgs args = pool_args(cells, x.size(1), x.size(2), x.size(3), kernel, stride, padding, x);
  Tensor out = empty_images(x, args.B, args.C, sizes.H, sizes.W);
  Tensor taps = empty_images(x, args.B, args.C, sizes.H, sizes.W, ScalarType::Byte);
  cells.clear_hidden(out);
  cells.clear_hidden(taps, 255);
  args.x = x.const_data_ptr(), args.out = out.mutable_data_ptr(), args.taps = static_cast<uint8_t*>(taps.mutable_data_ptr());
  parallel_for(args.B * sizes.H, sizes.W * args.C * args.kh * args.kw,
               [&](int64_t begin, int64_t end) { pick_BlockPoolKernels().forward(args, begin, end); });
  return {out, taps};
}

Tensor max_pool_backward(const Tensor& grad_any, const Tensor& taps_any, const Tensor& cells_any, Sizes size, Sizes kernel, Sizes stride,
                         Sizes padding) {
  check_tensor(kBlockPool, "grad", grad_any, "[B, C, H, W]", kFloats, {kAny, kAny, kAny, kAny}, grad_any);
  if (size.size() != 2) fail(kBlockPool, "size", "be two numbers", join_sizes(size));
  const int64_t B = grad_any.size(0), C = grad_any.size(1);
  check_block_cells(kBlockPool, grad_any, B, size[0], size[1], cells_any);
  const WindowSizes sizes = check_block_pool(size[0], size[1], cells_any, kernel, stride, padding);
  check_tensor(kBlockPool, "grad", grad_any, "[B, C, H, W]", kFloats, {kAny, kAny, sizes.H, sizes.W}, grad_any);
  check_tensor(kBlockPool, "taps", taps_any, "[B, C, H, W]", {ScalarType::Byte}, {B, C, sizes.H, sizes.W}, grad_any);
  const Tensor grad = as_rows(grad_any), taps = as_rows(taps_any);
  const Cells cells(cells_any);
  BlockPoolArgs args = pool_args(cells, size[0], size[1], C, kernel, stride, padding, grad);
  Tensor out = empty_images(grad, B, C, args.H, args.W);
  cells.clear_hidden(out);
  args.grad = grad.const_data_ptr(), args.out = out.mutable_data_ptr();
  args.taps = const_cast<uint8_t*>(static_cast<const uint8_t*>(taps.const_data_ptr()));
  parallel_for(B * args.H, args.W * C * args.kh * args.kw,
               [&](int64_t begin, int64_t end) { pick_BlockPoolKernels().backward(args, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("_sparse_conv_block_moments", TORCH_BOX(&moments));
  m.impl("sparse_conv_block_norm", TORCH_BOX(&norm));
  m.impl("_sparse_conv_block_norm_sums", TORCH_BOX(&norm_sums));
  m.impl("_sparse_conv_block_norm_backward", TORCH_BOX(&norm_backward));
  m.impl("sparse_conv_block_layer_norm", TORCH_BOX(&layer_norm));
  m.impl("_sparse_conv_block_layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("sparse_conv_block_max_pool", TORCH_BOX(&max_pool));
  m.impl("_sparse_conv_block_max_pool_backward", TORCH_BOX(&max_pool_backward));
}

}  // namespace maskops
#endif
