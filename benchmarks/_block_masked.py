"""Rivals of block-masked convolution: the dense layer times the mask, as SparK computes, in both memory layouts; SparK's step.

20 of 49 cells are active, batch 8. The floor of a row is the dense layer's flops times 20 / 49 at the multiply-add roof: no more
than 49 / 20 = 2.45 of a dense layer that runs at it. What keeps us below it: kernel places that reach into a hidden neighbour,
which are summed as zeros unless a whole tile of rows lacks them, and the zeros of hidden cells, which are written.
"""

import copy
import types
from typing import Any

import torch
import torch.nn.functional as F
from _harness import RIVAL_RMS, Case, Inputs
from torch import Tensor, nn

import maskops
from maskops.models.spark import SparK, SparKConfig
from maskops.reference.sparse_conv_block import position_mask

BATCH, GRID, KEPT = 8, 7, 20
FIRST, LAST = "dense x mask", "dense x mask, channels_last"
# channels, size, kernel, groups
LAYERS = ((64, 56, 3, 1), (128, 28, 3, 1), (96, 56, 7, 96), (192, 28, 7, 192))


def cells_of(seed: int, device: torch.device) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(BATCH, GRID**2, generator=g).argsort(1) < KEPT).view(BATCH, GRID, GRID).to(device)


def ours(x: Tensor, weight: Tensor, cells: Tensor, backend: str = "auto", **_: Any) -> Tensor:
    groups = x.shape[1] // weight.shape[1]
    return maskops.block_masked_conv(x, weight, cells, groups=groups, backend=backend)


def channels_last(x: Tensor, weight: Tensor, mask: Tensor, **_: Any) -> Tensor:
    return F.conv2d(x, weight, padding=weight.shape[2] // 2, groups=x.shape[1] // weight.shape[1]) * mask


def channels_first(x_first: Tensor, weight: Tensor, mask: Tensor, **_: Any) -> Tensor:
    return channels_last(x_first, weight, mask)


def make(channels: int, size: int, kernel: int, groups: int, dtype: torch.dtype) -> Any:
    def inputs(device: torch.device, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        cells, each = cells_of(seed, device), channels // groups
        mask = position_mask(cells, size, size).to(dtype)
        x, grad = (torch.randn(BATCH, channels, size, size, generator=g).to(device, dtype) for _ in range(2))
        weight = (torch.randn(channels, each, kernel, kernel, generator=g) / (each * kernel**2) ** 0.5).to(
            device, dtype
        )
        x = x * mask
        made: Inputs = {
            "x": x.contiguous(memory_format=torch.channels_last),
            "weight": weight,
            "cells": cells,
            "mask": mask,
        }
        return made | {"x_first": x, "grad_out": grad.contiguous(memory_format=torch.channels_last)}

    return inputs


def gate_gradients(made: Inputs) -> None:
    """As the usual gate, but what a dense layer hands to hidden positions, which the mask below it removes, does not count."""
    results = []
    for forward in (ours, channels_last):
        leaves = {name: made[name].detach().requires_grad_() for name in ("x", "weight")}
        out = forward(**made | leaves)
        grad_x, grad_weight = torch.autograd.grad(out, list(leaves.values()), made["grad_out"])
        results.append((out.detach(), grad_x * made["mask"], grad_weight))
    for what, mine, other in zip(("result", "grad_x", "grad_weight"), *results, strict=True):
        off = (mine.double() - other.double()).square().mean() / other.double().square().mean()
        assert off.sqrt() <= RIVAL_RMS[mine.dtype], f"{what} is off by {off.sqrt():.2e} (RMS)"


def flops(made: Inputs) -> int:
    x, weight = made["x"], made["weight"]
    return 2 * BATCH * x.shape[2] * x.shape[3] * weight.numel() * KEPT // GRID**2


def layer_cases() -> list[Case]:
    out = []
    for channels, size, kernel, groups in LAYERS:
        for dtype in (torch.float32, torch.bfloat16):
            kind = "depthwise " if groups > 1 else ""
            name = f"block-masked {kind}{kernel}x{kernel}, {channels} channels, {size}x{size}"
            common = {
                "dtype": dtype,
                "make": make(channels, size, kernel, groups, dtype),
                "kind": "flops",
                "sets": "one",
            }
            common |= {"rounds": 60, "quick": dtype == torch.float32 and size == 28}
            # The gradients of the contiguous rival go to another tensor: it is measured forward only.
            out.append(
                Case(
                    name,
                    "fwd",
                    ours=ours,
                    rivals={FIRST: channels_first, LAST: channels_last},
                    asked={"best": 1.8},
                    work=flops,
                    **common,
                )
            )
            out.append(
                Case(
                    name, "fwd+bwd", ours=ours, rivals={LAST: channels_last}, grads=("x", "weight"), asked={"best": 1.8},
                    gate=gate_gradients, work=lambda made: 3 * flops(made), **common,
                )
            )  # fmt: skip
    return out


# ---------------------------------------------------------------- a step of SparK


def as_published(model: SparK) -> SparK:
    """The same model as SparK's own code computes it: dense layers times the mask, batch norm of gathered rows."""
    model = copy.deepcopy(model)

    def conv(self: nn.Conv2d, x: Tensor) -> Tensor:
        out = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return out * position_mask(model.now, *out.shape[2:]).to(out.dtype)

    def pool(self: nn.MaxPool2d, x: Tensor) -> Tensor:
        out = F.max_pool2d(x, self.kernel_size, self.stride, self.padding)
        return out * position_mask(model.now, *out.shape[2:]).to(out.dtype)

    def norm(self: nn.BatchNorm2d, x: Tensor) -> Tensor:
        rows, at = x.permute(0, 2, 3, 1), position_mask(model.now, *x.shape[2:]).squeeze(1).nonzero(as_tuple=True)
        found = F.batch_norm(
            rows[at], self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
        )
        out = torch.zeros_like(rows)
        out[at] = found
        return out.permute(0, 3, 1, 2)

    for part in (model.encoder, model.densify_norms):
        for module in part.modules():
            kinds = ((nn.Conv2d, conv), (nn.MaxPool2d, pool), (nn.BatchNorm2d, norm))
            for forward in (f for kind, f in kinds if isinstance(module, kind)):
                module.forward = types.MethodType(forward, module)
    return model


def make_step(device: torch.device, seed: int) -> Inputs:
    torch.manual_seed(seed)
    model = SparK(SparKConfig.of_size("resnet50")).to(device).train()
    images = torch.randn(BATCH, 3, 224, 224, device=device)
    return {
        "images": images,
        "model": model,
        "published": as_published(model),
        "noise": torch.rand(BATCH, GRID**2, device=device),
    }


def step(model: SparK, images: Tensor, noise: Tensor) -> Tensor:
    with torch.enable_grad():
        out = model(images, noise)
        out.loss.backward()
    model.zero_grad(set_to_none=True)
    return out.loss.detach()


def our_step(images: Tensor, model: SparK, noise: Tensor, **_: Any) -> Tensor:
    return step(model, images, noise)


def their_step(images: Tensor, published: SparK, noise: Tensor, **_: Any) -> Tensor:
    split = maskops.random_masking(BATCH, GRID**2, num_keep=KEPT, noise=noise)
    published.now = published.cells(split)
    # Masked pixels are 0 and the stem of a dense network reads them.
    x = images * position_mask(published.now, *images.shape[2:]).to(images.dtype)
    with torch.enable_grad():
        maps = published.encoder.features(x)[::-1]
        maps = [norm(m) for norm, m in zip(published.densify_norms, maps, strict=True)]
        published_norms, published.densify_norms = published.densify_norms, nn.ModuleList(nn.Identity() for _ in maps)
        pred = published.decode(maps, split)
        published.densify_norms = published_norms
        loss = maskops.masked_patch_loss(pred, images, split, published.patch_size)
        loss.backward()
    published.zero_grad(set_to_none=True)
    return loss.detach()


def gate_step(made: Inputs) -> None:
    """Both give the same loss."""
    mine, theirs = our_step(**made), their_step(**made)
    assert abs(mine - theirs) <= 1e-4 * abs(theirs), f"SparK's loss is {mine:.6f} here and {theirs:.6f} there"


def cases() -> list[Case]:
    whole = Case(
        "a training step of SparK ResNet-50, 224x224, batch 8", "fwd+bwd", torch.float32, make_step, our_step,
        {"dense x mask, gathered batch norm": their_step}, gate=gate_step, quick=False, sets="one", rounds=5,
        asked={"best": 1.6},
    )  # fmt: skip
    return [*layer_cases(), whole]
