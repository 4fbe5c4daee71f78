// linear_cross_entropy and linear_sample on the CPU: the rows that count are packed once, the classes stream by in tiles. The forward
// pass is one product, the backward pass three, of which the first makes the logits again: 96 classes at a time they never leave
// the caches. The floor is the multiply-adds: 2 M V D flops a product against 4 bytes of weight read (and written) per 2 M of them.
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

constexpr int64_t kRowUnit = LinearLoss::kRowUnit;
constexpr int64_t kSuperTileBytes = int64_t{1} << 20;  // of a thread, about

// Hidden rows that count for some codebook, and all that is made for them.
class LinearRun {
 public:
  LinearRun(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target, int64_t ignore,
            double scale, double smoothing, double z_loss, bool backward)
      : hidden_(with_contiguous_rows(hidden)), weight_(contiguous_or_copy(weight)), target_(contiguous_or_copy(target)),
        bias_(bias ? std::optional<Tensor>(contiguous_or_copy(*bias)) : std::nullopt), ignore_(ignore), books_(weight.size(0)) {
    for (int64_t n = 0; n < hidden.size(0); ++n) {
      const int64_t* row = all_targets() + n * books_;
      if (std::any_of(row, row + books_, [&](int64_t v) { return v != ignore; })) rows_.push_back(n);
    }
    args.rows = rows_.data(), args.M = static_cast<int64_t>(rows_.size());
    args.D = hidden.size(1), args.V = weight.size(1), args.books = books_;
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
    const int64_t vectors = backward ? 3 : 2 + 4 * args.ranges();
    const LinearBytes bytes = kernels().bytes(args, backward);
    auto aligned = [](int64_t size) { return (size + 63) / 64 * 64; };
    memory_ = std::make_unique<Buffer>(aligned(bytes.across) + aligned(bytes.along) + aligned(bytes.grad_hidden) +
                                       vectors * args.stride * element());
    char* next = static_cast<char*>(memory_->get());
    auto take = [&](int64_t size) { return std::exchange(next, next + aligned(size)); };
    args.across = take(bytes.across);
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

void run_forward(LinearRun& run, Tensor& loss, Tensor& lse, Tensor* sample) {
  LinearLoss& args = run.args;
  if (run.empty()) return;
  const int64_t ranges = args.ranges();
  args.picked = run.vector(0), args.lse = run.vector(1);
  args.highest = run.vector(2), args.total = run.vector(2 + ranges), args.sums = run.vector(2 + 2 * ranges);
  args.best = run.vector(2 + 3 * ranges);
  std::vector<int64_t> drawn(sample == nullptr ? 0 : ranges * args.stride);
  args.sample = drawn.data();
  const Buffer out(args.stride * run.element());
  const int64_t bytes = run.kernels().bytes(args, false).thread;
  for (int64_t g = 0; g < args.books; ++g) {
    run.use_book(g);
    parallel_for(ranges, args.M * args.D * args.V / ranges, [&](int64_t begin, int64_t end) {
      const Buffer buffer(bytes);
      run.kernels().forward(args, sample != nullptr, begin, end, buffer.get());
    });
    run.kernels().finish(args, sample != nullptr, out.get());
    run.scatter_sums(out.get(), g, loss);
    run.scatter_sums(args.lse, g, lse);
    if (sample != nullptr) run.scatter<int64_t>(args.sample, g, *sample);
  }
}

std::tuple<Tensor, Tensor> masked_loss_linear(const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias,
                                              const Tensor& target_any, int64_t ignore, double scale, double smoothing, double z_loss) {
  const char* op = "linear_cross_entropy";
  check_linear_loss(op, hidden, weight, bias, target_any, scale, smoothing, z_loss);
  const Tensor target = contiguous_or_copy(target_any);
  check_linear_target(op, static_cast<const int64_t*>(target.const_data_ptr()), hidden.size(0), weight.size(0), ignore, weight.size(1));
  const ScalarType type = accumulation_type(hidden.scalar_type());
  Tensor loss = zeros_like_device(hidden, {hidden.size(0), weight.size(0)}, type);
  Tensor lse = zeros_like_device(hidden, {hidden.size(0), weight.size(0)}, type);
  LinearRun run(hidden, weight, bias, target, ignore, scale, smoothing, z_loss, false);
  run_forward(run, loss, lse, nullptr);
  return {loss, lse};
}

std::tuple<Tensor, Tensor, Tensor> masked_loss_sample(const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias,
                                                      const Tensor& target_any, const Tensor& seed_any, int64_t ignore, double scale,
                                                      double smoothing, double z_loss, double temperature) {
  const char* op = "linear_sample";
  check_linear_loss(op, hidden, weight, bias, target_any, scale, smoothing, z_loss);
  check_tensor(op, "seed", seed_any, "[2]", kInt64, {2}, hidden);
  if (!(temperature > 0)) fail(op, "sample_temperature", "be above 0", temperature);
  const Tensor target = contiguous_or_copy(target_any), seed = contiguous_or_copy(seed_any);
  check_linear_target(op, static_cast<const int64_t*>(target.const_data_ptr()), hidden.size(0), weight.size(0), ignore, weight.size(1));
  const ScalarType type = accumulation_type(hidden.scalar_type());
  Tensor loss = zeros_like_device(hidden, {hidden.size(0), weight.size(0)}, type);
  Tensor lse = zeros_like_device(hidden, {hidden.size(0), weight.size(0)}, type);
  Tensor sample = empty_like_device(hidden, {hidden.size(0), weight.size(0)}, ScalarType::Long);
  std::fill_n(static_cast<int64_t*>(sample.mutable_data_ptr()), sample.numel(), int64_t{-1});
  LinearRun run(hidden, weight, bias, target, ignore, scale, smoothing, z_loss, false);
  const int64_t* words = static_cast<const int64_t*>(seed.const_data_ptr());
  run.args.key = PhiloxKey::of(words[0], words[1]);
  run.args.inverse_temperature = 1 / temperature;
  run_forward(run, loss, lse, &sample);
  return {loss, lse, sample};
}

std::tuple<Tensor, Tensor, Tensor> masked_loss_linear_backward(const Tensor& grad_any, const Tensor& hidden, const Tensor& weight,
                                                               std::optional<Tensor> bias, const Tensor& target_any, const Tensor& lse_any,
                                                               int64_t ignore, double scale, double smoothing, double z_loss) {
  const char* op = "linear_cross_entropy";
  check_linear_loss(op, hidden, weight, bias, target_any, scale, smoothing, z_loss);
  const ScalarType type = accumulation_type(hidden.scalar_type());
  check_tensor(op, "grad", grad_any, "[N, G]", {type}, {hidden.size(0), weight.size(0)}, hidden);
  check_tensor(op, "lse", lse_any, "[N, G]", {type}, {hidden.size(0), weight.size(0)}, hidden);
  const Tensor target = contiguous_or_copy(target_any), grad = contiguous_or_copy(grad_any), lse = contiguous_or_copy(lse_any);
  check_linear_target(op, static_cast<const int64_t*>(target.const_data_ptr()), hidden.size(0), weight.size(0), ignore, weight.size(1));
  const int64_t books = weight.size(0), V = weight.size(1), D = weight.size(2);
  Tensor grad_hidden = zeros_like_device(hidden, {hidden.size(0), D}, hidden.scalar_type());
  Tensor grad_weight = empty_like_device(weight, {books, V, D}), grad_bias = empty_like_device(weight, {books, V});
  LinearRun run(hidden, weight, bias, target, ignore, scale, smoothing, z_loss, true);
  LinearLoss& args = run.args;
  if (run.empty()) {
    return {grad_hidden, torch::stable::zero_(grad_weight), torch::stable::zero_(grad_bias)};
  }
  args.lse = run.vector(0), args.slope = run.vector(1);
  const LinearBytes bytes = run.kernels().bytes(args, true);
  std::memset(args.grad_hidden, 0, static_cast<size_t>(bytes.grad_hidden));
  // What a super tile holds does not change the sums: they run over the classes in order. Threads wait for each other at its end.
  const int64_t threads = torch::stable::get_num_threads(), fitting = kSuperTileBytes / (bytes.panels + bytes.logits);
  const int64_t together = std::min(args.tiles(), threads * std::clamp<int64_t>(fitting, 1, 4));
  const Buffer tiles(together * (bytes.panels + bytes.logits));
  args.together = together, args.panels = tiles.get(), args.logits = static_cast<char*>(tiles.get()) + together * bytes.panels;
  const int64_t item = static_cast<int64_t>(weight.element_size());
  std::vector<std::unique_ptr<Buffer>> buffers;
  for (int64_t i = 0; i < together; ++i) buffers.push_back(std::make_unique<Buffer>(bytes.thread));
  for (int64_t g = 0; g < books; ++g) {
    run.use_book(g);
    run.gather_sums(lse, g, args.lse, 1e30, 1);
    run.gather_sums(grad, g, args.slope, 0, scale);
    args.grad_weight = static_cast<char*>(grad_weight.mutable_data_ptr()) + g * V * D * item;
    args.grad_bias = static_cast<char*>(grad_bias.mutable_data_ptr()) + g * V * item;
    for (int64_t first = 0; first < args.tiles(); first += together) {
      const int64_t count = std::min(together, args.tiles() - first), work = args.M * D * LinearLoss::kTile;
      parallel_for(count, work, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) run.kernels().tile_gradient(args, i, first + i, buffers[i]->get());
      });
      const int64_t items = run.kernels().hidden_items(args);
      if (items == 0) continue;  // no width
      parallel_for(items, count * work / items, [&](int64_t begin, int64_t end) { run.kernels().add_hidden(args, first, count, begin, end); });
    }
  }
  parallel_for((args.M + kRowUnit - 1) / kRowUnit, D * 8 * kRowUnit, [&](int64_t begin, int64_t end) {
    run.kernels().unpack(args, grad_hidden.mutable_data_ptr(), begin, end);
  });
  return {grad_hidden, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("masked_loss_linear", TORCH_BOX(&masked_loss_linear));
  m.impl("masked_loss_sample", TORCH_BOX(&masked_loss_sample));
  m.impl("_masked_loss_linear_backward", TORCH_BOX(&masked_loss_linear_backward));
}

}  // namespace maskops
#endif
