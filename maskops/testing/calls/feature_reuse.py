"""Calls of feature_reuse's public functions."""

from collections.abc import Callable

import torch
from torch import Tensor

import maskops
from maskops.ops.mask_sampling import seed_tensor
from maskops.testing.calls._shared import DIM, tokens


def case_cached_attention(batch: int, count: int) -> tuple[Callable, tuple]:
    def f(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, ids: Tensor) -> Tensor:
        return maskops.cached_attention(q, k, v, maskops.ContextCache.of(keys, values), 0, ids)

    local = [torch.randn(batch, 3, 4, DIM, requires_grad=True) for _ in range(3)]
    cached = [torch.randn(1, batch, 3, count, DIM, requires_grad=True) for _ in range(2)]
    return f, (*local, *cached, tokens(batch, count)[1].ids_keep[:, :4].clone())


def case_confidence_select(batch: int, count: int) -> tuple[Callable, tuple]:
    def f(logits: Tensor, known: Tensor, seed: Tensor) -> Tensor:
        return maskops.confidence_select(logits, known, 3, temperature=2.0, seed=seed).ids

    return f, (
        torch.randn(batch, count, DIM),
        torch.rand(batch, count) < 0.5,
        seed_tensor(3, None, torch.device("cpu")),
    )


def case_select_tokens(batch: int, count: int) -> tuple[Callable, tuple]:
    args = torch.randn(batch, count), torch.rand(batch, count) < 0.5
    return lambda s, k: maskops.select_tokens(s, k, threshold=0.5).ids, args


def case_token_drift(batch: int, count: int) -> tuple[Callable, tuple]:
    return maskops.token_drift, (torch.randn(batch, count, DIM), torch.randn(batch, count, DIM))


CALLS = {
    "cached_attention": case_cached_attention, "confidence_select": case_confidence_select,
    "select_tokens": case_select_tokens, "token_drift": case_token_drift,
}  # fmt: skip
AUTOCAST = {"cached_attention": torch.bfloat16}
