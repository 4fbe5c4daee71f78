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


def block_inputs(batch: int, count: int, *leaves: tuple[int, ...]) -> list[Tensor]:
    """x [batch, 10, 44, count / 2], cells of 4 x 4 positions, and more leaves."""
    cells = torch.rand(batch, 11, count // 8, generator=torch.Generator().manual_seed(0)) < 0.5
    first, *others = (torch.randn(*shape, requires_grad=True) for shape in ((batch, 10, 44, count // 2), *leaves))
    return [first, cells, *others]


def case_block_conv(batch: int, count: int) -> tuple[Callable, tuple]:
    x, cells, *rest = block_inputs(batch, count, (DIM, 5, 3, 3), (DIM,))
    return lambda x, c, w, b: maskops.block_masked_conv(x, w, c, b, stride=2, padding=1, groups=2), (x, cells, *rest)


def case_block_pool(batch: int, count: int) -> tuple[Callable, tuple]:
    return lambda x, c: maskops.block_masked_max_pool(x, c, 3, stride=2, padding=1), tuple(block_inputs(batch, count))


def case_batch_norm(batch: int, count: int) -> tuple[Callable, tuple]:
    def f(x: Tensor, cells: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return maskops.masked_batch_norm(x, cells, None, None, weight, bias, training=True)

    return f, tuple(block_inputs(batch, count, (10,), (10,)))


def case_group_norm(batch: int, count: int) -> tuple[Callable, tuple]:
    return lambda x, c, w, b: maskops.masked_group_norm(x, c, 2, w, b), tuple(block_inputs(batch, count, (10,), (10,)))


def case_instance_norm(batch: int, count: int) -> tuple[Callable, tuple]:
    return lambda x, c, w, b: maskops.masked_instance_norm(x, c, w, b), tuple(block_inputs(batch, count, (10,), (10,)))


def case_layer_norm(batch: int, count: int) -> tuple[Callable, tuple]:
    return lambda x, c, w, b: maskops.masked_layer_norm(x, c, w, b), tuple(block_inputs(batch, count, (10,), (10,)))


CALLS = {
    "kernel_map": case_kernel_map, "sparse_conv": case_sparse_conv, "sparse_max_pool": case_sparse_pool(maskops.sparse_max_pool),
    "sparse_avg_pool": case_sparse_pool(maskops.sparse_avg_pool), "sparse_global_pool": case_sparse_global_pool,
    "voxelize": case_voxelize, "neighbour_fill": case_neighbour_fill, "block_masked_conv": case_block_conv,
    "block_masked_max_pool": case_block_pool, "masked_batch_norm": case_batch_norm, "masked_group_norm": case_group_norm,
    "masked_instance_norm": case_instance_norm, "masked_layer_norm": case_layer_norm,
}  # fmt: skip
AUTOCAST = {name: torch.float32 for name in CALLS if name not in ("kernel_map", "block_masked_max_pool")}
AUTOCAST |= dict.fromkeys(("sparse_conv", "block_masked_conv"), torch.bfloat16)
