"""Calls of mask_sampling's public functions."""

from collections.abc import Callable

import torch
from torch import Tensor

import maskops
from maskops.testing.calls._shared import seed


def case_masking(batch: int, count: int) -> tuple[Callable, tuple]:
    def f(x: Tensor, seed: Tensor) -> Tensor:
        return maskops.random_masking(x.shape[0], x.shape[1], num_keep=4, seed=seed).ids_keep

    return f, (torch.randn(batch, count), seed())


CALLS = {"random_masking": case_masking}
AUTOCAST = {}
