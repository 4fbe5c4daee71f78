"""Samples, error samples and traffic of neighbour_fill."""

from collections.abc import Callable

import torch
from torch import Tensor

from maskops.testing import ErrorSample, Sample, randn

FILL = "sparse_conv_fill"


def _fill(
    shape: tuple[int, int, int, int], iterations: int, known: float = 0.4, *, last: bool = False, eps: float = 1e-5
) -> Callable:
    """known: the share of places; NaN and infinity stand at the others. last: channels lie together."""
    B, _, H, W = shape

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
        mask = torch.rand(B, 1, H, W, generator=g) < known
        x = randn(g, dtype, *shape)
        x = torch.where(mask, x, torch.where(torch.rand(shape, generator=g) < 0.5, torch.nan, torch.inf).to(dtype))
        return x.contiguous(memory_format=torch.channels_last) if last else x, mask, iterations, eps

    return make


# The gradient takes fills for constants, which finite differences do not.
SAMPLES = [
    Sample(FILL, "one_straight_through", _fill((2, 3, 7, 6), 1)),
    Sample(FILL, "far_straight_through", _fill((2, 2, 9, 11), 1000, 0.05, last=True)),
    Sample(FILL, "three_straight_through", _fill((2, 2, 7, 8), 3, 0.1, eps=0.0)),
    Sample(FILL, "none_known_straight_through", _fill((1, 2, 5, 5), 4, 0.0, eps=0.0)),
    Sample(FILL, "all_known_straight_through", _fill((1, 2, 5, 5), 4, 2.0)),
    Sample(FILL, "no_iteration_straight_through", _fill((2, 2, 5, 5), 0)),
    Sample(FILL, "empty_straight_through", _fill((0, 2, 5, 5), 2)),
    Sample(FILL, "no_places_straight_through", _fill((2, 2, 0, 5), 2)),
]


def _at(index: int, value: Callable) -> Callable:
    return lambda *args: (*args[:index], value(args[index]), *args[index + 1 :])


ERRORS = [
    ErrorSample(FILL, "x", _at(0, lambda x: x[0]), ValueError, "neighbour_fill: x must have shape"),
    ErrorSample(FILL, "mask", _at(1, lambda m: m[:1]), ValueError, "mask must have shape"),
    ErrorSample(FILL, "mask_dtype", _at(1, Tensor.float), ValueError, "mask must be bool"),
    ErrorSample(FILL, "iterations", _at(2, lambda i: -1), ValueError, "iterations must be at least 0, got -1"),
    ErrorSample(FILL, "eps", _at(3, lambda e: -0.5), ValueError, "eps must be at least 0 and below 1e300, got -0.5"),
]
TRAFFIC = {FILL: lambda x, mask, *_: 2 * x.numel() * x.element_size() + 2 * mask.numel()}
