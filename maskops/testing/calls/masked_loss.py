"""Calls of masked_loss's public functions."""

from collections.abc import Callable

import torch

import maskops
from maskops.testing.calls._shared import tokens


def case_loss(batch: int, count: int) -> tuple[Callable, tuple]:
    pred = torch.randn(batch, 16, 48, requires_grad=True)
    args = (pred, torch.randn(batch, 3, 16, 16), tokens(batch, 16)[1])
    return lambda p, i, s: maskops.masked_patch_loss(p, i, s, 4), args


CALLS = {"masked_patch_loss": case_loss}
AUTOCAST = {"masked_patch_loss": torch.float32}
