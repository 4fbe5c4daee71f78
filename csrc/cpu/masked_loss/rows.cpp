// masked_regression, contrastive_loss and linear_max_pool on the CPU.
#include "cpu/masked_loss/rows.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "common/buffer.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "cpu/masked_loss/linear.h"
#include "math/masked_loss_rows_check.h"

namespace maskops {
namespace {

constexpr int64_t kSlice = 64, kUnit = 16;

int64_t sum_bytes(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? 8 : 4; }
const int64_t* ids_of(const Tensor& x) { return static_cast<const int64_t*>(x.const_data_ptr()); }

// kernel(begin, end, buffer) over [0, count), each thread with a buffer of so many sums.
template <class Body>
void with_buffers(int64_t count, int64_t work, int64_t bytes, const Body& kernel) {
  parallel_for(count, work, [&](int64_t begin, int64_t end) {
    const Buffer buffer(bytes);
    kernel(begin, end, buffer.get());
  });
}

// ---- masked_regression

Tensor run_regression(const Tensor* grad_any, const Tensor& pred_any, const Tensor& target_any, const Tensor& mask_any, const std::string& kind,
                      double beta, bool normalise, double eps) {
  RegressionLoss args{};
  args.kind = check_regression(pred_any, target_any, mask_any, kind, beta, eps);
  const ScalarType type = accumulation_type(pred_any.scalar_type());
  const Tensor pred = with_contiguous_rows(pred_any), target = with_contiguous_rows(target_any), mask = contiguous_or_copy(mask_any);
  if (grad_any != nullptr) check_tensor("masked_regression", "grad", *grad_any, "[N]", {type}, {pred.size(0)}, pred);
  Tensor loss = grad_any != nullptr ? contiguous_or_copy(*grad_any) : empty_like_device(pred, {pred.size(0)}, type);
  Tensor out = grad_any != nullptr ? empty_like_device(pred, {pred.size(0), pred.size(1)}) : loss;
  args.pred = pred.const_data_ptr(), args.target = target.const_data_ptr(), args.mask = static_cast<const bool*>(mask.const_data_ptr());
  args.pred_stride = pred.stride(0), args.target_stride = target.stride(0), args.N = pred.size(0), args.D = pred.size(1);
  args.loss = loss.mutable_data_ptr(), args.grad_pred = out.mutable_data_ptr();
  args.dtype = static_cast<int>(dtype_of(pred)), args.beta = beta, args.eps = eps, args.normalise = normalise;
  with_buffers(args.N, args.D * 8, 2 * (args.D + 64) * 8, [&](int64_t begin, int64_t end, void* buffer) {
    pick_RowLossKernels().regression(args, grad_any != nullptr, begin, end, buffer);
  });
  return out;
}

Tensor masked_loss_regression(const Tensor& pred, const Tensor& target, const Tensor& mask, std::string kind, double beta, bool normalise,
                              double eps) {
  return run_regression(nullptr, pred, target, mask, kind, beta, normalise, eps);
}

Tensor masked_loss_regression_backward(const Tensor& grad, const Tensor& pred, const Tensor& target, const Tensor& mask, std::string kind,
                                       double beta, bool normalise, double eps) {
  return run_regression(&grad, pred, target, mask, kind, beta, normalise, eps);
}

// ---- contrastive_loss

struct ContrastInputs {
  Tensor query, keys, positive, negatives;
  ContrastLoss args{};

  ContrastInputs(const Tensor& q, const Tensor& k, const Tensor& p, const Tensor& n, double scale, bool collide)
      : query(with_contiguous_rows(q)), keys(with_contiguous_rows(k)), positive(contiguous_or_copy(p)), negatives(contiguous_or_copy(n)) {
    args.query = query.const_data_ptr(), args.keys = keys.const_data_ptr();
    args.positive = ids_of(positive), args.negatives = ids_of(negatives);
    args.query_stride = query.stride(0), args.keys_stride = keys.stride(0);
    args.M = query.size(0), args.D = query.size(1), args.P = keys.size(0), args.K = negatives.size(1);
    args.scale = scale, args.collide = collide, args.dtype = static_cast<int>(dtype_of(query));
    check_contrast_ids(args.positive, args.negatives, args.M, args.K, args.P);
  }
  int64_t work() const { return (args.K + 1) * args.D; }
};

std::tuple<Tensor, Tensor> masked_loss_contrast(const Tensor& query, const Tensor& keys, const Tensor& positive, const Tensor& negatives,
                                                double scale, bool collide) {
  check_contrast(query, keys, positive, negatives, scale);
  ContrastInputs in(query, keys, positive, negatives, scale, collide);
  const ScalarType type = accumulation_type(query.scalar_type());
  Tensor loss = empty_like_device(query, {in.args.M}, type), lse = empty_like_device(query, {in.args.M}, type);
  in.args.loss = loss.mutable_data_ptr(), in.args.lse = lse.mutable_data_ptr();
  with_buffers(in.args.M, in.work(), (in.args.K + 1) * 8, [&](int64_t begin, int64_t end, void* buffer) {
    pick_RowLossKernels().contrast(in.args, begin, end, buffer);
  });
  return {loss, lse};
}

std::tuple<Tensor, Tensor> masked_loss_contrast_backward(const Tensor& grad_any, const Tensor& query, const Tensor& keys, const Tensor& positive,
                                                         const Tensor& negatives, const Tensor& lse_any, double scale, bool collide) {
  check_contrast(query, keys, positive, negatives, scale);
  ContrastInputs in(query, keys, positive, negatives, scale, collide);
  ContrastLoss& args = in.args;
  const ScalarType type = accumulation_type(query.scalar_type());
  check_tensor("contrastive_loss", "grad", grad_any, "[M]", {type}, {args.M}, query);
  check_tensor("contrastive_loss", "lse", lse_any, "[M]", {type}, {args.M}, query);
  Tensor grad = contiguous_or_copy(grad_any), lse = contiguous_or_copy(lse_any);
  Tensor grad_query = empty_like_device(query, {args.M, args.D}), grad_keys = empty_like_device(query, {args.P, args.D});
  const Buffer slope(args.M * (args.K + 1) * sum_bytes(query));
  args.loss = grad.mutable_data_ptr(), args.lse = lse.mutable_data_ptr(), args.slope = slope.get();
  args.grad_query = grad_query.mutable_data_ptr(), args.grad_keys = grad_keys.mutable_data_ptr();
  const RowLossKernels& kernels = pick_RowLossKernels();
  with_buffers(args.M, 2 * in.work(), (args.D + 64) * 8, [&](int64_t begin, int64_t end, void* buffer) {
    kernels.contrast_slope(args, begin, end, buffer);
  });
  const int64_t slices = (args.D + kSlice - 1) / kSlice;
  with_buffers(slices, args.M * (args.K + 1) * kSlice, args.P * kSlice * sum_bytes(query), [&](int64_t begin, int64_t end, void* buffer) {
    kernels.contrast_keys(args, begin, end, buffer);
  });
  return {grad_query, grad_keys};
}

// ---- linear_max_pool

std::tuple<Tensor, Tensor> masked_loss_max_pool(const Tensor& hidden_any, const Tensor& weight_any, std::optional<Tensor> bias_any,
                                                const Tensor& mask_any) {
  check_max_pool(hidden_any, weight_any, bias_any);
  check_tensor("linear_max_pool", "mask", mask_any, "[B, L]", kBool, {hidden_any.size(0), hidden_any.size(1)}, hidden_any);
  const Tensor hidden = contiguous_or_copy(hidden_any), weight = contiguous_or_copy(weight_any), mask = contiguous_or_copy(mask_any);
  const std::optional<Tensor> bias = bias_any ? std::optional<Tensor>(contiguous_or_copy(*bias_any)) : std::nullopt;
  const int64_t B = hidden.size(0), L = hidden.size(1);
  std::vector<int64_t> starts{0}, rows, positions;
  for (int64_t b = 0; b < B; ++b) {
    const bool* seen = static_cast<const bool*>(mask.const_data_ptr()) + b * L;
    const size_t first = rows.size();
    for (int64_t l = 0; l < L; ++l) {
      if (seen[l]) rows.push_back(b * L + l), positions.push_back(l);
    }
    while (rows.size() > first && rows.size() % kUnit != 0) rows.push_back(rows[first]), positions.push_back(positions[first]);
    starts.push_back(static_cast<int64_t>(rows.size()));
  }
  LinearLoss args{};
  args.hidden = hidden.const_data_ptr(), args.weight = weight.const_data_ptr(), args.bias = bias ? bias->const_data_ptr() : nullptr;
  args.rows = rows.data(), args.M = static_cast<int64_t>(rows.size()), args.D = hidden.size(2), args.V = weight.size(0);
  args.hidden_stride = args.weight_stride = args.D;
  args.stride = ((args.M + kUnit - 1) / kUnit | 1) * kUnit;
  args.scale = 1, args.dtype = static_cast<int>(dtype_of(hidden));
  Tensor out = empty_like_device(hidden, {B, args.V}, accumulation_type(hidden.scalar_type()));
  Tensor at = empty_like_device(hidden, {B, args.V}, ScalarType::Long);
  if (B == 0 || args.V == 0) return {out, at};
  args.amx = dtype_of(hidden) == Dtype::kBFloat16 && use_amx();
  const LinearLossKernels& kernels = pick_LinearLossKernels();
  const LinearBytes bytes = kernels.bytes(args, false);
  const Buffer across(bytes.across);
  args.across = across.get();
  parallel_for(args.row_panels(), args.D * LinearLoss::kPanel * 8, [&](int64_t begin, int64_t end) { kernels.pack(args, begin, end); });
  const MaxPool samples{starts.data(), positions.data(), out.mutable_data_ptr(), static_cast<int64_t*>(at.mutable_data_ptr()), B};
  with_buffers(args.tiles(), args.M * args.D * LinearLoss::kTile, bytes.thread, [&](int64_t begin, int64_t end, void* buffer) {
    kernels.pool(args, samples, begin, end, buffer);
  });
  return {out, at};
}

std::tuple<Tensor, Tensor, Tensor> masked_loss_max_pool_backward(const Tensor& grad_any, const Tensor& hidden_any, const Tensor& weight_any,
                                                                 const Tensor& at_any) {
  check_max_pool(hidden_any, weight_any, std::nullopt);
  const ScalarType type = accumulation_type(hidden_any.scalar_type());
  const int64_t B = hidden_any.size(0), L = hidden_any.size(1), V = weight_any.size(0), D = weight_any.size(1);
  check_tensor("linear_max_pool", "grad", grad_any, "[B, V]", {type}, {B, V}, hidden_any);
  check_tensor("linear_max_pool", "at", at_any, "[B, V]", kInt64, {B, V}, hidden_any);
  const Tensor grad = contiguous_or_copy(grad_any), hidden = contiguous_or_copy(hidden_any), weight = contiguous_or_copy(weight_any);
  const Tensor at = contiguous_or_copy(at_any);
  for (int64_t i = 0; i < B * V; ++i) {
    if (ids_of(at)[i] >= -1 && ids_of(at)[i] < L) continue;
    const std::string place = "at[" + std::to_string(i / V) + ", " + std::to_string(i % V) + "]";
    fail("linear_max_pool", place, "be in [-1, " + std::to_string(L) + ")", ids_of(at)[i]);
  }
  Tensor grad_hidden = empty_like_device(hidden, {B, L, D}), grad_weight = empty_like_device(weight, {V, D}), grad_bias = empty_like_device(weight, {V});
  PoolBackward args{hidden.const_data_ptr(), weight.const_data_ptr(), grad.const_data_ptr(), ids_of(at),
                    grad_hidden.mutable_data_ptr(), grad_weight.mutable_data_ptr(), grad_bias.mutable_data_ptr(), B, L, V, D,
                    static_cast<int>(dtype_of(hidden))};
  const RowLossKernels& kernels = pick_RowLossKernels();
  with_buffers(V, B * D * 4, (D + 64) * 8, [&](int64_t begin, int64_t end, void* buffer) { kernels.pool_weight(args, begin, end, buffer); });
  with_buffers((D + kSlice - 1) / kSlice, B * V * kSlice * 4, B * L * kSlice * sum_bytes(hidden),
               [&](int64_t begin, int64_t end, void* buffer) { kernels.pool_hidden(args, begin, end, buffer); });
  return {grad_hidden, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("masked_loss_regression", TORCH_BOX(&masked_loss_regression));
  m.impl("_masked_loss_regression_backward", TORCH_BOX(&masked_loss_regression_backward));
  m.impl("masked_loss_contrast", TORCH_BOX(&masked_loss_contrast));
  m.impl("_masked_loss_contrast_backward", TORCH_BOX(&masked_loss_contrast_backward));
  m.impl("masked_loss_max_pool", TORCH_BOX(&masked_loss_max_pool));
  m.impl("_masked_loss_max_pool_backward", TORCH_BOX(&masked_loss_max_pool_backward));
}

}  // namespace maskops
#endif
