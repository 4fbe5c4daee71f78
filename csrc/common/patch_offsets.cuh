// From the index of a value within a patch to its offset within the image, without a division instruction.
#pragma once

#include <algorithm>

#include "common/launch.cuh"
#include "math/visible_tokens.h"

namespace maskops {

// Both orders of the V values of a patch: pixel by pixel with the channels last (MAE), or channel by channel (a Conv weight).
struct PatchOffsets {
  FastDivisor channels, patch_w, patch_h, pixels;
  std::int64_t channel_pixels = 0, size_h = 0, size_w = 0;

  explicit PatchOffsets(const PatchGrid& grid)
      : channels(std::max<std::int64_t>(1, grid.channels)), patch_w(grid.patch_w), patch_h(grid.patch_h), pixels(grid.patch_pixels()),
        channel_pixels(grid.channel_pixels()), size_h(grid.size_h), size_w(grid.size_w) {
    if (grid.values() > 0x7fffffff) throw std::runtime_error(sentence("maskops: patches of ", grid.values(), " values are too large"));
  }

  __device__ __forceinline__ std::int64_t pixel(std::uint32_t channel, std::uint32_t at) const {
    std::uint32_t column = at, row = patch_w.split(column);
    const std::uint32_t frame = patch_h.split(row);
    return channel * channel_pixels + (frame * size_h + row) * size_w + column;
  }
  // Offset from the patch's corner of value v, channels last.
  __device__ __forceinline__ std::int64_t channels_last(std::uint32_t v) const {
    std::uint32_t channel = v;
    const std::uint32_t at = channels.split(channel);
    return pixel(channel, at);
  }
  __device__ __forceinline__ std::int64_t channels_first(std::uint32_t v) const {
    std::uint32_t at = v;
    const std::uint32_t channel = pixels.split(at);
    return pixel(channel, at);
  }
  // Where value v of the channels-first order stands in the channels-last order.
  __device__ __forceinline__ std::uint32_t first_to_last(std::uint32_t v) const {
    std::uint32_t at = v;
    const std::uint32_t channel = pixels.split(at);
    return at * channels.divisor + channel;
  }
};

}  // namespace maskops
