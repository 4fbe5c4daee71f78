"""Samples, error samples and traffic of pooling and voxelisation."""

from collections.abc import Callable

import torch
from torch import Tensor

from maskops.reference import sparse_conv as conv_reference
from maskops.reference.visible_tokens import accumulation_dtype
from maskops.testing import ErrorSample, Sample, randn

G = torch.Generator
SUM, MAX, MAX_BACKWARD = "sparse_conv_sum_pool", "sparse_conv_max_pool", "_sparse_conv_max_backward"
SEGMENT_SUM, SEGMENT_MAX, SPREAD = (f"sparse_conv_segment_{name}" for name in ("sum", "max", "spread"))
VOXELIZE = "sparse_conv_voxelize"


def _map(g: G, rows: int, empty: bool = False) -> Tensor:
    """int32 [9, M]: of a kernel of 3 x 3 with stride 2, over places in no order; some rows of the result read nothing."""
    if empty:
        return torch.zeros((9, 0), dtype=torch.int32)
    at = torch.randperm(144, generator=g)[:rows]
    coords = torch.stack([at * 0, at // 12, at % 12], 1).int()
    out = torch.tensor([[0, y, x] for y in range(6) for x in range(7)], dtype=torch.int32)
    return conv_reference.sparse_conv_map(coords, out, [3, 3], [2, 2], [1, 1], [1, 1], False)


def _values(g: G, dtype: torch.dtype, rows: int, channels: int, kind: str) -> Tensor:
    """kind: "" any numbers, "ties" few different ones, "poison" with NaN and infinity, "strided" out of a wider tensor."""
    if kind == "ties":
        return torch.randint(-1, 2, (rows, channels), generator=g).to(dtype)
    x = randn(g, dtype, rows, 2 * channels)[:, :channels] if kind == "strided" else randn(g, dtype, rows, channels)
    if kind == "poison":
        x[torch.rand(rows, channels, generator=g) < 0.1] = torch.nan
        x[torch.rand(rows, channels, generator=g) < 0.1] = -torch.inf
    return x


def _over_map(
    op: str, channels: int, kind: str = "", *, scaled: bool = False, reverse: bool = False, rows: int = 50
) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        found = _map(g, rows, rows == 0)
        x = _values(g, dtype, rows, channels, kind)
        back = conv_reference.sparse_conv_reverse(found, rows) if reverse else None
        if op == MAX:
            return x, found, back
        scales = (torch.rand(size, generator=g, dtype=torch.float64) for size in (rows, found.shape[1]))
        options = {"dtype": accumulation_dtype(dtype)}
        return x, found, back, *(scale.to(**options) if scaled else None for scale in scales)

    return make


def _max_backward(dtype: torch.dtype, g: G) -> tuple:
    found = _map(g, 50)
    M = found.shape[1]
    any_of = torch.rand(9, M, 21, generator=g).masked_fill((found < 0)[..., None], -1).argmax(0)
    return (
        randn(g, dtype, M, 21),
        found[any_of, torch.arange(M)[:, None]],
        conv_reference.sparse_conv_reverse(found, 50),
    )


def segments_of(index: Tensor, segments: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order, begin, count, inverse of rows with this index, -1 for a row of no segment."""
    order = torch.argsort(torch.where(index < 0, segments, index), stable=True)
    count = torch.bincount(index[index >= 0], minlength=segments)
    return order.int(), (count.cumsum(0) - count).int(), count.int(), index.int()


def _segments(
    op: str, channels: int, kind: str = "", *, rows: int = 90, segments: int = 20, scaled: bool = False
) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        index = torch.randint(-1, max(segments - 1, 0), (rows,), generator=g)  # the last one is empty
        parts = segments_of(index, segments)
        x = _values(g, dtype, segments if op == SPREAD else rows, channels, kind)
        scale = torch.rand(segments, generator=g, dtype=torch.float64).to(accumulation_dtype(dtype)) if scaled else None
        return (x, *parts) if op == SEGMENT_MAX else (x, *parts, scale)

    return make


def _voxelize(kind: str) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        count = 0 if kind == "empty" else 120
        points = (torch.rand(count, 5, generator=g, dtype=torch.float64) * 4 - 0.4).to(dtype)
        batch = torch.randint(0, 3, (count,), generator=g, dtype=torch.int32)
        size, low, shape = [0.5, 0.75, 1.0], [0.0, 0.25, 0.0], [6, 4, 3]
        if kind == "some":
            points[3, 0], points[7, 2], points[9, 1] = torch.nan, torch.inf, -torch.inf
        elif kind == "one_cell":
            points[:, :3] = 0.9
        elif kind == "line":
            points[:, :2] = 0.5
            size, shape = [0.5, 0.75, 1 / 64], [6, 4, 256]
        elif kind == "corners":
            points[:, :3] = torch.randint(0, 2, (count, 3), generator=g).to(dtype) * 4
            size, low, shape = [1 / 2**18] * 3, [0.0] * 3, [2**20 + 1] * 3
        elif kind == "far":
            size, low, shape = [4 / 2**20] * 3, [-0.5] * 3, [2**20] * 3
        elif kind == "strided":
            points = points.repeat(1, 2)[:, 1:4]
        elif kind == "plane":
            return points[:, :2], None, size[1:], low[1:], shape[1:], 1
        return points, batch, size, low, shape, 3

    return make


SAMPLES = [
    Sample(SUM, "any", _over_map(SUM, 21)),
    Sample(SUM, "scaled", _over_map(SUM, 70, "strided", scaled=True, reverse=True)),
    Sample(SUM, "empty", _over_map(SUM, 8, rows=0)),
    Sample(MAX, "any", _over_map(MAX, 21, "strided", reverse=True)),
    Sample(MAX, "ties_hard", _over_map(MAX, 70, "ties")),
    Sample(MAX, "poison_hard", _over_map(MAX, 8, "poison")),
    Sample(MAX, "empty", _over_map(MAX, 8, rows=0)),
    Sample(MAX_BACKWARD, "any", _max_backward),
    Sample(SEGMENT_SUM, "any", _segments(SEGMENT_SUM, 21, "strided", scaled=True)),
    Sample(SEGMENT_SUM, "long", _segments(SEGMENT_SUM, 3, rows=4500, segments=2), ("triton",)),
    Sample(SEGMENT_SUM, "empty", _segments(SEGMENT_SUM, 5, rows=0, segments=2)),
    Sample(SEGMENT_SUM, "none", _segments(SEGMENT_SUM, 5, rows=4, segments=0)),
    Sample(SEGMENT_MAX, "any", _segments(SEGMENT_MAX, 21, "strided")),
    Sample(SEGMENT_MAX, "long_ties_hard", _segments(SEGMENT_MAX, 3, "ties", rows=4500, segments=2), ("triton",)),
    Sample(SEGMENT_MAX, "poison_hard", _segments(SEGMENT_MAX, 5, "poison")),
    Sample(SEGMENT_MAX, "empty", _segments(SEGMENT_MAX, 5, rows=0, segments=2)),
    Sample(SPREAD, "any", _segments(SPREAD, 21, "strided", scaled=True)),
    *(Sample(VOXELIZE, kind, _voxelize(kind)) for kind in ("some", "one_cell", "line", "strided", "plane", "empty")),
    # Keys of 62 bits: eight passes of the sort, which knows no dtype.
    *(Sample(VOXELIZE, kind, _voxelize(kind), ("emulated",)) for kind in ("corners", "far")),
]  # fmt: skip


def _at(index: int, value: Callable) -> Callable:
    return lambda *args: (*args[:index], value(args[index]), *args[index + 1 :])


ERRORS = [
    ErrorSample(SUM, "map_row", _at(1, lambda m: m + 99), IndexError, r"sparse_avg_pool: map\[\d+, \d+\] must be in \[-1, 50\)"),
    ErrorSample(SUM, "map", _at(1, Tensor.long), ValueError, r"sparse_avg_pool: map must be int32"),
    ErrorSample(SUM, "reverse", _at(2, lambda r: torch.zeros(9, 4).int()), ValueError, "reverse must have shape"),
    ErrorSample(SUM, "read_scale", _at(3, lambda s: torch.ones(49)), ValueError, "read_scale must have shape"),
    ErrorSample(SUM, "scale", _at(4, lambda s: torch.ones(42).double()), ValueError, "scale must be float32"),
    ErrorSample(MAX, "x", _at(0, Tensor.long), ValueError, "sparse_max_pool: features must be float32"),
    ErrorSample(MAX, "map_row", _at(1, lambda m: m - 9), IndexError, r"sparse_max_pool: map\[\d+, \d+\] must be in"),
    ErrorSample(MAX_BACKWARD, "arg", _at(1, lambda a: a[1:]), ValueError, f"{MAX_BACKWARD}: arg must have shape"),
    ErrorSample(MAX_BACKWARD, "reverse", _at(2, lambda r: r + 99), IndexError, r"reverse\[\d+, \d+\] must be in"),
    ErrorSample(SEGMENT_SUM, "order", _at(1, lambda o: o + 1), IndexError, rf"{SEGMENT_SUM}: order\[\d+\] must be in \[0, 89\]"),
    ErrorSample(SEGMENT_SUM, "begin", _at(2, lambda b: b - 1), IndexError, r"begin\[0\] must be in \[0, 90\], got -1"),
    ErrorSample(SEGMENT_SUM, "count", _at(3, lambda c: c + 99), IndexError, r"count\[0\] must be in \[0, 90\], got"),
    ErrorSample(SEGMENT_SUM, "inverse", _at(4, lambda i: i[1:]), ValueError, "inverse must have shape"),
    ErrorSample(SEGMENT_SUM, "scale", _at(5, lambda s: s[1:]), ValueError, "scale must have shape"),
    ErrorSample(SEGMENT_MAX, "count_shape", _at(3, lambda c: c[1:]), ValueError, f"{SEGMENT_MAX}: count must have shape"),
    ErrorSample(SPREAD, "inverse", _at(4, lambda i: i + 99), IndexError, r"inverse\[0, \d+\] must be in"),
    ErrorSample(VOXELIZE, "points", _at(0, lambda p: p[:, :2]), ValueError, "voxelize: shape must be one to three sizes"),
    ErrorSample(VOXELIZE, "batch", _at(1, lambda b: b + 1), IndexError, r"batch_index\[\d+\] must be in \[0, 3\), got 3"),
    ErrorSample(VOXELIZE, "batch_dtype", _at(1, Tensor.long), ValueError, "batch_index must be int32"),
    ErrorSample(VOXELIZE, "size", _at(2, lambda s: [0.0, 1.0, 1.0]), ValueError, "voxel_size must be 3 numbers above 0"),
    ErrorSample(VOXELIZE, "low", _at(3, lambda s: s[1:]), ValueError, "low must be 3 finite numbers"),
    ErrorSample(VOXELIZE, "shape", _at(4, lambda s: [0, 1, 1]), ValueError, "shape must be 3 numbers from 1"),
    ErrorSample(VOXELIZE, "cells", _at(4, lambda s: [2**30] * 3), ValueError, r"shape must have at most 2\^62 cells"),
    ErrorSample(VOXELIZE, "batch_size", _at(5, lambda b: 0), ValueError, r"batch_size must be in \[1, 2\^31\)"),
]  # fmt: skip


def _over_map_bytes(x: Tensor, map: Tensor, *rest: object) -> int:
    return (x.numel() + map.shape[1] * x.shape[1]) * x.element_size() + 4 * map.numel()


def _segment_bytes(x: Tensor, order: Tensor, begin: Tensor, *rest: object) -> int:
    return (x.numel() + len(begin) * x.shape[1]) * x.element_size() + 4 * order.numel()


TRAFFIC = {
    SUM: _over_map_bytes,
    MAX: lambda x, map, *rest: _over_map_bytes(x, map) + 4 * map.shape[1] * x.shape[1],
    SEGMENT_SUM: _segment_bytes,
    SEGMENT_MAX: lambda x, order, begin, *rest: _segment_bytes(x, order, begin) + 4 * len(begin) * x.shape[1],
    SPREAD: lambda x, order, begin, count, inverse, *rest: (x.numel() + len(inverse) * x.shape[1]) * x.element_size(),
    VOXELIZE: lambda points, *rest: points.numel() * points.element_size() + 8 * len(points),
}
