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
constexpr int64_t kAmxQueries = 8;  // fewer leave most of a tile register empty
constexpr int64_t kTilesPerPart = 8;    // 512 keys at least: merging costs a hundredth of reading them
constexpr int64_t kMostHeadParts = 256;  // parts of all heads, each with the sums of a tile of queries

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

// The inputs of the kernels, and the tensors they point into.
struct Call {
  Tensor q, k, v;
  std::optional<Tensor> tiles, words, bias;
  Attention args{};

  Call(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, double scale)
      : q(with_contiguous_rows(q_any)), k(with_contiguous_rows(k_any)), v(with_contiguous_rows(v_any)) {
    args.dtype = static_cast<int>(dtype_of(q));
    args.B = q.size(0), args.H = q.size(1), args.L = q.size(2), args.D = q.size(3);
    args.G = k.size(1), args.S = k.size(2);
    args.q = rows_of(q), args.k = rows_of(k), args.v = rows_of(v);
    args.scale = scale, args.keep_scale = 1, args.parts = 1;
    args.amx = dtype_of(q) == Dtype::kBFloat16 && args.L >= kAmxQueries && use_amx();
  }

  void set_mask(const std::optional<Tensor>& tiles_any, const std::optional<Tensor>& words_any) {
    if (!tiles_any) return;
    tiles = contiguous_or_copy(*tiles_any), words = contiguous_or_copy(*words_any);
    check_tiles(*tiles, words->size(0));
    args.tiles = static_cast<const int32_t*>(tiles->const_data_ptr());
    args.words = static_cast<const uint64_t*>(words->const_data_ptr());
    const int64_t each = args.query_tiles() * args.key_tiles();
    args.tiles_batch = tiles->size(0) == 1 ? 0 : tiles->size(1) * each;
    args.tiles_head = tiles->size(1) == 1 ? 0 : each;
  }

  void set_bias(const std::optional<Tensor>& bias_any) {
    if (!bias_any) return;
    bias = with_contiguous_rows(*bias_any);
    args.bias = rows_of(*bias);
    args.bias_B = bias->size(0), args.bias_H = bias->size(1), args.bias_L = bias->size(2);
    if (args.bias_B == 1) args.bias.batch = 0;
    if (args.bias_H == 1) args.bias.head = 0;
    if (args.bias_L == 1) args.bias.row = 0;
  }

  void set_dropout(const std::optional<Tensor>& seed_any, double dropout_p) {
    if (!seed_any) return;
    const Tensor seed = contiguous_or_copy(*seed_any);
    const int64_t* words = static_cast<const int64_t*>(seed.const_data_ptr());
    args.key = PhiloxKey::of(words[0], words[1]);
    args.drop_below = static_cast<uint32_t>(dropout_p * 4294967296.0), args.keep_scale = 1 / (1 - dropout_p);
  }

  // Parts into which the tiles of a head are cut where there are too few heads for the threads.
  static int64_t parts(int64_t heads, int64_t tiles) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t wanted = threads == 1 ? 1 : (kItemsPerThread * threads + heads - 1) / std::max<int64_t>(1, heads);
    return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, tiles));
  }

  int64_t work(int64_t items) const { return 4 * args.B * args.H * args.L * args.S * args.D / std::max<int64_t>(1, items) / 8; }
};

// A few queries of many keys, as in generation: the keys of a head are cut into parts whose results are merged. How many follows
// from the sizes alone, so that results do not depend on the number of threads.
int64_t parts_of_keys(const Attention& args) {
  if (args.query_tiles() != 1) return 1;
  return std::max<int64_t>(1, std::min<int64_t>(args.key_tiles() / kTilesPerPart, kMostHeadParts / (args.B * args.H)));
}

void run_forward(Call& call) {
  Attention& args = call.args;
  const ForwardKernels& kernels = pick_ForwardKernels();
  args.parts = parts_of_keys(args);
  const int64_t heads = args.B * args.H, rows = args.query_tiles(), columns = args.key_tiles(), bytes = kernels.bytes(args);
  const Buffer partial(args.parts > 1 ? heads * args.parts * kernels.partial_bytes(args) : 0);
  args.partial = partial.get();
  const int64_t parts = args.parts > 1 ? args.parts : Call::parts(heads, rows);
  parallel_for(heads * parts, call.work(heads * parts), [&](int64_t begin, int64_t end) {
    const Buffer buffer(bytes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / parts, part = i % parts;
      AttentionItem item{head / args.H, head % args.H, {0, rows}, {0, columns}, part, false, false};
      if (args.parts > 1) item.keys = {part * columns / parts, (part + 1) * columns / parts};
      else item.queries = {part * rows / parts, (part + 1) * rows / parts};
      kernels.run(args, item, buffer.get());
    }
  });
  if (args.parts == 1) return;
  parallel_for(heads, args.parts * args.L * args.D, [&](int64_t begin, int64_t end) {
    const Buffer buffer(bytes);
    for (int64_t head = begin; head < end; ++head) kernels.merge(args, head / args.H, head % args.H, buffer.get());
  });
}

std::tuple<Tensor, Tensor, Tensor> masked_attention(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> tiles,
                                                    std::optional<Tensor> words, std::optional<Tensor> bias, std::optional<Tensor> seed,
                                                    double scale, double dropout_p, bool want_entropy) {
  check_masked_attention({q, k, v, tiles, words, bias, seed, dropout_p});
  Call call(q, k, v, scale);
  call.set_mask(tiles, words), call.set_bias(bias), call.set_dropout(seed, dropout_p);
  Attention& args = call.args;
  const ScalarType sums = accumulation_type(q.scalar_type());
  Tensor out = empty_like_device(q, {args.B, args.H, args.L, args.D}), lse = empty_like_device(q, {args.B, args.H, args.L}, sums);
  Tensor entropy = empty_like_device(q, {args.B, args.H, want_entropy ? args.L : 0}, sums);
  if (lse.numel() == 0) return {out, lse, entropy};
  args.out = out.mutable_data_ptr(), args.lse = lse.mutable_data_ptr();
  if (want_entropy) args.entropy = entropy.mutable_data_ptr();
  run_forward(call);
  return {out, lse, entropy};
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
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / parts, part = i % parts;
        AttentionItem item{head / args.G, head % args.G, {0, rows}, {0, columns}, 0, grad_q, grad_kv};
        if (by_query) item.queries = {part * rows / parts, (part + 1) * rows / parts};
        else item.keys = {part * columns / parts, (part + 1) * columns / parts};
        kernels.run(args, item, buffer.get());
      }
    });
  };
  if (heads >= 2 * torch::stable::get_num_threads() || torch::stable::get_num_threads() == 1) return run(1, false, true, true);
  run(Call::parts(heads, columns), false, false, true);
  run(Call::parts(heads, rows), true, true, false);
}

// What the gradients read.
struct GradientCall : Call {
  Tensor grad, grad_lse, grad_entropy, out, lse, entropy;

  explicit GradientCall(const GradientArgs& given)
      : Call(given.q, given.k, given.v, given.scale), grad(with_contiguous_rows(given.grad)), grad_lse(contiguous_or_copy(given.grad_lse)),
        grad_entropy(contiguous_or_copy(given.grad_entropy)), out(contiguous_or_copy(given.out)), lse(contiguous_or_copy(given.lse)),
        entropy(contiguous_or_copy(given.entropy)) {
    set_mask(given.tiles, given.words), set_bias(given.bias), set_dropout(given.seed, given.dropout_p);
    args.grad = rows_of(grad);
    args.grad_lse = grad_lse.const_data_ptr(), args.of_out = out.const_data_ptr(), args.of_lse = lse.const_data_ptr();
    if (entropy.numel() == 0) return;
    args.grad_entropy = grad_entropy.const_data_ptr(), args.of_entropy = entropy.const_data_ptr();
  }
};

std::tuple<Tensor, Tensor, Tensor> masked_attention_backward(const Tensor& grad, const Tensor& grad_lse, const Tensor& grad_entropy,
                                                             const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                                                             const Tensor& lse, const Tensor& entropy, std::optional<Tensor> tiles,
                                                             std::optional<Tensor> words, std::optional<Tensor> bias,
                                                             std::optional<Tensor> seed, double scale, double dropout_p) {
  const GradientArgs given{{q, k, v, tiles, words, bias, seed, dropout_p}, grad, grad_lse, grad_entropy, out, lse, entropy, scale};
  check_masked_attention_backward(given);
  GradientCall call(given);
  Attention& args = call.args;
  Tensor grad_q = empty_like_device(q, {args.B, args.H, args.L, args.D});
  Tensor grad_k = empty_like_device(k, {args.B, args.G, args.S, args.D}), grad_v = empty_like_device(v, {args.B, args.G, args.S, args.D});
  args.grad_q = grad_q.mutable_data_ptr(), args.grad_k = grad_k.mutable_data_ptr(), args.grad_v = grad_v.mutable_data_ptr();
  if (args.B * args.G > 0) run_backward(call);
  return {grad_q, grad_k, grad_v};
}

Tensor masked_attention_grad_bias(const Tensor& grad, const Tensor& grad_lse, const Tensor& grad_entropy, const Tensor& q,
                                  const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& entropy,
                                  std::optional<Tensor> tiles, std::optional<Tensor> words, std::optional<Tensor> bias,
                                  std::optional<Tensor> seed, double scale, double dropout_p) {
  const GradientArgs given{{q, k, v, tiles, words, bias, seed, dropout_p}, grad, grad_lse, grad_entropy, out, lse, entropy, scale};
  check_masked_attention_backward(given);
  if (!bias) fail("masked_attention", "bias", "be given", "None");
  GradientCall call(given);
  Attention& args = call.args;
  Tensor grad_bias = empty_like_device(q, {args.bias_B, args.bias_H, args.bias_L, args.S});
  args.grad_bias = grad_bias.mutable_data_ptr();
  const BackwardKernels& kernels = pick_BackwardKernels();
  const int64_t columns = args.key_tiles(), items = args.bias_B * args.bias_H * columns, bytes = kernels.bias_bytes(args);
  parallel_for(items, call.work(items) * 2, [&](int64_t begin, int64_t end) {
    const Buffer buffer(bytes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / columns, kt = i % columns;
      kernels.run_bias(args, {head / args.bias_H, head % args.bias_H, {0, args.query_tiles()}, {kt, kt + 1}, 0, false, false}, buffer.get());
    }
  });
  return grad_bias;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("masked_attention", TORCH_BOX(&masked_attention));
  m.impl("_masked_attention_backward", TORCH_BOX(&masked_attention_backward));
  m.impl("_masked_attention_grad_bias", TORCH_BOX(&masked_attention_grad_bias));
}

}  // namespace maskops
#endif
