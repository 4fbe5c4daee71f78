// sparse_conv and the gradient of its weight on the CPU.
#include "cpu/sparse_conv/conv.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>

#include "common/buffer.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "math/sparse_conv_check.h"

namespace maskops {
namespace {

ConvArgs args_of(const Tensor& x, const Tensor& map, int64_t columns, int64_t groups) {
  ConvArgs args{};
  args.x = x.const_data_ptr();
  args.map = static_cast<const int32_t*>(map.const_data_ptr());
  args.x_stride = x.stride(0);
  args.N = x.size(0), args.C = x.size(1), args.D = columns;
  args.K = map.size(0), args.M = map.size(1);
  args.groups = groups;
  args.dtype = static_cast<int>(dtype_of(x));
  // Groups of fewer channels would leave most of the tiles empty. Rows are read in words of two channels.
  constexpr int64_t kLeast = 8;
  const bool half = args.dtype == static_cast<int>(Dtype::kBFloat16);
  args.amx = half && use_amx() && args.C >= kLeast * groups && args.D >= kLeast * groups;
  args.pairs = half && use_bf16_dot() && args.C / groups % 2 == 0;
  return args;
}

[[noreturn]] void fail_map(const ConvArgs& args) {
  for (int64_t i = 0;; ++i) {
    if (args.map[i] >= -1 && args.map[i] < args.N) continue;
    const std::string at = "map[" + std::to_string(i / args.M) + ", " + std::to_string(i % args.M) + "]";
    fail_index("sparse_conv", at, "be in [-1, " + std::to_string(args.N) + ")", std::to_string(args.map[i]));
  }
}

Tensor sparse_conv(const Tensor& x_any, const Tensor& weight_any, std::optional<Tensor> bias_any, const Tensor& map_any,
                   std::optional<Tensor> reverse, int64_t groups) {
  check_conv(x_any, weight_any, bias_any, map_any, reverse, groups);
  const Tensor x = with_contiguous_rows(x_any), weight = contiguous_or_copy(weight_any), map = contiguous_or_copy(map_any);
  const std::optional<Tensor> bias = bias_any ? std::optional<Tensor>(contiguous_or_copy(*bias_any)) : std::nullopt;
  ConvArgs args = args_of(x, map, weight.size(2), groups);
  Tensor out = empty_like_device(x, {args.M, args.D});
  if (args.M == 0 || args.D == 0) return out;
  args.weight = weight.const_data_ptr();
  args.bias = bias ? bias->const_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  const ConvKernels& kernels = pick_ConvKernels();
  const Buffer packed(kernels.packed_bytes(args));
  if (kernels.packed_bytes(args) > 0) {
    args.packed = packed.get();
    parallel_for(args.K, args.C / groups * args.D, [&](int64_t begin, int64_t end) { kernels.pack(args, begin, end); });
  }
  const int64_t rows = kernels.tile_rows(args), bytes = kernels.bytes(args);
  std::atomic<bool> good{true};
  share_out((args.M + rows - 1) / rows, rows * args.K * args.C / groups * args.D / 8, [&](const NextItem& next) {
    const Buffer buffer(bytes);
    for (int64_t tile; next(&tile);) {
      if (!kernels.forward(args, tile, tile + 1, buffer.get())) good = false;
    }
  });
  if (!good) fail_map(args);
  return out;
}

Tensor sparse_conv_grad_weight(const Tensor& grad_any, const Tensor& x_any, const Tensor& map_any, int64_t groups) {
  check_conv_grad_weight(grad_any, x_any, map_any, groups);
  const Tensor x = with_contiguous_rows(x_any), grad = with_contiguous_rows(grad_any), map = contiguous_or_copy(map_any);
  ConvArgs args = args_of(x, map, grad.size(1), groups);
  Tensor out = empty_like_device(x, {args.K, args.C / groups, args.D});
  if (out.numel() == 0) return out;
  args.grad = grad.const_data_ptr();
  args.grad_stride = grad.stride(0);
  args.out = out.mutable_data_ptr();
  const ConvKernels& kernels = pick_ConvKernels();
  const Buffer partial(kernels.partial_bytes(args));
  args.partial = partial.get();
  // Places of a chunk go together as far as that leaves some items to each thread.
  const int64_t chunks = args.chunks(), bytes = kernels.bytes(args), work = args.C / groups * args.D;
  const int64_t wanted = (4 * torch::stable::get_num_threads() + chunks - 1) / chunks;
  const int64_t places = std::clamp<int64_t>(args.K / wanted, 1, kernels.weight_places(args)), parts = (args.K + places - 1) / places;
  std::atomic<bool> good{true};
  share_out(chunks * parts, args.M / chunks * places * work / 8, [&](const NextItem& next) {
    const Buffer buffer(bytes);
    for (int64_t item; next(&item);) {
      const int64_t k = item % parts * places;
      if (!kernels.weight_chunk(args, item / parts, k, std::min(args.K, k + places), buffer.get())) good = false;
    }
  });
  if (!good) fail_map(args);
  parallel_for(args.K, chunks * work, [&](int64_t begin, int64_t end) { kernels.sum_chunks(args, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("sparse_conv", TORCH_BOX(&sparse_conv));
  m.impl("_sparse_conv_grad_weight", TORCH_BOX(&sparse_conv_grad_weight));
}

}  // namespace maskops
#endif
