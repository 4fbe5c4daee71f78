"""Calls of masked_attention's public functions."""

from collections.abc import Callable

import torch
from torch import Tensor

import maskops


def case_masked_attention(batch: int, count: int) -> tuple[Callable, tuple]:
    found = maskops.AttentionMask.key_padding(torch.full((batch,), count - 1)).compile(count, count)

    def f(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, words: Tensor) -> Tensor:
        return maskops.masked_attention(q, k, v, maskops.BlockMap(tiles, words, q.shape[2], k.shape[2]))

    return f, (*(torch.randn(batch, 3, count, 4, requires_grad=True) for _ in range(3)), found.tiles, found.words)


CALLS = {"masked_attention": case_masked_attention}
AUTOCAST = {}
