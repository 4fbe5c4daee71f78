// embed_patches on the CPU: checks, the tables of patch positions, buffers and threads around the kernels.
#include "cpu/visible_tokens/embed.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "common/buffer.h"
#include "common/dispatch.h"
#include "common/ids.h"
#include "math/visible_tokens_check.h"

namespace maskops {
namespace {

constexpr const char* kOp = "embed_patches";
// Slots whose patches are packed at a time for grad_weight: bounds the buffer, and fixes the order of the additions.
constexpr int64_t kSlotsPerPass = 4096;

const void* data_or_null(const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }

std::optional<Tensor> contiguous(const std::optional<Tensor>& x) {
  if (!x) return std::nullopt;
  return contiguous_or_copy(*x);
}

// What the kernels need to know about one call, and the tables they point into.
struct Call {
  PatchGrid grid;
  int64_t batch, slots;
  Tensor images, weight;
  std::optional<Tensor> ids;
  std::vector<int64_t> starts, tokens, runs;
  const EmbedKernels& kernels = pick_EmbedKernels();
  Embed args{};

  Call(const PatchGrid& grid_of, const Tensor& images_any, const Tensor& weight_any, const std::optional<Tensor>& ids_any)
      : grid(grid_of), batch(images_any.size(0)), images(contiguous_or_copy(images_any)),
        weight(contiguous_or_copy(weight_any)), ids(contiguous(ids_any)) {
    slots = ids ? ids->size(1) : grid.tokens();
    const int64_t* chosen = static_cast<const int64_t*>(data_or_null(ids));
    if (chosen) check_ids(kOp, "ids", chosen, batch, slots, grid.tokens(), -1);
    place_slots(chosen);
    args.dtype = static_cast<int>(dtype_of(images));
    args.products = bf16_products();
    args.rows = batch * slots;
    args.embed = weight.size(0);
    args.values = grid.values();
    args.run = grid.patch_w;
    args.starts = starts.data(), args.tokens = tokens.data(), args.runs = runs.data();
    args.images = images.const_data_ptr(), args.weight = weight.const_data_ptr();
  }

  void place_slots(const int64_t* chosen) {
    starts.resize(batch * slots);
    tokens.resize(batch * slots);
    for (int64_t b = 0, row = 0; b < batch; ++b) {
      for (int64_t k = 0; k < slots; ++k, ++row) {
        tokens[row] = chosen ? chosen[row] : k;
        starts[row] = tokens[row] < 0 ? -1 : b * grid.image_values() + grid.corner(tokens[row]);
      }
    }
    for (int64_t c = 0; c < grid.channels; ++c) {
      for (int64_t r = 0; r < grid.patch_t; ++r) {
        for (int64_t p = 0; p < grid.patch_h; ++p) runs.push_back(c * grid.channel_pixels() + grid.inside(r, p, 0));
      }
    }
  }

  int64_t line_bytes(int64_t width) const { return kEmbedLines * width * static_cast<int64_t>(images.element_size()); }
};

int64_t panels_of(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

// body(span, buffers) over [0, count) in whole panels, with an A block, partial tiles and lines of its own per thread.
template <class Body>
void for_panels(int64_t count, int64_t work, const GemmPlan& plan, int64_t line_bytes, void* b, const Body& body) {
  parallel_for(panels_of(count, plan.panel_rows), work * plan.panel_rows, [&](int64_t begin, int64_t end) {
    const Buffer a(plan.a_bytes), partial(plan.partial_bytes), lines(line_bytes);
    body(Span{begin * plan.panel_rows, std::min(end * plan.panel_rows, count)}, Buffers{a.get(), b, partial.get(), lines.get()});
  });
}

// body(span, buffers) over the packed steps of B.
template <class Body>
void for_steps(const GemmPlan& plan, int64_t line_bytes, void* b, const Body& body) {
  parallel_for(plan.steps, line_bytes / kEmbedLines, [&](int64_t begin, int64_t end) {
    const Buffer lines(line_bytes);
    body(Span{begin, end}, Buffers{nullptr, b, nullptr, lines.get()});
  });
}

Tensor visible_tokens_embed(const Tensor& images, const Tensor& weight, std::optional<Tensor> bias_any, std::optional<Tensor> ids,
                            std::optional<Tensor> pos_any) {
  const PatchGrid grid = check_embed(images, weight, bias_any, ids, pos_any);
  Call call(grid, images, weight, ids);
  const std::optional<Tensor> bias = contiguous(bias_any), pos = contiguous(pos_any);
  Embed& args = call.args;
  Tensor out = empty_like_device(images, {call.batch, call.slots, args.embed});
  if (out.numel() == 0) return out;
  args.bias = data_or_null(bias), args.pos = data_or_null(pos), args.out = out.mutable_data_ptr();
  const GemmPlan plan = call.kernels.plan(args, args.rows, args.embed, args.values);
  const Buffer packed(plan.b_bytes);
  const Buffers shared{nullptr, packed.get(), nullptr, nullptr};
  parallel_for(panels_of(args.embed, plan.panel_cols), plan.panel_cols * args.values * 4,
               [&](int64_t begin, int64_t end) { call.kernels.pack_weight(args, {begin, end}, shared); });
  for_panels(args.rows, args.embed * args.values, plan, 0, packed.get(),
             [&](Span rows, const Buffers& use) { call.kernels.forward(args, rows, use); });
  return out;
}

// ---- gradients

void run_grad_weight(const Call& call, const Tensor& grad_weight) {
  const Embed& args = call.args;
  if (grad_weight.numel() == 0) return;
  const ScalarType type = grad_weight.scalar_type();
  const bool wide = accumulation_type(type) == type;
  const Tensor sums = wide ? grad_weight : empty_like_device(grad_weight, {grad_weight.numel()}, accumulation_type(type));
  const GemmPlan most = call.kernels.plan(args, args.embed, args.values, std::min(args.rows, kSlotsPerPass));
  const Buffer packed(most.b_bytes);
  // No slots at all: one empty pass, which writes zeros.
  for (int64_t begin = 0; begin == 0 || begin < args.rows; begin += kSlotsPerPass) {
    const Span slots{begin, std::min(args.rows, begin + kSlotsPerPass)};
    const int64_t depth = slots.end - slots.begin;
    const GemmPlan plan = call.kernels.plan(args, args.embed, args.values, depth);
    for_steps(plan, call.line_bytes(args.values), packed.get(),
              [&](Span steps, const Buffers& use) { call.kernels.pack_patches(args, slots, steps, use); });
    for_panels(args.embed, args.values * depth, plan, call.line_bytes(args.embed), packed.get(),
               [&](Span channels, const Buffers& use) { call.kernels.grad_weight(args, slots, channels, use, sums.mutable_data_ptr()); });
  }
  if (wide) return;
  parallel_for(grad_weight.numel() / 64 + 1, 64 * 6, [&](int64_t begin, int64_t end) {
    const Span values{begin * 64, std::min<int64_t>(end * 64, grad_weight.numel())};
    call.kernels.narrow(args, sums.const_data_ptr(), values, grad_weight.mutable_data_ptr());
  });
}

void run_grad_images(Call& call, const Tensor& grad_images) {
  Embed& args = call.args;
  if (grad_images.numel() == 0) return;
  char* data = static_cast<char*>(grad_images.mutable_data_ptr());
  const int64_t image_bytes = call.grid.image_values() * static_cast<int64_t>(grad_images.element_size());
  if (call.ids) {  // without ids every pixel belongs to a patch
    parallel_for(call.batch, image_bytes, [&](int64_t begin, int64_t end) {
      std::memset(data + begin * image_bytes, 0, static_cast<size_t>((end - begin) * image_bytes));
    });
  }
  if (args.rows == 0 || args.values == 0) return;
  args.out = data;
  const GemmPlan plan = call.kernels.plan(args, args.rows, args.values, args.embed);
  const Buffer packed(plan.b_bytes);
  for_steps(plan, call.line_bytes(args.values), packed.get(),
            [&](Span steps, const Buffers& use) { call.kernels.pack_weight_rows(args, steps, use); });
  for_panels(args.rows, args.embed * args.values, plan, 0, packed.get(),
             [&](Span rows, const Buffers& use) { call.kernels.grad_images(args, rows, use); });
}

// Position and bias share the sums per token, so that grad is read once.
void run_grad_pos_and_bias(const Call& call, const Tensor& grad_pos, const Tensor& grad_bias, bool need_pos, bool need_bias) {
  const Embed& args = call.args;
  const int64_t tokens = call.grid.tokens(), embed = args.embed;
  if (embed == 0) return;
  std::vector<int64_t> row_of(call.batch * tokens, -1);
  for (int64_t row = 0; row < args.rows; ++row) {
    if (args.tokens[row] >= 0) row_of[row / call.slots * tokens + args.tokens[row]] = row;
  }
  const ScalarType type = call.images.scalar_type(), sum_type = accumulation_type(type);
  const bool wide = sum_type == type;
  const Tensor sums = wide && need_pos ? grad_pos : empty_like_device(call.images, {tokens, embed}, sum_type);
  parallel_for(tokens, call.batch * embed * 4, [&](int64_t begin, int64_t end) {
    call.kernels.sum_slots(args, row_of.data(), call.batch, tokens, {begin, end}, sums.mutable_data_ptr());
  });
  if (need_bias) {
    parallel_for(panels_of(embed, 16), 16 * tokens * 4, [&](int64_t begin, int64_t end) {
      const Span channels{begin * 16, std::min(end * 16, embed)};
      call.kernels.sum_rows(args, sums.const_data_ptr(), tokens, channels, grad_bias.mutable_data_ptr());
    });
  }
  if (need_pos && !wide) {
    parallel_for(tokens, embed * 6, [&](int64_t begin, int64_t end) {
      call.kernels.narrow(args, sums.const_data_ptr(), {begin * embed, end * embed}, grad_pos.mutable_data_ptr());
    });
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> embed_backward(const Tensor& grad_any, const Tensor& images, const Tensor& weight,
                                                          std::optional<Tensor> ids, bool need_images, bool need_weight,
                                                          bool need_bias, bool need_pos) {
  const PatchGrid grid = check_embed_backward(grad_any, images, weight, ids);
  Call call(grid, images, weight, ids);
  const Tensor grad = contiguous_or_copy(grad_any);
  call.args.grad = grad.const_data_ptr();
  const int64_t embed = call.args.embed;
  auto empty = [&](bool needed, std::vector<int64_t> sizes) {
    return torch::stable::new_empty(call.images, needed ? sizes : std::vector<int64_t>{0});
  };
  Tensor grad_images = empty(need_images, sizes_from(call.images, 0));
  Tensor grad_weight = empty(need_weight, sizes_from(call.weight, 0));
  Tensor grad_bias = empty(need_bias, {embed}), grad_pos = empty(need_pos, {grid.tokens(), embed});
  if (need_images) run_grad_images(call, grad_images);
  if (need_weight) run_grad_weight(call, grad_weight);
  if (need_bias || need_pos) run_grad_pos_and_bias(call, grad_pos, grad_bias, need_pos, need_bias);
  return {grad_images, grad_weight, grad_bias, grad_pos};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("visible_tokens_embed", TORCH_BOX(&visible_tokens_embed));
  m.impl("_visible_tokens_embed_backward", TORCH_BOX(&embed_backward));
}

}  // namespace maskops
#endif
