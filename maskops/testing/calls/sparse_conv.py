"""Calls of sparse_conv's public functions."""

from collections.abc import Callable

import torch
from torch import Tensor

import maskops
from maskops.testing.calls._shared import DIM


def places(batch: int, count: int) -> Tensor:
    """int32 [batch * count, 2]: every other place of a line."""
    at = torch.arange(count).repeat(batch) * 2
    return torch.stack([torch.arange(batch).repeat_interleave(count), at + at // 3], 1).int()


def case_kernel_map(batch: int, count: int) -> tuple[Callable, tuple]:
    return lambda coords: maskops.kernel_map(coords, 3).map, (places(batch, count),)


def case_sparse_conv(batch: int, count: int) -> tuple[Callable, tuple]:
    def f(x: Tensor, weight: Tensor, bias: Tensor, coords: Tensor) -> Tensor:
        return maskops.sparse_conv(x, weight, maskops.kernel_map(coords, 3), bias)

    leaves = torch.randn(batch * count, 4), torch.randn(3, 4, DIM), torch.randn(DIM)
    return f, (*(t.requires_grad_() for t in leaves), places(batch, count))


def case_sparse_pool(pool: Callable) -> Callable:
    def case(batch: int, count: int) -> tuple[Callable, tuple]:
        def f(x: Tensor, coords: Tensor) -> Tensor:
            return pool(x, maskops.kernel_map(coords, 3))

        return f, (torch.randn(batch * count, DIM, requires_grad=True), places(batch, count))

    return case


def case_sparse_global_pool(batch: int, count: int) -> tuple[Callable, tuple]:
    x, coords = torch.randn(batch * count, DIM, requires_grad=True), places(batch, count)
    return lambda x, coords: maskops.sparse_global_pool(x, coords[:, 0], 9), (x, coords)


def case_voxelize(batch: int, count: int) -> tuple[Callable, tuple]:
    def f(points: Tensor, index: Tensor) -> Tensor:
        found = maskops.voxelize(points, (0.5, 0.5), (0, 0, 4, 4), batch_index=index, batch_size=9)
        return found.slice(found.tensor.features)

    points = torch.rand(batch * count, DIM) * 5
    return f, (points.requires_grad_(), places(batch, count)[:, 0])


def case_neighbour_fill(batch: int, count: int) -> tuple[Callable, tuple]:
    x, mask = torch.randn(batch, 3, count, DIM, requires_grad=True), torch.rand(batch, 1, count, DIM) < 0.5
    return lambda x, mask: maskops.neighbour_fill(x, mask, 2)[0], (x, mask)


CALLS = {
    "kernel_map": case_kernel_map,
    "sparse_conv": case_sparse_conv,
    "sparse_max_pool": case_sparse_pool(maskops.sparse_max_pool),
    "sparse_avg_pool": case_sparse_pool(maskops.sparse_avg_pool),
    "sparse_global_pool": case_sparse_global_pool,
    "voxelize": case_voxelize,
    "neighbour_fill": case_neighbour_fill,
}
AUTOCAST = {"sparse_conv": torch.bfloat16}
AUTOCAST |= {name: torch.float32 for name in CALLS if name not in ("kernel_map", "sparse_conv")}
