// Input checks of the family masked_loss, shared by the CPU and the CUDA op functions.
#pragma once

#include <string>
#include <vector>

#include "math/masked_loss.h"
#include "math/visible_tokens_check.h"

namespace maskops {

inline LossKind loss_kind(const std::string& kind) {
  if (kind == "l2") return LossKind::kL2;
  if (kind == "l1") return LossKind::kL1;
  if (kind == "smooth_l1") return LossKind::kSmoothL1;
  fail("masked_patch_loss", "kind", "be one of ('l2', 'l1', 'smooth_l1')", "'" + kind + "'");
}

inline LossOn loss_on(const std::string& on) {
  if (on == "masked") return LossOn::kMasked;
  if (on == "visible") return LossOn::kVisible;
  if (on == "all") return LossOn::kAll;
  fail("masked_patch_loss", "on", "be one of ('masked', 'visible', 'all')", "'" + on + "'");
}

inline PatchGrid check_patch_loss(const Tensor& pred, const Tensor& images, const Tensor& ids_restore, const Tensor& num_keep,
                                  const Tensor& num_mask, const std::vector<int64_t>& patch, const std::string& kind, double beta,
                                  const std::string& on) {
  const char* op = "masked_patch_loss";
  check_tensor(op, "pred", pred, "[B, N, V]", kFloats, {kAny, kAny, kAny}, pred);
  const ScalarType type = pred.scalar_type();
  const PatchGrid grid = type == ScalarType::Double ? check_images(op, images, patch, {type})
                                                    : check_images(op, images, patch, {type, ScalarType::Float});
  if (images.size(0) != pred.size(0)) {
    std::vector<int64_t> sizes = sizes_from(images, 0);
    sizes[0] = pred.size(0);
    fail(op, "images", "have shape [B, C, ...] = " + join_sizes(sizes), describe(images));
  }
  if (device_name(images) != device_name(pred)) fail(op, "images", "be on " + device_name(pred), "a tensor on " + device_name(images));
  check_tensor(op, "pred", pred, "[B, N, V]", kFloats, {kAny, grid.tokens(), grid.values()}, pred);
  check_tensor(op, "ids_restore", ids_restore, "[B, N]", kInt64, {pred.size(0), pred.size(1)}, pred);
  check_tensor(op, "num_keep", num_keep, "[B]", kInt64, {pred.size(0)}, pred);
  check_tensor(op, "num_mask", num_mask, "[B]", kInt64, {pred.size(0)}, pred);
  loss_kind(kind);  // raises where unknown
  loss_on(on);
  if (!(beta > 0)) fail(op, "beta", "be above 0", beta);
  return grid;
}

inline PatchGrid check_patch_loss_backward(const Tensor& grad, const Tensor& pred, const Tensor& images, const Tensor& stats,
                                           const Tensor& ids_restore, const Tensor& num_keep, const Tensor& num_mask,
                                           const std::vector<int64_t>& patch, const std::string& kind, double beta,
                                           const std::string& on) {
  const PatchGrid grid = check_patch_loss(pred, images, ids_restore, num_keep, num_mask, patch, kind, beta, on);
  const ScalarType type = pred.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_tensor("masked_patch_loss", "grad", grad, "[B, N]", {type}, {pred.size(0), pred.size(1)}, pred);
  check_tensor("masked_patch_loss", "stats", stats, "[B, N, 2]", {type}, {pred.size(0), pred.size(1), 2}, pred);
  return grid;
}

}  // namespace maskops
