"""The names of spconv 2 over maskops' sparse convolutions: `import maskops.compat.spconv as spconv` in place of `spconv.pytorch`.

Classes, argument names and the layout of the weights (KRSC: [out, *kernel_size, in]) are those of spconv, so that a backbone and
its checkpoints move without a change. Arguments that choose between spconv's own algorithms are taken and have no effect.

    import maskops.compat.spconv as spconv

    net = spconv.SparseSequential(
        spconv.SubMConv3d(4, 16, 3, bias=False, indice_key="subm1"), nn.BatchNorm1d(16), nn.ReLU(),
        spconv.SparseConv3d(16, 32, 3, stride=2, padding=1, bias=False, indice_key="down1"),
    )
    out = net(spconv.SparseConvTensor(features, indices, spatial_shape, batch_size)).dense()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from maskops.nn.sparse_conv import OF_AXES, Sizes
from maskops.ops.sparse_conv import KernelMap, SparseTensor, sparse_conv
from maskops.ops.sparse_conv.tensor import Places

__all__ = [
    "SparseConv1d", "SparseConv2d", "SparseConv3d", "SparseConvTensor", "SparseConvTranspose1d", "SparseConvTranspose2d",
    "SparseConvTranspose3d", "SparseInverseConv1d", "SparseInverseConv2d", "SparseInverseConv3d", "SparseModule",
    "SparseSequential", "SubMConv1d", "SubMConv2d", "SubMConv3d", "ToDense", "from_krsc", "to_krsc",
]  # fmt: skip


def from_krsc(weight: Tensor) -> Tensor:
    """spconv's [D, *kernel_size, C / G] as the [*kernel_size, C / G, D] of maskops."""
    return weight.movedim(0, -1)


def to_krsc(weight: Tensor) -> Tensor:
    """The [*kernel_size, C / G, D] of maskops as spconv's [D, *kernel_size, C / G]."""
    return weight.movedim(-1, 0)


class SparseConvTensor(SparseTensor):
    """A SparseTensor by spconv's names; indice_dict: key -> the places that the convolution of this key began with, and its map."""

    def __init__(
        self, features: Tensor, indices: Tensor, spatial_shape: Sequence[int], batch_size: int, grid: Any = None,
        voxel_num: Any = None, indice_dict: dict | None = None, benchmark: bool = False,
    ) -> None:  # fmt: skip
        """grid, voxel_num, benchmark: of no effect. indice_dict: of another tensor, to share what its convolutions left."""
        super().__init__(features, indices, [int(size) for size in spatial_shape], batch_size)
        self.indice_dict: dict[str, tuple[Places, KernelMap]] = {} if indice_dict is None else indice_dict

    @property
    def indices(self) -> Tensor:
        return self.coords

    def replace_feature(self, feature: Tensor) -> SparseConvTensor:
        """The same places with other features."""
        return self._at(self.replace(feature).features, self.places)

    def dense(self, channels_first: bool = True) -> Tensor:
        """[B, C, *spatial_shape], or with the channels last."""
        out = super().dense()
        return out if channels_first else out.movedim(1, -1)

    def _at(self, features: Tensor, places: Places) -> SparseConvTensor:
        made = SparseConvTensor.over(features, places)
        made.indice_dict = self.indice_dict
        return made


class SparseModule(nn.Module):
    """A module that takes and returns a SparseConvTensor, as SparseSequential must know."""


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
        own = OF_AXES[self.axes](in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding, self.dilation = (
            own.kernel_size,
            own.stride,
            own.padding,
            own.dilation,
        )
        self.indice_key = indice_key
        self.weight = nn.Parameter(to_krsc(own.weight.detach()).contiguous())
        self.bias = None if own.bias is None else nn.Parameter(own.bias.detach())

    def forward(self, input: SparseConvTensor) -> SparseConvTensor:
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


class SparseSequential(SparseModule, nn.Sequential):
    """Modules in turn; one that is no SparseModule gets the features."""

    def forward(self, input: Any) -> Any:
        for module in self:
            if isinstance(module, SparseModule) or not isinstance(input, SparseConvTensor):
                input = module(input)
            else:
                input = input.replace_feature(module(input.features))
        return input


class ToDense(SparseModule):
    """SparseConvTensor -> [B, C, *spatial_shape]."""

    def forward(self, x: SparseConvTensor) -> Tensor:
        return x.dense()


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
