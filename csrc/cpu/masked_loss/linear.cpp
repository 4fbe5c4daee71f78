// linear_cross_entropy and linear_sample on the CPU: the rows that count are packed once, the classes stream by in tiles of 96. The
// forward pass is one product, the backward pass two, and a third where the logits are made again; else their exponentials lie where
// the gradient of the weight will, which has D columns for them. The floor is the multiply-adds: 2 M V D flops a product against 4
// bytes of weight read (and written) per 2 M of them.
#include "cpu/masked_loss/linear.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "common/buffer.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "math/masked_loss_linear_check.h"

namespace maskops {
namespace {

constexpr const char* kOp = "linear_cross_entropy";
constexpr int64_t kRowUnit = LinearLoss::kRowUnit;
constexpr int64_t kSuperTileBytes = int64_t{1} << 20;  // of a thread, about

// Hidden rows that count for some codebook, and all that is made for them.
class LinearRun {
 public:
  LinearRun(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target, int64_t ignore,
            double scale, double smoothing, double z_loss, bool backward, bool kept)
      : hidden_(with_contiguous_rows(hidden)), weight_(contiguous_or_copy(weight)), target_(contiguous_or_copy(target)),
        bias_(bias ? std::optional<Tensor>(contiguous_or_copy(*bias)) : std::nullopt), ignore_(ignore), books_(weight.size(0)) {
    for (int64_t n = 0; n < hidden.size(0); ++n) {
      const int64_t* row = all_targets() + n * books_;
      if (std::any_of(row, row + books_, [&](int64_t v) { return v != ignore; })) rows_.push_back(n);
    }
    args.rows = rows_.data(), args.M = static_cast<int64_t>(rows_.size());
    args.D = hidden.size(1), args.V = weight.size(1), args.books = books_;
    if (kept) args.kept = args.M <= args.D ? args.M : args.D / LinearLoss::kPanel * LinearLoss::kPanel;
    // An odd number of units: rows of a tile below each other then fall into different sets of the caches.
    args.stride = (args.M + kRowUnit - 1) / kRowUnit | 1;
    args.stride *= kRowUnit;
    args.hidden = hidden_.const_data_ptr(), args.hidden_stride = hidden_.stride(0), args.weight_stride = args.D;
    args.scale = scale, args.smoothing = smoothing, args.z_loss = z_loss, args.inverse_temperature = 1;
    args.dtype = static_cast<int>(dtype_of(hidden));
    args.amx = dtype_of(hidden) == Dtype::kBFloat16 && use_amx();
    targets_.resize(args.M);
    args.target = targets_.data();
    if (empty()) return;
    const int64_t vectors = backward ? 2 : 2 + 4 * args.ranges();
    const LinearBytes bytes = kernels().bytes(args, backward);
    auto aligned = [](int64_t size) { return (size + 63) / 64 * 64; };
    memory_ = std::make_unique<Buffer>(aligned(bytes.across) + aligned(bytes.along) + aligned(bytes.grad_hidden) +
                                       vectors * args.stride * element());
    char* next = static_cast<char*>(memory_->get());
    auto take = [&](int64_t size) { return std::exchange(next, next + aligned(size)); };
    if (bytes.across > 0) args.across = take(bytes.across);
    if (backward) args.along = take(bytes.along), args.grad_hidden = take(bytes.grad_hidden);
    vectors_ = next;
    parallel_for(args.row_panels(), args.D * LinearLoss::kPanel * 8, [&](int64_t begin, int64_t end) { kernels().pack(args, begin, end); });
  }

  const LinearLossKernels& kernels() const { return pick_LinearLossKernels(); }
  bool empty() const { return args.M == 0 || args.V == 0 || books_ == 0; }
  int64_t element() const { return args.dtype == static_cast<int>(Dtype::kDouble) ? 8 : 4; }
  void* at(void* base, int64_t elements) const { return static_cast<char*>(base) + elements * element(); }
  void* vector(int64_t i) const { return at(vectors_, i * args.stride); }
  const int64_t* all_targets() const { return static_cast<const int64_t*>(target_.const_data_ptr()); }

  void use_book(int64_t g) {
    const int64_t bytes = static_cast<int64_t>(weight_.element_size());
    args.book = g;
    args.weight = static_cast<const char*>(weight_.const_data_ptr()) + g * args.V * args.D * bytes;
    args.bias = bias_ ? static_cast<const char*>(bias_->const_data_ptr()) + g * args.V * bytes : nullptr;
    for (int64_t m = 0; m < args.M; ++m) {
      const int64_t v = all_targets()[rows_[m] * books_ + g];
      targets_[m] = v == ignore_ ? -1 : v;
    }
  }

  // Codebook g of x [G, ..].
  static void* part(const Tensor& x, int64_t g) {
    return static_cast<char*>(x.mutable_data_ptr()) + g * (x.numel() / x.size(0)) * static_cast<int64_t>(x.element_size());
  }

  // x [N, G] of codebook g from [M].
  template <class S>
  void scatter(const void* from, int64_t g, Tensor& x) const {
    S* to = static_cast<S*>(x.mutable_data_ptr());
    for (int64_t m = 0; m < args.M; ++m) to[rows_[m] * books_ + g] = static_cast<const S*>(from)[m];
  }
  void scatter_sums(const void* from, int64_t g, Tensor& x) const {
    element() == 8 ? scatter<double>(from, g, x) : scatter<float>(from, g, x);
  }
  void gather_sums(const Tensor& x, int64_t g, void* to, double rest, double factor) const {
    element() == 8 ? gather<double>(x, g, to, rest, factor) : gather<float>(x, g, to, rest, factor);
  }

  LinearLoss args{};

 private:
  template <class S>
  void gather(const Tensor& x, int64_t g, void* to, double rest, double factor) const {
    const S* from = static_cast<const S*>(x.const_data_ptr());
    S* out = static_cast<S*>(to);
    for (int64_t m = 0; m < args.stride; ++m) {
      const bool counted = m < args.M && targets_[m] >= 0;
      out[m] = counted ? S(from[rows_[m] * books_ + g] * S(factor)) : S(rest);
    }
  }

  Tensor hidden_, weight_, target_;
  std::optional<Tensor> bias_;
  int64_t ignore_, books_;
  std::vector<int64_t> rows_, targets_;
  std::unique_ptr<Buffer> memory_;
  void* vectors_ = nullptr;
};

Tensor zeros_like_device(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  Tensor x = empty_like_device(like, sizes, type);
  return torch::stable::zero_(x);
}

// What the backward pass writes over: powers [G, V, D], tops [G, tiles, D].
struct Kept {
  Tensor powers, tops;

  void use(LinearRun& run, int64_t g) const {
    run.args.powers = run.part(powers, g), run.args.tops = run.part(tops, g);
  }
};

struct Forward {
  Tensor loss, lse;              // [N, G]
  std::optional<Tensor> sample;  // [N, G], -1 where nothing counts
  std::optional<Kept> kept;
};

void run_forward(LinearRun& run, Forward& result) {
  LinearLoss& args = run.args;
  if (run.empty()) return;
  const bool sampled = result.sample.has_value();
  const int64_t ranges = args.ranges();
  args.picked = run.vector(0), args.lse = run.vector(1);
  args.highest = run.vector(2), args.total = run.vector(2 + ranges), args.sums = run.vector(2 + 2 * ranges);
  args.best = run.vector(2 + 3 * ranges);
  std::vector<int64_t> drawn(sampled ? ranges * args.stride : 0);
  args.sample = drawn.data();
  const Buffer out(args.stride * run.element());
  const int64_t bytes = run.kernels().bytes(args, false).thread;
  for (int64_t g = 0; g < args.books; ++g) {
    run.use_book(g);
    if (result.kept) result.kept->use(run, g);
    share_out(ranges, args.M * args.D * args.V / ranges, [&](const NextItem& next) {
      const Buffer buffer(bytes);
      for (int64_t range; next(&range);) run.kernels().forward(args, sampled, range, range + 1, buffer.get());
    });
    run.kernels().finish(args, sampled, out.get());
    run.scatter_sums(out.get(), g, result.loss);
    run.scatter_sums(args.lse, g, result.lse);
    if (sampled) run.scatter<int64_t>(args.sample, g, *result.sample);
  }
}

// Checks its inputs; with a seed it samples.
Forward forward_of(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target_any,
                   const std::optional<Tensor>& seed_any, int64_t ignore, double scale, double smoothing, double z_loss, double temperature,
                   bool keep) {
  const char* op = seed_any ? "linear_sample" : kOp;
  check_linear_loss(op, hidden, weight, bias, target_any, scale, smoothing, z_loss);
  if (seed_any) check_tensor(op, "seed", *seed_any, "[2]", kInt64, {2}, hidden);
  if (seed_any && !(temperature > 0)) fail(op, "sample_temperature", "be above 0", temperature);
  const Tensor target = contiguous_or_copy(target_any);
  check_linear_target(op, static_cast<const int64_t*>(target.const_data_ptr()), hidden.size(0), weight.size(0), ignore, weight.size(1));
  const ScalarType type = accumulation_type(hidden.scalar_type());
  const int64_t N = hidden.size(0), books = weight.size(0), V = weight.size(1), D = weight.size(2);
  Forward result{zeros_like_device(hidden, {N, books}, type), zeros_like_device(hidden, {N, books}, type), {}, {}};
  if (keep) {
    const int64_t tiles = (V + LinearLoss::kTile - 1) / LinearLoss::kTile;
    result.kept = Kept{empty_like_device(weight, {books, V, D}), empty_like_device(weight, {books, tiles, D}, type)};
  }
  LinearRun run(hidden, weight, bias, target, ignore, scale, smoothing, z_loss, false, keep);
  if (seed_any) {
    result.sample = empty_like_device(hidden, {N, books}, ScalarType::Long);
    std::fill_n(static_cast<int64_t*>(result.sample->mutable_data_ptr()), N * books, int64_t{-1});
    const Tensor seed = contiguous_or_copy(*seed_any);
    const int64_t* words = static_cast<const int64_t*>(seed.const_data_ptr());
    run.args.key = PhiloxKey::of(words[0], words[1]);
    run.args.inverse_temperature = 1 / temperature;
  }
  run_forward(run, result);
  return result;
}

std::tuple<Tensor, Tensor> masked_loss_linear(const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias,
                                              const Tensor& target, int64_t ignore, double scale, double smoothing, double z_loss) {
  const Forward found = forward_of(hidden, weight, bias, target, {}, ignore, scale, smoothing, z_loss, 1, false);
  return {found.loss, found.lse};
}

std::tuple<Tensor, Tensor, Tensor> masked_loss_sample(const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias,
                                                      const Tensor& target, const Tensor& seed, int64_t ignore, double scale,
                                                      double smoothing, double z_loss, double temperature) {
  const Forward found = forward_of(hidden, weight, bias, target, seed, ignore, scale, smoothing, z_loss, temperature, false);
  return {found.loss, found.lse, *found.sample};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> masked_loss_linear_kept(const Tensor& hidden, const Tensor& weight,
                                                                           std::optional<Tensor> bias, const Tensor& target,
                                                                           std::optional<Tensor> seed, int64_t ignore, double scale,
                                                                           double smoothing, double z_loss, double temperature) {
  const Forward found = forward_of(hidden, weight, bias, target, seed, ignore, scale, smoothing, z_loss, temperature, true);
  const Tensor none = empty_like_device(hidden, {0}, ScalarType::Long);
  return {found.loss, found.lse, found.sample.value_or(none), found.kept->powers, found.kept->tops};
}

// The tiles of a codebook, a few at a time: each is made by one thread, then all threads add what they give to grad_hidden, each to
// the part that is in its cache. Classes are added in order, so that neither threads nor super tiles change the sums.
class SuperTiles {
 public:
  SuperTiles(const LinearRun& run, const LinearBytes& bytes) : kernels_(run.kernels()) {
    const int64_t threads = torch::stable::get_num_threads();
    together_ = std::min(run.args.tiles(), threads * std::clamp<int64_t>(kSuperTileBytes / (bytes.panels + bytes.logits), 1, 4));
    tiles_ = std::make_unique<Buffer>(together_ * (bytes.panels + bytes.logits));
    logits_ = static_cast<char*>(tiles_->get()) + together_ * bytes.panels;
    for (int64_t i = 0; i < std::min(threads, together_); ++i) buffers_.push_back(std::make_unique<Buffer>(bytes.thread));
  }

  void walk(LinearLoss& args) const {
    args.together = together_, args.panels = tiles_->get(), args.logits = logits_;
    const int64_t work = args.M * args.D * LinearLoss::kTile;
    for (int64_t first = 0; first < args.tiles(); first += together_) {
      const int64_t made = std::min(together_, args.tiles() - first), items = kernels_.hidden_items(args);
      std::atomic<int64_t> busy{0};
      share_out(made, work, [&](const NextItem& next) {
        void* buffer = buffers_[busy.fetch_add(1)]->get();
        for (int64_t i; next(&i);) kernels_.tile_gradient(args, i, first + i, buffer);
      });
      share_out_parts(items, made * work / std::max<int64_t>(1, items), [&](int64_t i) { kernels_.add_hidden(args, first, made, i, i + 1); });
    }
  }

 private:
  const LinearLossKernels& kernels_;
  int64_t together_;
  std::unique_ptr<Buffer> tiles_;
  void* logits_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
};

// The arguments that all gradients share, checked.
struct LinearGradient {
  const Tensor &hidden, &weight;
  std::optional<Tensor> bias;
  Tensor target, grad, lse;
  int64_t ignore;
  double scale, smoothing, z_loss;

  LinearGradient(const Tensor& grad_any, const Tensor& hidden_any, const Tensor& weight_any, const std::optional<Tensor>& bias_any,
                 const Tensor& target_any, const Tensor& lse_any, int64_t ignore_index, double scale_of, double smoothing_of, double z_loss_of)
      : hidden(hidden_any), weight(weight_any), bias(bias_any), ignore(ignore_index), scale(scale_of), smoothing(smoothing_of),
        z_loss(z_loss_of) {
    check_linear_loss(kOp, hidden, weight, bias, target_any, scale, smoothing, z_loss);
    check_sums("grad", grad_any);
    check_sums("lse", lse_any);
    target = contiguous_or_copy(target_any), grad = contiguous_or_copy(grad_any), lse = contiguous_or_copy(lse_any);
    const int64_t* targets = static_cast<const int64_t*>(target.const_data_ptr());
    check_linear_target(kOp, targets, hidden.size(0), weight.size(0), ignore, weight.size(1));
  }

  void check_sums(const char* name, const Tensor& x) const {
    check_tensor(kOp, name, x, "[N, G]", {accumulation_type(hidden.scalar_type())}, {hidden.size(0), weight.size(0)}, hidden);
  }

  // grad_hidden [N, D] is 0 before; grad_weight [G, V, D] may be what was kept.
  void run(Tensor& grad_hidden, Tensor& grad_weight, Tensor& grad_bias, const Kept* kept) const;
};

void LinearGradient::run(Tensor& grad_hidden, Tensor& grad_weight, Tensor& grad_bias, const Kept* kept) const {
  LinearRun run(hidden, weight, bias, target, ignore, scale, smoothing, z_loss, true, kept != nullptr);
  LinearLoss& args = run.args;
  if (run.empty()) {
    torch::stable::zero_(grad_weight), torch::stable::zero_(grad_bias);
    return;
  }
  args.lse = run.vector(0), args.slope = run.vector(1);
  const LinearBytes bytes = run.kernels().bytes(args, true);
  std::memset(args.grad_hidden, 0, static_cast<size_t>(bytes.grad_hidden));
  const SuperTiles tiles(run, bytes);
  for (int64_t g = 0; g < args.books; ++g) {
    run.use_book(g);
    run.gather_sums(lse, g, args.lse, 1e30, 1);
    run.gather_sums(grad, g, args.slope, 0, scale);
    if (kept != nullptr) kept->use(run, g);
    args.grad_weight = run.part(grad_weight, g), args.grad_bias = run.part(grad_bias, g);
    tiles.walk(args);
  }
  parallel_for((args.M + kRowUnit - 1) / kRowUnit, args.D * 8 * kRowUnit, [&](int64_t begin, int64_t end) {
    run.kernels().unpack(args, grad_hidden.mutable_data_ptr(), begin, end);
  });
}

std::tuple<Tensor, Tensor, Tensor> masked_loss_linear_backward(const Tensor& grad, const Tensor& hidden, const Tensor& weight,
                                                               std::optional<Tensor> bias, const Tensor& target, const Tensor& lse,
                                                               int64_t ignore, double scale, double smoothing, double z_loss) {
  const LinearGradient gradient(grad, hidden, weight, bias, target, lse, ignore, scale, smoothing, z_loss);
  const int64_t books = weight.size(0), V = weight.size(1), D = weight.size(2);
  Tensor grad_hidden = zeros_like_device(hidden, {hidden.size(0), D}, hidden.scalar_type());
  Tensor grad_weight = empty_like_device(weight, {books, V, D}), grad_bias = empty_like_device(weight, {books, V});
  gradient.run(grad_hidden, grad_weight, grad_bias, nullptr);
  return {grad_hidden, grad_weight, grad_bias};
}

void masked_loss_linear_kept_backward(const Tensor& grad, const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias,
                                      const Tensor& target, const Tensor& lse, Tensor powers_any, const Tensor& tops_any,
                                      Tensor grad_hidden_any, Tensor grad_bias_any, int64_t ignore, double scale,
                                      double smoothing, double z_loss) {
  const LinearGradient gradient(grad, hidden, weight, bias, target, lse, ignore, scale, smoothing, z_loss);
  const int64_t books = weight.size(0), V = weight.size(1), D = weight.size(2), tiles = (V + LinearLoss::kTile - 1) / LinearLoss::kTile;
  const ScalarType type = weight.scalar_type(), sums = accumulation_type(type);
  check_tensor(kOp, "powers", powers_any, "[G, V, D]", {type}, {books, V, D}, hidden);
  check_tensor(kOp, "tops", tops_any, "[G, tiles, D]", {sums}, {books, tiles, D}, hidden);
  check_tensor(kOp, "grad_hidden", grad_hidden_any, "[N, D]", {type}, {hidden.size(0), D}, hidden);
  check_tensor(kOp, "grad_bias", grad_bias_any, "[G, V]", {type}, {books, V}, hidden);
  Tensor powers = contiguous_or_copy(powers_any), grad_hidden = contiguous_or_copy(grad_hidden_any);
  Tensor grad_bias = contiguous_or_copy(grad_bias_any);
  torch::stable::zero_(grad_hidden);
  const Kept kept{powers, contiguous_or_copy(tops_any)};
  gradient.run(grad_hidden, powers, grad_bias, &kept);
  if (!powers_any.is_contiguous()) torch::stable::copy_(powers_any, powers);
  if (!grad_hidden_any.is_contiguous()) torch::stable::copy_(grad_hidden_any, grad_hidden);
  if (!grad_bias_any.is_contiguous()) torch::stable::copy_(grad_bias_any, grad_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("masked_loss_linear", TORCH_BOX(&masked_loss_linear));
  m.impl("_masked_loss_linear_kept", TORCH_BOX(&masked_loss_linear_kept));
  m.impl("masked_loss_sample", TORCH_BOX(&masked_loss_sample));
  m.impl("_masked_loss_linear_backward", TORCH_BOX(&masked_loss_linear_backward));
  m.impl("_masked_loss_linear_kept_backward_", TORCH_BOX(&masked_loss_linear_kept_backward));
}

}  // namespace maskops
#endif
