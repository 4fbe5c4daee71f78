// nm_matmul_linear on CUDA: y [M, N] = x [M, K] W^T + b with a compressed weight.
#include "common/library.cuh"
#include "cuda/nm_matmul/linear_sparse.cuh"
#include "cuda/nm_matmul/linear_tiled.cuh"
#include "math/nm_matmul_check.h"

namespace maskops {
namespace {

template <typename T>
void run_tiled(const LinearArgs<T>& args, cudaStream_t stream) {
  constexpr int V = sizeof(Acc<T>) == 8 ? 2 : 4;
  const bool wide_y = args.outputs % V == 0 && reinterpret_cast<std::uintptr_t>(args.y) % (V * sizeof(T)) == 0;
  const TiledShape shape(args.n, args.m, args.rows, wide_y);
  const std::int64_t tiles = ceil_div(args.rows, kTiledSide) * ceil_div(args.outputs, kTiledSide);
  dispatch_width<T>(vector_width<T>({args.inputs, shape.depth}, {args.x}), [&](auto w) {
    launch(linear_tiled_kernel<T, (w() > 1)>, grid_for(tiles, 1), dim3(kTiledThreads), 0, stream, args, shape);
  });
}

template <typename T>
void run_sparse(const LinearArgs<T>& args, cudaStream_t stream) {
  const std::int64_t row_tiles = ceil_div(args.rows, kSparseRows), tiles = row_tiles * ceil_div(args.outputs, kSparseOutputs);
  const bool wide_y = vector_width<T>({args.outputs}, {args.y}) > 1;
  const bool even = reinterpret_cast<std::uintptr_t>(args.places) % 2 == 0;
  const int width = even ? vector_width<T>({args.inputs, args.slots}, {args.x, args.values}) : 1;
  dispatch_width<T>(width, [&](auto w) {
    launch(linear_sparse_kernel<T, (w() > 1)>, grid_for(tiles, 1), dim3(kSparseThreads), 0, stream, args,
           static_cast<unsigned>(row_tiles), wide_y);
  });
}

Tensor nm_matmul_linear(const Tensor& x_any, const Tensor& values_any, const Tensor& places_any, std::optional<Tensor> bias_any,
                        std::int64_t n, std::int64_t m) {
  const NmLayout layout = check_nm_linear(x_any, values_any, places_any, bias_any, n, m);
  const DeviceScope scope(x_any);
  const Tensor x = torch::stable::contiguous(x_any), values = torch::stable::contiguous(values_any);
  const Tensor places = torch::stable::contiguous(places_any);
  const std::optional<Tensor> bias = contiguous(bias_any);
  Tensor y = empty_like_device(x, {x.size(0), values.size(0)});
  if (layout.K > kMaxInputs) throw std::runtime_error(sentence("maskops: ", layout.K, " inputs of a linear layer are not supported"));
  dispatch_floats(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const LinearArgs<T> args{const_data<T>(x),
                             const_data<T>(values),
                             const_data<std::uint8_t>(places),
                             const_data_or_null<T>(bias),
                             data<T>(y),
                             x.size(0),
                             values.size(0),
                             static_cast<int>(layout.K),
                             static_cast<int>(layout.slots),
                             static_cast<int>(layout.row_bytes),
                             static_cast<int>(layout.groups),
                             layout.n,
                             layout.m,
                             layout.bits};
    if constexpr (sizeof(T) == 2) {
      if (n == 2 && m == 4 && has_sparse_mma()) return run_sparse(args, scope.stream());
    }
    run_tiled(args, scope.stream());
  });
  return y;
}

}  // namespace

MASKOPS_CUDA_LIBRARY(m) { m.impl("nm_matmul_linear", TORCH_BOX(&nm_matmul_linear)); }

}  // namespace maskops
