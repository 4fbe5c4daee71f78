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


def case_sampling(draw: Callable) -> Callable:
    """A mask of [batch, count], drawn by draw(batch, count, x, seed)."""

    def case(batch: int, count: int) -> tuple[Callable, tuple]:
        def f(x: Tensor, seed: Tensor) -> Tensor:
            return draw(x.shape[0], x.shape[1], x, seed)

        return f, (torch.rand(batch, count), seed())

    return case


_LAWS = {
    "random_words": lambda B, N, x, seed: maskops.random_words((B, N), seed=seed),
    "bernoulli_masking": lambda B, N, x, seed: maskops.bernoulli_masking(B, N, x, seed=seed),
    "weighted_masking": lambda B, N, x, seed: maskops.weighted_masking(x, num_keep=4, seed=seed).ids_keep,
    "guided_masking": lambda B, N, x, seed: maskops.guided_masking(x, num_keep=4, num_hard=2, seed=seed).ids_keep,
    "corrupt_tokens": lambda B, N, x, seed: maskops.corrupt_tokens((x * 9).long(), x > 0.5, 99, 9, seed=seed),
    "sample_gates": lambda B, N, x, seed: maskops.sample_gates(x, seed=seed),
    "colour_masking": lambda B, N, x, seed: maskops.colour_masking(B, (5, 6), num_keep=7, seed=seed).ids_keep,
    "block_masking": lambda B, N, x, seed: maskops.block_masking(B, (5, 6), 12, seed=seed).ids_keep,
    "multiblock_masking": lambda B, N, x, seed: maskops.multiblock_masking(B, (6, 5), seed=seed).targets,
    "span_masking": lambda B, N, x, seed: maskops.span_masking(B, N, 0.5, span=3, equalise=True, seed=seed),
    "group_masking": lambda B, N, x, seed: maskops.group_masking((x * 9).long() - 1, 0.4, num_groups=8, seed=seed),
    "draw_spans": lambda B, N, x, seed: maskops.draw_spans((x[:, 0] * 90).long(), max_spans=3, seed=seed),
}  # fmt: skip

CALLS = {"random_masking": case_masking, **{name: case_sampling(draw) for name, draw in _LAWS.items()}}
AUTOCAST = {}  # what has a gradient, sample_gates, keeps the dtype of its logits
