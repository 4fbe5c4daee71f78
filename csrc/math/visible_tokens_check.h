// Input checks of the family visible_tokens, shared by the CPU and the CUDA op functions.
#pragma once

#include <vector>

#include "common/check.h"
#include "math/visible_tokens.h"

namespace maskops {

inline RowStrides row_strides(const Tensor& x) {
  return x.dim() == 3 ? RowStrides{x.stride(0), x.stride(1)} : RowStrides{0, x.stride(0)};
}

inline void check_split(const Tensor& mask, int64_t max_keep, int64_t max_mask) {
  const char* op = "split_tokens";
  check_tensor(op, "mask", mask, "[B, N]", kBool, {kAny, kAny}, mask);
  if (max_keep < 0) fail(op, "max_seqlen", "be at least 0", max_keep);
  if (max_mask < 0) fail(op, "max_masked", "be at least 0", max_mask);
}

inline void check_gather(const Tensor& x, const Tensor& ids) {
  check_tensor("gather_tokens", "x", x, "[B, N, D]", kFloats, {kAny, kAny, kAny}, x);
  check_tensor("gather_tokens", "ids", ids, "[B, K]", kInt64, {x.size(0), kAny}, x);
}

inline void check_gather_backward(const Tensor& grad, const Tensor& ids, int64_t tokens) {
  check_tensor("gather_tokens", "grad", grad, "[B, K, D]", kFloats, {kAny, kAny, kAny}, grad);
  check_tensor("gather_tokens", "ids", ids, "[B, K]", kInt64, {grad.size(0), grad.size(1)}, grad);
  if (tokens < 0) fail("gather_tokens", "N", "be at least 0", tokens);
}

inline void check_fill(const char* op, const Tensor& fill, int64_t batch, int64_t tokens, const Tensor& like) {
  const char* shapes = "[D], [N, D] or [B, N, D]";
  const int64_t channels = like.size(like.dim() - 1);
  const ScalarType type = like.scalar_type();
  switch (fill.dim()) {
    case 1: return check_tensor(op, "fill", fill, shapes, {type}, {channels}, like);
    case 2: return check_tensor(op, "fill", fill, shapes, {type}, {tokens, channels}, like);
    case 3: return check_tensor(op, "fill", fill, shapes, {type}, {batch, tokens, channels}, like);
    default: fail(op, "fill", std::string("have shape ") + shapes, std::to_string(fill.dim()) + " dimensions");
  }
}

inline void check_fill_dim(const char* op, int64_t fill_dim) {
  if (fill_dim < 1 || fill_dim > 3) {
    fail(op, "fill", "have shape [D], [N, D] or [B, N, D]", std::to_string(fill_dim) + " dimensions");
  }
}

inline void check_prefix(const char* op, int64_t prefix, const Tensor& rows, const char* name) {
  if (prefix < 0 || prefix > rows.size(1)) {
    fail(op, "prefix", "be in [0, " + std::to_string(rows.size(1)) + "], the rows of " + name, prefix);
  }
}

inline void check_restore(const Tensor& x_keep, const Tensor& ids_restore, const Tensor& num_keep, const Tensor& fill,
                          const std::optional<Tensor>& pos, int64_t prefix) {
  const char* op = "restore_tokens";
  check_tensor(op, "x_keep", x_keep, "[B, P + K, D]", kFloats, {kAny, kAny, kAny}, x_keep);
  check_tensor(op, "ids_restore", ids_restore, "[B, N]", kInt64, {x_keep.size(0), kAny}, x_keep);
  check_tensor(op, "num_keep", num_keep, "[B]", kInt64, {x_keep.size(0)}, x_keep);
  check_prefix(op, prefix, x_keep, "x_keep");
  check_fill(op, fill, x_keep.size(0), ids_restore.size(1), x_keep);
  if (pos) {
    check_tensor(op, "pos", *pos, "[P + N, D]", {x_keep.scalar_type()}, {prefix + ids_restore.size(1), x_keep.size(2)}, x_keep);
  }
}

inline void check_restore_backward(const Tensor& grad, const Tensor& ids_restore, const Tensor& num_keep, int64_t prefix,
                                   int64_t fill_dim, int64_t num_slots) {
  const char* op = "restore_tokens";
  check_tensor(op, "grad", grad, "[B, P + N, D]", kFloats, {kAny, kAny, kAny}, grad);
  check_prefix(op, prefix, grad, "grad");
  check_tensor(op, "ids_restore", ids_restore, "[B, N]", kInt64, {grad.size(0), grad.size(1) - prefix}, grad);
  check_tensor(op, "num_keep", num_keep, "[B]", kInt64, {grad.size(0)}, grad);
  if (num_slots < 0) fail(op, "num_slots", "be at least 0", num_slots);
  check_fill_dim(op, fill_dim);
}

inline void check_packed_rows(const char* op, const Tensor& ids_restore, const Tensor& cu_seqlens, int64_t batch,
                              int64_t tokens, const Tensor& like) {
  check_tensor(op, "ids_restore", ids_restore, "[B, N]", kInt64, {batch, tokens}, like);
  check_tensor(op, "cu_seqlens", cu_seqlens, "[B + 1]", kInt32, {ids_restore.size(0) + 1}, like);
}

inline void check_pack(const Tensor& x, const Tensor& ids_restore, const Tensor& cu_seqlens, int64_t total) {
  check_tensor("pack_tokens", "x", x, "[B, N, D]", kFloats, {kAny, kAny, kAny}, x);
  check_packed_rows("pack_tokens", ids_restore, cu_seqlens, x.size(0), x.size(1), x);
  if (total < 0) fail("pack_tokens", "total", "be at least 0", total);
}

inline void check_unpack(const Tensor& packed, const Tensor& ids_restore, const Tensor& cu_seqlens, const Tensor& fill) {
  check_tensor("unpack_tokens", "packed", packed, "[total, D]", kFloats, {kAny, kAny}, packed);
  check_packed_rows("unpack_tokens", ids_restore, cu_seqlens, kAny, kAny, packed);
  check_fill("unpack_tokens", fill, ids_restore.size(0), ids_restore.size(1), packed);
}

inline void check_unpack_backward(const Tensor& grad, const Tensor& ids_restore, const Tensor& cu_seqlens, int64_t total,
                                  int64_t fill_dim) {
  check_tensor("unpack_tokens", "grad", grad, "[B, N, D]", kFloats, {kAny, kAny, kAny}, grad);
  check_packed_rows("unpack_tokens", ids_restore, cu_seqlens, grad.size(0), grad.size(1), grad);
  if (total < 0) fail("unpack_tokens", "total", "be at least 0", total);
  check_fill_dim("unpack_tokens", fill_dim);
}

// Of a patch and of an image: every product of sizes then fits into int64.
inline bool too_many_pixels(const std::vector<int64_t>& sizes) {
  constexpr int64_t kMaxPixels = int64_t{1} << 40;
  int64_t pixels = 1;
  for (int64_t size : sizes) {
    if (size == 0) return false;
  }
  for (int64_t size : sizes) {
    if (size > kMaxPixels / pixels) return true;
    pixels *= size;
  }
  return false;
}

// The grid of patches; the sizes must be two or three, positive and divide the image.
inline PatchGrid check_grid(const char* op, const std::vector<int64_t>& patch, const std::vector<int64_t>& image, int64_t channels) {
  if ((patch.size() != 2 && patch.size() != 3) || patch.size() != image.size()) {
    fail(op, "patch_size", "have one size per image axis, (p, q) or (r, p, q)", join_sizes(patch));
  }
  for (size_t axis = 0; axis < patch.size(); ++axis) {
    if (patch[axis] <= 0 || image[axis] % patch[axis] != 0) {
      fail(op, "patch_size", "be positive and divide the image size " + join_sizes(image), join_sizes(patch));
    }
    if (image[axis] < 0) fail(op, "image_size", "be at least 0 along every axis", join_sizes(image));
  }
  if (too_many_pixels(patch)) fail(op, "patch_size", "have at most 2^40 pixels", join_sizes(patch));
  if (patch.size() == 2) return PatchGrid::of(channels, 1, image[0], image[1], 1, patch[0], patch[1]);
  return PatchGrid::of(channels, image[0], image[1], image[2], patch[0], patch[1], patch[2]);
}

inline std::vector<int64_t> sizes_from(const Tensor& x, int64_t first) {
  std::vector<int64_t> sizes;
  for (int64_t axis = first; axis < x.dim(); ++axis) sizes.push_back(x.size(axis));
  return sizes;
}

inline PatchGrid check_images(const char* op, const Tensor& images, const std::vector<int64_t>& patch,
                              std::initializer_list<ScalarType> dtypes = kFloats) {
  if (images.dim() != 4 && images.dim() != 5) {
    fail(op, "images", "have shape [B, C, H, W] or [B, C, T, H, W]", std::to_string(images.dim()) + " dimensions");
  }
  if (images.dim() == 4) check_tensor(op, "images", images, "[B, C, ...]", dtypes, {kAny, kAny, kAny, kAny}, images);
  else check_tensor(op, "images", images, "[B, C, ...]", dtypes, {kAny, kAny, kAny, kAny, kAny}, images);
  return check_grid(op, patch, sizes_from(images, 2), images.size(1));
}

inline void check_optional_ids(const char* op, const std::optional<Tensor>& ids, int64_t slots, const Tensor& like) {
  if (ids) check_tensor(op, "ids", *ids, "[B, K]", kInt64, {like.size(0), slots}, like);
}

inline PatchGrid check_patchify(const Tensor& images, const std::optional<Tensor>& ids, const std::vector<int64_t>& patch) {
  const PatchGrid grid = check_images("patchify", images, patch);
  check_optional_ids("patchify", ids, kAny, images);
  return grid;
}

inline PatchGrid check_unpatchify(const Tensor& patches, const std::optional<Tensor>& ids, const std::vector<int64_t>& patch,
                                  const std::vector<int64_t>& image) {
  const char* op = "unpatchify";
  PatchGrid grid = check_grid(op, patch, image, 1);
  check_tensor(op, "patches", patches, "[B, K, V]", kFloats, {kAny, ids ? kAny : grid.tokens(), kAny}, patches);
  check_optional_ids(op, ids, patches.size(1), patches);
  if (patches.size(2) % grid.patch_pixels() != 0) {
    fail(op, "patches", "have V divisible by " + std::to_string(grid.patch_pixels()), "V = " + std::to_string(patches.size(2)));
  }
  if (too_many_pixels(image)) fail(op, "image_size", "have at most 2^40 pixels", join_sizes(image));
  grid.channels = patches.size(2) / grid.patch_pixels();
  return grid;
}

inline PatchGrid check_embed(const Tensor& images, const Tensor& weight, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& ids, const std::optional<Tensor>& pos) {
  const char* op = "embed_patches";
  if (weight.dim() != images.dim()) {
    fail(op, "weight", "have " + std::to_string(images.dim()) + " dimensions, [E, C, patch]", std::to_string(weight.dim()) + " dimensions");
  }
  const PatchGrid grid = check_images(op, images, sizes_from(weight, 2));
  const ScalarType type = images.scalar_type();
  if (images.dim() == 4) {
    check_tensor(op, "weight", weight, "[E, C, patch]", {type}, {kAny, images.size(1), kAny, kAny}, images);
  } else {
    check_tensor(op, "weight", weight, "[E, C, patch]", {type}, {kAny, images.size(1), kAny, kAny, kAny}, images);
  }
  if (bias) check_tensor(op, "bias", *bias, "[E]", {type}, {weight.size(0)}, images);
  check_optional_ids(op, ids, kAny, images);
  if (pos) check_tensor(op, "pos", *pos, "[N, E]", {type}, {grid.tokens(), weight.size(0)}, images);
  return grid;
}

inline PatchGrid check_embed_backward(const Tensor& grad, const Tensor& images, const Tensor& weight, const std::optional<Tensor>& ids) {
  const PatchGrid grid = check_embed(images, weight, std::nullopt, ids, std::nullopt);
  const int64_t slots = ids ? ids->size(1) : grid.tokens();
  check_tensor("embed_patches", "grad", grad, "[B, K, E]", {images.scalar_type()}, {images.size(0), slots, weight.size(0)}, images);
  return grid;
}

}  // namespace maskops
