"""Triton kernels of masked_patch_loss: the per-patch error against patches read straight from the images.

B batch, N patches per image, V values per patch in the order (t, h, w, c).
"""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import (
    accumulator,
    cdiv,
    launch,
    patch_grid,
    patch_origin,
    patch_value,
    rounded,
    row_tile,
    rows_of,
)

VARIANCE_EPS = tl.constexpr(1e-6)


@triton.jit
def _selected(restore_ptr, keep_ptr, hide_ptr, r, rows, N, ON: tl.constexpr):
    """Whether the loss counts patch r of [B*N]; padding tokens have slots beyond num_keep + num_mask."""
    b = r // N
    slot = tl.load(restore_ptr + r, mask=r < rows, other=0)
    keep = tl.load(keep_ptr + b, mask=r < rows, other=0)
    end = keep + tl.load(hide_ptr + b, mask=r < rows, other=0)
    if ON == "masked":
        chosen = (slot >= keep) & (slot < end)
    elif ON == "visible":
        chosen = slot < keep
    else:
        chosen = slot < end
    return chosen & (r < rows)


@triton.jit
def _load_pixels(images_ptr, pixel, v, chosen, s_c, s_t, s_h, C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr,
                 PW: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Values v of the chosen patches as ACC [BLOCK_R, BLOCK_D], zero elsewhere."""
    at = pixel[:, None] + patch_value(v, s_c, s_t, s_h, C, PT, PH, PW, True)[None, :]
    mask = chosen[:, None] & (v < C * PT * PH * PW)[None, :]
    return tl.load(images_ptr + at, mask=mask, other=0.0).to(ACC)


@triton.jit
def _loss_kernel(pred_ptr, images_ptr, restore_ptr, keep_ptr, hide_ptr, loss_ptr, stats_ptr, rows, N, grid_h, grid_w,
                 sp_b, sp_n, s_b, s_c, s_t, s_h, C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
                 NORM: tl.constexpr, KIND: tl.constexpr, BETA: tl.constexpr, ON: tl.constexpr, ACC: tl.constexpr,
                 BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_R patches of [B*N] and walks over their V values, BLOCK_D at a time: mean, then the centred
    # variance (exact for constant patches), then the error. The second and third look at the pixels hit the L1 cache.
    V: tl.constexpr = C * PT * PH * PW
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    b = r // N
    n = r % N
    chosen = _selected(restore_ptr, keep_ptr, hide_ptr, r, rows, N, ON)
    pixel = b * s_b + patch_origin(n, s_t, s_h, grid_h, grid_w, PT, PH, PW)
    mean = tl.zeros([BLOCK_R], ACC)
    rstd = tl.zeros([BLOCK_R], ACC) + 1.0
    if NORM:
        total = tl.zeros([BLOCK_R, BLOCK_D], ACC)
        for v0 in range(0, V, BLOCK_D):
            v = v0 + tl.arange(0, BLOCK_D)
            total += _load_pixels(images_ptr, pixel, v, chosen, s_c, s_t, s_h, C, PT, PH, PW, ACC)
        mean = tl.sum(total, 1) / V
        total = tl.zeros([BLOCK_R, BLOCK_D], ACC)
        rest = tl.zeros([BLOCK_R, BLOCK_D], ACC)
        for v0 in range(0, V, BLOCK_D):
            v = v0 + tl.arange(0, BLOCK_D)
            target = _load_pixels(images_ptr, pixel, v, chosen, s_c, s_t, s_h, C, PT, PH, PW, ACC) - mean[:, None]
            target = tl.where((v < V)[None, :], target, 0.0)
            total += target * target
            rest += target
        # What is left of the mean after rounding: rstd of a constant patch is 1000 and would show it in the loss.
        shift = tl.sum(rest, 1) / V
        mean += shift
        variance = tl.maximum(tl.sum(total, 1) - shift * shift * V, 0.0) / max(V - 1, 1)
        rstd = 1.0 / tl.sqrt(variance + VARIANCE_EPS)
    total = tl.zeros([BLOCK_R, BLOCK_D], ACC)
    for v0 in range(0, V, BLOCK_D):
        v = v0 + tl.arange(0, BLOCK_D)
        target = _load_pixels(images_ptr, pixel, v, chosen, s_c, s_t, s_h, C, PT, PH, PW, ACC)
        if NORM:
            target = (target - mean[:, None]) * rstd[:, None]
        mask = chosen[:, None] & (v < V)[None, :]
        pred = tl.load(pred_ptr + (b * sp_b + n * sp_n)[:, None] + v[None, :], mask=mask, other=0.0).to(ACC)
        error = pred - target
        size = tl.abs(error)
        if KIND == "l2":
            value = error * error
        elif KIND == "l1":
            value = size
        else:
            value = tl.where(size < BETA, 0.5 * error * error / BETA, size - 0.5 * BETA)
        total += tl.where(mask, value, 0.0)
    tl.store(loss_ptr + r, tl.where(chosen, tl.sum(total, 1) / V, 0.0), mask=r < rows)
    tl.store(stats_ptr + 2 * r, tl.where(chosen, mean, 0.0), mask=r < rows)
    tl.store(stats_ptr + 2 * r + 1, tl.where(chosen, rstd, 0.0), mask=r < rows)


@triton.jit
def _loss_backward_kernel(grad_ptr, pred_ptr, images_ptr, stats_ptr, restore_ptr, keep_ptr, hide_ptr, out_ptr,
                          rows, N, grid_h, grid_w, sp_b, sp_n, s_b, s_c, s_t, s_h,
                          C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, NORM: tl.constexpr,
                          KIND: tl.constexpr, BETA: tl.constexpr, ON: tl.constexpr, ACC: tl.constexpr,
                          BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_R patches x BLOCK_D values of grad_pred [B*N, V]: elementwise, with mean and rstd of the
    # forward pass in stats [B*N, 2]; patches that do not count get zeros and are not read.
    V: tl.constexpr = C * PT * PH * PW
    tiles_v: tl.constexpr = (V + BLOCK_D - 1) // BLOCK_D
    r = (tl.program_id(0) // tiles_v).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    v = (tl.program_id(0) % tiles_v) * BLOCK_D + tl.arange(0, BLOCK_D)
    b = r // N
    n = r % N
    chosen = _selected(restore_ptr, keep_ptr, hide_ptr, r, rows, N, ON)
    pixel = b * s_b + patch_origin(n, s_t, s_h, grid_h, grid_w, PT, PH, PW)
    target = _load_pixels(images_ptr, pixel, v, chosen, s_c, s_t, s_h, C, PT, PH, PW, ACC)
    if NORM:
        mean = tl.load(stats_ptr + 2 * r, mask=chosen, other=0.0)
        rstd = tl.load(stats_ptr + 2 * r + 1, mask=chosen, other=0.0)
        target = (target - mean[:, None]) * rstd[:, None]
    mask = chosen[:, None] & (v < V)[None, :]
    pred = tl.load(pred_ptr + (b * sp_b + n * sp_n)[:, None] + v[None, :], mask=mask, other=0.0).to(ACC)
    scale = tl.load(grad_ptr + r, mask=chosen, other=0.0).to(ACC) / V
    error = pred - target
    if KIND == "l2":
        slope = 2.0 * error
    else:
        slope = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, error))
        if KIND == "smooth_l1":
            slope = tl.where(tl.abs(error) < BETA, error / BETA, slope)
    value = tl.where(mask, slope * scale[:, None], 0.0)
    at = r[:, None] * V + v[None, :]
    tl.store(out_ptr + at, rounded(value, out_ptr.dtype.element_ty), mask=(r < rows)[:, None] & (v < V)[None, :])


def _choice(norm_pix, kind, beta, on):
    # smooth_l1 without a width is l1; saying so here keeps a division by zero out of the kernel.
    kind = "l1" if kind == "smooth_l1" and beta == 0 else kind
    return {"NORM": norm_pix, "KIND": kind, "BETA": float(beta) if kind == "smooth_l1" else 1.0, "ON": on}


def masked_loss_patch(pred, images, ids_restore, num_keep, num_mask, patch_size, norm_pix, kind, beta, on):
    pred, grid = rows_of(pred), patch_grid(images, patch_size)
    B, N = ids_restore.shape
    acc, tl_acc = accumulator(pred)
    per_patch = torch.empty((B, N), dtype=acc, device=pred.device)
    stats = torch.empty((B, N, 2), dtype=acc, device=pred.device)
    block_d = min(1024, max(16, triton.next_power_of_2(grid.values)))
    block_r = 1024 // block_d
    launch(
        _loss_kernel, cdiv(B * N, block_r), pred, grid.images, ids_restore.contiguous(), num_keep.contiguous(),
        num_mask.contiguous(), per_patch, stats, B * N, N, *grid.grid[1:], pred.stride(0), pred.stride(1),
        *grid.strides, **grid.patch, **_choice(norm_pix, kind, beta, on), ACC=tl_acc,
        BLOCK_R=block_r, BLOCK_D=block_d, num_warps=8 if acc == torch.float64 else 4,
    )  # fmt: skip
    return per_patch, stats


def _masked_loss_patch_backward(
    grad, pred, images, stats, ids_restore, num_keep, num_mask, patch_size, norm_pix, kind, beta, on
):
    pred, grid = rows_of(pred), patch_grid(images, patch_size)
    B, N = ids_restore.shape
    grad_pred = pred.new_empty(pred.shape)
    tile = row_tile(grid.values)
    launch(
        _loss_backward_kernel, cdiv(B * N, tile["BLOCK_R"]) * cdiv(grid.values, tile["BLOCK_D"]),
        grad.contiguous(), pred, grid.images, stats.contiguous(), ids_restore.contiguous(), num_keep.contiguous(),
        num_mask.contiguous(), grad_pred, B * N, N, *grid.grid[1:], pred.stride(0), pred.stride(1), *grid.strides,
        **grid.patch, **_choice(norm_pix, kind, beta, on), ACC=accumulator(pred)[1], **tile,
    )  # fmt: skip
    return grad_pred
