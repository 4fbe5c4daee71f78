"""Rivals of masked_loss: the published MAE loss, which materialises the targets of all patches."""

from typing import Any

import torch
from _harness import Case, Inputs
from torch import Tensor

import maskops
from maskops import TokenSplit
from maskops.testing.masked_loss import TRAFFIC

IDIOM = "patchify, normalise, square, mask, mean"


def published(pred: Tensor, images: Tensor, mask: Tensor, patch: int, **_: Any) -> Tensor:
    """forward_loss of the published MAE with norm_pix_loss."""
    batch, channels, height, width = images.shape
    h, w = height // patch, width // patch
    target = images.reshape(batch, channels, h, patch, w, patch)
    target = torch.einsum("nchpwq->nhwpqc", target).reshape(batch, h * w, patch**2 * channels)
    mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
    target = (target - mean) / (var + 1.0e-6) ** 0.5
    loss = ((pred - target) ** 2).mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


def gather_first(pred: Tensor, images: Tensor, mask: Tensor, patch: int, split: TokenSplit, **_: Any) -> Tensor:
    """What a careful user writes: only the masked patches of both are gathered, normalised and compared."""
    batch, channels, height, width = images.shape
    target = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    target = target.permute(0, 2, 4, 3, 5, 1).reshape(batch, pred.shape[1], -1)
    ids = split.ids_mask[:, :, None].expand(-1, -1, target.shape[2])
    target, pred = torch.gather(target, 1, ids), torch.gather(pred, 1, ids)
    var, mean = torch.var_mean(target, dim=-1, keepdim=True)
    return (pred - (target - mean) * (var + 1.0e-6).rsqrt()).square().mean()


def ours(pred: Tensor, images: Tensor, patch: int, split: TokenSplit, backend: str = "auto", **_: Any) -> Tensor:
    return maskops.masked_patch_loss(pred, images, split, patch, backend=backend)


def make(batch: int, size: int, patch: int, dtype: torch.dtype, channels: int = 3) -> Any:
    def inputs(device: torch.device, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        tokens = (size // patch) ** 2
        split = maskops.random_masking(batch, tokens, 0.75, seed=seed, device=device)
        images = torch.randn(batch, channels, size, size, generator=g).to(device, dtype)
        pred = torch.randn(batch, tokens, channels * patch**2, generator=g).to(device, dtype)
        return {
            "pred": pred, "images": images, "mask": split.mask.to(dtype), "patch": patch, "split": split,
            "grad_out": torch.ones((), device=device, dtype=dtype),
        }  # fmt: skip

    return inputs


def work(inputs: Inputs) -> int:
    pred, images, split = inputs["pred"], inputs["images"], inputs["split"]
    rows = split.ids_restore, split.num_keep, split.num_mask, [inputs["patch"]] * 2, True, "l2", 1.0, "masked"
    forward = TRAFFIC["masked_loss_patch"](pred, images, *rows)
    return forward + TRAFFIC["_masked_loss_patch_backward"](None, pred, images, None, *rows)


def cases() -> list[Case]:
    sizes = [
        (64, 224, 16, torch.float32, True), (64, 224, 16, torch.bfloat16, False), (8, 224, 16, torch.float32, False),
        (1, 224, 16, torch.float32, False), (64, 224, 14, torch.float32, False), (5, 208, 8, torch.float32, False),
    ]  # fmt: skip
    out = []
    for batch, size, patch, dtype, headline in sizes:
        # The loss of a half-precision prediction is float32 here, so its gradient is too; the idiom keeps bfloat16.
        rivals = {IDIOM: in_loss_dtype(published), "gather masked patches first": in_loss_dtype(gather_first)}
        out.append(
            Case(
                f"masked_patch_loss batch {batch}, {size}/{patch}", mode="fwd+bwd", dtype=dtype,
                make=in_float_grad(make(batch, size, patch, dtype)), ours=ours, rivals=rivals, grads=("pred",),
                compiled=tuple(rivals) if headline else (), work=work, quick=headline,
                asked={IDIOM: 4.0, "compiled": 1.5} if headline else {},
            )
        )  # fmt: skip
    return out


def in_loss_dtype(forward: Any) -> Any:
    return lambda **inputs: forward(**inputs).float() if inputs["pred"].dtype != torch.float64 else forward(**inputs)


def in_float_grad(make_inputs: Any) -> Any:
    def inputs(device: torch.device, seed: int) -> Inputs:
        made = make_inputs(device, seed)
        return {**made, "grad_out": made["grad_out"].float()}

    return inputs
