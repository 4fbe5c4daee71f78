"""Samples, error samples and traffic of block-masked convolution, pooling and normalisation."""

from collections.abc import Callable

import torch
from torch import Tensor

from maskops.reference import sparse_conv_block as reference
from maskops.reference.visible_tokens import accumulation_dtype
from maskops.testing import ErrorSample, Sample, randn

G = torch.Generator
CONV, POOL, NORM, LAYER = (f"sparse_conv_block{end}" for end in ("", "_max_pool", "_norm", "_layer_norm"))
GRAD_INPUT, GRAD_WEIGHT = f"_{CONV}_grad_input", f"_{CONV}_grad_weight"
POOL_BACK, LAYER_BACK, NORM_BACK = f"_{POOL}_backward", f"_{LAYER}_backward", f"_{NORM}_backward"
MOMENTS, SUMS = f"_{CONV}_moments", f"_{NORM}_sums"


def cells_of(g: G, B: int, h: int, w: int, kind: str = "some") -> Tensor:
    """bool [B, h, w]: of "some", the first image has one active cell and the last has all but one."""
    if kind != "some":
        return torch.full((B, h, w), kind == "all")
    cells = torch.rand(B, h, w, generator=g) < 0.5
    cells[0], cells[-1] = False, True
    cells[0, h // 2, w // 2], cells[-1, 0, 0] = True, False
    return cells


def image(g: G, dtype: torch.dtype, cells: Tensor, C: int, H: int, W: int, layout: str = "last") -> Tensor:
    """[B, C, H, W] with NaN in hidden cells; layout: "last", "first", or "cut" out of a larger one."""
    x = randn(g, dtype, cells.shape[0], C, H, W + 2 * (layout == "cut"))[..., :W]
    if cells.numel():
        x.masked_fill_(~reference.position_mask(cells, H, W), torch.nan)
    return x if layout != "last" else reference.channels_last(x, dtype)


# B, C, O, size of the image, cells along it, kernel, stride, padding
SIZES = {  # small: Triton's interpreter takes milliseconds for a kernel place of a tile
    "3x3": (2, 20, 37, (6, 4), (3, 2), (3, 3), (1, 1), (1, 1)),
    "wide": (1, 66, 70, (4, 8), (1, 2), (3, 3), (1, 1), (1, 1)),
    "1x1": (2, 17, 33, (4, 4), (2, 2), (1, 1), (1, 1), (0, 0)),
    "stride": (2, 18, 24, (8, 4), (2, 1), (3, 3), (2, 2), (1, 1)),
    "down": (2, 16, 20, (4, 8), (1, 2), (2, 2), (2, 2), (0, 0)),
    "stem": (1, 3, 16, (8, 8), (2, 2), (7, 7), (2, 2), (3, 3)),
    "pixels": (2, 16, 16, (4, 3), (4, 3), (5, 7), (1, 1), (2, 3)),
    "uneven": (2, 16, 8, (6, 6), (1, 3), (1, 5), (2, 1), (0, 2)),
    "no_rows": (2, 4, 6, (0, 4), (2, 2), (3, 3), (1, 1), (1, 1)),
    "patches": (2, 3, 24, (8, 8), (2, 2), (4, 4), (4, 4), (0, 0)),
}


def _conv(
    name: str, *, groups: int = 1, channels: tuple[int, int] | None = None, bias: bool = True, kind: str = "some",
    layout: str = "last", batch: int | None = None,
) -> Callable:  # fmt: skip
    B, C, O, size, parts, kernel, stride, padding = SIZES[name]
    C, O = channels or (C, O)

    def make(dtype: torch.dtype, g: G) -> tuple:
        cells = cells_of(g, B, *parts, kind)[:batch]
        x = image(g, dtype, cells, C, *size, layout)
        fan = kernel[0] * kernel[1] * C // groups
        weight = randn(g, dtype, O, C // groups, *kernel) / max(fan, 1) ** 0.5
        return x, weight, randn(g, dtype, O) if bias else None, cells, list(stride), list(padding), groups

    return make


def _grad(name: str, x: Tensor, weight: Tensor, cells: Tensor, stride: list[int], dtype: torch.dtype, g: G) -> Tensor:
    H, W = x.shape[2] // stride[0], x.shape[3] // stride[1]
    return image(g, dtype, cells, weight.shape[0], H, W)


def _grad_input(name: str, **options: object) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        x, weight, _, cells, stride, padding, groups = _conv(name, **options)(dtype, g)
        grad = _grad(name, x, weight, cells, stride, dtype, g)
        return grad, weight, cells, list(x.shape[2:]), stride, padding, groups

    return make


def _grad_weight(name: str, **options: object) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        x, weight, _, cells, stride, padding, groups = _conv(name, **options)(dtype, g)
        grad = _grad(name, x, weight, cells, stride, dtype, g)
        return grad, x, cells, list(weight.shape[2:]), stride, padding, groups

    return make


def _pool(
    name: str, C: int, *, padding: tuple[int, int] | None = None, layout: str = "last", kind: str = "some"
) -> Callable:
    B, _, _, size, parts, kernel, stride, own = SIZES[name]

    def make(dtype: torch.dtype, g: G) -> tuple:
        cells = cells_of(g, B, *parts, kind)
        x = image(g, dtype, cells, C, *size, layout)
        return x, cells, list(kernel), list(stride), list(padding or own)

    return make


def _pool_backward(name: str, C: int) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        x, cells, *sizes = _pool(name, C)(dtype, g)
        out, taps = reference.sparse_conv_block_max_pool(x, cells, *sizes)
        return image(g, dtype, cells, C, *out.shape[2:]), taps, cells, list(x.shape[2:]), *sizes

    return make


# B, C, groups, size of the image, cells along it
NORMS = {
    "batch": (3, 20, 20, (8, 6), (4, 3)),
    "group": (3, 12, 4, (6, 6), (3, 2)),
    "instance": (2, 33, 33, (4, 4), (2, 2)),
}


def _image(name: str, dtype: torch.dtype, g: G, kind: str = "some", layout: str = "last") -> tuple[Tensor, Tensor]:
    B, C, _, size, parts = NORMS[name]
    cells = cells_of(g, B, *parts, kind)
    return image(g, dtype, cells, C, *size, layout) * 2 + 3, cells


def _moments(name: str, per_sample: bool, **options: str) -> Callable:
    return lambda dtype, g: (*_image(name, dtype, g, **options), per_sample)


def _norm(name: str, per_sample: bool, *, frozen: bool = False, affine: bool = True, **options: str) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        (x, cells), acc = _image(name, dtype, g, **options), accumulation_dtype(dtype)
        groups, each = NORMS[name][2], x.shape[1] // NORMS[name][2]
        wide, mask = reference._active(x, cells), reference.position_mask(cells, *x.shape[2:])
        count = (mask.sum((1, 2, 3)) if per_sample else mask.sum()[None]).to(acc)
        over = wide.unflatten(1, (groups, each)) if per_sample else wide.transpose(0, 1)[None]
        sizes = (count * each).clamp(min=1)[:, None]
        mean = over.flatten(2).sum(2) / sizes
        spread = torch.where(mask if per_sample else mask.transpose(0, 1), 1.0, 0.0)
        spread = spread[:, None] if per_sample else spread[None]
        var = (((over - mean[..., None, None, None]) * spread).square().flatten(2).sum(2)) / sizes
        stats = (s.repeat_interleave(x.shape[1] // s.shape[1], 1) for s in (mean, (var + 1e-5).rsqrt()))
        weight, bias = (randn(g, acc, x.shape[1]) if affine else None for _ in range(2))
        return x, *stats, weight, bias, cells, None if frozen else count, groups, ""

    return make


def _sums(name: str, per_sample: bool) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        x, mean, *_, cells, _, _, _ = _norm(name, per_sample)(dtype, g)
        return image(g, dtype, cells, *x.shape[1:]), x, mean, cells

    return make


def _norm_backward(name: str, per_sample: bool) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        grad, x, mean, cells = _sums(name, per_sample)(dtype, g)
        return grad, x, mean, *(randn(g, mean.dtype, *mean.shape) for _ in range(3)), cells

    return make


def _layer(name: str, *, affine: bool = True, **options: str) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        (x, cells), acc = _image(name, dtype, g, **options), accumulation_dtype(dtype)
        weight, bias = (randn(g, acc, x.shape[1]) if affine else None for _ in range(2))
        return x, weight, bias, cells, 1e-5

    return make


def _layer_backward(name: str, *, affine: bool = True) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        x, weight, _, cells, eps = _layer(name, affine=affine)(dtype, g)
        return image(g, dtype, cells, *x.shape[1:]), x, weight, cells, eps

    return make


SLOW = dict.fromkeys(("wide", "stem", "pixels"), ("triton",))
DEPTHWISE = {"groups": 21, "channels": (21, 21)}
SAMPLES = [
    *(Sample(CONV, name, _conv(name), SLOW.get(name, ())) for name in SIZES if name != "no_rows"),
    # Of tensors without elements finite differences know nothing.
    Sample(CONV, "no_rows_hard", _conv("no_rows")),
    Sample(CONV, "groups", _conv("3x3", groups=2, channels=(12, 20))),
    Sample(CONV, "depthwise", _conv("3x3", **DEPTHWISE)),
    Sample(CONV, "depthwise_wide", _conv("wide", groups=40, channels=(40, 40), bias=False)),
    Sample(CONV, "depthwise_stride", _conv("stride", **DEPTHWISE)),
    Sample(CONV, "depthwise_7", _conv("stem", groups=18, channels=(18, 18)), ("triton",)),
    Sample(CONV, "depthwise_pixels", _conv("pixels", **DEPTHWISE), ("triton",)),
    Sample(CONV, "first", _conv("3x3", layout="first", bias=False)),
    Sample(CONV, "cut", _conv("1x1", layout="cut")),
    Sample(CONV, "none", _conv("3x3", kind="none")),
    Sample(CONV, "all", _conv("stride", kind="all")),
    Sample(CONV, "empty", _conv("3x3", batch=0)),
    Sample(CONV, "no_channels_hard", _conv("3x3", channels=(0, 8))),
    Sample(CONV, "no_result", _conv("3x3", channels=(8, 0))),
    Sample(GRAD_INPUT, "3x3", _grad_input("3x3")),
    Sample(GRAD_INPUT, "depthwise_stride", _grad_input("stride", **DEPTHWISE)),
    Sample(GRAD_WEIGHT, "3x3", _grad_weight("3x3")),
    Sample(GRAD_WEIGHT, "none", _grad_weight("1x1", kind="none")),
    Sample(GRAD_INPUT, "no_rows", _grad_input("no_rows")),
    Sample(GRAD_INPUT, "no_channels", _grad_input("3x3", channels=(0, 8))),
    Sample(GRAD_WEIGHT, "no_rows", _grad_weight("no_rows")),
    Sample(GRAD_WEIGHT, "no_result", _grad_weight("3x3", channels=(8, 0))),
    Sample(POOL, "stride", _pool("stride", 21)),
    Sample(POOL, "same", _pool("pixels", 5)),
    Sample(POOL, "down", _pool("down", 33, layout="first")),
    Sample(POOL, "none", _pool("stride", 4, kind="none")),
    Sample(POOL, "no_rows_hard", _pool("no_rows", 3)),
    Sample(POOL_BACK, "stride", _pool_backward("stride", 21)),
    Sample(POOL_BACK, "same", _pool_backward("pixels", 5)),
    Sample(MOMENTS, "batch", _moments("batch", False)),
    Sample(MOMENTS, "sample", _moments("group", True, layout="first")),
    Sample(MOMENTS, "none", _moments("batch", True, kind="none")),
    Sample(NORM, "straight_through_batch", _norm("batch", False)),
    Sample(NORM, "straight_through_group", _norm("group", True, layout="first")),
    Sample(NORM, "straight_through_none", _norm("instance", True, kind="none")),
    Sample(NORM, "frozen", _norm("batch", False, frozen=True)),
    Sample(NORM, "plain", _norm("instance", True, frozen=True, affine=False)),
    Sample(SUMS, "batch", _sums("batch", False)),
    Sample(SUMS, "sample", _sums("group", True)),
    Sample(NORM_BACK, "batch", _norm_backward("batch", False)),
    Sample(NORM_BACK, "sample", _norm_backward("group", True)),
    Sample(LAYER, "affine", _layer("batch")),
    Sample(LAYER, "plain", _layer("instance", affine=False, layout="first")),
    Sample(LAYER, "none", _layer("group", kind="none")),
    Sample(LAYER_BACK, "affine", _layer_backward("batch")),
    Sample(LAYER_BACK, "plain", _layer_backward("instance", affine=False)),
]


def _at(index: int, value: Callable) -> Callable:
    return lambda *args: (*args[:index], value(args[index]), *args[index + 1 :])


ERRORS = [
    ErrorSample(CONV, "x", _at(0, lambda x: x[0]), ValueError, r"block_masked_conv: x must have shape \[B, C, H, W\]"),
    ErrorSample(CONV, "cells_dtype", _at(3, Tensor.long), ValueError, "cells must be bool"),
    ErrorSample(CONV, "cells_batch", _at(3, lambda c: c[1:]), ValueError, "cells must have shape"),
    ErrorSample(
        CONV, "cells_size", _at(3, lambda c: c.repeat(1, 3, 1)), ValueError, "cells must divide 6 x 4 positions"
    ),
    ErrorSample(CONV, "weight", _at(1, lambda w: w[:, 1:]), ValueError, "weight must have shape"),
    ErrorSample(
        CONV,
        "kernel",
        _at(1, lambda w: w.repeat(1, 1, 3, 1)),
        ValueError,
        "weight must have two kernel sizes from 1 to 7",
    ),
    ErrorSample(CONV, "bias", _at(2, lambda b: b[1:]), ValueError, "bias must have shape"),
    ErrorSample(
        CONV, "stride", _at(4, lambda s: [1, 3]), ValueError, "stride must divide the 2 x 2 positions of a cell"
    ),
    ErrorSample(CONV, "padding", _at(5, lambda p: [0, 1]), ValueError, "padding must give 6 x 4 positions"),
    ErrorSample(CONV, "groups", _at(6, lambda g: 3), ValueError, "groups must divide 20 and 37 channels"),
    ErrorSample(GRAD_INPUT, "grad", _at(0, lambda g: g[:, :, 1:]), ValueError, "grad must have shape"),
    ErrorSample(GRAD_WEIGHT, "grad", _at(0, lambda g: g[:, :, 1:]), ValueError, "grad must have shape"),
    ErrorSample(POOL, "padding", _at(4, lambda p: [2, 2]), ValueError, "block_masked_max_pool: padding must"),
    ErrorSample(
        POOL, "kernel", _at(2, lambda k: [3, 9]), ValueError, "kernel_size must have two kernel sizes from 1 to 7"
    ),
    ErrorSample(POOL_BACK, "taps", _at(1, Tensor.int), ValueError, "taps must be uint8"),
    ErrorSample(MOMENTS, "cells", _at(1, lambda c: c[:, :0]), ValueError, "cells must divide 8 x 6 positions"),
    ErrorSample(NORM, "mean", _at(1, lambda m: m[:, 1:]), ValueError, "mean must have shape"),
    ErrorSample(NORM, "rows", _at(1, lambda m: m.repeat(2, 1)), ValueError, "mean must have 1 or 3 rows"),
    ErrorSample(NORM, "weight", _at(3, Tensor.half), ValueError, "weight must be float32"),
    ErrorSample(NORM, "groups", _at(7, lambda g: 3), ValueError, "groups must divide 20 channels"),
    ErrorSample(SUMS, "grad", _at(0, lambda g: g[1:]), ValueError, "grad must have shape"),
    ErrorSample(LAYER, "bias", _at(2, lambda b: b[1:]), ValueError, "masked_layer_norm: bias must have shape"),
    ErrorSample(LAYER_BACK, "grad", _at(0, lambda g: g[1:]), ValueError, "grad must have shape"),
]


def _share(cells: Tensor) -> float:
    return cells.float().mean().item() if cells.numel() else 0.0


def _conv_bytes(x: Tensor, weight: Tensor, bias: Tensor | None, cells: Tensor, stride: list[int], *rest: object) -> int:
    out = x.numel() // max(x.shape[1], 1) * weight.shape[0] // (stride[0] * stride[1])
    return int(x.numel() * _share(cells) + weight.numel() + out) * x.element_size()


TRAFFIC = {
    CONV: _conv_bytes,
    POOL: lambda x, cells, kernel_size, stride, padding: (
        int(x.numel() * (_share(cells) + 1 / stride[0] / stride[1])) * x.element_size()
    ),
    NORM: lambda x, mean, rstd, weight, bias, cells, *rest: int(x.numel() * (1 + _share(cells))) * x.element_size(),
    LAYER: lambda x, weight, bias, cells, eps: int(x.numel() * (1 + _share(cells))) * x.element_size(),
}
