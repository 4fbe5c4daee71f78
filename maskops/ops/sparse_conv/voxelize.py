"""voxelize: points to the active cells of a grid, in ascending order, and the rows of points reduced in each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import FLOATS, check_is_tensor, check_tensor, describe, fail, integer, number, one_of
from maskops._registry import OpSpec, define_op, dynamic_size
from maskops.ops.sparse_conv.map import INT32, MOST_AXES
from maskops.ops.sparse_conv.segments import Segments, check_batch, reduce_segments
from maskops.ops.sparse_conv.tensor import Places, SparseTensor
from maskops.reference import sparse_conv_voxelize as reference

FUNCTION = "voxelize"
REDUCTIONS = ("mean", "sum", "max", "first")
OUTSIDE = ("drop", "raise")


class Voxels(NamedTuple):
    """What voxelize returns.

    tensor: SparseTensor over the V voxels, ascending.
    inverse: int32 [P], the voxel of each point, or -1 for one that was dropped.
    counts: int32 [V], the points that each row of tensor was reduced from.
    dropped: int64 [], points that are NaN or outside of the range.
    segments: the points of each voxel.
    """

    tensor: SparseTensor
    inverse: Tensor
    counts: Tensor
    dropped: Tensor
    segments: Segments

    def slice(self, features: Tensor, *, backend: str = "auto") -> Tensor:
        """Rows of voxels [V, C] back at their points [P, C]; 0 for a point that was dropped. Differentiable."""
        check_tensor("Voxels.slice", "features", features, "[V, C]", FLOATS, (self.counts.shape[0], None), self.inverse)
        op = find_op("sparse_conv_segment_spread", features.device.type, backend, "Voxels.slice")
        return op(features, *self.segments._replace(inverse=self.inverse), None)


@public("sparse_conv_voxelize", native="C++ on CPU, many threads; CUDA C++", triton="CUDA, ROCm and XPU")
def voxelize(
    points: Tensor, voxel_size: float | Sequence[float], range: Sequence[float] | None = None, *,
    batch_index: Tensor | None = None, batch_size: int | None = None, reduce: str = "mean", max_points: int | None = None,
    outside: str = "drop", backend: str = "auto",
) -> Voxels:  # fmt: skip
    """Put points into the cells of a grid and reduce the points of each cell to one row.

        cell = floor((points[:, axis] - low[axis]) / voxel_size[axis]) of each axis, in float64

    Args:
        points: float [P, axes + F], the place in the first columns, then any features.
        voxel_size: of a cell, one per axis, one to three; a number alone: of each of three.
        range: (low of each axis, ..., high of each axis, ...), a whole number of cells; a point at `high` lies outside. Default:
            around the points, which needs to look at them.
        batch_index: int32 or int64 [P], the sample of each point. Default: all are of one.
        batch_size: samples. Default: as batch_index has them, which needs to look at it.
        reduce: "mean", "sum", "max" or "first", of all columns of the points of a voxel.
        max_points: take the first so many points of a voxel only.
        outside: "drop" points that are NaN or out of range, or "raise".
        backend: "auto", "native", "triton", "reference".

    Returns:
        Voxels: tensor with features [V, axes + F] (differentiable in points through the reduction), its coords in the order of
        the columns of points; inverse, counts, dropped.

    Notes:
        Voxels ascend by sample and place, points of a voxel keep their order: the result is the same on every backend and for any
        number of threads. No point gives no voxel.

    Raises:
        ValueError: wrong dtype, shape, sizes or reduce; with outside="raise", a point that is NaN or out of range.
        IndexError: a sample that is not in [0, batch_size).  TypeError: an argument of another type.

    Source:
        Zhou, Tuzel: VoxelNet, 2018 (arXiv 1711.06396).

    Example:
        >>> points = torch.tensor([[0.1, 0.1, 5.0], [3.9, 0.2, 1.0], [0.9, 0.8, 7.0], [9.0, 0.0, 0.0]])
        >>> found = maskops.voxelize(points, (1.0, 1.0), (0, 0, 4, 4))
        >>> found.tensor.coords.tolist(), found.tensor.features[:, 2].tolist(), found.inverse.tolist(), int(found.dropped)
        ([[0, 0, 0], [0, 3, 0]], [6.0, 1.0], [0, 1, 0, -1], 1)
    """
    check_is_tensor(FUNCTION, "points", points)
    check_tensor(FUNCTION, "points", points, "[P, axes + F]", FLOATS, (None, None), points)
    sizes = _numbers("voxel_size", voxel_size if isinstance(voxel_size, Sequence) else (voxel_size,) * MOST_AXES)
    if not 1 <= len(sizes) <= min(MOST_AXES, points.shape[1]) or any(not 0 < size < math.inf for size in sizes):
        expected = "be one to three sizes above 0, one per column of a place"
        fail(FUNCTION, "voxel_size", expected, f"{voxel_size} for points {describe(points)}")
    one_of(FUNCTION, "reduce", reduce, REDUCTIONS)
    one_of(FUNCTION, "outside", outside, OUTSIDE)
    if max_points is not None and integer(FUNCTION, "max_points", max_points) < 1:
        fail(FUNCTION, "max_points", "be at least 1, or None", max_points)
    low, shape = _around(points, sizes) if range is None else _grid(_numbers("range", range), sizes)
    batch_index, batch_size = _samples(points, batch_index, batch_size)
    if isinstance(batch_size, int) and math.prod(shape) * batch_size > 2**62:
        got = f"{' x '.join(map(str, shape))} of {batch_size}"
        fail(FUNCTION, "voxel_size", "be such that all samples have at most 2^62 cells", got)

    op = find_op("sparse_conv_voxelize", points.device.type, backend)
    coords, inverse, order, count = op(points.detach(), batch_index, sizes, low, shape, batch_size)
    dropped = points.shape[0] - count.sum()
    if outside == "raise":
        _refuse(points, inverse, range)
    begin = (count.cumsum(0) - count).int()
    features, counts = _reduced(points, Segments(order, begin, count, inverse), reduce, max_points, backend)
    tensor = SparseTensor.over(features, Places(coords, tuple(shape), batch_size, (1,) * len(shape)))
    return Voxels(tensor, inverse, counts, dropped, Segments(order, begin, count, inverse))


def _reduced(points: Tensor, segments: Segments, reduce: str, most: int | None, backend: str) -> tuple[Tensor, Tensor]:
    """(a row for each segment, of its first `most` points, how many those are)"""
    counts = segments.count if most is None else segments.count.clamp(max=most)
    if reduce == "first":
        most, reduce = 1, "sum"
    used = segments if most is None else _first_of_each(segments, most)
    return reduce_segments(FUNCTION, points, used, reduce, backend), counts


def _first_of_each(segments: Segments, most: int) -> Segments:
    """The first rows of each segment only."""
    order, begin, count, inverse = segments
    # The rank of a row in its segment: where it stands in order, less where the segment begins; a row of none takes the last 0.
    number = torch.arange(order.shape[0], dtype=order.dtype, device=order.device)
    rank = (
        torch.empty_like(order).scatter_(0, order.long(), number)
        - torch.cat([begin, begin.new_zeros(1)])[inverse.long()]
    )
    inverse = torch.where(rank < most, inverse, -1)
    return Segments(order, begin, count.clamp(max=most), inverse)


def _numbers(name: str, values: object) -> list[float]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{FUNCTION}: {name} must be a sequence of numbers, got {values!r}")
    return [number(FUNCTION, name, value) for value in values]


def _grid(range: list[float], sizes: list[float]) -> tuple[list[float], list[int]]:
    """(the low end, cells) of each axis."""
    axes = len(sizes)
    if len(range) != 2 * axes or any(not math.isfinite(value) for value in range):
        fail(FUNCTION, "range", f"be {axes} low and {axes} high ends, finite", range)
    low, shape = range[:axes], []
    for a, b, size in zip(low, range[axes:], sizes, strict=True):
        exact = (b - a) / size
        cells = round(exact) if 0 < exact < 2**31 else 0
        if cells < 1 or abs(exact - cells) > 1e-3 or cells >= 2**31:
            fail(FUNCTION, "range", f"be a whole number of cells of {size}, from 1 to 2^31 - 1", f"{a} to {b}")
        shape.append(cells)
    return low, shape


def _around(points: Tensor, sizes: list[float]) -> tuple[list[float], list[int]]:
    """As _grid, for the points that are finite; low ends are whole numbers of cells."""
    places = points.detach()[:, : len(sizes)].double()
    places = places[places.isfinite().all(1)]
    if not len(places):
        return [0.0] * len(sizes), [1] * len(sizes)
    ends = zip(sizes, places.amin(0).tolist(), places.amax(0).tolist(), strict=True)
    low, shape = [], []
    for size, a, b in ends:
        first = math.floor(a / size) * size if math.isfinite(a / size) else -math.inf
        # A cell more on both sides, where rounding may put a point at an end; empty cells cost nothing.
        cells = math.floor((b - first) / size) + 3 if math.isfinite((b - first) / size) else 2**31
        if cells >= 2**31:
            fail(FUNCTION, "voxel_size", "be such that the points need fewer than 2^31 cells on an axis", size)
        low.append(first - size)
        shape.append(cells)
    return low, shape


def _samples(points: Tensor, index: Tensor | None, size: int | None) -> tuple[Tensor | None, int]:
    if size is not None and isinstance(integer(FUNCTION, "batch_size", size), int) and not 1 <= size < 2**31:
        fail(FUNCTION, "batch_size", "be in [1, 2^31)", size)
    if index is None:
        return None, 1 if size is None else size
    check_is_tensor(FUNCTION, "batch_index", index)
    check_tensor(FUNCTION, "batch_index", index, "[P]", (torch.int32, torch.int64), (points.shape[0],), points)
    if size is None:
        size = max(int(index.max()) + 1, 1) if len(index) else 1
        if size >= 2**31:
            fail(FUNCTION, "batch_index", "be below 2^31 - 1", size - 1)
    check_batch(FUNCTION, index, size)
    return index.int(), size


def _refuse(points: Tensor, inverse: Tensor, range: Sequence[float] | None) -> None:
    outside = inverse < 0
    if points.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(~outside.any(), f"{FUNCTION}: points must be inside of range")
    elif outside.any():
        row = int(torch.nonzero(outside)[0, 0])
        where = "be finite" if range is None else f"be inside of {list(range)}"
        fail(FUNCTION, f"points[{row}]", where, [round(value, 6) for value in points[row].tolist()])


# ---------------------------------------------------------------- the op


def _check(
    points: Tensor, batch_index: Tensor | None, voxel_size: list[float], low: list[float], shape: list[int], batch_size: int
) -> None:  # fmt: skip
    op = FUNCTION
    check_tensor(op, "points", points, "[P, axes + *]", FLOATS, (None, None), points)
    axes = len(shape)
    if not 1 <= axes <= MOST_AXES or points.shape[1] < axes:
        fail(op, "shape", "be one to three sizes, one for each of the first columns of points", _joined(shape))
    if any(not 1 <= size < 2**31 for size in shape):
        fail(op, "shape", f"be {axes} numbers from 1 to 2^31 - 1", _joined(shape))
    if len(voxel_size) != axes or any(not 0 < size < 1e300 for size in voxel_size):
        fail(op, "voxel_size", f"be {axes} numbers above 0", "others")
    if len(low) != axes or any(not -1e300 < value < 1e300 for value in low):
        fail(op, "low", f"be {axes} finite numbers", "others")
    if not 1 <= batch_size < 2**31:
        fail(op, "batch_size", "be in [1, 2^31)", int(batch_size))
    if math.prod(shape) * batch_size > 2**62:
        fail(op, "shape", "have at most 2^62 cells in all samples", _joined(shape))
    if batch_index is not None:
        check_tensor(op, "batch_index", batch_index, "[P]", INT32, (points.shape[0],), points)


def _joined(values: list[int]) -> str:
    return f"[{', '.join(str(int(value)) for value in values)}]"


def _fake(
    points: Tensor, batch_index: Tensor | None, voxel_size: list[float], low: list[float], shape: list[int], *_: object
) -> tuple:
    rows, voxels = points.shape[0], dynamic_size()
    sizes = ((voxels, 1 + len(shape)), (rows,), (rows,), (voxels,))
    return tuple(points.new_empty(size, dtype=torch.int32) for size in sizes)


define_op(
    OpSpec(
        "sparse_conv_voxelize(Tensor points, Tensor? batch_index, float[] voxel_size, float[] low, SymInt[] shape,"
        " SymInt batch_size) -> (Tensor, Tensor, Tensor, Tensor)",
        family="sparse_conv",
        reference=reference.sparse_conv_voxelize,
        check=_check,
        check_data=lambda points, index, size, low, shape, batch_size: (
            None if index is None else check_batch(FUNCTION, index, batch_size)
        ),
        fake=_fake,
    )
)
