"""Calls of nm_matmul's public functions."""

from collections.abc import Callable

import torch
from torch import Tensor

import maskops
from maskops.testing.calls._shared import DIM, seed


def case_nm_mask(batch: int, count: int) -> tuple[Callable, tuple]:
    return lambda s: maskops.nm_mask(s, 2, 4), (torch.randn(batch, count),)


def nm_weight(count: int) -> Tensor:
    weight = torch.randn(DIM, count)
    return torch.where(maskops.nm_mask(weight.abs(), 2, 4), weight, 0)


def case_nm_compress(batch: int, count: int) -> tuple[Callable, tuple]:
    return lambda w: maskops.nm_compress(w, 2, 4).values, (nm_weight(count).requires_grad_(),)


def case_nm_linear(batch: int, count: int) -> tuple[Callable, tuple]:
    weight, x = maskops.nm_compress(nm_weight(count), 2, 4), torch.randn(batch, count, requires_grad=True)

    def f(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor) -> Tensor:
        return maskops.nm_linear(x, maskops.NMWeight(values, indices, 2, 4, x.shape[1]), bias)

    return f, (x, weight.values.requires_grad_(), weight.indices, torch.randn(DIM, requires_grad=True))


def case_pack_bitmask(batch: int, count: int) -> tuple[Callable, tuple]:
    return maskops.pack_bitmask, (torch.rand(batch, count) < 0.5,)


def case_bitmask_linear(batch: int, count: int) -> tuple[Callable, tuple]:
    bitmask = maskops.pack_bitmask(torch.rand(batch, DIM, count) < 0.5)
    leaves = torch.randn(batch, 5, count), torch.randn(DIM, count), torch.randn(DIM), torch.zeros(DIM, count)
    x, weight, bias, scores = (t.requires_grad_() for t in leaves)
    return lambda x, w, m, b, s: maskops.bitmask_linear(x, w, m, b, scores=s), (x, weight, bitmask, bias, scores)


def case_nm_soft_linear(batch: int, count: int) -> tuple[Callable, tuple]:
    # One row more, or the first batch is tied to the 6 patterns.
    x, logits = torch.randn(batch + 1, count, requires_grad=True), torch.randn(DIM, count // 4, 6, requires_grad=True)

    def f(x: Tensor, weight: Tensor, logits: Tensor, seed: Tensor) -> Tensor:
        y, kept = maskops.nm_soft_linear(x, weight, logits, 2, 4, tau=0.5, seed=seed)
        return y + kept.to(y.dtype)

    return f, (x, torch.randn(DIM, count), logits, seed())


CALLS = {
    "nm_mask": case_nm_mask,
    "nm_compress": case_nm_compress,
    "nm_linear": case_nm_linear,
    "pack_bitmask": case_pack_bitmask,
    "bitmask_linear": case_bitmask_linear,
    "nm_soft_linear": case_nm_soft_linear,
}
AUTOCAST = {"nm_linear": torch.bfloat16, "bitmask_linear": torch.bfloat16, "nm_soft_linear": torch.bfloat16}
