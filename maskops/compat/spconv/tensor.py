"""SparseConvTensor, SparseModule and SparseSequential: what spconv's layers take and return."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from maskops.ops.sparse_conv import KernelMap, SparseTensor
from maskops.ops.sparse_conv.tensor import Places


class SparseConvTensor(SparseTensor):
    """A SparseTensor by spconv's names; indice_dict: key -> the places that the convolution of this key began with, and its map."""

    _called = ("SparseConvTensor", "indices")

    def __init__(
        self, features: Tensor, indices: Tensor, spatial_shape: Sequence[int], batch_size: int, grid: Any = None,
        voxel_num: Any = None, indice_dict: dict | None = None, benchmark: bool = False,
    ) -> None:  # fmt: skip
        """grid, voxel_num, benchmark: of no effect. indice_dict: of another tensor, to share what its convolutions left."""
        super().__init__(
            features, indices, _plain("spatial_shape", spatial_shape), _plain("batch_size", [batch_size])[0]
        )
        if not isinstance(indice_dict, dict | None):
            raise TypeError(f"SparseConvTensor: indice_dict must be a dict or None, got {type(indice_dict).__name__}")
        self.indice_dict: dict[str, tuple[Places, KernelMap]] = {} if indice_dict is None else indice_dict

    @classmethod
    def over(cls, features: Tensor, places: Places) -> SparseConvTensor:
        """Features [N, C] over places that are known to be good."""
        made = super().over(features, places)
        made.indice_dict = {}
        return made

    @property
    def indices(self) -> Tensor:
        return self.coords

    def replace_feature(self, feature: Tensor) -> SparseConvTensor:
        """The same places with other features."""
        return self.replace(feature)

    def replace(self, features: Tensor) -> SparseConvTensor:
        """As replace_feature."""
        return self._at(super().replace(features).features, self.places)

    def dense(self, channels_first: bool = True) -> Tensor:
        """[B, C, *spatial_shape], or with the channels last."""
        out = super().dense()
        return out if channels_first else out.movedim(1, -1)

    @property
    def spatial_size(self) -> int:
        """How many places the grid has."""
        return math.prod(self.spatial_shape)

    def find_indice_pair(self, key: str | None) -> tuple[Places, KernelMap] | None:
        """What the convolution with this indice_key left, or None."""
        return None if key is None else self.indice_dict.get(key)

    def _at(self, features: Tensor, places: Places) -> SparseConvTensor:
        made = SparseConvTensor.over(features, places)
        made.indice_dict = self.indice_dict
        return made


def _plain(name: str, values: Any) -> list[int]:
    """Sizes in any kind of sequence, also arrays and tensors, as spconv takes them; whole numbers only."""
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise TypeError(f"SparseConvTensor: {name} must be a sequence of int, got {values!r}")
    found = []
    for value in values:
        if isinstance(value, bool | str) or value is None or int(value) != value:
            raise TypeError(f"SparseConvTensor: {name} must be int, got {value!r}")
        found.append(int(value))
    return found


def indice_key_of(module: str, key: object) -> str | None:
    if key is not None and not isinstance(key, str):
        raise TypeError(f"{module}: indice_key must be a string or None, got {type(key).__name__}")
    return key


def check_input(module: str, x: object, axes: int | None) -> None:
    if not isinstance(x, SparseConvTensor):
        raise TypeError(f"{module}: input must be a SparseConvTensor, got {type(x).__name__}")
    if axes is not None and len(x.spatial_shape) != axes:
        raise ValueError(f"{module}: input must have {axes} axes, got {len(x.spatial_shape)}")


class SparseModule(nn.Module):
    """A module that takes and returns a SparseConvTensor, as SparseSequential must know."""


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
        check_input("ToDense", x, None)
        return x.dense()
