"""Samples, error samples and traffic of masked_regression, contrastive_loss and linear_max_pool."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from maskops.reference import masked_loss as reference
from maskops.testing import ErrorSample, Sample, ragged_mask, randn
from maskops.testing.masked_loss.linear import at

G = torch.Generator
REGRESSION, REGRESSION_BACKWARD = "masked_loss_regression", "_masked_loss_regression_backward"
CONTRAST, CONTRAST_BACKWARD = "masked_loss_contrast", "_masked_loss_contrast_backward"
POOL, POOL_BACKWARD = "masked_loss_max_pool", "_masked_loss_max_pool_backward"


def with_grad(forward: Callable, results: Callable) -> Callable:
    """Arguments of a backward op: results(arguments) -> (the loss's shape and dtype, all arguments after grad)."""

    def make(dtype: torch.dtype, g: G) -> tuple:
        like, rest = results(forward(dtype, g))
        return torch.randn(like.shape, generator=g).to(like.dtype), *rest

    return make


# ---------------------------------------------------------------- regression


def _regression(
    rows: int,
    width: int,
    kind: str,
    normalise: bool,
    *,
    counted: float = 0.6,
    strided: bool = False,
    constant: bool = False,
) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        pred, target = (randn(g, dtype, rows, width + 3 * strided)[:, strided : width + strided] for _ in range(2))
        if constant:
            target = torch.full_like(target, 0.3)
        mask = torch.rand(rows, generator=g) < counted
        pred[~mask], target[~mask] = math.nan, math.inf
        return pred, target, mask, kind, 0.7, normalise, 1e-6

    return make


def _regression_backward(*args: object, **options: object) -> Callable:
    return with_grad(_regression(*args, **options), lambda a: (reference.masked_loss_regression(*a), a))


# ---------------------------------------------------------------- contrast


def _contrast(
    queries: int,
    keys: int,
    negatives: int,
    width: int,
    *,
    collide: bool = True,
    counted: float = 0.8,
    strided: bool = False,
) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        query, key = (randn(g, dtype, n, width + 3 * strided)[:, :width] for n in (queries, keys))
        if keys > 2:
            key[2] = key[0]  # equal values under another id
        positive = torch.randint(max(keys, 1), (queries,), generator=g)
        ids = torch.randint(-1, max(keys, 1), (queries, negatives), generator=g)
        positive[torch.rand(queries, generator=g) >= counted] = -1
        if keys == 0:
            positive, ids = torch.full_like(positive, -1), torch.full_like(ids, -1)
        query[positive < 0] = math.nan
        return query, key, positive, ids, 2 / max(width, 1) ** 0.5, collide

    return make


def _contrast_backward(*args: object, **options: object) -> Callable:
    def results(a: tuple) -> tuple:
        loss, lse = reference.masked_loss_contrast(*a)
        return loss, (*a[:4], lse, *a[4:])

    return with_grad(_contrast(*args, **options), results)


# ---------------------------------------------------------------- max pool


def _pool(batch: int, tokens: int, width: int, classes: int, *, bias: bool = True, empty: bool = False) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        hidden, weight = randn(g, dtype, batch, tokens, width), randn(g, dtype, classes, width)
        mask = torch.zeros(batch, tokens, dtype=torch.bool) if empty or not batch else ragged_mask(g, batch, tokens)
        hidden[~mask] = math.nan
        return hidden, weight, randn(g, dtype, classes) if bias else None, mask

    return make


def _seen_pool(*args: object, **options: object) -> Callable:
    """Every sample has a token: finite differences know no -inf."""
    forward = _pool(*args, **options)

    def make(dtype: torch.dtype, g: G) -> tuple:
        hidden, weight, bias, mask = forward(dtype, g)
        mask = mask.clone()
        mask[:, 0] = True
        return hidden.nan_to_num(), weight, bias, mask

    return make


def _pool_backward(*args: object, **options: object) -> Callable:
    def results(a: tuple) -> tuple:
        out, found = reference.masked_loss_max_pool(*a)
        return out.nan_to_num(), (a[0], a[1], found)

    return with_grad(_pool(*args, **options), results)


SAMPLES = [
    Sample(REGRESSION, "l2", _regression(13, 37, "l2", False)),
    Sample(REGRESSION, "layer_norm", _regression(11, 70, "l2", True, strided=True)),
    Sample(REGRESSION, "l1", _regression(9, 16, "l1", True)),
    Sample(REGRESSION, "smooth", _regression(9, 33, "smooth_l1", False)),
    Sample(REGRESSION, "cosine", _regression(13, 37, "cosine", False)),
    Sample(REGRESSION, "cosine_norm", _regression(7, 20, "cosine", True, strided=True)),
    Sample(REGRESSION, "constant", _regression(5, 24, "l2", True, constant=True)),
    Sample(REGRESSION, "none", _regression(4, 8, "l2", True, counted=0.0)),
    Sample(REGRESSION, "empty", _regression(0, 8, "cosine", False)),
    Sample(REGRESSION_BACKWARD, "layer_norm", _regression_backward(13, 37, "l2", True)),
    Sample(REGRESSION_BACKWARD, "smooth", _regression_backward(13, 37, "smooth_l1", False)),
    Sample(REGRESSION_BACKWARD, "cosine", _regression_backward(13, 37, "cosine", True, strided=True)),
    Sample(CONTRAST, "plain", _contrast(15, 9, 6, 20)),
    Sample(CONTRAST, "keep", _contrast(15, 9, 6, 20, collide=False, strided=True)),
    Sample(CONTRAST, "wide", _contrast(6, 20, 40, 70, counted=1.0)),
    Sample(CONTRAST, "no_negatives", _contrast(5, 4, 0, 8)),
    Sample(CONTRAST, "none", _contrast(5, 4, 3, 8, counted=0.0)),
    Sample(CONTRAST, "empty", _contrast(0, 4, 3, 8)),
    Sample(CONTRAST, "no_keys", _contrast(3, 0, 2, 8)),
    Sample(CONTRAST_BACKWARD, "plain", _contrast_backward(15, 9, 6, 20)),
    Sample(CONTRAST_BACKWARD, "wide", _contrast_backward(6, 20, 40, 70, collide=False)),
    Sample(POOL, "plain", _seen_pool(3, 21, 24, 37)),
    Sample(POOL, "ragged_without_keys", _pool(4, 19, 20, 103, bias=False), ("triton",)),
    Sample(POOL, "none_without_keys", _pool(2, 5, 8, 9, empty=True)),
    Sample(POOL, "empty", _pool(0, 5, 8, 9)),
    Sample(POOL_BACKWARD, "plain", _pool_backward(3, 21, 24, 37)),
    Sample(POOL_BACKWARD, "wide", _pool_backward(4, 19, 70, 103)),
]

ERRORS = [
    ErrorSample(REGRESSION, "target_shape", at(1, lambda t: t[:, 1:]), ValueError, "masked_regression: target must have shape"),
    ErrorSample(REGRESSION, "target_dtype", at(1, Tensor.half), ValueError, "target must be float32"),
    ErrorSample(REGRESSION, "mask", at(2, Tensor.float), ValueError, "mask must be bool"),
    ErrorSample(REGRESSION, "kind", at(3, lambda k: "l3"), ValueError, "kind must be one of"),
    ErrorSample(REGRESSION, "beta", at(4, lambda b: 0.0), ValueError, "beta must be above 0"),
    ErrorSample(REGRESSION, "eps", at(6, lambda e: 0.0), ValueError, "eps must be above 0"),
    ErrorSample(CONTRAST, "keys", at(1, lambda k: k[:, 1:]), ValueError, "contrastive_loss: keys must have shape"),
    ErrorSample(CONTRAST, "positive_shape", at(2, lambda p: p[1:]), ValueError, "positives must have shape"),
    ErrorSample(CONTRAST, "positive", at(2, lambda p: p + 9), IndexError, r"positives\[\d+\] must be in \[-1, 9\)"),
    ErrorSample(CONTRAST, "negatives", at(3, lambda n: n - 2), IndexError, r"negatives_ids\[\d+, \d+\] must be in \[-1, 9\)"),
    ErrorSample(CONTRAST, "scale", at(4, lambda s: 0.0), ValueError, "scale must be above 0"),
    ErrorSample(POOL, "weight", at(1, lambda w: w[:, 1:]), ValueError, "linear_max_pool: weight must have shape"),
    ErrorSample(POOL, "bias", at(2, lambda b: b[1:]), ValueError, "bias must have shape"),
    ErrorSample(POOL, "mask", at(3, lambda m: m[:, 1:]), ValueError, "mask must have shape"),
    ErrorSample(POOL_BACKWARD, "at", at(3, lambda a: a + 99), ValueError, r"at\[0, 0\] must be in"),
]  # fmt: skip


def _regression_bytes(pred: Tensor, target: Tensor, mask: Tensor, *rest: object) -> int:
    return int(mask.sum()) * pred.shape[1] * 2 * pred.element_size() + pred.shape[0] * 5


def _regression_backward_bytes(grad: Tensor, pred: Tensor, *rest: object) -> int:
    return _regression_bytes(pred, *rest) + pred.numel() * pred.element_size()


def _contrast_bytes(query: Tensor, keys: Tensor, positive: Tensor, negatives: Tensor, *rest: object) -> int:
    return (query.numel() + keys.numel()) * query.element_size() + (positive.numel() + negatives.numel()) * 8


def _pool_bytes(hidden: Tensor, weight: Tensor, *rest: object) -> int:
    return (hidden.numel() + weight.numel()) * hidden.element_size() + hidden.shape[0] * weight.shape[0] * 12


TRAFFIC = {
    REGRESSION: _regression_bytes,
    REGRESSION_BACKWARD: _regression_backward_bytes,
    CONTRAST: _contrast_bytes,
    CONTRAST_BACKWARD: lambda grad, *rest: 2 * _contrast_bytes(*rest),
    POOL: _pool_bytes,
    POOL_BACKWARD: lambda grad, *rest: 2 * _pool_bytes(*rest),
}
