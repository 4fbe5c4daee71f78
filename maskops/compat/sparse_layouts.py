"""Weights of sparse convolutions from and to TorchSparse and MinkowskiEngine: the order of kernel places. Of spconv: compat.spconv.

maskops counts the places of a kernel row by row, the last axis fastest: weight [*kernel_size, C, D]. Both libraries keep
[K, C, D], or [C, D] for a kernel of one place, and count otherwise:

    MinkowskiEngine    the first axis fastest
    TorchSparse        the first axis fastest for an odd number of places, the last for an even one, so 2 x 2 x 2 goes as it is

A place k of an axis lies k - (size - 1) // 2 from the centre in TorchSparse; in MinkowskiEngine too for an odd size, and k for an
even one. So kernel_map(padding=) of each axis is dilation * that shift, as `padding_of` tells.

    weight = from_minkowski(state["conv1.kernel"], (3, 3, 3))
    out = maskops.sparse_conv(features, weight, maskops.kernel_map(coords, 3))
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from maskops._checks import check_is_tensor, describe, fail, integer, integers, one_of

LIBRARIES = ("torchsparse", "minkowski")

__all__ = ["from_minkowski", "from_torchsparse", "padding_of", "to_minkowski", "to_torchsparse"]


def from_torchsparse(kernel: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """TorchSparse's [K, C, D] (or [C, D]) as the [*kernel_size, C, D] of maskops."""
    return _from("from_torchsparse", kernel, kernel_size, None)


def to_torchsparse(weight: Tensor) -> Tensor:
    """The [*kernel_size, C, D] of maskops as TorchSparse's [K, C, D], or [C, D] for a kernel of one place."""
    return _to("to_torchsparse", weight, None)


def from_minkowski(kernel: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """MinkowskiEngine's [K, C, D] (or [C, D]) as the [*kernel_size, C, D] of maskops."""
    return _from("from_minkowski", kernel, kernel_size, True)


def to_minkowski(weight: Tensor) -> Tensor:
    """The [*kernel_size, C, D] of maskops as MinkowskiEngine's [K, C, D], or [C, D] for a kernel of one place."""
    return _to("to_minkowski", weight, True)


def padding_of(library: str, kernel_size: Sequence[int], dilation: int = 1) -> tuple[int, ...]:
    """The padding of kernel_map under which places lie around the centre as in "torchsparse" or "minkowski"."""
    one_of("padding_of", "library", library, LIBRARIES)
    sizes, dilation = _sizes("padding_of", kernel_size), integer("padding_of", "dilation", dilation)
    if dilation < 1:
        fail("padding_of", "dilation", "be at least 1", dilation)
    return tuple(0 if library == "minkowski" and size % 2 == 0 else dilation * ((size - 1) // 2) for size in sizes)


def _sizes(name: str, kernel_size: Sequence[int]) -> list[int]:
    sizes = integers(name, "kernel_size", kernel_size)
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        fail(name, "kernel_size", "be one to three sizes of at least 1", sizes)
    return sizes


def _odd(kernel_size: Sequence[int]) -> bool:
    return math.prod(kernel_size) % 2 == 1


def _from(name: str, kernel: Tensor, kernel_size: Sequence[int], first_fastest: bool | None) -> Tensor:
    """first_fastest: None, where it is so for an odd number of places."""
    check_is_tensor(name, "kernel", kernel)
    sizes = _sizes(name, kernel_size)
    first_fastest = _odd(sizes) if first_fastest is None else first_fastest
    kernel = kernel[None] if kernel.dim() == 2 else kernel
    if kernel.dim() != 3 or kernel.shape[0] != math.prod(sizes):
        fail(name, "kernel", f"have shape [{math.prod(sizes)}, C, D]", describe(kernel))
    if not first_fastest:
        return kernel.unflatten(0, sizes)
    return _axes_reversed(kernel.unflatten(0, sizes[::-1]))


def _to(name: str, weight: Tensor, first_fastest: bool | None) -> Tensor:
    check_is_tensor(name, "weight", weight)
    if not 3 <= weight.dim() <= 5:
        fail(name, "weight", "have shape [*kernel_size, C, D] with one to three axes", describe(weight))
    first_fastest = _odd(weight.shape[:-2]) if first_fastest is None else first_fastest
    kernel = (_axes_reversed(weight) if first_fastest else weight).flatten(0, -3)
    return kernel[0] if len(kernel) == 1 else kernel


def _axes_reversed(weight: Tensor) -> Tensor:
    axes = weight.dim() - 2
    return weight.permute(*reversed(range(axes)), axes, axes + 1)
