"""Modules of the family sparse_conv: convolutions of a SparseTensor in one to three axes, C and D channels, G groups."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from maskops._checks import boolean, integer, sizes_of
from maskops.ops.sparse_conv import KernelMap, SparseTensor, sparse_conv
from maskops.ops.sparse_conv.tensor import Places

Sizes = int | Sequence[int]


def check_sparse(module: str, x: object, axes: int | None = None) -> None:
    if not isinstance(x, SparseTensor):
        raise TypeError(f"{module}: x must be a SparseTensor, got {type(x).__name__}")
    if axes is not None and len(x.spatial_shape) != axes:
        raise ValueError(f"{module}: x must have {axes} axes, got {len(x.spatial_shape)}")


class SparseConvolution(nn.Module):
    """What the sparse convolutions share: a weight [*kernel_size, C / G, D] over a kernel map. Initialised as torch's convolutions.

    Args:
        in_channels, out_channels: C and D.
        kernel_size, stride, padding, dilation: int, or one per axis.
        groups: of channels.
        bias: whether to learn one.

    Raises:
        ValueError: groups that do not divide the channels, sizes that are not positive.
    """

    axes = 0  # 1, 2 or 3, by class

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Sizes, stride: Sizes = 1, padding: Sizes = 0, dilation: Sizes = 1,
        groups: int = 1, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        name, axes = type(self).__name__, self.axes
        in_channels, out_channels, groups = (
            integer(name, argument, value)
            for argument, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups))
        )
        for argument, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value < 0:
                raise ValueError(f"{name}: {argument} must be at least 0, got {value}")
        boolean(name, "bias", bias)
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"{name}: groups must divide {in_channels} and {out_channels} channels, got {groups}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        given = (
            ("kernel_size", kernel_size, 1),
            ("stride", stride, 1),
            ("padding", padding, 0),
            ("dilation", dilation, 1),
        )
        for argument, value, least in given:
            setattr(self, argument, tuple(sizes_of(name, argument, value, axes, least)))
        if math.prod(self.kernel_size) >= 2**31:
            raise ValueError(f"{name}: kernel_size must have fewer than 2^31 places, got {self.kernel_size}")
        self.weight = nn.Parameter(torch.empty(*self.kernel_size, in_channels // groups, out_channels))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fan_in = math.prod(self.kernel_size) * self.in_channels // self.groups
        bound = 1 / math.sqrt(max(fan_in, 1))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def target(self, places: Places) -> tuple[Places, KernelMap]:
        """(places of the result, the map onto them)"""
        return places.convolved(self.kernel_size, self.stride, self.padding, self.dilation)

    def forward(self, x: SparseTensor) -> SparseTensor:
        check_sparse(type(self).__name__, x, self.axes)
        places, found = self.target(x.places)
        return SparseTensor.over(sparse_conv(x.features, self.weight, found, self.bias, self.groups), places)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        for name, usual in (("stride", 1), ("padding", 0), ("dilation", 1)):
            if set(getattr(self, name)) != {usual}:
                parts.append(f"{name}={getattr(self, name)}")
        parts += [f"groups={self.groups}"] if self.groups > 1 else []
        return ", ".join(parts + (["bias=False"] if self.bias is None else []))


class _Submanifold(SparseConvolution):
    """Convolution whose result has the places of x: no place becomes active, so sparsity stays."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, dilation=dilation, groups=groups, bias=bias)
        if any(size % 2 == 0 for size in self.kernel_size):
            raise ValueError(f"{type(self).__name__}: kernel_size must be odd, got {kernel_size}")

    def target(self, places: Places) -> tuple[Places, KernelMap]:
        return places, places.submanifold(self.kernel_size, self.dilation)


class _Transposed(SparseConvolution):
    """Transposed convolution: every place of the finer grid that a place of x reaches becomes active."""

    def target(self, places: Places) -> tuple[Places, KernelMap]:
        return places.convolved(self.kernel_size, self.stride, self.padding, self.dilation, transposed=True)


# ---------------------------------------------------------------- by axes


class SubMConv1d(_Submanifold):
    """Submanifold convolution, one axis. Arguments as of SparseConvolution without stride and padding."""

    axes = 1


class SubMConv2d(_Submanifold):
    """Submanifold convolution, two axes. Arguments as of SparseConvolution without stride and padding."""

    axes = 2


class SubMConv3d(_Submanifold):
    """Submanifold convolution, three axes. Arguments as of SparseConvolution without stride and padding."""

    axes = 3


class SparseConv1d(SparseConvolution):
    """Convolution onto every place that is reached, one axis. Arguments as of SparseConvolution."""

    axes = 1


class SparseConv2d(SparseConvolution):
    """Convolution onto every place that is reached, two axes. Arguments as of SparseConvolution."""

    axes = 2


class SparseConv3d(SparseConvolution):
    """Convolution onto every place that is reached, three axes. Arguments as of SparseConvolution."""

    axes = 3


class SparseConvTranspose1d(_Transposed):
    """Transposed convolution onto every place that is reached, one axis. Arguments as of SparseConvolution."""

    axes = 1


class SparseConvTranspose2d(_Transposed):
    """Transposed convolution onto every place that is reached, two axes. Arguments as of SparseConvolution."""

    axes = 2


class SparseConvTranspose3d(_Transposed):
    """Transposed convolution onto every place that is reached, three axes. Arguments as of SparseConvolution."""

    axes = 3


OF_AXES = {1: SparseConv1d, 2: SparseConv2d, 3: SparseConv3d}


class SparseInverseConv(nn.Module):
    """Convolution back onto the places that the last convolution with a stride came from, over its kernel map reversed.

    Example:
        >>> x = maskops.SparseTensor(torch.rand(2, 8), torch.tensor([[0, 1, 1], [0, 5, 2]], dtype=torch.int32), (8, 8), 1)
        >>> down, up = maskops.nn.SparseConv2d(8, 16, 2, stride=2), maskops.nn.SparseInverseConv(16, 8, (2, 2))
        >>> bool((up(down(x)).coords == x.coords).all())
        True
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Sequence[int], groups: int = 1, bias: bool = True
    ) -> None:
        """kernel_size: one per axis, of the convolution whose places are returned to."""
        super().__init__()
        if not isinstance(kernel_size, Sequence) or len(kernel_size) not in OF_AXES:
            raise ValueError(
                f"SparseInverseConv: kernel_size must be one to three numbers, one per axis, got {kernel_size!r}"
            )
        self.conv = OF_AXES[len(kernel_size)](in_channels, out_channels, kernel_size, groups=groups, bias=bias)

    def forward(self, x: SparseTensor) -> SparseTensor:
        check_sparse("SparseInverseConv", x)
        conv, origin = self.conv, x.places.origin
        if origin is None:
            raise ValueError("SparseInverseConv: x must come from a convolution with a stride, got places of their own")
        places, found = origin
        if found.kernel_size != conv.kernel_size:
            raise ValueError(
                f"SparseInverseConv: kernel_size must be {found.kernel_size}, of that convolution, got {conv.kernel_size}"
            )
        out = sparse_conv(x.features, conv.weight, found.inverse(places.coords), conv.bias, conv.groups)
        return SparseTensor.over(out, places)
