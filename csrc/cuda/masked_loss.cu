// masked_loss_patch on CUDA: the error of predicted patches [B, N, V] against the patches of the image, which are read in place.
#include "common/ids.cuh"
#include "common/library.cuh"
#include "common/patch_offsets.cuh"
#include "common/reduce.cuh"
#include "math/masked_loss_check.h"

namespace maskops {
namespace {

constexpr int kLossThreads = 256;
constexpr int kLossWarps = kLossThreads / 32;

// What forward and backward share. T is pred's type, I the image's.
template <typename T, typename I>
struct LossRows {
  using Pred = T;
  using Image = I;
  using A = Acc<T>;
  const T* pred;  // [B, N, V]
  RowStrides strides;
  const I* images;  // [B, C, T, H, W]
  PatchGrid grid;
  PatchOffsets offsets;
  const std::int64_t *ids_restore, *num_keep, *num_mask;  // [B, N], [B], [B]
  std::int64_t rows, tokens;
  LossKind kind;
  LossOn on;
  A beta;
  bool norm_pix;

  __device__ __forceinline__ bool selects(std::int64_t row, std::int64_t b) const {
    return loss_selects(on, load(ids_restore + row), load(num_keep + b), load(num_mask + b));
  }
  __device__ __forceinline__ const I* corner(std::int64_t b, std::int64_t n) const {
    return images + b * grid.image_values() + grid.corner(n);
  }
  // What value v of a prediction is off by, where `corner` starts the patch that it predicts.
  __device__ __forceinline__ A error(T predicted, const I* corner, std::uint32_t v, A mean, A rstd) const {
    return static_cast<A>(widen(predicted)) - (static_cast<A>(widen(load(corner + offsets.channels_last(v)))) - mean) * rstd;
  }
};

// The checks of ids_restore and of the counts, in the first blocks of the grid.
template <typename Rows>
__device__ __forceinline__ void check_loss_rows(const Rows& r, const IdsCheck& check) {
  const std::int64_t b = blockIdx.x / check.chunks;
  if (threadIdx.x == 0 && blockIdx.x % check.chunks == 0) {
    const std::int64_t keep = load(r.num_keep + b), masked = load(r.num_mask + b);
    MASKOPS_DEVICE_CHECK(keep >= 0 && keep <= r.tokens, std::invalid_argument, "masked_patch_loss", "num_keep must be in [0, N]",
                         "num_keep[", b, "] must be in [0, ", r.tokens, "], got ", keep);
    MASKOPS_DEVICE_CHECK(masked >= 0 && masked <= r.tokens - keep, std::invalid_argument, "masked_patch_loss",
                         "num_mask must be at least 0 and num_keep + num_mask at most N", "num_mask[", b,
                         "] must be at least 0 and num_keep + num_mask at most ", r.tokens, ", got ", masked);
  }
  check_ids<kLossThreads>(check, blockIdx.x, "masked_patch_loss", "ids_restore");
}

// Patch n of sample b, the row of [B * N] that a warp owns.
struct LossPatch {
  std::int64_t row, b, n;
};

// False for the checking blocks at the front of the grid, once they have checked, and for warps behind the last patch.
template <typename Rows>
__device__ __forceinline__ bool find_patch(const Rows& r, const IdsCheck& check, LossPatch& patch) {
  if (blockIdx.x < check.blocks) {
    check_loss_rows(r, check);
    return false;
  }
  const std::int64_t row = (blockIdx.x - check.blocks) * kLossWarps + threadIdx.x / 32;
  patch = {row, row / r.tokens, row % r.tokens};
  return row < r.rows;
}

// Mean and 1 / sqrt(var + eps) of a patch, by one warp, in two passes over pixels that the second time come from the cache: the
// variance of a constant patch is exactly zero.
template <typename A, typename I>
__device__ __forceinline__ void patch_statistics(const I* corner, const PatchOffsets& offsets, std::uint32_t values, A& mean, A& rstd) {
  A sum = 0, squares = 0;
#pragma unroll 4
  for (std::uint32_t v = threadIdx.x % 32; v < values; v += 32) sum += static_cast<A>(widen(load(corner + offsets.channels_first(v))));
  mean = warp_sum(sum) / static_cast<A>(values);
#pragma unroll 4
  for (std::uint32_t v = threadIdx.x % 32; v < values; v += 32) {
    const A centred = static_cast<A>(widen(load(corner + offsets.channels_first(v)))) - mean;
    squares += centred * centred;
  }
  const A variance = warp_sum(squares) / static_cast<A>(values > 1 ? values - 1 : 1);
  rstd = A(1) / std::sqrt(variance + static_cast<A>(kVarianceEps));
}

// per_patch [B, N], stats [B, N, 2]. One warp owns one patch; patches that are not selected cost two stores.
template <typename T, typename I, int W>
__global__ void __launch_bounds__(kLossThreads, 4)
    loss_kernel(const LossRows<T, I> r, const IdsCheck check, Acc<T>* __restrict__ per_patch, Acc<T>* __restrict__ stats) {
  using A = Acc<T>;
  LossPatch patch;
  if (!find_patch(r, check, patch)) return;
  const auto [row, b, n] = patch;
  const bool first_lane = threadIdx.x % 32 == 0;
  A mean = 0, rstd = 0, sum = 0;
  const std::uint32_t values = static_cast<std::uint32_t>(r.grid.values());
  if (r.selects(row, b)) {
    rstd = 1;
    const I* corner = r.corner(b, n);
    if (r.norm_pix) patch_statistics(corner, r.offsets, values, mean, rstd);
    const T* pred = r.pred + r.strides.at(b, n);
    for (std::uint32_t v = threadIdx.x % 32 * W; v < values; v += 32 * W) {
      const Vec<T, W> predicted = load_vec<W>(pred + v);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        sum += loss_value(r.kind, r.error(predicted.v[i], corner, v + i, mean, rstd), r.beta);
      }
    }
    sum = warp_sum(sum) / static_cast<A>(values);
  }
  if (!first_lane) return;
  store(per_patch + row, sum);
  store(stats + 2 * row, mean);
  store(stats + 2 * row + 1, rstd);
}

// grad_pred [B, N, V]. One warp owns one patch; zeros where it is not selected, whatever pred and grad hold there.
template <typename T, typename I, int W>
__global__ void __launch_bounds__(kLossThreads, 4)
    loss_backward_kernel(const LossRows<T, I> r, const IdsCheck check, const Acc<T>* __restrict__ grad, const Acc<T>* __restrict__ stats,
                         T* __restrict__ grad_pred) {
  using A = Acc<T>;
  LossPatch patch;
  if (!find_patch(r, check, patch)) return;
  const auto [row, b, n] = patch;
  const std::uint32_t values = static_cast<std::uint32_t>(r.grid.values());
  T* to = grad_pred + row * values;
  const bool selected = r.selects(row, b);
  const A mean = load(stats + 2 * row), rstd = load(stats + 2 * row + 1), scale = load(grad + row) / static_cast<A>(values);
  const I* corner = r.corner(b, n);
  const T* pred = r.pred + r.strides.at(b, n);
  for (std::uint32_t v = threadIdx.x % 32 * W; v < values; v += 32 * W) {
    Vec<T, W> value = zero_vec<T, W>();
    if (selected) {
      const Vec<T, W> predicted = load_vec<W>(pred + v);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        value.v[i] = narrow<T>(loss_slope(r.kind, r.error(predicted.v[i], corner, v + i, mean, rstd), r.beta) * scale);
      }
    }
    store_vec<W>(to + v, value);
  }
}

// ---------------------------------------------------------------- ops

// The arguments of both ops, as the kernels read them.
struct LossInputs {
  Tensor pred, images, ids_restore, num_keep, num_mask;
  PatchGrid grid;
  bool norm_pix;
  LossKind kind;
  LossOn on;
  double beta;
  IdsCheck check;

  LossInputs(const PatchGrid& grid_, const Tensor& pred_, const Tensor& images_, const Tensor& ids_restore_, const Tensor& num_keep_,
             const Tensor& num_mask_, bool norm_pix_, const std::string& kind_, double beta_, const std::string& on_)
      : pred(with_contiguous_rows(pred_)), images(torch::stable::contiguous(images_)),
        ids_restore(torch::stable::contiguous(ids_restore_)), num_keep(torch::stable::contiguous(num_keep_)),
        num_mask(torch::stable::contiguous(num_mask_)), grid(grid_), norm_pix(norm_pix_), kind(loss_kind(kind_)), on(loss_on(on_)),
        beta(beta_), check(const_data<std::int64_t>(ids_restore), pred.size(0), pred.size(1), pred.size(1), 0) {}

  template <typename T, typename I>
  LossRows<T, I> rows() const {
    return {const_data<T>(pred), row_strides(pred), const_data<I>(images), grid, PatchOffsets(grid),
            const_data<std::int64_t>(ids_restore), const_data<std::int64_t>(num_keep), const_data<std::int64_t>(num_mask),
            pred.size(0) * pred.size(1), pred.size(1), kind, on, static_cast<Acc<T>>(beta), norm_pix};
  }
  dim3 blocks() const { return grid_for(check.blocks + ceil_div(pred.size(0) * pred.size(1), kLossWarps), 1); }
};

// body(rows, width): images are of pred's type or float32; pred and `written`, which may be null, move `width` values at a time.
template <typename Body>
void dispatch_loss(const LossInputs& in, const void* written, const Body& body) {
  dispatch_floats(in.pred.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const auto of_image = [&](auto image_type) {
      const auto rows = in.template rows<T, typename decltype(image_type)::type>();
      const int width = vector_width<T>({in.grid.values(), rows.strides.batch, rows.strides.row}, {rows.pred, written});
      dispatch_width<T>(width, [&](auto w) { body(rows, w); });
    };
    if (in.images.scalar_type() == in.pred.scalar_type()) {
      of_image(type);
    } else if constexpr (sizeof(T) == 2) {
      of_image(Type<float>{});
    }
  });
}

std::tuple<Tensor, Tensor> masked_loss_patch(const Tensor& pred, const Tensor& images, const Tensor& ids_restore,
                                             const Tensor& num_keep, const Tensor& num_mask, std::vector<std::int64_t> patch_size,
                                             bool norm_pix, std::string kind, double beta, std::string on) {
  const PatchGrid grid = check_patch_loss(pred, images, ids_restore, num_keep, num_mask, patch_size, kind, beta, on);
  const DeviceScope scope(pred);
  const LossInputs in(grid, pred, images, ids_restore, num_keep, num_mask, norm_pix, kind, beta, on);
  const ScalarType acc_type = accumulation_type(pred.scalar_type());
  Tensor per_patch = empty_like_device(pred, {pred.size(0), pred.size(1)}, acc_type);
  Tensor stats = empty_like_device(pred, {pred.size(0), pred.size(1), 2}, acc_type);
  dispatch_loss(in, nullptr, [&](const auto& rows, auto w) {
    using Rows = std::decay_t<decltype(rows)>;
    launch(loss_kernel<typename Rows::Pred, typename Rows::Image, w()>, in.blocks(), dim3(kLossThreads), 0, scope.stream(), rows,
           in.check, data<typename Rows::A>(per_patch), data<typename Rows::A>(stats));
  });
  return {per_patch, stats};
}

Tensor masked_loss_patch_backward(const Tensor& grad_any, const Tensor& pred, const Tensor& images, const Tensor& stats_any,
                                  const Tensor& ids_restore, const Tensor& num_keep, const Tensor& num_mask,
                                  std::vector<std::int64_t> patch_size, bool norm_pix, std::string kind, double beta, std::string on) {
  const PatchGrid grid =
      check_patch_loss_backward(grad_any, pred, images, stats_any, ids_restore, num_keep, num_mask, patch_size, kind, beta, on);
  const DeviceScope scope(pred);
  const LossInputs in(grid, pred, images, ids_restore, num_keep, num_mask, norm_pix, kind, beta, on);
  const Tensor grad = torch::stable::contiguous(grad_any), stats = torch::stable::contiguous(stats_any);
  Tensor grad_pred = empty_like_device(pred, {pred.size(0), pred.size(1), pred.size(2)});
  dispatch_loss(in, grad_pred.const_data_ptr(), [&](const auto& rows, auto w) {
    using Rows = std::decay_t<decltype(rows)>;
    using T = typename Rows::Pred;
    launch(loss_backward_kernel<T, typename Rows::Image, w()>, in.blocks(), dim3(kLossThreads), 0, scope.stream(), rows, in.check,
           const_data<Acc<T>>(grad), const_data<Acc<T>>(stats), data<T>(grad_pred));
  });
  return grad_pred;
}

}  // namespace

MASKOPS_CUDA_LIBRARY(m) {
  m.impl("masked_loss_patch", TORCH_BOX(&masked_loss_patch));
  m.impl("_masked_loss_patch_backward", TORCH_BOX(&masked_loss_patch_backward));
}

}  // namespace maskops
