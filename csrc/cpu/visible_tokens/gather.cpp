// gather, restore, pack and unpack on the CPU: each becomes a map of rows, then one pass of a row kernel.
#include "cpu/visible_tokens/rows.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/ids.h"
#include "math/visible_tokens_check.h"

namespace maskops {
namespace {

using Map = std::vector<int64_t>;

const int64_t* ids_data(const Tensor& ids) { return static_cast<const int64_t*>(ids.const_data_ptr()); }

void run_copy(const Tensor& source, const Map& map, const Tensor& out, int64_t row_bytes) {
  const int64_t rows = static_cast<int64_t>(map.size());
  if (rows == 0 || row_bytes == 0) return;
  const CopyRows args{static_cast<const char*>(source.const_data_ptr()), map.data(), static_cast<char*>(out.mutable_data_ptr()),
                      row_bytes, rows * row_bytes > kStreamBytes};
  const RowKernels& kernels = pick_RowKernels();
  parallel_for(rows, row_bytes * 2, [&](int64_t begin, int64_t end) { kernels.copy(args, begin, end); });
}

// ---- gather

// Check, map and copy in one visit of a sample: three loops over threads would cost as much as a small gather itself. A faulty
// sample is not copied, and its fault is thrown after the loop.
void gather_samples(const Tensor& x, const Tensor& ids, const Tensor& out) {
  const int64_t slots = ids.size(1), size = static_cast<int64_t>(x.element_size()), row_bytes = x.size(2) * size;
  const RowStrides strides = row_strides(x);
  IdCheck check("gather_tokens", "ids", ids_data(ids), slots, x.size(1), -1);
  const CopyRows all{static_cast<const char*>(x.const_data_ptr()), nullptr, static_cast<char*>(out.mutable_data_ptr()), row_bytes,
                     ids.numel() * row_bytes > kStreamBytes};
  const RowKernels& kernels = pick_RowKernels();
  const int64_t* id = ids_data(ids);  // outside of the loop: the stable ABI's accessors are calls
  parallel_for(ids.size(0), slots * (row_bytes * 2 + 16), [&](int64_t begin, int64_t end) {
    TokenMarks marks = check.scratch();
    Map map(slots);
    CopyRows own = all;
    own.map = map.data();
    for (int64_t b = begin; b < end; ++b) {
      if (!check.row(b, marks)) continue;
      for (int64_t k = 0; k < slots; ++k) {
        const int64_t n = id[b * slots + k];
        map[k] = n < 0 ? -1 : strides.at(b, n) * size;
      }
      own.out = all.out + b * slots * row_bytes;
      kernels.copy(own, 0, slots);
    }
  });
  check.raise();
}

Tensor visible_tokens_gather(const Tensor& x_any, const Tensor& ids_any) {
  constexpr int64_t kManySamples = 8;  // fewer are shared among the threads row by row
  check_gather(x_any, ids_any);
  const Tensor x = with_contiguous_rows(x_any), ids = contiguous_or_copy(ids_any);
  const int64_t batch = ids.size(0), slots = ids.size(1), channels = x.size(2);
  Tensor out = empty_like_device(x, {batch, slots, channels});
  if (batch >= kManySamples) {
    gather_samples(x, ids, out);
    return out;
  }
  check_ids("gather_tokens", "ids", ids_data(ids), batch, slots, x.size(1), -1);
  const int64_t size = static_cast<int64_t>(x.element_size());
  const RowStrides strides = row_strides(x);
  const int64_t* id = ids_data(ids);
  Map map(batch * slots);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t k = 0; k < slots; ++k) {
      const int64_t n = id[b * slots + k];
      map[b * slots + k] = n < 0 ? -1 : strides.at(b, n) * size;
    }
  }
  run_copy(x, map, out, channels * size);
  return out;
}

Tensor gather_backward(const Tensor& grad_any, const Tensor& ids_any, int64_t tokens) {
  check_gather_backward(grad_any, ids_any, tokens);
  const Tensor grad = with_contiguous_rows(grad_any), ids = contiguous_or_copy(ids_any);
  const int64_t batch = ids.size(0), slots = ids.size(1), channels = grad.size(2);
  check_ids("gather_tokens", "ids", ids_data(ids), batch, slots, tokens, -1);
  const int64_t size = static_cast<int64_t>(grad.element_size());
  const RowStrides strides = row_strides(grad);
  const int64_t* id = ids_data(ids);
  Map map(batch * tokens, -1);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t k = 0; k < slots; ++k) {
      const int64_t n = id[b * slots + k];
      if (n >= 0) map[b * tokens + n] = strides.at(b, k) * size;
    }
  }
  Tensor out = empty_like_device(grad, {batch, tokens, channels});
  run_copy(grad, map, out, channels * size);
  return out;
}

// ---- restore and unpack: the visible rows of a sample start at row first(b), count(b) of them

struct Slots {
  std::vector<SlotRows> rows;  // [B]

  static Slots padded(const int64_t* num_keep, int64_t batch, int64_t prefix, int64_t slots) {
    Slots out;
    for (int64_t b = 0; b < batch; ++b) out.rows.push_back({b * (prefix + slots) + prefix, num_keep[b]});
    return out;
  }
  static Slots packed(const int32_t* starts, int64_t batch) {
    Slots out;
    for (int64_t b = 0; b < batch; ++b) out.rows.push_back({starts[b], starts[b + 1] - starts[b]});
    return out;
  }
};

void check_packed_data(const char* op, const int32_t* starts, int64_t batch, int64_t tokens, int64_t total) {
  if (starts[0] != 0) fail(op, "cu_seqlens[0]", "start at 0", starts[0]);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t count = static_cast<int64_t>(starts[b + 1]) - starts[b];
    if (count < 0 || count > tokens) {
      fail(op, "row lengths of cu_seqlens[" + std::to_string(b) + "]", "be in [0, " + std::to_string(tokens) + "]", count);
    }
  }
  if (starts[batch] > total) fail(op, "last cu_seqlens[0]", "be at most total = " + std::to_string(total), starts[batch]);
}

// Per row (b, r) of [B, P + N]: the row of the sample's prefix or slot as offset(row), or -1 where it is filled.
template <class Offset>
Map restore_map(const Slots& slots, const int64_t* restore, int64_t tokens, int64_t prefix, const Offset& offset) {
  const int64_t batch = static_cast<int64_t>(slots.rows.size()), rows = prefix + tokens;
  Map map(batch * rows);
  parallel_for(batch, rows * 16, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const SlotRows own = slots.rows[b];
      for (int64_t p = 0; p < prefix; ++p) map[b * rows + p] = offset(b, p - prefix, own);
      for (int64_t n = 0; n < tokens; ++n) {
        const int64_t slot = restore[b * tokens + n];
        map[b * rows + prefix + n] = slot < own.count ? offset(b, slot, own) : -1;
      }
    }
  });
  return map;
}

void run_restore(const Tensor& source, const Map& map, const Tensor& fill_any, const std::optional<Tensor>& pos_any,
                 const Tensor& out, int64_t prefix) {
  const int64_t rows = out.size(1), channels = out.size(2);
  if (map.empty() || channels == 0) return;
  const Tensor fill = contiguous_or_copy(fill_any);
  std::optional<Tensor> pos;
  if (pos_any) pos = contiguous_or_copy(*pos_any);
  const RowStrides fill_rows = fill_strides(fill.dim(), rows - prefix, channels);
  const int64_t row_bytes = channels * static_cast<int64_t>(out.element_size());
  const RestoreRows args{static_cast<int>(dtype_of(out)), source.const_data_ptr(), map.data(), fill.const_data_ptr(),
                         fill_rows.batch, fill_rows.row, pos ? pos->const_data_ptr() : nullptr, out.mutable_data_ptr(),
                         rows, prefix, channels, static_cast<int64_t>(map.size()) * row_bytes > kStreamBytes};
  const RowKernels& kernels = pick_RowKernels();
  parallel_for(static_cast<int64_t>(map.size()), row_bytes * 2, [&](int64_t begin, int64_t end) { kernels.restore(args, begin, end); });
}

Tensor visible_tokens_restore(const Tensor& x_any, const Tensor& restore_any, const Tensor& num_keep_any, const Tensor& fill,
                              std::optional<Tensor> pos, int64_t prefix) {
  check_restore(x_any, restore_any, num_keep_any, fill, pos, prefix);
  const Tensor x = with_contiguous_rows(x_any), restore = contiguous_or_copy(restore_any);
  const Tensor num_keep = contiguous_or_copy(num_keep_any);
  const int64_t batch = restore.size(0), tokens = restore.size(1), slots = x.size(1) - prefix;
  check_ids("restore_tokens", "ids_restore", ids_data(restore), batch, tokens, tokens, 0);
  check_counts("restore_tokens", "num_keep", ids_data(num_keep), batch, std::min(slots, tokens));
  const RowStrides strides = row_strides(x);
  const Slots kept = Slots::padded(ids_data(num_keep), batch, prefix, slots);
  auto offset = [&](int64_t b, int64_t slot, SlotRows) { return strides.at(b, prefix + slot); };
  const Map map = restore_map(kept, ids_data(restore), tokens, prefix, offset);
  Tensor out = empty_like_device(x, {batch, prefix + tokens, x.size(2)});
  run_restore(x, map, fill, pos, out, prefix);
  return out;
}

Tensor visible_tokens_unpack(const Tensor& packed_any, const Tensor& restore_any, const Tensor& starts_any, const Tensor& fill) {
  check_unpack(packed_any, restore_any, starts_any, fill);
  const Tensor packed = with_contiguous_rows(packed_any), restore = contiguous_or_copy(restore_any);
  const Tensor cu_seqlens = contiguous_or_copy(starts_any);
  const int32_t* starts = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t batch = restore.size(0), tokens = restore.size(1), row = packed.stride(0);
  check_ids("unpack_tokens", "ids_restore", ids_data(restore), batch, tokens, tokens, 0);
  check_packed_data("unpack_tokens", starts, batch, tokens, packed.size(0));
  auto offset = [&](int64_t, int64_t slot, SlotRows own) { return (own.first + slot) * row; };
  const Map map = restore_map(Slots::packed(starts, batch), ids_data(restore), tokens, 0, offset);
  Tensor out = empty_like_device(packed, {batch, tokens, packed.size(1)});
  run_restore(packed, map, fill, std::nullopt, out, 0);
  return out;
}

// ---- gradients of restore and unpack

struct Need {
  bool x, fill, pos;
};

Tensor empty_or(bool needed, const Tensor& like, std::initializer_list<int64_t> sizes) {
  return needed ? empty_like_device(like, sizes) : empty_like_device(like, {0});
}

Tensor empty_fill(const Tensor& grad, int64_t tokens, int64_t fill_dim) {
  const int64_t batch = grad.size(0), channels = grad.size(2);
  if (fill_dim == 1) return empty_like_device(grad, {channels});
  return fill_dim == 2 ? empty_like_device(grad, {tokens, channels}) : empty_like_device(grad, {batch, tokens, channels});
}

// Slots of grad_x that no row of grad reaches are the padding of ragged rows: they are set to zero.
void zero_unreached(const Tensor& grad_x, int64_t first, int64_t last) {
  const int64_t bytes = grad_x.size(grad_x.dim() - 1) * static_cast<int64_t>(grad_x.element_size());
  char* data = static_cast<char*>(grad_x.mutable_data_ptr());
  std::fill(data + first * bytes, data + last * bytes, char{0});
}

void run_restore_gradient(const Tensor& grad, const Map& map, const Tensor& grad_x, const Tensor& grad_fill, const Tensor& grad_pos,
                          int64_t prefix, int64_t fill_dim, Need need) {
  const int64_t batch = grad.size(0), rows = grad.size(1), channels = grad.size(2);
  const int64_t chunks = (rows + RestoreGradient::kChunk - 1) / RestoreGradient::kChunk;
  const bool one_token = need.fill && fill_dim == 1;
  const ScalarType sums = accumulation_type(grad.scalar_type());
  Tensor partial = empty_like_device(grad, {one_token ? chunks * channels : 0}, sums);
  const RowStrides strides = row_strides(grad);
  RestoreGradient args{};
  args.dtype = static_cast<int>(dtype_of(grad));
  args.grad = grad.const_data_ptr();
  args.grad_batch = strides.batch;
  args.grad_row = strides.row;
  args.map = map.data();
  args.grad_x = need.x ? grad_x.mutable_data_ptr() : nullptr;
  args.grad_fill = need.fill && !one_token ? grad_fill.mutable_data_ptr() : nullptr;
  args.partial = one_token ? partial.mutable_data_ptr() : nullptr;
  args.grad_pos = need.pos ? grad_pos.mutable_data_ptr() : nullptr;
  args.sums_fill_rows = need.fill && fill_dim == 2;
  args.batch = batch, args.rows = rows, args.prefix = prefix, args.channels = channels;
  const RowKernels& kernels = pick_RowKernels();
  const int64_t work = RestoreGradient::kChunk * batch * channels * static_cast<int64_t>(grad.element_size());
  parallel_for(chunks, work, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(2 * channels);
    kernels.restore_gradient(args, scratch.data(), begin, end);
  });
  if (one_token) kernels.sum_partials(args.dtype, args.partial, chunks, channels, grad_fill.mutable_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> restore_backward(const Tensor& grad_any, const Tensor& restore_any, const Tensor& num_keep_any,
                                                    int64_t slots, int64_t prefix, int64_t fill_dim, bool need_x, bool need_fill,
                                                    bool need_pos) {
  check_restore_backward(grad_any, restore_any, num_keep_any, prefix, fill_dim, slots);
  const Tensor grad = with_contiguous_rows(grad_any), restore = contiguous_or_copy(restore_any);
  const Tensor num_keep = contiguous_or_copy(num_keep_any);
  const int64_t batch = grad.size(0), tokens = restore.size(1), channels = grad.size(2), width = prefix + slots;
  check_ids("restore_tokens", "ids_restore", ids_data(restore), batch, tokens, tokens, 0);
  check_counts("restore_tokens", "num_keep", ids_data(num_keep), batch, std::min(slots, tokens));
  Tensor grad_x = empty_or(need_x, grad, {batch, width, channels});
  Tensor grad_fill = need_fill ? empty_fill(grad, tokens, fill_dim) : empty_like_device(grad, {0});
  Tensor grad_pos = empty_or(need_pos, grad, {prefix + tokens, channels});
  const Slots kept = Slots::padded(ids_data(num_keep), batch, prefix, slots);
  auto offset = [&](int64_t, int64_t slot, SlotRows own) { return (own.first + slot) * channels; };
  const Map map = restore_map(kept, ids_data(restore), tokens, prefix, offset);
  if (need_x) {
    for (int64_t b = 0; b < batch; ++b) zero_unreached(grad_x, kept.rows[b].first + kept.rows[b].count, (b + 1) * width);
  }
  if (need_fill) zero_unreached(grad_fill, 0, grad_fill.numel() / std::max<int64_t>(channels, 1));
  run_restore_gradient(grad, map, grad_x, grad_fill, grad_pos, prefix, fill_dim, {need_x, need_fill, need_pos});
  return {grad_x, grad_fill, grad_pos};
}

std::tuple<Tensor, Tensor> unpack_backward(const Tensor& grad_any, const Tensor& restore_any, const Tensor& starts_any, int64_t total,
                                           int64_t fill_dim, bool need_packed, bool need_fill) {
  check_unpack_backward(grad_any, restore_any, starts_any, total, fill_dim);
  const Tensor grad = with_contiguous_rows(grad_any), restore = contiguous_or_copy(restore_any);
  const Tensor cu_seqlens = contiguous_or_copy(starts_any);
  const int32_t* starts = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t batch = grad.size(0), tokens = grad.size(1), channels = grad.size(2);
  check_ids("unpack_tokens", "ids_restore", ids_data(restore), batch, tokens, tokens, 0);
  check_packed_data("unpack_tokens", starts, batch, tokens, total);
  Tensor grad_packed = empty_or(need_packed, grad, {total, channels});
  Tensor grad_fill = need_fill ? empty_fill(grad, tokens, fill_dim) : empty_like_device(grad, {0});
  auto offset = [&](int64_t, int64_t slot, SlotRows own) { return (own.first + slot) * channels; };
  const Map map = restore_map(Slots::packed(starts, batch), ids_data(restore), tokens, 0, offset);
  if (need_packed) zero_unreached(grad_packed, starts[batch], total);
  if (need_fill) zero_unreached(grad_fill, 0, grad_fill.numel() / std::max<int64_t>(channels, 1));
  run_restore_gradient(grad, map, grad_packed, grad_fill, grad_fill, 0, fill_dim, {need_packed, need_fill, false});
  return {grad_packed, grad_fill};
}

Tensor visible_tokens_pack(const Tensor& x_any, const Tensor& restore_any, const Tensor& starts_any, int64_t total) {
  check_pack(x_any, restore_any, starts_any, total);
  const Tensor x = with_contiguous_rows(x_any), restore = contiguous_or_copy(restore_any);
  const Tensor cu_seqlens = contiguous_or_copy(starts_any);
  const int32_t* starts = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2), size = static_cast<int64_t>(x.element_size());
  check_ids("pack_tokens", "ids_restore", ids_data(restore), batch, tokens, tokens, 0);
  check_packed_data("pack_tokens", starts, batch, tokens, total);
  const RowStrides strides = row_strides(x);
  Map map(total, -1);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t n = 0; n < tokens; ++n) {
      const int64_t slot = ids_data(restore)[b * tokens + n];
      if (slot < starts[b + 1] - starts[b]) map[starts[b] + slot] = strides.at(b, n) * size;
    }
  }
  Tensor packed = empty_like_device(x, {total, channels});
  run_copy(x, map, packed, channels * size);
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("visible_tokens_gather", TORCH_BOX(&visible_tokens_gather));
  m.impl("_visible_tokens_gather_backward", TORCH_BOX(&gather_backward));
  m.impl("visible_tokens_restore", TORCH_BOX(&visible_tokens_restore));
  m.impl("_visible_tokens_restore_backward", TORCH_BOX(&restore_backward));
  m.impl("visible_tokens_pack", TORCH_BOX(&visible_tokens_pack));
  m.impl("visible_tokens_unpack", TORCH_BOX(&visible_tokens_unpack));
  m.impl("_visible_tokens_unpack_backward", TORCH_BOX(&unpack_backward));
}

}  // namespace maskops
#endif
