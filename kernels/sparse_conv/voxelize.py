"""Triton kernel of voxelisation: the cell of each point as one number. Sorting is torch's."""

import math

import torch
import triton
import triton.language as tl
from maskops.kernels._common import Arg, cdiv, launch, rows_of
from maskops.kernels.sparse_conv.conv import _three

POINTS = 256


@triton.jit
def _axis(points_ptr, n, sp, axis: tl.constexpr, low, size, cells, mask):
    """(the cell of points on one axis, whether it is one), in float64; NaN is in none."""
    at = tl.floor((tl.load(points_ptr + n.to(tl.int64) * sp + axis, mask=mask, other=0.0).to(tl.float64) - low) / size)
    inside = (at >= 0) & (at < cells.to(tl.float64))
    return tl.where(inside, at, 0).to(tl.int64), inside


@triton.jit
def _cell_kernel(points_ptr, batch_ptr, grid_ptr, out_ptr, P, sp, n0, n1, n2, cells, AXES: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    # One program owns BLOCK points of [P, *] and writes the numbers of their cells, `cells` for a point outside.
    # grid float64 [2, 3]: low ends and sizes; axes that lack come first.
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = n < P
    cell = tl.zeros([BLOCK], tl.int64)
    if batch_ptr is not None:
        cell += tl.load(batch_ptr + n, mask=mask, other=0).to(tl.int64)
    inside = mask
    if AXES == 3:
        at, good = _axis(points_ptr, n, sp, 0, tl.load(grid_ptr), tl.load(grid_ptr + 3), n0, mask)
        cell = cell * n0 + at
        inside = inside & good
    if AXES >= 2:
        at, good = _axis(points_ptr, n, sp, AXES - 2, tl.load(grid_ptr + 1), tl.load(grid_ptr + 4), n1, mask)
        cell = cell * n1 + at
        inside = inside & good
    at, good = _axis(points_ptr, n, sp, AXES - 1, tl.load(grid_ptr + 2), tl.load(grid_ptr + 5), n2, mask)
    cell = cell * n2 + at
    tl.store(out_ptr + n, tl.where(inside & good, cell, cells), mask=mask)


def sparse_conv_voxelize(points, batch_index, voxel_size, low, shape, batch_size):
    points = rows_of(points)
    batch_index = None if batch_index is None else batch_index.contiguous()
    P, cells = len(points), math.prod(shape) * batch_size
    grid = torch.tensor([_three(low, 0.0), _three(voxel_size, 1.0)], dtype=torch.float64, device=points.device)
    keys = torch.empty(P, dtype=torch.int64, device=points.device)
    launch(
        _cell_kernel, cdiv(P, POINTS), points, batch_index, grid, keys, P, points.stride(0), *_three(shape, 1), cells,
        AXES=len(shape), BLOCK=POINTS, num_warps=4,
    )  # fmt: skip
    integers = {"dtype": torch.int32, "device": points.device}
    if points.is_meta:  # recorded for ahead-of-time compilation
        return tuple(torch.empty(size, **integers) for size in ((0, 1 + len(shape)), (P,), (P,), (0,)))
    keys, order = torch.sort(keys, stable=True)
    kept = keys < cells
    voxels, number, count = torch.unique_consecutive(keys[kept], return_inverse=True, return_counts=True)
    inverse = torch.full((P,), -1, **integers)
    inverse[order[kept]] = number.int()
    columns = []
    for size in reversed(shape):
        columns.append(voxels % size)
        voxels = voxels // size
    coords = torch.stack([voxels, *reversed(columns)], 1)
    return coords.int(), inverse, order.int(), count.int()


AOT_SAMPLES = {
    "sparse_conv_voxelize": (
        (Arg("float", (10000, 4)), Arg("int32", (10000,)), [0.05, 0.05, 0.1], [0.0, -40.0, -3.0], [1408, 1600, 40], 4),
        (Arg("float", (10000, 2)), None, [1.0, 1.0], [0.0, 0.0], [2**20, 2**20], 1),
    )
}
LIMITS = {
    "sparse_conv_voxelize": {"dtypes": (torch.float32, torch.float64, torch.bfloat16, torch.float16), "reason": ""}
}
