"""Reference of voxelisation in the family sparse_conv: P points with their place in the first columns, V voxels, C columns."""

import torch
from torch import Tensor


def sparse_conv_voxelize(
    points: Tensor, batch_index: Tensor | None, voxel_size: list[float], low: list[float], shape: list[int], batch_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(coords int32 [V, 1 + axes] ascending, voxel of each point or -1, points voxel by voxel and the outer ones last, counts)"""
    options = {"dtype": torch.float64, "device": points.device}
    at = (points[:, : len(shape)].double() - torch.tensor(low, **options)) / torch.tensor(voxel_size, **options)
    at = at.floor()
    inside = ((at >= 0) & (at < torch.tensor(shape, **options))).all(1)  # NaN is never inside
    batch = at.new_zeros(len(at), 1) if batch_index is None else batch_index[:, None].double()
    cells = torch.cat([batch, at], 1)[inside].int()
    coords, number, count = torch.unique(cells, dim=0, return_inverse=True, return_counts=True)
    inverse = torch.full((len(points),), -1, dtype=torch.int32, device=points.device)
    inverse[inside] = number.int()
    order = torch.argsort(torch.where(inside, inverse, len(coords)), stable=True)
    return coords, inverse, order.int(), count.int()
