// Facts of the family visible_tokens that every device shares; includes no torch header, so that any kernel may include it.
// B batch, N tokens, K kept slots, P prefix tokens, D channels, C image channels, V values per patch.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace maskops {

// Rows of a tensor [B, rows, D] whose last axis is contiguous: where row (b, n) starts, in elements.
struct RowStrides {
  int64_t batch, row;

  MASKOPS_HOST_DEVICE int64_t at(int64_t b, int64_t n) const { return b * batch + n * row; }
};

// How the fill [D], [N, D] or [B, N, D] is read: strides that do not exist are zero.
MASKOPS_HOST_DEVICE inline RowStrides fill_strides(int64_t fill_dim, int64_t tokens, int64_t channels) {
  return {fill_dim == 3 ? tokens * channels : 0, fill_dim >= 2 ? channels : 0};
}

// Where the rows of a sample start and how many there are: [B, P + K, D] padded, or [total, D] packed.
struct SlotRows {
  int64_t first, count;
};

// The grid of patches of an image [B, C, H, W] or a video [B, C, T, H, W]; an image is a video with T = patch_t = 1.
struct PatchGrid {
  int64_t channels;
  int64_t size_t_, size_h, size_w;     // pixels along each axis
  int64_t patch_t, patch_h, patch_w;   // of one patch
  int64_t grid_t, grid_h, grid_w;      // patches along each axis

  MASKOPS_HOST_DEVICE static PatchGrid of(int64_t channels, int64_t t, int64_t h, int64_t w, int64_t pt, int64_t ph, int64_t pw) {
    return {channels, t, h, w, pt, ph, pw, t / pt, h / ph, w / pw};
  }
  MASKOPS_HOST_DEVICE int64_t tokens() const { return grid_t * grid_h * grid_w; }
  MASKOPS_HOST_DEVICE int64_t patch_pixels() const { return patch_t * patch_h * patch_w; }
  MASKOPS_HOST_DEVICE int64_t values() const { return channels * patch_pixels(); }
  MASKOPS_HOST_DEVICE int64_t channel_pixels() const { return size_t_ * size_h * size_w; }
  MASKOPS_HOST_DEVICE int64_t image_values() const { return channels * channel_pixels(); }

  // Offset of the first pixel of patch n within one channel.
  MASKOPS_HOST_DEVICE int64_t corner(int64_t n) const {
    const int64_t x = n % grid_w, y = (n / grid_w) % grid_h, z = n / (grid_w * grid_h);
    return (z * patch_t * size_h + y * patch_h) * size_w + x * patch_w;
  }
  // Offset from the corner of pixel (r, p, q) of a patch.
  MASKOPS_HOST_DEVICE int64_t inside(int64_t r, int64_t p, int64_t q) const { return (r * size_h + p) * size_w + q; }
};

}  // namespace maskops
