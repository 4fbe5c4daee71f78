// masked_patch_loss on the CPU. One patch at a time: its pixels are brought into a buffer in L1 in the order of pred, where
// mean, variance (two passes) and loss cost no memory traffic; patches that are not selected are never read.
#include "common/isa.h"
#include "math/masked_loss.h"
#include "math/visible_tokens.h"

namespace maskops {

struct PatchLoss {
  PatchGrid grid;
  const void *pred, *images;
  int64_t pred_batch, pred_row;  // strides in elements
  const int64_t *ids_restore, *num_keep, *num_mask;
  void* per_patch;  // forward: [B, N]; backward: the gradient of it, read
  void* stats;      // [B, N, 2]
  void* grad_pred;  // backward: [B, N, V]
  bool norm_pix, stream;
  LossKind kind;
  LossOn on;
  double beta;
};

struct PatchLossKernels {
  void (*forward)(int pred_type, int image_type, const PatchLoss&, void* buffer, int64_t begin, int64_t end);
  void (*backward)(int pred_type, int image_type, const PatchLoss&, void* buffer, int64_t begin, int64_t end);
};
MASKOPS_DECLARE_KERNELS(PatchLossKernels)

}  // namespace maskops

#include "common/simd_shuffle.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

// The pixels of one patch into `target`, in the order (r, p, q, c).
template <class I, class A>
void read_patch(const PatchGrid& grid, const I* corner, A* target) {
  using V = typename VecFor<I>::type;
  const int64_t plane = grid.channel_pixels(), width = grid.patch_w, channels = grid.channels;
  for (int64_t r = 0; r < grid.patch_t; ++r) {
    for (int64_t p = 0; p < grid.patch_h; ++p, target += width * channels) {
      const I* row = corner + grid.inside(r, p, 0);
      if (channels == 3) {
        int64_t q = 0;
        for (; q + V::width <= width; q += V::width) {
          store_interleaved(V::load(row + q), V::load(row + plane + q), V::load(row + 2 * plane + q), target + 3 * q);
        }
        for (; q < width; ++q) {
          target[3 * q] = to_float(row[q]);
          target[3 * q + 1] = to_float(row[plane + q]);
          target[3 * q + 2] = to_float(row[2 * plane + q]);
        }
        continue;
      }
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t q = 0; q < width; ++q) target[q * channels + c] = to_float(row[c * plane + q]);
      }
    }
  }
}

// A patch is short pieces of image rows, which no hardware prefetcher guesses: the next one is fetched while one is computed.
template <class T, class I>
void prefetch_patch(const PatchLoss& args, int64_t b, int64_t n) {
  constexpr int64_t kLine = 64;
  const PatchGrid& grid = args.grid;
  const I* corner = static_cast<const I*>(args.images) + b * grid.image_values() + grid.corner(n);
  for (int64_t c = 0; c < grid.channels; ++c) {
    for (int64_t r = 0; r < grid.patch_t; ++r) {
      for (int64_t p = 0; p < grid.patch_h; ++p) {
        const char* row = reinterpret_cast<const char*>(corner + c * grid.channel_pixels() + grid.inside(r, p, 0));
        const int64_t bytes = grid.patch_w * static_cast<int64_t>(sizeof(I));
        for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(row + i);
      }
    }
  }
  const char* pred = reinterpret_cast<const char*>(static_cast<const T*>(args.pred) + b * args.pred_batch + n * args.pred_row);
  for (int64_t i = 0; i < grid.values() * static_cast<int64_t>(sizeof(T)); i += kLine) __builtin_prefetch(pred + i);
}

// Sum over i of term(i, n) for n = number of valid elements at i; four chains hide the latency of the additions.
template <class V, class Term>
typename V::scalar sum_over(int64_t count, const Term& term) {
  V sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t i = 0;
  for (; i + 4 * V::width <= count; i += 4 * V::width) {
    for (int u = 0; u < 4; ++u) sums[u] = sums[u] + term(i + u * V::width, V::width);
  }
  for (; i < count; i += V::width) sums[0] = sums[0] + term(i, min_of<int64_t>(V::width, count - i));
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
}

template <class V, class A>
void mean_and_rstd(const A* target, int64_t count, A* mean, A* rstd) {
  // Differences from the first pixel, so that the mean of a constant patch is that pixel to the last bit.
  const A first = count > 0 ? target[0] : A(0);  // no channels: the mean of nothing is NaN
  const V shift = V::all(first);
  *mean = first + sum_over<V>(count, [&](int64_t i, int64_t n) {
    if (n == V::width) return V::load(target + i) - shift;
    A tail[V::width] = {};
    for (int64_t j = 0; j < n; ++j) tail[j] = target[i + j] - first;
    return V::load(tail);
  }) / A(count);
  const V centre = V::all(*mean);
  const A squares = sum_over<V>(count, [&](int64_t i, int64_t n) {
    if (n == V::width) {
      const V d = V::load(target + i) - centre;
      return d * d;
    }
    // Past the end a partial load holds zeros, whose distance from the mean must not count.
    A tail[V::width] = {};
    for (int64_t j = 0; j < n; ++j) tail[j] = (target[i + j] - *mean) * (target[i + j] - *mean);
    return V::load(tail);
  });
  const A variance = squares / A(count > 1 ? count - 1 : 1);
  *rstd = A(1) / A(__builtin_sqrt(double(variance) + kVarianceEps));
}

template <LossKind kKind, class V>
V value_of(V error, V beta, V half_beta) {
  if constexpr (kKind == LossKind::kL2) return error * error;
  const V size = abs(error);
  if constexpr (kKind == LossKind::kL1) return size;
  return where_less(size, beta, V::all(0.5f) * error * error / beta, size - half_beta);
}

template <LossKind kKind, class V>
V slope_of(V error, V beta) {
  if constexpr (kKind == LossKind::kL2) return error + error;
  const V one = V::all(1), minus = V::all(-1), zero = V::zero();
  // A comparison with NaN is false, so NaN is what is left over.
  if constexpr (kKind == LossKind::kL1) return where_less(zero, error, one, where_less(error, zero, minus, error));
  const V slope = error / beta;
  return where_less(one, slope, one, where_less(slope, minus, minus, slope));
}

template <LossKind kKind, class T, class I>
void forward_patch(const PatchLoss& args, int64_t b, int64_t n, typename Arithmetic<T>::type* target) {
  using A = typename Arithmetic<T>::type;
  using V = typename VecFor<T>::type;
  const PatchGrid& grid = args.grid;
  const int64_t count = grid.values(), at = b * grid.tokens() + n;
  A *per_patch = static_cast<A*>(args.per_patch) + at, *stats = static_cast<A*>(args.stats) + 2 * at;
  if (!loss_selects(args.on, args.ids_restore[at], args.num_keep[b], args.num_mask[b])) {
    *per_patch = stats[0] = stats[1] = 0;
    return;
  }
  read_patch(grid, static_cast<const I*>(args.images) + b * grid.image_values() + grid.corner(n), target);
  stats[0] = 0, stats[1] = 1;
  if (args.norm_pix) mean_and_rstd<V>(target, count, stats, stats + 1);
  const V mean = V::all(stats[0]), rstd = V::all(stats[1]), beta = V::all(A(args.beta)), half_beta = V::all(A(0.5 * args.beta));
  const T* pred = static_cast<const T*>(args.pred) + b * args.pred_batch + n * args.pred_row;
  A total = sum_over<V>(count, [&](int64_t i, int64_t m) {
    if (m == V::width) return value_of<kKind>(V::load(pred + i) - (V::load(target + i) - mean) * rstd, beta, half_beta);
    A tail[V::width] = {};
    for (int64_t j = 0; j < m; ++j) {
      tail[j] = loss_value<A>(kKind, to_float(pred[i + j]) - (target[i + j] - stats[0]) * stats[1], A(args.beta));
    }
    return V::load(tail);
  });
  *per_patch = total / A(count);
}

template <LossKind kKind, class T, class I>
void backward_patch(const PatchLoss& args, int64_t b, int64_t n, typename Arithmetic<T>::type* target) {
  using A = typename Arithmetic<T>::type;
  using V = typename VecFor<T>::type;
  const PatchGrid& grid = args.grid;
  const int64_t count = grid.values(), at = b * grid.tokens() + n;
  T* out = static_cast<T*>(args.grad_pred) + at * count;
  if (!loss_selects(args.on, args.ids_restore[at], args.num_keep[b], args.num_mask[b])) {
    memset(out, 0, count * sizeof(T));
    return;
  }
  read_patch(grid, static_cast<const I*>(args.images) + b * grid.image_values() + grid.corner(n), target);
  const A* stats = static_cast<const A*>(args.stats) + 2 * at;
  const V mean = V::all(stats[0]), rstd = V::all(stats[1]), beta = V::all(A(args.beta));
  const V scale = V::all(static_cast<const A*>(args.per_patch)[at] / A(count));
  const T* pred = static_cast<const T*>(args.pred) + b * args.pred_batch + n * args.pred_row;
  const bool stream = args.stream && can_stream<V>(out);
  int64_t i = 0;
  for (; i + V::width <= count; i += V::width) {
    const V slope = slope_of<kKind>(V::load(pred + i) - (V::load(target + i) - mean) * rstd, beta) * scale;
    if (stream) slope.stream(out + i);
    else slope.store(out + i);
  }
  if (i < count) {
    const int64_t m = count - i;
    const V error = V::load_n(pred + i, m) - (V::load_n(target + i, m) - mean) * rstd;
    (slope_of<kKind>(error, beta) * scale).store_n(out + i, m);
  }
}

template <LossKind kKind, class T, class I, bool kForward>
void run_patches(const PatchLoss& args, void* buffer, int64_t begin, int64_t end) {
  using A = typename Arithmetic<T>::type;
  const int64_t tokens = args.grid.tokens();
  auto selected = [&](int64_t i) { return loss_selects(args.on, args.ids_restore[i], args.num_keep[i / tokens], args.num_mask[i / tokens]); };
  int64_t fetched = begin;
  for (int64_t i = begin; i < end; ++i) {
    if (fetched <= i) {
      for (fetched = i + 1; fetched < end && !selected(fetched);) ++fetched;
      if (fetched < end) prefetch_patch<T, I>(args, fetched / tokens, fetched % tokens);
    }
    if constexpr (kForward) forward_patch<kKind, T, I>(args, i / tokens, i % tokens, static_cast<A*>(buffer));
    else backward_patch<kKind, T, I>(args, i / tokens, i % tokens, static_cast<A*>(buffer));
  }
  if (!kForward && args.stream) stream_fence();
}

template <class T, class I, bool kForward>
void pick_kind(const PatchLoss& args, void* buffer, int64_t begin, int64_t end) {
  switch (args.kind) {
    case LossKind::kL2: return run_patches<LossKind::kL2, T, I, kForward>(args, buffer, begin, end);
    case LossKind::kL1: return run_patches<LossKind::kL1, T, I, kForward>(args, buffer, begin, end);
    default: return run_patches<LossKind::kSmoothL1, T, I, kForward>(args, buffer, begin, end);
  }
}

// Codes of common/dispatch.h: images have pred's type, or are float.
template <bool kForward>
void run(int pred_type, int image_type, const PatchLoss& args, void* buffer, int64_t begin, int64_t end) {
  switch (pred_type * 4 + image_type) {
    case 0: return pick_kind<float, float, kForward>(args, buffer, begin, end);
    case 5: return pick_kind<double, double, kForward>(args, buffer, begin, end);
    case 8: return pick_kind<bf16, float, kForward>(args, buffer, begin, end);
    case 10: return pick_kind<bf16, bf16, kForward>(args, buffer, begin, end);
    case 12: return pick_kind<f16, float, kForward>(args, buffer, begin, end);
    default: return pick_kind<f16, f16, kForward>(args, buffer, begin, end);
  }
}

}  // namespace

extern const PatchLossKernels PatchLossKernels_table{&run<true>, &run<false>};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/buffer.h"
#include "common/dispatch.h"
#include "common/ids.h"
#include "math/masked_loss_check.h"

namespace maskops {
namespace {

void check_patch_loss_data(const Tensor& ids_restore, const Tensor& num_keep, const Tensor& num_mask) {
  const char* op = "masked_patch_loss";
  const int64_t batch = ids_restore.size(0), tokens = ids_restore.size(1);
  auto data = [](const Tensor& x) { return static_cast<const int64_t*>(x.const_data_ptr()); };
  check_ids(op, "ids_restore", data(ids_restore), batch, tokens, tokens, 0);
  check_counts(op, "num_keep", data(num_keep), batch, tokens);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t masked = data(num_mask)[b];
    if (masked < 0 || masked > tokens - data(num_keep)[b]) {
      fail(op, "num_mask[" + std::to_string(b) + "]", "be at least 0 and num_keep + num_mask at most " + std::to_string(tokens), masked);
    }
  }
}

// The tensors of one call, contiguous where the kernels want them so; they must outlive the PatchLoss made from them.
struct Inputs {
  Tensor pred, images, ids_restore, num_keep, num_mask;

  Inputs(const Tensor& p, const Tensor& i, const Tensor& ids, const Tensor& keep, const Tensor& mask)
      : pred(with_contiguous_rows(p)),
        images(contiguous_or_copy(i)),
        ids_restore(contiguous_or_copy(ids)),
        num_keep(contiguous_or_copy(keep)),
        num_mask(contiguous_or_copy(mask)) {}

  PatchLoss arguments(const PatchGrid& grid, bool norm_pix, LossKind kind, double beta, LossOn on) const {
    auto data = [](const Tensor& x) { return static_cast<const int64_t*>(x.const_data_ptr()); };
    PatchLoss args{};
    args.grid = grid;
    args.pred = pred.const_data_ptr(), args.images = images.const_data_ptr();
    args.pred_batch = pred.stride(0), args.pred_row = pred.stride(1);
    args.ids_restore = data(ids_restore), args.num_keep = data(num_keep), args.num_mask = data(num_mask);
    args.norm_pix = norm_pix, args.kind = kind, args.beta = beta, args.on = on;
    return args;
  }

  template <class Kernel>
  void run(const PatchLoss& args, Kernel kernel) const {
    const int64_t values = args.grid.values();
    const int pred_type = static_cast<int>(dtype_of(pred)), image_type = static_cast<int>(dtype_of(images));
    parallel_for(pred.size(0) * args.grid.tokens(), values * 8, [&](int64_t begin, int64_t end) {
      const Buffer buffer(values * static_cast<int64_t>(sizeof(double)));  // at a cache line: vectors across two took half as long again
      kernel(pred_type, image_type, args, buffer.get(), begin, end);
    });
  }
};

std::tuple<Tensor, Tensor> masked_loss_patch(const Tensor& pred, const Tensor& images, const Tensor& ids_restore,
                                             const Tensor& num_keep, const Tensor& num_mask, std::vector<int64_t> patch_size,
                                             bool norm_pix, std::string kind, double beta, std::string on) {
  const PatchGrid grid = check_patch_loss(pred, images, ids_restore, num_keep, num_mask, patch_size, kind, beta, on);
  const Inputs inputs(pred, images, ids_restore, num_keep, num_mask);
  check_patch_loss_data(inputs.ids_restore, inputs.num_keep, inputs.num_mask);
  const ScalarType type = accumulation_type(pred.scalar_type());
  Tensor per_patch = empty_like_device(pred, {pred.size(0), pred.size(1)}, type);
  Tensor stats = empty_like_device(pred, {pred.size(0), pred.size(1), 2}, type);
  PatchLoss args = inputs.arguments(grid, norm_pix, loss_kind(kind), beta, loss_on(on));
  args.per_patch = per_patch.mutable_data_ptr(), args.stats = stats.mutable_data_ptr();
  inputs.run(args, pick_PatchLossKernels().forward);
  return {per_patch, stats};
}

Tensor masked_loss_patch_backward(const Tensor& grad_any, const Tensor& pred, const Tensor& images, const Tensor& stats_any,
                                  const Tensor& ids_restore, const Tensor& num_keep, const Tensor& num_mask,
                                  std::vector<int64_t> patch_size, bool norm_pix, std::string kind, double beta, std::string on) {
  const PatchGrid grid =
      check_patch_loss_backward(grad_any, pred, images, stats_any, ids_restore, num_keep, num_mask, patch_size, kind, beta, on);
  const Inputs inputs(pred, images, ids_restore, num_keep, num_mask);
  check_patch_loss_data(inputs.ids_restore, inputs.num_keep, inputs.num_mask);
  const Tensor grad = contiguous_or_copy(grad_any), stats = contiguous_or_copy(stats_any);
  Tensor grad_pred = empty_like_device(pred, {pred.size(0), pred.size(1), pred.size(2)});
  PatchLoss args = inputs.arguments(grid, norm_pix, loss_kind(kind), beta, loss_on(on));
  args.per_patch = grad.data_ptr(), args.stats = stats.data_ptr(), args.grad_pred = grad_pred.mutable_data_ptr();
  args.stream = grad_pred.numel() * static_cast<int64_t>(grad_pred.element_size()) > kStreamBytes;
  inputs.run(args, pick_PatchLossKernels().backward);
  return grad_pred;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("masked_loss_patch", TORCH_BOX(&masked_loss_patch));
  m.impl("_masked_loss_patch_backward", TORCH_BOX(&masked_loss_patch_backward));
}

}  // namespace maskops
#endif
