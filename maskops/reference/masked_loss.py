"""Reference of the family masked_loss: B batch, N patches, V values per patch."""

import torch
from torch import Tensor

from maskops.reference.visible_tokens import accumulation_dtype, patches_of

VARIANCE_EPS = 1e-6


def selected_patches(ids_restore: Tensor, num_keep: Tensor, num_mask: Tensor, on: str) -> Tensor:
    """bool [B, N]: the patches that the loss counts. Padding tokens (slot >= num_keep + num_mask) never count."""
    keep, end = num_keep[:, None], (num_keep + num_mask)[:, None]
    if on == "masked":
        return (ids_restore >= keep) & (ids_restore < end)
    return ids_restore < (keep if on == "visible" else end)


def normalised_target(images: Tensor, patch_size: list[int], norm_pix: bool) -> tuple[Tensor, Tensor, Tensor]:
    """target [B, N, V], mean [B, N], rstd [B, N]; (0, 1) without norm_pix. The variance is unbiased, as in MAE."""
    target = patches_of(images, patch_size).to(accumulation_dtype(images.dtype))
    mean = target.new_zeros(target.shape[:2])
    if not norm_pix:
        return target, mean, mean + 1
    mean = target.mean(2)
    centred = target - mean[:, :, None]
    variance = centred.square().sum(2) / max(target.shape[2] - 1, 1)
    rstd = (variance + VARIANCE_EPS).rsqrt()
    return centred * rstd[:, :, None], mean, rstd


def masked_loss_patch(
    pred: Tensor, images: Tensor, ids_restore: Tensor, num_keep: Tensor, num_mask: Tensor, patch_size: list[int],
    norm_pix: bool, kind: str, beta: float, on: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    chosen = selected_patches(ids_restore, num_keep, num_mask, on)
    target, mean, rstd = normalised_target(images.to(accumulation_dtype(pred.dtype)), patch_size, norm_pix)
    error = pred.to(target.dtype) - target
    if kind == "l2":
        value = error.square()
    elif kind == "l1":
        value = error.abs()
    else:
        size = error.abs()
        value = torch.where(size < beta, 0.5 * error.square() / beta, size - 0.5 * beta)
    per_patch = torch.where(chosen, value.mean(2), 0)
    return per_patch, torch.where(chosen[:, :, None], torch.stack([mean, rstd], 2), 0)


def _masked_loss_patch_backward(
    grad: Tensor, pred: Tensor, images: Tensor, stats: Tensor, ids_restore: Tensor, num_keep: Tensor, num_mask: Tensor,
    patch_size: list[int], norm_pix: bool, kind: str, beta: float, on: str,
) -> Tensor:  # fmt: skip
    chosen = selected_patches(ids_restore, num_keep, num_mask, on)[:, :, None]
    target = (patches_of(images, patch_size).to(stats.dtype) - stats[:, :, :1]) * stats[:, :, 1:]
    error = pred.to(stats.dtype) - target
    if kind == "l2":
        slope = 2 * error
    elif kind == "l1":
        slope = error.sign()
    else:
        slope = (error / beta).clamp(-1, 1)
    return torch.where(chosen, slope * (grad[:, :, None] / pred.shape[2]), 0).to(pred.dtype)
