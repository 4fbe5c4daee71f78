"""spconv's convolutions and the layout of their weights, KRSC: [out, *kernel_size, in]."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from maskops._checks import sizes_of
from maskops.compat.spconv.tensor import SparseConvTensor, SparseModule, check_input, indice_key_of
from maskops.nn.sparse_conv import OF_AXES, Sizes
from maskops.ops.sparse_conv import KernelMap, sparse_conv
from maskops.ops.sparse_conv.tensor import Places


def from_krsc(weight: Tensor) -> Tensor:
    """spconv's [D, *kernel_size, C / G] as the [*kernel_size, C / G, D] of maskops."""
    return weight.movedim(0, -1)


def to_krsc(weight: Tensor) -> Tensor:
    """The [*kernel_size, C / G, D] of maskops as spconv's [D, *kernel_size, C / G]."""
    return weight.movedim(-1, 0)


class _Convolution(SparseModule):
    """What the convolutions share.  kind: "subm", "sparse", "transposed" or "inverse".

    algo, fp32_accum, large_kernel_fast_algo and name have no effect: there is one algorithm, and sums are in float32.
    """

    kind, axes = "sparse", 0

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Sizes, stride: Sizes = 1, padding: Sizes = 0, dilation: Sizes = 1,
        groups: int = 1, bias: bool = True, indice_key: str | None = None, algo: Any = None, fp32_accum: bool | None = None,
        large_kernel_fast_algo: bool = False, name: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        name = type(self).__name__
        if self.kind == "subm" and any(
            size % 2 == 0 for size in sizes_of(name, "kernel_size", kernel_size, self.axes, 1)
        ):
            raise ValueError(f"{name}: kernel_size must be odd, got {kernel_size}")
        base = OF_AXES[self.axes]
        try:
            own = base(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        except (TypeError, ValueError) as error:  # in the name of this class
            raise type(error)(str(error).replace(base.__name__, name, 1)) from None
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding, self.dilation = (
            own.kernel_size,
            own.stride,
            own.padding,
            own.dilation,
        )
        self.indice_key = indice_key_of(name, indice_key)
        self.weight = nn.Parameter(to_krsc(own.weight.detach()).contiguous())
        self.bias = None if own.bias is None else nn.Parameter(own.bias.detach())

    def forward(self, input: SparseConvTensor) -> SparseConvTensor:
        check_input(type(self).__name__, input, self.axes)
        places, found = self.target(input)
        features = sparse_conv(input.features, from_krsc(self.weight), found, self.bias, self.groups)
        return input._at(features, places)

    def target(self, x: SparseConvTensor) -> tuple[Places, KernelMap]:
        """(places of the result, the map onto them)"""
        if self.kind == "subm":
            return x.places, x.places.submanifold(self.kernel_size, self.dilation)
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation)
        places, found = x.places.convolved(*sizes, transposed=self.kind == "transposed")
        if self.indice_key is not None:
            x.indice_dict[self.indice_key] = (x.places, found)
        return places, found

    def extra_repr(self) -> str:
        key = "" if self.indice_key is None else f", indice_key={self.indice_key!r}"
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}{key}"


class _Inverse(_Convolution):
    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Sizes, indice_key: str | None = None, bias: bool = True,
        algo: Any = None, fp32_accum: bool | None = None, large_kernel_fast_algo: bool = False, name: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, bias=bias, indice_key=indice_key)

    def target(self, x: SparseConvTensor) -> tuple[Places, KernelMap]:
        if self.indice_key not in x.indice_dict:
            known = sorted(x.indice_dict) or "none"
            raise ValueError(
                f"{type(self).__name__}: indice_key must be that of an earlier convolution ({known}), got {self.indice_key!r}"
            )
        places, found = x.indice_dict[self.indice_key]
        if found.map.shape[1] != len(x) or found.kernel_size != self.kernel_size:
            raise ValueError(
                f"{type(self).__name__}: the convolution {self.indice_key!r} must have led to these places with kernel_size"
                f" {self.kernel_size}, got {found.map.shape[1]} places with {found.kernel_size}, not {len(x)}"
            )
        return places, found.inverse(places.coords)


# ---------------------------------------------------------------- by axes


class SubMConv1d(_Convolution):
    """One axis: submanifold convolution; stride and padding have no effect, as in spconv."""

    kind, axes = "subm", 1


class SubMConv2d(_Convolution):
    """Two axes: submanifold convolution; stride and padding have no effect, as in spconv."""

    kind, axes = "subm", 2


class SubMConv3d(_Convolution):
    """Three axes: submanifold convolution; stride and padding have no effect, as in spconv."""

    kind, axes = "subm", 3


class SparseConv1d(_Convolution):
    """One axis: convolution onto every place that is reached."""

    kind, axes = "sparse", 1


class SparseConv2d(_Convolution):
    """Two axes: convolution onto every place that is reached."""

    kind, axes = "sparse", 2


class SparseConv3d(_Convolution):
    """Three axes: convolution onto every place that is reached."""

    kind, axes = "sparse", 3


class SparseConvTranspose1d(_Convolution):
    """One axis: transposed convolution."""

    kind, axes = "transposed", 1


class SparseConvTranspose2d(_Convolution):
    """Two axes: transposed convolution."""

    kind, axes = "transposed", 2


class SparseConvTranspose3d(_Convolution):
    """Three axes: transposed convolution."""

    kind, axes = "transposed", 3


class SparseInverseConv1d(_Inverse):
    """One axis: back to the places of the convolution with this indice_key."""

    kind, axes = "inverse", 1


class SparseInverseConv2d(_Inverse):
    """Two axes: back to the places of the convolution with this indice_key."""

    kind, axes = "inverse", 2


class SparseInverseConv3d(_Inverse):
    """Three axes: back to the places of the convolution with this indice_key."""

    kind, axes = "inverse", 3
