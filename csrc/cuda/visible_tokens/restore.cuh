// Restoring kernels shared by visible_tokens_restore (padded slots) and visible_tokens_unpack (packed rows).
#pragma once

#include <algorithm>

#include "common/library.cuh"
#include "common/reduce.cuh"
#include "cuda/visible_tokens/rows.cuh"
#include "math/visible_tokens_check.h"

namespace maskops {

// ---------------------------------------------------------------- forward

template <typename T>
struct RestoreRows {
  const T* x;  // kept rows, padded or packed
  RowStrides strides;
  Slots slots;
  const std::int64_t* ids_restore;  // [B, N]
  const T* fill;
  RowStrides fill_strides;
  const T* pos;  // [P + N, D] or null
  T* out;        // [B, P + N, D]
  std::int64_t rows, tokens, channels;
};

// out = (kept row or fill) + pos. One warp owns one row of out, so everything is read and written once, 16 bytes a lane.
template <typename T, int W>
__global__ void __launch_bounds__(kRowThreads, 4)
    restore_rows_kernel(const RestoreRows<T> r, const IdsCheck check, const Function function) {
  if (blockIdx.x < check.blocks) {
    check_restore_rows(check, r.slots, function);
    return;
  }
  const std::int64_t row = (blockIdx.x - check.blocks) * kRowWarps + threadIdx.x / 32;
  if (row >= r.rows) return;
  const std::int64_t prefix = r.slots.prefix, in_sample = prefix + r.tokens, b = row / in_sample, p = row % in_sample;
  const T* from = r.x + r.strides.at(b, p);
  if (p >= prefix) {
    const SlotRows kept = r.slots.of(b);
    const std::int64_t slot = load(r.ids_restore + b * r.tokens + p - prefix);
    from = slot >= 0 && slot < kept.count ? r.x + r.strides.at(b, kept.first + slot) : r.fill + r.fill_strides.at(b, p - prefix);
  }
  T* to = r.out + row * r.channels;
  if (!r.pos) {
    move_row<W>(from, to, r.channels);
    return;
  }
  const T* pos = r.pos + p * r.channels;
#pragma unroll 2
  for (std::int64_t c = static_cast<std::int64_t>(threadIdx.x % 32) * W; c < r.channels; c += 32 * W) {
    Vec<T, W> value = load_vec<W>(from + c);
    const Vec<T, W> add = load_vec<W>(pos + c);
#pragma unroll
    for (int i = 0; i < W; ++i) value.v[i] = narrow<T>(widen(value.v[i]) + widen(add.v[i]));
    store_vec<W>(to + c, value);
  }
}

// ---------------------------------------------------------------- sums over the batch

// First stage of grad_fill and grad_pos. One warp owns 32 W columns of one row t of [P + N] and the samples of one split, in order:
//   pos_sums[split, t] = sum of grad[b, t],   fill_sums[split, n] = sum of grad[b, P + n] where token n was filled.
// Both sums come from one reading of grad. Sums are kept in float (double for double).
template <typename T>
struct BatchSums {
  const T* grad;  // [B, P + N, D]
  RowStrides strides;
  Slots slots;
  const std::int64_t* ids_restore;  // [B, N]
  Acc<T>* fill_sums;                // [S, N, D] or null
  Acc<T>* pos_sums;                 // [S, P + N, D] or null
  std::int64_t batch, tokens, channels, splits, column_tiles;
};

template <typename T, int W>
__device__ __forceinline__ void add_vec(Acc<T> (&sum)[W], const Vec<T, W>& value) {
#pragma unroll
  for (int i = 0; i < W; ++i) sum[i] += widen(value.v[i]);
}

template <typename A, int W>
__device__ __forceinline__ void store_sums(A* to, const A (&sum)[W]) {
#pragma unroll
  for (int i = 0; i < W; ++i) store(to + i, sum[i]);
}

template <typename T, int W>
__global__ void __launch_bounds__(kRowThreads, 4) batch_sums_kernel(const BatchSums<T> s) {
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / 32;
  const std::int64_t prefix = s.slots.prefix, rows = prefix + s.tokens;
  const std::int64_t tile = item % s.column_tiles, t = item / s.column_tiles % rows, split = item / s.column_tiles / rows;
  const std::int64_t column = (tile * 32 + threadIdx.x % 32) * W;
  if (split >= s.splits || column >= s.channels) return;
  const std::int64_t per_split = (s.batch + s.splits - 1) / s.splits, begin = split * per_split;
  const std::int64_t end = begin + per_split < s.batch ? begin + per_split : s.batch, n = t - prefix;
  const bool want_fill = s.fill_sums && n >= 0;
  Acc<T> pos_sum[W] = {}, fill_sum[W] = {};
#pragma unroll 2
  for (std::int64_t b = begin; b < end; ++b) {
    const bool filled = want_fill && load(s.ids_restore + b * s.tokens + n) >= s.slots.of(b).count;
    if (!filled && !s.pos_sums) continue;
    const Vec<T, W> value = load_vec<W>(s.grad + s.strides.at(b, t) + column);
    add_vec<T, W>(pos_sum, value);
    if (filled) add_vec<T, W>(fill_sum, value);
  }
  if (s.pos_sums) store_sums(s.pos_sums + (split * rows + t) * s.channels + column, pos_sum);
  if (want_fill) store_sums(s.fill_sums + (split * s.tokens + n) * s.channels + column, fill_sum);
}

// Second stage: out[c] = sums[0, c] + ... + sums[R - 1, c]. A block owns 32 columns; its GROUPS warps share the R rows and are added
// up in order. GROUPS = 1 where there are many columns and few rows.
template <typename T, int GROUPS>
__global__ void __launch_bounds__(32 * GROUPS)
    sum_rows_kernel(const Acc<T>* __restrict__ sums, T* __restrict__ out, std::int64_t rows, std::int64_t columns) {
  MASKOPS_SHARED(Acc<T>, partial, 32 * GROUPS);
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * 32 + lane;
  Acc<T> sum = 0;
  if (column < columns) {
#pragma unroll 4
    for (std::int64_t r = group; r < rows; r += GROUPS) sum += load(sums + r * columns + column);
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (group != 0 || column >= columns) return;
  for (int g = 1; g < GROUPS; ++g) sum += partial[g * 32 + lane];
  store(out + column, narrow<T>(sum));
}

template <typename T>
void sum_rows(const Acc<T>* sums, T* out, std::int64_t rows, std::int64_t columns, cudaStream_t stream) {
  const bool deep = rows >= 32;
  auto kernel = deep ? sum_rows_kernel<T, 16> : sum_rows_kernel<T, 1>;
  launch(kernel, grid_for(columns, 32), dim3(deep ? 512 : 32), 0, stream, sums, out, rows, columns);
}

// ---------------------------------------------------------------- gradient of fill and pos

// grad_fill of rank 3: grad where the token was filled, zero elsewhere.
template <typename T>
struct FilledRowsPlan {
  const T* grad;
  RowStrides strides;
  Slots slots;
  const std::int64_t* ids_restore;
  T* grad_fill;  // [B, N, D]
  Function function;
  std::int64_t rows, tokens, channels;

  __device__ void check(const IdsCheck& ids_check) const { check_restore_rows(ids_check, slots, function); }
  __device__ void find(std::int64_t row, const T*& from, T*& to) const {
    const std::int64_t b = row / tokens, n = row % tokens;
    if (load(ids_restore + row) >= slots.of(b).count) from = grad + strides.at(b, slots.prefix + n);
    to = grad_fill + row * channels;
  }
};

struct FillGradient {
  Tensor grad, ids_restore;  // [B, P + N, D] with contiguous rows, [B, N] contiguous
  Slots slots;
  Function function;
  std::int64_t fill_dim;
  bool need_fill, need_pos;
};

// Splits of the batch so that a launch has some thousands of warps; from the sizes alone, so that every device adds in one order.
inline std::int64_t batch_splits(std::int64_t warps_per_split, std::int64_t batch) {
  constexpr std::int64_t kWarpsWanted = 4096, kMostSplits = 64;
  const std::int64_t splits = ceil_div(kWarpsWanted, std::max<std::int64_t>(1, warps_per_split));
  return std::max<std::int64_t>(1, std::min({splits, batch, kMostSplits}));
}

template <typename T, int W>
void sum_over_batch(const FillGradient& f, const std::optional<Tensor>& grad_fill, const std::optional<Tensor>& grad_pos,
                    cudaStream_t stream) {
  const std::int64_t batch = f.grad.size(0), tokens = f.ids_restore.size(1), channels = f.grad.size(2), rows = f.grad.size(1);
  const std::int64_t column_tiles = ceil_div(channels, 32 * W), splits = batch_splits(rows * column_tiles, batch);
  const ScalarType acc_type = accumulation_type(f.grad.scalar_type());
  std::optional<Tensor> fill_sums, pos_sums;
  if (grad_fill) fill_sums = empty_like_device(f.grad, {splits, tokens, channels}, acc_type);
  if (grad_pos) pos_sums = empty_like_device(f.grad, {splits, rows, channels}, acc_type);
  const BatchSums<T> sums{const_data<T>(f.grad), row_strides(f.grad), f.slots, const_data<std::int64_t>(f.ids_restore),
                          fill_sums ? data<Acc<T>>(*fill_sums) : nullptr, pos_sums ? data<Acc<T>>(*pos_sums) : nullptr,
                          batch, tokens, channels, splits, column_tiles};
  launch(batch_sums_kernel<T, W>, grid_for(splits * rows * column_tiles, kRowWarps), dim3(kRowThreads), 0, stream, sums);
  if (grad_fill && f.fill_dim == 1) sum_rows<T>(sums.fill_sums, data<T>(*grad_fill), splits * tokens, channels, stream);
  if (grad_fill && f.fill_dim == 2) sum_rows<T>(sums.fill_sums, data<T>(*grad_fill), splits, tokens * channels, stream);
  if (grad_pos) sum_rows<T>(sums.pos_sums, data<T>(*grad_pos), splits, rows * channels, stream);
}

template <typename T, int W>
void fill_each_row(const FillGradient& f, const Tensor& grad_fill, cudaStream_t stream) {
  const std::int64_t batch = f.ids_restore.size(0), tokens = f.ids_restore.size(1);
  const FilledRowsPlan<T> plan{const_data<T>(f.grad), row_strides(f.grad), f.slots, const_data<std::int64_t>(f.ids_restore),
                               data<T>(grad_fill), f.function, batch * tokens, tokens, f.grad.size(2)};
  move_rows<T, W>(plan, IdsCheck(plan.ids_restore, batch, tokens, tokens, 0), stream);
}

// (grad_fill, grad_pos), of shape [0] where not needed.
inline std::tuple<Tensor, Tensor> fill_and_pos_gradient(const FillGradient& f, cudaStream_t stream) {
  const std::int64_t batch = f.grad.size(0), tokens = f.ids_restore.size(1), channels = f.grad.size(2);
  Tensor grad_fill = !f.need_fill      ? empty_like_device(f.grad, {0})
                     : f.fill_dim == 1 ? empty_like_device(f.grad, {channels})
                     : f.fill_dim == 2 ? empty_like_device(f.grad, {tokens, channels})
                                       : empty_like_device(f.grad, {batch, tokens, channels});
  Tensor grad_pos = f.need_pos ? empty_like_device(f.grad, {f.grad.size(1), channels}) : empty_like_device(f.grad, {0});
  dispatch_floats(f.grad.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const RowStrides strides = row_strides(f.grad);
    dispatch_width<T>(vector_width<T>({channels, strides.batch, strides.row}, {const_data<T>(f.grad)}), [&](auto w) {
      const bool summed_fill = f.need_fill && f.fill_dim < 3;
      if (f.need_fill && !summed_fill) fill_each_row<T, w()>(f, grad_fill, stream);
      if (!summed_fill && !f.need_pos) return;
      sum_over_batch<T, w()>(f, summed_fill ? std::optional(grad_fill) : std::nullopt,
                             f.need_pos ? std::optional(grad_pos) : std::nullopt, stream);
    });
  });
  return {grad_fill, grad_pos};
}

// Forward of both ops. x: kept rows; out [B, P + N, D].
inline void restore_rows(const Tensor& x, const Tensor& ids_restore, const Slots& slots, const Tensor& fill,
                         const std::optional<Tensor>& pos, const Tensor& out, Function function, cudaStream_t stream) {
  const std::int64_t batch = ids_restore.size(0), tokens = ids_restore.size(1), channels = out.size(2);
  const IdsCheck check(const_data<std::int64_t>(ids_restore), batch, tokens, tokens, 0);
  dispatch_floats(out.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const RestoreRows<T> rows{const_data<T>(x), row_strides(x), slots, check.ids, const_data<T>(fill),
                              fill_strides(fill.dim(), tokens, channels), const_data_or_null<T>(pos), data<T>(out),
                              batch * out.size(1), tokens, channels};
    const int width = vector_width<T>({channels, rows.strides.batch, rows.strides.row}, {rows.x, rows.fill, rows.pos, rows.out});
    dispatch_width<T>(width, [&](auto w) {
      launch(restore_rows_kernel<T, w()>, grid_for(check.blocks + ceil_div(rows.rows, kRowWarps), 1), dim3(kRowThreads), 0, stream,
             rows, check, function);
    });
  });
}

}  // namespace maskops
