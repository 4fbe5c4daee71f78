"""Calls of sparse_conv's public functions."""

from collections.abc import Callable

import torch
from torch import Tensor

import maskops
from maskops.testing.calls._shared import DIM


def places(batch: int, count: int) -> Tensor:
    """int32 [batch * count, 2]: every other place of a line."""
    at = torch.arange(count).repeat(batch) * 2
    return torch.stack([torch.arange(batch).repeat_interleave(count), at + at // 3], 1).int()


def case_kernel_map(batch: int, count: int) -> tuple[Callable, tuple]:
    return lambda coords: maskops.kernel_map(coords, 3).map, (places(batch, count),)


def case_sparse_conv(batch: int, count: int) -> tuple[Callable, tuple]:
    def f(x: Tensor, weight: Tensor, bias: Tensor, coords: Tensor) -> Tensor:
        return maskops.sparse_conv(x, weight, maskops.kernel_map(coords, 3), bias)

    leaves = torch.randn(batch * count, 4), torch.randn(3, 4, DIM), torch.randn(DIM)
    return f, (*(t.requires_grad_() for t in leaves), places(batch, count))


CALLS = {"kernel_map": case_kernel_map, "sparse_conv": case_sparse_conv}
AUTOCAST = {"sparse_conv": torch.bfloat16}
