// patchify and unpatchify on the CPU: one patch at a time, its rows of pixels read or written in order. Dtype-free: elements
// are moved as integers of their size.
#include "common/isa.h"
#include "math/visible_tokens.h"

namespace maskops {

struct PatchCopy {
  PatchGrid grid;
  const void* from;
  void* to;
  const int64_t* ids;  // [B, K] or null
  int64_t slots, tokens;
  int element_size;
  bool channels_last;
};

struct PatchKernels {
  void (*cut)(const PatchCopy&, int64_t begin, int64_t end);    // images -> patches, over rows b * K + k
  void (*paste)(const PatchCopy&, int64_t begin, int64_t end);  // patches -> images
};
MASKOPS_DECLARE_KERNELS(PatchKernels)

inline namespace MASKOPS_ISA_NS {
namespace {

// One row of pixels, C planes of `count` values `plane` apart, to or from `count` interleaved groups of C.
template <class E, bool kCut>
void interleave_row(E* pixels, E* patch, int64_t channels, int64_t plane, int64_t count) {
  if (channels == 3) {
    E *red = pixels, *green = pixels + plane, *blue = pixels + 2 * plane;
    for (int64_t q = 0; q < count; ++q) {
      if (kCut) patch[3 * q] = red[q], patch[3 * q + 1] = green[q], patch[3 * q + 2] = blue[q];
      else red[q] = patch[3 * q], green[q] = patch[3 * q + 1], blue[q] = patch[3 * q + 2];
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t q = 0; q < count; ++q) {
      if (kCut) patch[q * channels + c] = pixels[c * plane + q];
      else pixels[c * plane + q] = patch[q * channels + c];
    }
  }
}

template <class E, bool kCut>
void copy_row(E* pixels, E* patch, int64_t count) {
  for (int64_t q = 0; q < count; ++q) {
    if (kCut) patch[q] = pixels[q];
    else pixels[q] = patch[q];
  }
}

template <class E, bool kCut>
void one_patch(const PatchGrid& grid, E* corner, E* patch, bool channels_last) {
  const int64_t plane = grid.channel_pixels(), width = grid.patch_w;
  for (int64_t r = 0; r < grid.patch_t; ++r) {
    for (int64_t p = 0; p < grid.patch_h; ++p) {
      E* pixels = corner + grid.inside(r, p, 0);
      const int64_t row = (r * grid.patch_h + p) * width;
      if (channels_last) {
        interleave_row<E, kCut>(pixels, patch + row * grid.channels, grid.channels, plane, width);
        continue;
      }
      for (int64_t c = 0; c < grid.channels; ++c) {
        copy_row<E, kCut>(pixels + c * plane, patch + c * grid.patch_pixels() + row, width);
      }
    }
  }
}

template <class E, bool kCut>
void move_patches(const PatchCopy& args, int64_t begin, int64_t end) {
  const PatchGrid& grid = args.grid;
  E* images = static_cast<E*>(kCut ? const_cast<void*>(args.from) : args.to);
  E* patches = static_cast<E*>(kCut ? args.to : const_cast<void*>(args.from));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / args.slots, n = args.ids ? args.ids[i] : i % args.slots;
    E* patch = patches + i * grid.values();
    if (n >= 0) {
      one_patch<E, kCut>(grid, images + b * grid.image_values() + grid.corner(n), patch, args.channels_last);
    } else if (kCut) {
      for (int64_t v = 0; v < grid.values(); ++v) patch[v] = E(0);
    }
  }
}

template <bool kCut>
void move_sized(const PatchCopy& args, int64_t begin, int64_t end) {
  switch (args.element_size) {
    case 2: return move_patches<uint16_t, kCut>(args, begin, end);
    case 4: return move_patches<uint32_t, kCut>(args, begin, end);
    default: return move_patches<uint64_t, kCut>(args, begin, end);
  }
}

}  // namespace

extern const PatchKernels PatchKernels_table{&move_sized<true>, &move_sized<false>};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/ids.h"
#include "math/visible_tokens_check.h"

namespace maskops {
namespace {

const int64_t* optional_ids(const char* op, const std::optional<Tensor>& ids, int64_t tokens) {
  if (!ids) return nullptr;
  const int64_t* data = static_cast<const int64_t*>(ids->const_data_ptr());
  check_ids(op, "ids", data, ids->size(0), ids->size(1), tokens, -1);
  return data;
}

std::optional<Tensor> contiguous_or_none(const std::optional<Tensor>& ids) {
  if (!ids) return std::nullopt;
  return contiguous_or_copy(*ids);
}

Tensor visible_tokens_patchify(const Tensor& images_any, std::optional<Tensor> ids_any, std::vector<int64_t> patch_size,
                               bool channels_last) {
  const PatchGrid grid = check_patchify(images_any, ids_any, patch_size);
  const Tensor images = contiguous_or_copy(images_any);
  const std::optional<Tensor> ids = contiguous_or_none(ids_any);
  const int64_t* chosen = optional_ids("patchify", ids, grid.tokens());
  const int64_t batch = images.size(0), slots = ids ? ids->size(1) : grid.tokens();
  Tensor out = empty_like_device(images, {batch, slots, grid.values()});
  const PatchCopy args{grid, images.const_data_ptr(), out.mutable_data_ptr(), chosen, slots, grid.tokens(),
                       static_cast<int>(images.element_size()), channels_last};
  const PatchKernels& kernels = pick_PatchKernels();
  parallel_for(batch * slots, grid.values() * args.element_size * 2, [&](int64_t begin, int64_t end) { kernels.cut(args, begin, end); });
  return out;
}

Tensor visible_tokens_unpatchify(const Tensor& patches_any, std::optional<Tensor> ids_any, std::vector<int64_t> patch_size,
                                 std::vector<int64_t> image_size, bool channels_last) {
  const PatchGrid grid = check_unpatchify(patches_any, ids_any, patch_size, image_size);
  const Tensor patches = contiguous_or_copy(patches_any);
  const std::optional<Tensor> ids = contiguous_or_none(ids_any);
  const int64_t* chosen = optional_ids("unpatchify", ids, grid.tokens());
  const int64_t batch = patches.size(0), slots = patches.size(1);
  std::vector<int64_t> sizes{batch, grid.channels};
  sizes.insert(sizes.end(), image_size.begin(), image_size.end());
  // With ids some pixels are not written by any patch, and those are zero.
  Tensor out = with_huge_pages(ids ? torch::stable::new_zeros(patches, sizes) : torch::stable::new_empty(patches, sizes));
  const PatchCopy args{grid, patches.const_data_ptr(), out.mutable_data_ptr(), chosen, slots, grid.tokens(),
                       static_cast<int>(patches.element_size()), channels_last};
  const PatchKernels& kernels = pick_PatchKernels();
  parallel_for(batch * slots, grid.values() * args.element_size * 2, [&](int64_t begin, int64_t end) { kernels.paste(args, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("visible_tokens_patchify", TORCH_BOX(&visible_tokens_patchify));
  m.impl("visible_tokens_unpatchify", TORCH_BOX(&visible_tokens_unpatchify));
}

}  // namespace maskops
#endif
