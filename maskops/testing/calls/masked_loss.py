"""Calls of masked_loss's public functions."""

from collections.abc import Callable

import torch
from torch import Tensor

import maskops
from maskops.testing.calls._shared import DIM, seed, tokens


def case_loss(batch: int, count: int) -> tuple[Callable, tuple]:
    pred = torch.randn(batch, 16, 48, requires_grad=True)
    args = (pred, torch.randn(batch, 3, 16, 16), tokens(batch, 16)[1])
    return lambda p, i, s: maskops.masked_patch_loss(p, i, s, 4), args


def classes_of(batch: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, bias = torch.randn(batch, count, DIM), torch.randn(37, DIM), torch.randn(37)
    return (*(t.requires_grad_() for t in (hidden, weight, bias)), torch.randint(37, (batch, count)))


def case_linear_cross_entropy(batch: int, count: int) -> tuple[Callable, tuple]:
    mask = torch.arange(count).expand(batch, count) % 3 == 0

    def f(h: Tensor, w: Tensor, b: Tensor, t: Tensor, m: Tensor) -> Tensor:
        return maskops.linear_cross_entropy(h, w, t, mask=m, bias=b, label_smoothing=0.1)

    return f, (*classes_of(batch, count), mask)


def case_linear_sample(batch: int, count: int) -> tuple[Callable, tuple]:
    def f(h: Tensor, w: Tensor, b: Tensor, t: Tensor, words: Tensor) -> Tensor:
        loss, sample = maskops.linear_sample(h, w, t, bias=b, seed=words, reduction="none")
        return loss + sample * 0

    return f, (*classes_of(batch, count), seed())


def case_masked_regression(batch: int, count: int) -> tuple[Callable, tuple]:
    pred, mask = torch.randn(batch, count, DIM, requires_grad=True), torch.rand(batch, count) < 0.5
    args = (pred, torch.randn(batch, count, DIM), mask)
    return lambda p, t, m: maskops.masked_regression(p, t, m, normalise=True), args


def case_contrastive_loss(batch: int, count: int) -> tuple[Callable, tuple]:
    query, keys = torch.randn(batch, DIM, requires_grad=True), torch.randn(count, DIM, requires_grad=True)
    positives, negatives = torch.randint(count, (batch,)), torch.randint(count, (batch, 3))
    return lambda q, k, p, n: maskops.contrastive_loss(q, k, p, n), (query, keys, positives, negatives)


def case_linear_max_pool(batch: int, count: int) -> tuple[Callable, tuple]:
    hidden, weight, bias, _ = classes_of(batch, count)
    return maskops.linear_max_pool, (hidden, weight, bias, torch.arange(count).expand(batch, count) % 3 == 0)


CALLS = {
    "masked_patch_loss": case_loss,
    "linear_cross_entropy": case_linear_cross_entropy,
    "linear_sample": case_linear_sample,
    "masked_regression": case_masked_regression,
    "contrastive_loss": case_contrastive_loss,
    "linear_max_pool": case_linear_max_pool,
}
AUTOCAST = {
    "masked_patch_loss": torch.float32,
    "linear_cross_entropy": torch.float32,
    "masked_regression": torch.float32,
    "contrastive_loss": torch.float32,
    "linear_max_pool": torch.float32,
}
