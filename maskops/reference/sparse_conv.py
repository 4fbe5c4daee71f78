"""Reference of the family sparse_conv: N places read, M places written, K places of the kernel, C and D channels, G groups.

coords int32 [N, 1 + axes] are (batch, place). The places of a kernel are counted row by row, the last axis fastest.
"""

import itertools

import torch
from torch import Tensor

from maskops.reference.visible_tokens import accumulation_dtype


def kernel_places(kernel_size: list[int], device: torch.device) -> Tensor:
    """int64 [K, axes]"""
    return torch.tensor(list(itertools.product(*(range(size) for size in kernel_size))), device=device)


def sources(
    out_coords: Tensor, k: Tensor, stride: list[int], padding: list[int], dilation: list[int], transposed: bool
) -> tuple[Tensor, Tensor]:
    """(coords that kernel place k [axes] reads for each row of out_coords [M, 1 + axes], whether there are such coords)."""
    stride, padding, dilation = (out_coords.new_tensor(x, dtype=torch.int64) for x in (stride, padding, dilation))
    batch, place = out_coords[:, :1].long(), out_coords[:, 1:].long()
    if not transposed:
        return torch.cat([batch, place * stride - padding + k * dilation], 1), torch.ones_like(
            batch[:, 0], dtype=torch.bool
        )
    place = place + padding - k * dilation
    return torch.cat([batch, place.div(stride, rounding_mode="floor")], 1), (place % stride == 0).all(1)


def sparse_conv_map(
    coords: Tensor, out_coords: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool,
) -> Tensor:  # fmt: skip
    N, M = len(coords), len(out_coords)
    rows = []
    for k in kernel_places(kernel_size, coords.device):
        wanted, exists = sources(out_coords, k, stride, padding, dilation, transposed)
        number = torch.unique(torch.cat([coords.long(), wanted]), dim=0, return_inverse=True)[1]
        row_of = number.new_full((N + M,), -1)
        row_of[number[:N]] = torch.arange(N, device=coords.device)
        rows.append(torch.where(exists, row_of[number[N:]], -1))
    return torch.stack(rows).int()


def sparse_conv_outputs(
    coords: Tensor, out_shape: list[int], kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool,
) -> Tensor:  # fmt: skip
    # A place of the result reads what the reversed question, with strides multiplied instead of divided, finds.
    end = coords.new_tensor(out_shape, dtype=torch.int64)
    found = [coords.new_empty((0, coords.shape[1]), dtype=torch.int64)]
    for k in kernel_places(kernel_size, coords.device):
        place, exists = sources(coords, k, stride, padding, dilation, not transposed)
        inside = (place[:, 1:] >= 0).all(1) & (place[:, 1:] < end).all(1)
        found.append(place[exists & inside])
    return torch.unique(torch.cat(found), dim=0).int()


def sparse_conv_reverse(map: Tensor, rows: int) -> Tensor:
    result = map.new_full((len(map), rows), -1)
    k, m = torch.nonzero(map >= 0, as_tuple=True)
    result[k, map[k, m].long()] = m.int()
    return result


def sparse_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, map: Tensor, reverse: Tensor | None, groups: int
) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    (K, _, D), M = weight.shape, map.shape[1]
    out = x.new_zeros((M, D), dtype=dtype)
    if bias is not None:
        out += bias
    for k in range(K):
        m = torch.nonzero(map[k] >= 0)[:, 0]
        out[m] += grouped(x[map[k, m].long()].to(dtype), weight[k].to(dtype), groups)
    return out.to(x.dtype)


def grouped(rows: Tensor, weight: Tensor, groups: int) -> Tensor:
    """rows [m, C] times weight [C / G, D], each group of columns with its own channels."""
    each = weight.shape[1] // groups
    parts = rows.unflatten(1, (groups, weight.shape[0]))
    return torch.einsum("mgc,cgd->mgd", parts, weight.unflatten(1, (groups, each))).flatten(1)


def _sparse_conv_grad_weight(grad: Tensor, x: Tensor, map: Tensor, groups: int) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    K, C, D = map.shape[0], x.shape[1], grad.shape[1]
    result = x.new_zeros((K, C // groups, D), dtype=dtype)
    for k in range(K):
        m = torch.nonzero(map[k] >= 0)[:, 0]
        own = x[map[k, m].long()].to(dtype).unflatten(1, (groups, C // groups))
        result[k] = torch.einsum("mgc,mgd->cgd", own, grad[m].to(dtype).unflatten(1, (groups, D // groups))).flatten(1)
    return result.to(x.dtype)
