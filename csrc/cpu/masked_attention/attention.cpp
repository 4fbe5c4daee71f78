// masked_attention on the CPU: checks, and how the work is shared by threads.
#include "cpu/masked_attention/attention.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/buffer.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "math/masked_attention_check.h"

namespace maskops {
namespace {

constexpr int64_t kItemsPerThread = 4;

HeadRows rows_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

void check_tiles(const Tensor& tiles, int64_t partial) {
  const int32_t* at = static_cast<const int32_t*>(tiles.const_data_ptr());
  bool good = true;
  for (int64_t i = 0; i < tiles.numel(); ++i) good = good && at[i] >= kMaskFull && at[i] < partial;
  if (good) return;
  for (int64_t i = 0; i < tiles.numel(); ++i) {
    if (at[i] >= kMaskFull && at[i] < partial) continue;
    int64_t rest = i, place[4];
    for (int axis = 3; axis >= 0; --axis) place[axis] = rest % tiles.size(axis), rest /= tiles.size(axis);
    std::ostringstream where;
    where << "tiles[" << place[0] << ", " << place[1] << ", " << place[2] << ", " << place[3] << "]";
    fail_index("masked_attention", where.str(), "be in [-2, " + std::to_string(partial) + ")", std::to_string(at[i]));
  }
}

// The arguments of the kernels, and the tensors they point into.
struct Call {
  Tensor q, k, v;
  std::optional<Tensor> tiles, words;
  Attention args{};

  Call(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const std::optional<Tensor>& tiles_any,
       const std::optional<Tensor>& words_any, double scale)
      : q(with_contiguous_rows(q_any)), k(with_contiguous_rows(k_any)), v(with_contiguous_rows(v_any)) {
    args.dtype = static_cast<int>(dtype_of(q));
    args.B = q.size(0), args.H = q.size(1), args.L = q.size(2), args.D = q.size(3);
    args.G = k.size(1), args.S = k.size(2);
    args.q = rows_of(q), args.k = rows_of(k), args.v = rows_of(v);
    args.scale = scale;
    if (!tiles_any) return;
    tiles = contiguous_or_copy(*tiles_any), words = contiguous_or_copy(*words_any);
    check_tiles(*tiles, words->size(0));
    args.tiles = static_cast<const int32_t*>(tiles->const_data_ptr());
    args.words = static_cast<const uint64_t*>(words->const_data_ptr());
    const int64_t each = args.query_tiles() * args.key_tiles();
    args.tiles_batch = tiles->size(0) == 1 ? 0 : tiles->size(1) * each;
    args.tiles_head = tiles->size(1) == 1 ? 0 : each;
  }

  // Parts into which the tiles of a head are cut where there are too few heads for the threads.
  static int64_t parts(int64_t heads, int64_t tiles) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t wanted = threads == 1 ? 1 : (kItemsPerThread * threads + heads - 1) / std::max<int64_t>(1, heads);
    return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, tiles));
  }

  int64_t work(int64_t items) const { return 4 * args.B * args.H * args.L * args.S * args.D / std::max<int64_t>(1, items) / 8; }
};

std::tuple<Tensor, Tensor> masked_attention(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> tiles,
                                            std::optional<Tensor> words, double scale) {
  check_masked_attention(q, k, v, tiles, words);
  Call call(q, k, v, tiles, words, scale);
  Attention& args = call.args;
  Tensor out = empty_like_device(q, {args.B, args.H, args.L, args.D});
  Tensor lse = empty_like_device(q, {args.B, args.H, args.L}, accumulation_type(q.scalar_type()));
  if (lse.numel() == 0) return {out, lse};
  args.out = out.mutable_data_ptr(), args.lse = lse.mutable_data_ptr();
  const ForwardKernels& kernels = pick_ForwardKernels();
  const int64_t rows = args.query_tiles(), parts = Call::parts(args.B * args.H, rows), items = args.B * args.H * parts;
  const int64_t bytes = kernels.bytes(args);
  parallel_for(items, call.work(items), [&](int64_t begin, int64_t end) {
    const Buffer buffer(bytes);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / parts, part = item % parts;
      kernels.run(args, {head / args.H, head % args.H, {part * rows / parts, (part + 1) * rows / parts}, {0, args.key_tiles()}, false, false},
                  buffer.get());
    }
  });
  return {out, lse};
}

// Heads of k and v are shared by the threads; where they are too few, first tiles of keys are, then, for the gradient of q, tiles of
// queries. Every sum has the same terms in the same order either way.
void run_backward(const Call& call) {
  const Attention& args = call.args;
  const BackwardKernels& kernels = pick_BackwardKernels();
  const int64_t heads = args.B * args.G, bytes = kernels.bytes(args), rows = args.query_tiles(), columns = args.key_tiles();
  auto run = [&](int64_t parts, bool by_query, bool grad_q, bool grad_kv) {
    parallel_for(heads * parts, call.work(heads * parts) * 2, [&](int64_t begin, int64_t end) {
      const Buffer buffer(bytes);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t head = item / parts, part = item % parts;
        AttentionItem some{head / args.G, head % args.G, {0, rows}, {0, columns}, grad_q, grad_kv};
        if (by_query) some.queries = {part * rows / parts, (part + 1) * rows / parts};
        else some.keys = {part * columns / parts, (part + 1) * columns / parts};
        kernels.run(args, some, buffer.get());
      }
    });
  };
  if (heads >= 2 * torch::stable::get_num_threads() || torch::stable::get_num_threads() == 1) return run(1, false, true, true);
  run(Call::parts(heads, columns), false, false, true);
  run(Call::parts(heads, rows), true, true, false);
}

std::tuple<Tensor, Tensor, Tensor> masked_attention_backward(const Tensor& grad_any, const Tensor& grad_lse_any, const Tensor& q,
                                                             const Tensor& k, const Tensor& v, const Tensor& out_any,
                                                             const Tensor& lse_any, std::optional<Tensor> tiles,
                                                             std::optional<Tensor> words, double scale) {
  check_masked_attention_backward(grad_any, grad_lse_any, q, k, v, out_any, lse_any, tiles, words);
  Call call(q, k, v, tiles, words, scale);
  Attention& args = call.args;
  const Tensor grad = with_contiguous_rows(grad_any), grad_lse = contiguous_or_copy(grad_lse_any);
  const Tensor out = contiguous_or_copy(out_any), lse = contiguous_or_copy(lse_any);
  args.grad = rows_of(grad);
  args.grad_lse = grad_lse.const_data_ptr(), args.of_out = out.const_data_ptr(), args.of_lse = lse.const_data_ptr();
  Tensor grad_q = empty_like_device(q, {args.B, args.H, args.L, args.D});
  Tensor grad_k = empty_like_device(k, {args.B, args.G, args.S, args.D}), grad_v = empty_like_device(v, {args.B, args.G, args.S, args.D});
  args.grad_q = grad_q.mutable_data_ptr(), args.grad_k = grad_k.mutable_data_ptr(), args.grad_v = grad_v.mutable_data_ptr();
  if (args.B * args.G > 0) run_backward(call);
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("masked_attention", TORCH_BOX(&masked_attention));
  m.impl("_masked_attention_backward", TORCH_BOX(&masked_attention_backward));
}

}  // namespace maskops
#endif
