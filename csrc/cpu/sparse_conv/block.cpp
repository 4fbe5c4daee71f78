// block_masked_conv, the gradients of its input and of its weight on the CPU.
#include "cpu/sparse_conv/block.h"

#include "cpu/sparse_conv/block_host.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/buffer.h"
#include "common/dispatch.h"
#include "math/sparse_conv_block_check.h"

namespace maskops {
namespace {

// body(item, buffer), items of unequal cost
template <class Body>
void share_items(int64_t count, int64_t work, int64_t bytes, const Body& body) {
  share_out(count, work, [&](const NextItem& next) {
    const Buffer buffer(bytes);
    for (int64_t item; next(&item);) body(item, buffer.get());
  });
}

struct Axis {
  int64_t kernel, stride, padding, from, to;  // from, to: positions of a cell of what is read and of the result
  bool reversed;                              // the result is the finer grid, as for the gradient of x

  // The position that kernel place k reads for position `at` of the result, both counted from the cell's first; false if none.
  bool source(int64_t at, int64_t k, int64_t* found) const {
    if (!reversed) {
      *found = at * stride + k - padding;
      return true;
    }
    *found = at + padding - k;
    const int64_t quotient = *found >= 0 ? *found / stride : -((stride - 1 - *found) / stride);
    const bool exact = quotient * stride == *found;
    *found = quotient;
    return exact;
  }
};

int64_t floor_divide(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Positions of a cell in the order in which a gradient through a stride shares kernel places: by remainder.
std::vector<int64_t> ordered_positions(const Axis& axis) {
  std::vector<int64_t> order;
  const int64_t step = axis.reversed ? axis.stride : 1;
  for (int64_t first = 0; first < step; ++first) {
    for (int64_t at = first; at < axis.to; at += step) order.push_back(at);
  }
  return order;
}

// The rows of a product: every active position of the result, cell by cell.
struct Rows {
  int64_t M, taps;
  std::vector<int32_t> source, target;  // [taps, M], [M]

  // compact: rows of x are those of its active cells alone, cell by cell.
  Rows(const Cells& cells, const Axis& ay, const Axis& ax, bool compact) {
    const int64_t P = ay.to * ax.to;
    M = cells.count() * P, taps = ay.kernel * ax.kernel;
    source.resize(static_cast<size_t>(taps * M));
    target.resize(static_cast<size_t>(M));
    // A kernel place reads one cell in a neighbourhood of ours, at a place within it: the same for all cells.
    std::vector<int64_t> dy(taps * P), dx(taps * P), inside(taps * P);
    std::vector<int64_t> own(P);
    const int64_t from_width = compact ? ax.from : cells.w * ax.from, to_width = cells.w * ax.to;
    int64_t p = 0, reach_y = 0, reach_x = 0;
    const std::vector<int64_t> lines = ordered_positions(ay), columns = ordered_positions(ax);
    for (int64_t y : lines) {
      for (int64_t x : columns) {
        own[p] = y * to_width + x;
        for (int64_t t = 0; t < taps; ++t) {
          int64_t sy, sx;
          const bool found = ay.source(y, t / ax.kernel, &sy) & ax.source(x, t % ax.kernel, &sx);
          const int64_t i = t * P + p;
          dy[i] = floor_divide(sy, ay.from), dx[i] = floor_divide(sx, ax.from);
          inside[i] = found ? (sy - dy[i] * ay.from) * from_width + sx - dx[i] * ax.from : -1;
          reach_y = std::max(reach_y, std::abs(dy[i])), reach_x = std::max(reach_x, std::abs(dx[i]));
        }
        ++p;
      }
    }
    const int64_t across = 2 * reach_x + 1;
    std::vector<int32_t> neighbour(taps * P);
    for (int64_t i = 0; i < taps * P; ++i) {
      neighbour[i] = inside[i] < 0 ? -1 : static_cast<int32_t>((dy[i] + reach_y) * across + dx[i] + reach_x);
    }
    std::vector<int32_t> rank(compact ? cells.B * cells.h * cells.w : 0);
    for (int64_t i = 0; compact && i < cells.count(); ++i) rank[cells.active[i]] = static_cast<int32_t>(i);
    parallel_for(cells.count(), P * taps * 8, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> first((2 * reach_y + 1) * across);
      for (int64_t number = begin; number < end; ++number) {
        const int64_t cell = cells.active[number], image = cell / (cells.h * cells.w);
        const int64_t cy = cell / cells.w % cells.h, cx = cell % cells.w;
        for (int64_t i = 0; i < static_cast<int64_t>(first.size()); ++i) {
          const int64_t y = cy + i / across - reach_y, x = cx + i % across - reach_x;
          const bool seen = y >= 0 && y < cells.h && x >= 0 && x < cells.w && cells.data[(image * cells.h + y) * cells.w + x];
          const int64_t other = (image * cells.h + y) * cells.w + x;
          const int64_t direct = ((image * cells.h + y) * ay.from) * cells.w * ax.from + x * ax.from;
          first[i] = !seen ? INT64_MIN : compact ? rank[other] * ay.from * ax.from : direct;
        }
        const int64_t at = (image * cells.h + cy) * ay.to * to_width + cx * ax.to;
        for (int64_t q = 0; q < P; ++q) target[number * P + q] = static_cast<int32_t>(at + own[q]);
        for (int64_t t = 0; t < taps; ++t) {
          int32_t* to = source.data() + t * M + number * P;
          for (int64_t q = 0; q < P; ++q) {
            const int32_t n = neighbour[t * P + q];
            const int64_t base = n < 0 ? INT64_MIN : first[n];
            to[q] = base < 0 ? -1 : static_cast<int32_t>(base + inside[t * P + q]);
          }
        }
      }
    });
  }
};

// Whether rows of x are multiplied as pairs of channels, as they are.
bool as_pairs(const Tensor& x, int64_t depth) {
  const BlockConvKernels& kernels = pick_BlockConvKernels();
  const bool wide = depth % 2 == 0 && depth >= kernels.few_channels;
  return wide && dtype_of(x) == Dtype::kBFloat16 && kernels.has_pairs && use_bf16_dot();
}

// Whether they are in AMX tiles; channels of the gradient of a weight are rows of a tile and have to fill it.
bool in_amx(const Tensor& x, int64_t depth, bool as_rows) {
  return dtype_of(x) == Dtype::kBFloat16 && depth >= pick_BlockConvKernels().few_channels && (!as_rows || depth % 16 == 0) && use_amx();
}

// x [B, H, W, C] in the precision of sums or as pairs of bfloat16: as it is, or its active cells alone, converted.
struct Source {
  bool compact;
  Buffer wide;
  const void* data;

  Source(const Tensor& x, const Cells& cells, bool as_it_is)
      : compact(!as_it_is && x.scalar_type() != accumulation_type(x.scalar_type())), wide(compact ? bytes_of(x, cells) : 0),
        data(x.const_data_ptr()) {
    if (!compact) return;
    const int64_t ch = x.size(1) / cells.h, cw = x.size(2) / cells.w, C = x.size(3), W = x.size(2);
    const BlockConvKernels& kernels = pick_BlockConvKernels();
    parallel_for(cells.count(), ch * cw * C * 4, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> row(ch * cw);
      for (int64_t number = begin; number < end; ++number) {
        const int64_t cell = cells.active[number], line = cell / cells.w * ch;  // images lie one below the other
        for (int64_t p = 0; p < ch * cw; ++p) row[p] = static_cast<int32_t>((line + p / cw) * W + cell % cells.w * cw + p % cw);
        float* to = static_cast<float*>(wide.get()) + number * ch * cw * C;
        kernels.widen_rows(static_cast<int>(dtype_of(x)), x.const_data_ptr(), row.data(), ch * cw, C, to);
      }
    });
    data = wide.get();
  }
  static int64_t bytes_of(const Tensor& x, const Cells& cells) {
    return cells.count() * (x.size(1) / cells.h) * (x.size(2) / cells.w) * x.size(3) * 4;
  }
};

bool is_depthwise(int64_t C, int64_t O, int64_t groups) { return groups > 1 && groups == C && groups == O; }

Axis axis_of(int64_t kernel, int64_t stride, int64_t padding, int64_t cell, bool reversed) {
  const int64_t coarse = cell / stride;
  return {kernel, stride, padding, reversed ? coarse : cell, reversed ? cell : coarse, reversed};
}

void run_forward(BlockConvArgs& args) {
  const BlockConvKernels& kernels = pick_BlockConvKernels();
  const Buffer packed(kernels.packed_bytes(args));
  args.packed = packed.get();
  const int64_t panels = args.groups * kernels.panels(args);
  parallel_for(panels, args.taps * args.depth * 64, [&](int64_t begin, int64_t end) { kernels.pack(args, begin, end); });
  const int64_t items = kernels.items(args), work = args.M * args.taps * args.depth * args.columns * args.groups / 8;
  share_items(items, work / std::max<int64_t>(1, items), kernels.bytes(args),
              [&](int64_t item, void* buffer) { kernels.forward(args, item, buffer); });
}

DepthwiseArgs depthwise_args(const Tensor& x, const Cells& cells, int64_t H, int64_t W, const Sizes& kernel) {
  DepthwiseArgs args{};
  args.x = x.const_data_ptr();
  args.cells = cells.data, args.active = cells.active.data(), args.count = cells.count();
  args.h = cells.h, args.w = cells.w, args.H = H, args.W = W, args.C = x.size(3);
  args.kh = kernel[0], args.kw = kernel[1], args.sy = args.sx = args.uy = args.ux = 1;
  args.dtype = static_cast<int>(dtype_of(x));
  return args;
}

bool in_twos(const DepthwiseArgs& args) {
  return args.dtype == static_cast<int>(Dtype::kBFloat16) && use_bf16_dot() && args.has_line();
}

// body(begin, end) over channels in whole blocks; each: of the values of a place.
template <class Body>
void each_block(const DepthwiseArgs& args, int64_t each, const Body& body) {
  constexpr int64_t kBlock = DepthwiseArgs::kBlock;
  parallel_for((args.C + kBlock - 1) / kBlock, kBlock * args.taps() * each * 4,
               [&](int64_t begin, int64_t end) { body(begin * kBlock, std::min(args.C, end * kBlock)); });
}

void run_depthwise(DepthwiseArgs& args) {
  const DepthwiseKernels& kernels = pick_DepthwiseKernels();
  args.pairs = in_twos(args);
  const Buffer packed(kernels.packed_bytes(args));
  args.packed = packed.get();
  each_block(args, 1, [&](int64_t begin, int64_t end) { kernels.pack(args, begin, end); });
  share_items(args.count, args.cell_h() * args.cell_w() * args.taps() * args.C / 8, kernels.bytes(args),
              [&](int64_t cell, void* buffer) { kernels.forward(args, cell, buffer); });
}

Tensor sparse_conv_block(const Tensor& x_any, const Tensor& weight_any, std::optional<Tensor> bias_any, const Tensor& cells_any,
                         Sizes stride, Sizes padding, int64_t groups) {
  const WindowSizes sizes = check_block_conv(x_any, weight_any, bias_any, cells_any, stride, padding, groups);
  const Tensor x = as_rows(x_any), weight = contiguous_or_copy(weight_any);
  const std::optional<Tensor> bias = bias_any ? std::optional<Tensor>(contiguous_or_copy(*bias_any)) : std::nullopt;
  const Cells cells(cells_any);
  const int64_t C = x.size(3), O = weight.size(0), H = x.size(1), W = x.size(2);
  Tensor out = empty_images(x, x.size(0), O, sizes.H, sizes.W);
  cells.clear_hidden(out);
  if (cells.count() == 0 || out.numel() == 0) return out;
  const Sizes kernel = kernel_of(weight);
  if (is_depthwise(C, O, groups)) {
    DepthwiseArgs args = depthwise_args(x, cells, H, W, kernel);
    args.weight = weight.const_data_ptr(), args.bias = bias ? bias->const_data_ptr() : nullptr, args.out = out.mutable_data_ptr();
    args.sy = stride[0], args.sx = stride[1], args.py = padding[0], args.px = padding[1];
    run_depthwise(args);
    return out;
  }
  const bool pairs = as_pairs(x, C / groups), amx = in_amx(x, C / groups, false);
  const Source source(x, cells, pairs || amx);
  const Rows rows(cells, axis_of(kernel[0], stride[0], padding[0], H / cells.h, false),
                  axis_of(kernel[1], stride[1], padding[1], W / cells.w, false), source.compact);
  BlockConvArgs args{};
  args.rows = source.data, args.source = rows.source.data(), args.target = rows.target.data();
  args.weight = weight.const_data_ptr(), args.bias = bias ? bias->const_data_ptr() : nullptr, args.out = out.mutable_data_ptr();
  args.M = rows.M, args.taps = rows.taps, args.row_stride = C, args.out_stride = O;
  args.depth = C / groups, args.columns = O / groups, args.groups = groups;
  args.of_depth = args.taps, args.of_column = args.depth * args.taps, args.of_group = args.columns * args.of_column;
  args.dtype = static_cast<int>(dtype_of(x)), args.pairs = pairs, args.amx = amx;
  run_forward(args);
  return out;
}

Tensor sparse_conv_block_grad_input(const Tensor& grad_any, const Tensor& weight_any, const Tensor& cells_any, Sizes size, Sizes stride,
                                    Sizes padding, int64_t groups) {
  check_block_grad_input(grad_any, weight_any, cells_any, size, stride, padding, groups);
  const Tensor grad = as_rows(grad_any), weight = contiguous_or_copy(weight_any);
  const Cells cells(cells_any);
  const int64_t C = weight.size(1) * groups, O = weight.size(0), H = size[0], W = size[1];
  Tensor out = empty_images(grad, grad.size(0), C, H, W);
  cells.clear_hidden(out);
  if (cells.count() == 0 || out.numel() == 0) return out;
  const Sizes kernel = kernel_of(weight);
  if (is_depthwise(C, O, groups)) {
    DepthwiseArgs args = depthwise_args(grad, cells, H, W, kernel);
    args.weight = weight.const_data_ptr(), args.out = out.mutable_data_ptr();
    args.uy = stride[0], args.ux = stride[1], args.py = kernel[0] - 1 - padding[0], args.px = kernel[1] - 1 - padding[1];
    args.flipped = true;
    run_depthwise(args);
    return out;
  }
  const bool pairs = as_pairs(grad, O / groups), amx = in_amx(grad, O / groups, false);
  const Source source(grad, cells, pairs || amx);
  const Rows rows(cells, axis_of(kernel[0], stride[0], padding[0], H / cells.h, true),
                  axis_of(kernel[1], stride[1], padding[1], W / cells.w, true), source.compact);
  BlockConvArgs args{};
  args.rows = source.data, args.source = rows.source.data(), args.target = rows.target.data();
  args.weight = weight.const_data_ptr(), args.out = out.mutable_data_ptr();
  args.M = rows.M, args.taps = rows.taps, args.row_stride = O, args.out_stride = C;
  args.depth = O / groups, args.columns = C / groups, args.groups = groups;
  args.of_column = args.taps, args.of_depth = args.columns * args.taps, args.of_group = args.depth * args.of_depth;
  args.dtype = static_cast<int>(dtype_of(grad)), args.pairs = pairs, args.amx = amx;
  run_forward(args);
  return out;
}

void run_depthwise_weight(DepthwiseArgs& args) {
  const DepthwiseKernels& kernels = pick_DepthwiseKernels();
  args.pairs = in_twos(args);
  const Buffer partial(kernels.partial_bytes(args));
  args.partial = partial.get();
  share_items(args.chunks(), args.count * args.cell_h() * args.cell_w() * args.taps() * args.C / args.chunks() / 8,
              kernels.bytes(args), [&](int64_t chunk, void* buffer) { kernels.weight_chunk(args, chunk, buffer); });
  each_block(args, args.chunks(), [&](int64_t begin, int64_t end) { kernels.sum_chunks(args, begin, end); });
}

std::tuple<Tensor, Tensor> sparse_conv_block_grad_weight(const Tensor& grad_any, const Tensor& x_any, const Tensor& cells_any,
                                                         Sizes kernel, Sizes stride, Sizes padding, int64_t groups) {
  check_block_grad_weight(grad_any, x_any, cells_any, kernel, stride, padding, groups);
  const Tensor grad = as_rows(grad_any), x = as_rows(x_any);
  const Cells cells(cells_any);
  const int64_t C = x.size(3), O = grad.size(3), H = x.size(1), W = x.size(2);
  Tensor grad_weight = empty_like_device(x, {O, C / groups, kernel[0], kernel[1]}), grad_bias = empty_like_device(x, {O});
  if (cells.count() == 0 || grad.numel() == 0) {
    torch::stable::zero_(grad_weight), torch::stable::zero_(grad_bias);
    return {grad_weight, grad_bias};
  }
  if (is_depthwise(C, O, groups)) {
    DepthwiseArgs args = depthwise_args(x, cells, H, W, kernel);
    args.grad = grad.const_data_ptr(), args.grad_weight = grad_weight.mutable_data_ptr(), args.grad_bias = grad_bias.mutable_data_ptr();
    args.sy = stride[0], args.sx = stride[1], args.py = padding[0], args.px = padding[1];
    run_depthwise_weight(args);
    return {grad_weight, grad_bias};
  }
  const bool pairs = as_pairs(x, C / groups), amx = in_amx(x, C / groups, true);
  const Source source(x, cells, pairs || amx);
  const Rows rows(cells, axis_of(kernel[0], stride[0], padding[0], H / cells.h, false),
                  axis_of(kernel[1], stride[1], padding[1], W / cells.w, false), source.compact);
  BlockConvArgs args{};
  args.rows = source.data, args.source = rows.source.data(), args.target = rows.target.data();
  args.grad = grad.const_data_ptr(), args.grad_weight = grad_weight.mutable_data_ptr(), args.grad_bias = grad_bias.mutable_data_ptr();
  args.M = rows.M, args.taps = rows.taps, args.row_stride = C, args.out_stride = O;
  args.depth = C / groups, args.columns = O / groups, args.groups = groups;
  args.dtype = static_cast<int>(dtype_of(x)), args.pairs = pairs, args.amx = amx;
  const BlockConvKernels& kernels = pick_BlockConvKernels();
  const Buffer partial(kernels.partial_bytes(args));
  args.partial = partial.get();
  const int64_t items = kernels.weight_items(args), work = args.M * args.taps * args.depth * O / 8;
  share_items(items, work / std::max<int64_t>(1, items), kernels.bytes(args),
              [&](int64_t item, void* buffer) { kernels.weight_chunk(args, item, buffer); });
  parallel_for(O, args.depth * args.taps * args.chunks() * 4, [&](int64_t begin, int64_t end) { kernels.sum_chunks(args, begin, end); });
  return {grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("sparse_conv_block", TORCH_BOX(&sparse_conv_block));
  m.impl("_sparse_conv_block_grad_input", TORCH_BOX(&sparse_conv_block_grad_input));
  m.impl("_sparse_conv_block_grad_weight", TORCH_BOX(&sparse_conv_block_grad_weight));
}

}  // namespace maskops
#endif
