// visible_tokens_patchify and _unpatchify on CUDA: image [B, C, T, H, W] <-> patches [B, K, V], each the other's gradient.
#include <algorithm>

#include "common/library.cuh"
#include "common/patch_offsets.cuh"
#include "cuda/visible_tokens/rows.cuh"
#include "math/visible_tokens_check.h"

namespace maskops {
namespace {

struct Patches {
  PatchGrid grid;
  PatchOffsets offsets;
  const std::int64_t* ids;  // [B, K]; null also where K = 0
  bool all;                 // no ids were given: all N patches in order
  std::int64_t batch, slots;
};

// out [B, K, V]. One warp owns one patch. Channels first, W neighbours of an image row are W neighbours of the patch and move as one
// vector; channels last, W values are gathered through the L1 cache, which holds the patch's rows, and stored as one vector.
template <typename T, int W, bool LAST>
__global__ void __launch_bounds__(kRowThreads, 2)
    patchify_kernel(const T* __restrict__ images, T* __restrict__ out, const Patches p, const IdsCheck check) {
  if (blockIdx.x < check.blocks) {
    check_ids<kRowThreads>(check, blockIdx.x, name_of(Function::patchify), "ids");
    return;
  }
  const std::int64_t row = (blockIdx.x - check.blocks) * kRowWarps + threadIdx.x / 32;
  if (row >= p.batch * p.slots) return;
  const std::int64_t n = p.all ? row % p.slots : load(p.ids + row);
  const std::uint32_t values = static_cast<std::uint32_t>(p.grid.values());
  T* to = out + row * values;
  if (n < 0 || n >= p.grid.tokens()) {
    move_row<W, T>(nullptr, to, values);
    return;
  }
  const T* corner = images + row / p.slots * p.grid.image_values() + p.grid.corner(n);
#pragma unroll 1
  for (std::uint32_t v = threadIdx.x % 32 * W; v < values; v += 32 * W) {
    Vec<T, W> value;
    if constexpr (LAST) {
#pragma unroll
      for (int i = 0; i < W; ++i) value.v[i] = load(corner + p.offsets.channels_last(v + i));
    } else {
      value = load_vec<W>(corner + p.offsets.channels_first(v));
    }
    store_vec<W>(to + v, value);
  }
}

// images [B, C, T, H, W] of patches [B, K, V]. One block owns `chunk` patches of one sample and inverts the ids that fall into them;
// each of its warps writes a patch's pixels, W neighbours of an image row at a time, zeros where no slot names the patch.
template <typename T, int W, bool LAST>
__global__ void __launch_bounds__(kRowThreads, 2)
    unpatchify_kernel(const T* __restrict__ patches, RowStrides strides, T* __restrict__ images, const Patches p, int chunk) {
  MASKOPS_SHARED(int, slot_of, kMaxChunk);
  const std::int64_t tokens = p.grid.tokens(), chunks = blocks_of_sample(tokens, chunk);
  const std::int64_t b = blockIdx.x / chunks, base = blockIdx.x % chunks * chunk;
  if (!p.all) invert_ids(slot_of, p.ids, b, p.slots, tokens, base, chunk, Function::unpatchify);
  const std::uint32_t values = static_cast<std::uint32_t>(p.grid.values());
  for (std::int64_t t = threadIdx.x / 32; t < chunk && base + t < tokens; t += kRowWarps) {
    const std::int64_t n = base + t, slot = p.all ? n : static_cast<std::int64_t>(slot_of[t]);
    const T* from = !p.all && slot == INT_MAX ? nullptr : patches + strides.at(b, slot);
    T* corner = images + b * p.grid.image_values() + p.grid.corner(n);
    for (std::uint32_t v = threadIdx.x % 32 * W; v < values; v += 32 * W) {
      Vec<T, W> value = zero_vec<T, W>();
      if (from && LAST) {
        const std::uint32_t first = p.offsets.first_to_last(v);
#pragma unroll
        for (int i = 0; i < W; ++i) value.v[i] = load(from + first + i * p.offsets.channels.divisor);
      } else if (from) {
        value = load_vec<W>(from + v);
      }
      store_vec<W>(corner + p.offsets.channels_first(v), value);
    }
  }
}

// Elements per vector along an image row: all of a patch's rows and the patch's own rows must start at 16-byte boundaries.
template <typename T>
int image_width(const PatchGrid& grid, const T* images) {
  return vector_width<T>({grid.patch_w, grid.size_w, grid.channel_pixels()}, {images});
}

template <typename T, bool LAST>
void run_patchify(const Tensor& images, const Patches& p, const IdsCheck& check, const Tensor& out, cudaStream_t stream) {
  const T *from = const_data<T>(images), *to = const_data<T>(out);
  int width = vector_width<T>({p.grid.values()}, {to});
  if (!LAST) width = std::min(width, image_width(p.grid, from));
  dispatch_width<T>(width, [&](auto w) {
    launch(patchify_kernel<T, w(), LAST>, grid_for(check.blocks + ceil_div(p.batch * p.slots, kRowWarps), 1), dim3(kRowThreads), 0,
           stream, from, data<T>(out), p, check);
  });
}

template <typename T, bool LAST>
void run_unpatchify(const Tensor& patches, const Patches& p, const Tensor& images, cudaStream_t stream) {
  const RowStrides strides = row_strides(patches);
  const std::int64_t row_bytes = p.grid.values() * static_cast<std::int64_t>(sizeof(T));
  const int chunk = tokens_per_block(p.slots, row_bytes);
  int width = image_width(p.grid, data<T>(images));
  if (!LAST) width = std::min(width, vector_width<T>({p.grid.values(), strides.batch, strides.row}, {const_data<T>(patches)}));
  dispatch_width<T>(width, [&](auto w) {
    launch(unpatchify_kernel<T, w(), LAST>, grid_for(p.batch * blocks_of_sample(p.grid.tokens(), chunk), 1), dim3(kRowThreads), 0, stream,
           const_data<T>(patches), strides, data<T>(images), p, chunk);
  });
}

// One channel: both orders are the same, take the one whose loads are vectors.
bool is_channels_last(const PatchGrid& grid, bool asked) { return asked && grid.channels > 1; }

Tensor visible_tokens_patchify(const Tensor& images_any, std::optional<Tensor> ids_any, std::vector<std::int64_t> patch_size,
                               bool channels_last_patch) {
  const PatchGrid grid = check_patchify(images_any, ids_any, patch_size);
  const DeviceScope scope(images_any);
  const Tensor images = torch::stable::contiguous(images_any);
  const std::optional<Tensor> ids = contiguous(ids_any);
  const std::int64_t batch = images.size(0), slots = ids ? ids->size(1) : grid.tokens();
  Tensor out = empty_like_device(images, {batch, slots, grid.values()});
  const Patches patches{grid, PatchOffsets(grid), const_data_or_null<std::int64_t>(ids), !ids, batch, slots};
  const IdsCheck check = ids ? IdsCheck(patches.ids, batch, slots, grid.tokens(), -1) : IdsCheck();
  dispatch_floats(images.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    if (is_channels_last(grid, channels_last_patch)) {
      run_patchify<T, true>(images, patches, check, out, scope.stream());
    } else {
      run_patchify<T, false>(images, patches, check, out, scope.stream());
    }
  });
  return out;
}

Tensor visible_tokens_unpatchify(const Tensor& patches_any, std::optional<Tensor> ids_any, std::vector<std::int64_t> patch_size,
                                 std::vector<std::int64_t> image_size, bool channels_last_patch) {
  const PatchGrid grid = check_unpatchify(patches_any, ids_any, patch_size, image_size);
  const DeviceScope scope(patches_any);
  const Tensor rows = with_contiguous_rows(patches_any);
  const std::optional<Tensor> ids = contiguous(ids_any);
  const std::int64_t batch = rows.size(0), slots = rows.size(1);
  Tensor images = image_size.size() == 2 ? empty_like_device(rows, {batch, grid.channels, grid.size_h, grid.size_w})
                                         : empty_like_device(rows, {batch, grid.channels, grid.size_t_, grid.size_h, grid.size_w});
  const Patches patches{grid, PatchOffsets(grid), const_data_or_null<std::int64_t>(ids), !ids, batch, slots};
  dispatch_floats(rows.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    if (is_channels_last(grid, channels_last_patch)) {
      run_unpatchify<T, true>(rows, patches, images, scope.stream());
    } else {
      run_unpatchify<T, false>(rows, patches, images, scope.stream());
    }
  });
  return images;
}

}  // namespace

MASKOPS_CUDA_LIBRARY(m) {
  m.impl("visible_tokens_patchify", TORCH_BOX(&visible_tokens_patchify));
  m.impl("visible_tokens_unpatchify", TORCH_BOX(&visible_tokens_unpatchify));
}

}  // namespace maskops
