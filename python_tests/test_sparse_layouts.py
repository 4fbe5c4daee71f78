"""Weights of TorchSparse and MinkowskiEngine: each library's own enumeration of kernel places, written out, is the oracle."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

import maskops
from maskops.compat.sparse_layouts import from_minkowski, from_torchsparse, padding_of, to_minkowski, to_torchsparse
from maskops.testing.sparse_conv import places


def torchsparse_offsets(size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """As torchsparse.nn.utils.get_kernel_offsets documents them."""
    x, y, z = (np.arange(-s // 2 + 1, s // 2 + 1).tolist() for s in size)
    if np.prod(size) % 2 == 1:
        return [(i, j, k) for k in z for j in y for i in x]
    return [(i, j, k) for i in x for j in y for k in z]


def minkowski_offsets(size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """As MinkowskiEngine's kernel_region_iterator counts: up on axis 0, carried over to the next; even sizes begin at 0."""
    low = [0 if s % 2 == 0 else -(s // 2) for s in size]
    at, found = list(low), []
    while True:
        found.append(tuple(at))
        for axis, s in enumerate(size):
            at[axis] += 1
            if at[axis] < low[axis] + s:
                break
            at[axis] = low[axis]
        else:
            return found


def convolved(dense: Tensor, kernel: Tensor, offsets: list[tuple[int, ...]]) -> Tensor:
    """out[p] = sum over k of dense[p + offset k] kernel[k], of [*shape, C], 0 outside."""
    out = dense.new_zeros(*dense.shape[:-1], kernel.shape[-1])
    for k, offset in enumerate(offsets):
        for p in itertools.product(*(range(n) for n in dense.shape[:-1])):
            q = tuple(a + b for a, b in zip(p, offset, strict=True))
            if all(0 <= a < n for a, n in zip(q, dense.shape[:-1], strict=True)):
                out[p] += dense[q] @ kernel[k]
    return out


@pytest.mark.parametrize("library", ["torchsparse", "minkowski"])
@pytest.mark.parametrize("size", [(3, 3, 3), (1, 3, 5), (2, 2, 2), (2, 3, 1), (1, 4, 3)])
def test_weights_give_the_convolution_of_the_library(library: str, size: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    shape = (4, 5, 6)
    coords = places(g, 50, 1, *shape)
    x = maskops.SparseTensor(torch.randn(len(coords), 2, generator=g, dtype=torch.float64), coords, shape, 1)
    offsets = (torchsparse_offsets if library == "torchsparse" else minkowski_offsets)(size)
    kernel = torch.randn(len(offsets), 2, 3, generator=g, dtype=torch.float64)
    convert, back = (from_torchsparse, to_torchsparse) if library == "torchsparse" else (from_minkowski, to_minkowski)
    weight = convert(kernel, size)
    found = maskops.kernel_map(coords, size, padding=padding_of(library, size), out_coords=coords)
    expected = convolved(x.dense()[0].movedim(0, -1), kernel, offsets)[tuple(coords[:, 1:].long().T)]
    torch.testing.assert_close(maskops.sparse_conv(x.features, weight, found), expected)
    assert torch.equal(back(weight), kernel) and weight.shape == (*size, 2, 3)


def test_minkowski_in_two_axes_and_kernels_of_one_place() -> None:
    kernel = torch.arange(6.0)[:, None, None]
    assert from_minkowski(kernel, (2, 3))[..., 0, 0].tolist() == [[0, 2, 4], [1, 3, 5]]
    one = torch.randn(4, 5)
    for convert, back in ((from_minkowski, to_minkowski), (from_torchsparse, to_torchsparse)):
        assert convert(one, (1, 1, 1)).shape == (1, 1, 1, 4, 5) and torch.equal(back(convert(one, (1, 1, 1))), one)


def test_errors_name_the_argument() -> None:
    with pytest.raises(
        ValueError, match=r"from_minkowski: kernel must have shape \[27, C, D\], got float32 \[9, 1, 1\]"
    ):
        from_minkowski(torch.zeros(9, 1, 1), (3, 3, 3))
    with pytest.raises(ValueError, match="padding_of: library must be one of"):
        padding_of("spconv", (3,))
    with pytest.raises(ValueError, match="to_torchsparse: weight must have shape"):
        to_torchsparse(torch.zeros(3, 3))
