"""Samples, error samples and traffic of linear_cross_entropy and linear_sample."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from maskops.reference import masked_loss as reference
from maskops.testing import ErrorSample, Sample, randn

G = torch.Generator
LOSS, BACKWARD, DRAWN = "masked_loss_linear", "_masked_loss_linear_backward", "masked_loss_sample"
KEPT, KEPT_BACKWARD = "_masked_loss_linear_kept", "_masked_loss_linear_kept_backward_"
IGNORE = -100


def _loss(
    rows: int, width: int, classes: int, *, books: int = 1, bias: bool = True, counted: float = 0.5, scale: float = 1.0,
    smoothing: float = 0.0, z_loss: float = 0.0, strided: bool = False,
) -> Callable:  # fmt: skip
    def make(dtype: torch.dtype, g: G) -> tuple:
        hidden = randn(g, dtype, rows, width + 3 * strided)[:, :width]
        weight, shift = randn(g, dtype, books, classes, width), randn(g, dtype, books, classes)
        target = torch.randint(max(classes, 1), (rows, books), generator=g)
        target[torch.rand(rows, books, generator=g) >= counted] = IGNORE
        hidden[(target == IGNORE).all(1)] = math.nan  # rows that do not count may hold anything
        return hidden, weight, shift if bias else None, target, IGNORE, scale / width**0.5, smoothing, z_loss

    return make


def _backward(*args: object, **options: object) -> Callable:
    forward = _loss(*args, **options)

    def make(dtype: torch.dtype, g: G) -> tuple:
        hidden, weight, bias, target, *rest = forward(dtype, g)
        loss, lse = reference.masked_loss_linear(hidden, weight, bias, target, *rest)
        return torch.randn(loss.shape, generator=g).to(loss.dtype), hidden, weight, bias, target, lse, *rest

    return make


def _kept(*args: object, seed: list[int] | None = None, **options: object) -> Callable:
    forward = _loss(*args, **options)

    def make(dtype: torch.dtype, g: G) -> tuple:
        hidden, weight, bias, target, *rest = forward(dtype, g)
        return hidden, weight, bias, target, None if seed is None else torch.tensor(seed), *rest, 0.5

    return make


def _kept_backward(*args: object, **options: object) -> Callable:
    forward = _loss(*args, **options)

    def make(dtype: torch.dtype, g: G) -> tuple:
        hidden, weight, bias, target, *rest = forward(dtype, g)
        loss, lse, _, *kept = reference._masked_loss_linear_kept(hidden, weight, bias, target, None, *rest, 1.0)
        grads = torch.full_like(hidden, math.nan), weight.new_full(weight.shape[:2], math.nan)
        grad = torch.randn(loss.shape, generator=g).to(loss.dtype)
        return grad, hidden, weight, bias, target, lse, *kept, *grads, *rest

    return make


def _drawn(*args: object, temperature: float = 1.0, **options: object) -> Callable:
    forward = _loss(*args, **options)

    def make(dtype: torch.dtype, g: G) -> tuple:
        hidden, weight, bias, target, *rest = forward(dtype, g)
        return hidden, weight, bias, target, torch.tensor([7, 3]), *rest, temperature

    return make


SAMPLES = [
    Sample(LOSS, "plain", _loss(21, 24, 37)),
    Sample(LOSS, "tiles", _loss(70, 70, 210, counted=0.95, bias=False), ("triton",)),
    Sample(LOSS, "books", _loss(19, 8, 11, books=3, smoothing=0.1, z_loss=0.01, scale=2.0)),
    Sample(LOSS, "strided", _loss(17, 20, 40, strided=True, smoothing=1.0)),
    Sample(LOSS, "all", _loss(5, 16, 32, counted=1.0)),
    Sample(LOSS, "none", _loss(5, 16, 32, counted=0.0)),
    Sample(LOSS, "empty", _loss(0, 16, 32)),
    Sample(LOSS, "one_class", _loss(3, 1, 1)),
    Sample(BACKWARD, "plain", _backward(21, 24, 37)),
    Sample(BACKWARD, "books", _backward(9, 20, 101, books=2, smoothing=0.2, z_loss=0.1)),
    # As many rows as columns, whose powers are all defined, and more.
    Sample(KEPT, "square", _kept(20, 20, 197, counted=1.0, smoothing=0.1)),
    Sample(KEPT, "drawn", _kept(20, 20, 197, counted=1.0, seed=[7, 3])),
    Sample(KEPT, "more", _kept(150, 64, 100, books=2, counted=1.0, bias=False, z_loss=0.01)),
    Sample(KEPT_BACKWARD, "some", _kept_backward(21, 24, 197, scale=2.0)),
    Sample(KEPT_BACKWARD, "more", _kept_backward(150, 70, 100, books=2, counted=0.8, smoothing=0.1, z_loss=0.1)),
    Sample(KEPT_BACKWARD, "narrow", _kept_backward(9, 5, 37, counted=1.0, bias=False)),
    Sample(DRAWN, "plain", _drawn(21, 24, 37)),
    Sample(DRAWN, "books", _drawn(19, 8, 211, books=2, temperature=0.5, smoothing=0.1)),
    Sample(DRAWN, "none", _drawn(5, 16, 32, counted=0.0)),
]


def at(index: int, value: Callable) -> Callable:
    return lambda *args: (*args[:index], value(args[index]), *args[index + 1 :])


ERRORS = [
    ErrorSample(LOSS, "weight_shape", at(1, lambda w: w[:, :, 1:]), ValueError, "linear_cross_entropy: weight must have shape"),
    ErrorSample(LOSS, "weight_dtype", at(1, Tensor.half), ValueError, "weight must be float32"),
    ErrorSample(LOSS, "bias_shape", at(2, lambda b: b[:, 1:]), ValueError, "bias must have shape"),
    ErrorSample(LOSS, "target_shape", at(3, lambda t: t[1:]), ValueError, "target must have shape"),
    ErrorSample(LOSS, "target_dtype", at(3, Tensor.int), ValueError, "target must be int64"),
    ErrorSample(LOSS, "target", at(3, lambda t: t + 99), IndexError, r"target\[\d+, 0\] must be in \[0, 37\) or -100, got"),
    ErrorSample(LOSS, "negative", at(3, lambda t: t * 0 - 1), IndexError, r"target\[0, 0\] must be in .* got -1"),
    ErrorSample(LOSS, "scale", at(5, lambda s: 0.0), ValueError, "scale must be above 0"),
    ErrorSample(LOSS, "smoothing", at(6, lambda s: 1.5), ValueError, r"label_smoothing must be in \[0, 1\]"),
    ErrorSample(LOSS, "z_loss", at(7, lambda z: -0.5), ValueError, "z_loss must be at least 0"),
    ErrorSample(DRAWN, "seed", at(4, lambda s: s[:1]), ValueError, "linear_sample: seed must have shape"),
    ErrorSample(DRAWN, "temperature", at(9, lambda t: 0.0), ValueError, "sample_temperature must be above 0"),
    ErrorSample(DRAWN, "target", at(3, lambda t: t + 99), IndexError, "linear_sample: target"),
]  # fmt: skip


def _spoilt_kept(name: str, index: int, value: Callable, match: str) -> ErrorSample:
    return ErrorSample(KEPT_BACKWARD, name, at(index, value), ValueError, f"linear_cross_entropy: {match}")


ERRORS += [
    ErrorSample(KEPT, "target", at(3, lambda t: t + 999), IndexError, "linear_cross_entropy: target"),
    _spoilt_kept("powers", 6, lambda x: x[:, 1:], "powers must have shape"),
    _spoilt_kept("tops", 7, lambda x: x.half(), "tops must be float32"),
    _spoilt_kept("grad_hidden", 8, lambda x: x[1:], "grad_hidden must have shape"),
    _spoilt_kept("grad_bias", 9, lambda x: x.double(), "grad_bias must be float32"),
]


def _bytes(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: object) -> int:
    counted = int((target != IGNORE).any(1).sum())
    return (counted * hidden.shape[1] + weight.numel()) * hidden.element_size() + target.numel() * 16


def _backward_bytes(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: object
) -> int:
    return 2 * _bytes(hidden, weight, bias, target)


TRAFFIC = {LOSS: _bytes, BACKWARD: _backward_bytes, DRAWN: _bytes}
