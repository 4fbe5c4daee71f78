"""Patch movers of visible_tokens: patchify and unpatchify, which are each other's backward."""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import cdiv, launch, patch_grid, patch_origin, patch_value, row_tile
from maskops.kernels.visible_tokens.index import invert_ids, patch_of_row


@triton.jit
def _patches_kernel(images_ptr, patches_ptr, ids_ptr, rows, per_batch, grid_h, grid_w,
                    s_b, s_c, s_t, s_h, sp_b, sp_k,
                    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
                    CHANNELS_LAST: tl.constexpr, TO_IMAGES: tl.constexpr,
                    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_R patches x BLOCK_D of their V values. To patches: rows are slots (b, k) of patches
    # [B, K, V] and ids [B, K] name the patch. To images: rows are all patches (b, n), and ids [B, N] is the inverse map
    # to slots, so that every pixel is written once, zero where no slot holds its patch. The patch side is contiguous,
    # the image side runs of PW pixels, whose cache lines one program uses up whole.
    V: tl.constexpr = C * PT * PH * PW
    tiles_v: tl.constexpr = (V + BLOCK_D - 1) // BLOCK_D
    r = (tl.program_id(0) // tiles_v).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    v = (tl.program_id(0) % tiles_v) * BLOCK_D + tl.arange(0, BLOCK_D)
    b, here, other, used = patch_of_row(ids_ptr, r, rows, per_batch)
    if TO_IMAGES:
        n, k = here, other
    else:
        n, k = other, here
    pixel = b * s_b + patch_origin(n, s_t, s_h, grid_h, grid_w, PT, PH, PW)
    pixel = pixel[:, None] + patch_value(v, s_c, s_t, s_h, C, PT, PH, PW, CHANNELS_LAST)[None, :]
    value_at = (b * sp_b + k * sp_k)[:, None] + v[None, :]
    live = (r < rows)[:, None] & (v < V)[None, :]
    used = used[:, None] & (v < V)[None, :]
    if TO_IMAGES:
        tl.store(images_ptr + pixel, tl.load(patches_ptr + value_at, mask=used, other=0.0), mask=live)
    else:
        tl.store(patches_ptr + value_at, tl.load(images_ptr + pixel, mask=used, other=0.0), mask=live)


def _move(grid, patches, ids, channels_last_patch, to_images):
    B, slots = patches.shape[:2]
    per_batch = grid.tokens if to_images else slots
    # Pixels lie anywhere, so that every value has an address of its own: with 8-byte values 2048 of them spilled on Blackwell.
    tile = row_tile(grid.values, 1024 if patches.element_size() == 8 else 2048)
    programs = cdiv(B * per_batch, tile["BLOCK_R"]) * cdiv(grid.values, tile["BLOCK_D"])
    launch(
        _patches_kernel, programs, grid.images, patches, ids, B * per_batch, per_batch,
        grid.grid[1], grid.grid[2], *grid.strides, patches.stride(0), patches.stride(1), **grid.patch,
        CHANNELS_LAST=channels_last_patch, TO_IMAGES=to_images, **tile,
    )  # fmt: skip


def visible_tokens_patchify(images, ids, patch_size, channels_last_patch=True):
    grid = patch_grid(images, patch_size)
    slots = grid.tokens if ids is None else ids.shape[1]
    patches = images.new_empty((images.shape[0], slots, grid.values))
    _move(grid, patches, None if ids is None else ids.contiguous(), channels_last_patch, to_images=False)
    return patches


def visible_tokens_unpatchify(patches, ids, patch_size, image_size, channels_last_patch=True):
    channels = patches.shape[2] // torch.Size(patch_size).numel()
    images = patches.new_empty((patches.shape[0], channels, *image_size))
    grid = patch_grid(images, patch_size)
    slot_of = None if ids is None else invert_ids(ids, grid.tokens)
    _move(grid, patches.contiguous(), slot_of, channels_last_patch, to_images=True)
    return images
