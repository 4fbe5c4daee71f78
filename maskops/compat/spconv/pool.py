"""spconv's pools: over kernels, and of whole samples."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from maskops._checks import sizes_of
from maskops.compat.spconv.tensor import SparseConvTensor, SparseModule, check_input, indice_key_of
from maskops.nn.sparse_conv import Sizes
from maskops.ops.sparse_conv import KernelMap, sparse_avg_pool, sparse_global_pool, sparse_max_pool


class _Pool(SparseModule):
    """What the pools share. algo, record_voxel_count and name have no effect: there is one algorithm.

    stride: None is kernel_size, as in spconv. indice_key: under it a SparseInverseConv leads back to the places of x.
    """

    axes = 0

    def __init__(
        self, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, dilation: Sizes = 1,
        indice_key: str | None = None, algo: Any = None, record_voxel_count: bool = False, name: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        given = (
            ("kernel_size", kernel_size, 1),
            ("stride", kernel_size if stride is None else stride, 1),
            ("padding", padding, 0),
            ("dilation", dilation, 1),
        )
        for argument, value, least in given:
            setattr(self, argument, tuple(sizes_of(type(self).__name__, argument, value, self.axes, least)))
        self.indice_key = indice_key_of(type(self).__name__, indice_key)

    def pooled(self, features: Tensor, found: KernelMap) -> Tensor:
        raise NotImplementedError

    def forward(self, input: SparseConvTensor) -> SparseConvTensor:
        check_input(type(self).__name__, input, self.axes)
        places, found = input.places.convolved(self.kernel_size, self.stride, self.padding, self.dilation)
        if self.indice_key is not None:
            input.indice_dict[self.indice_key] = (input.places, found)
        return input._at(self.pooled(input.features, found), places)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class _MaxPool(_Pool):
    """The largest value of the active places under the kernel. spconv's algorithm Native, its only one on the CPU, starts from 0
    and so gives 0 where all of them are negative; behind a ReLU there is no difference."""

    def pooled(self, features: Tensor, found: KernelMap) -> Tensor:
        return sparse_max_pool(features, found)


class _AvgPool(_Pool):
    """The average over the active places under the kernel."""

    def pooled(self, features: Tensor, found: KernelMap) -> Tensor:
        return sparse_avg_pool(features, found)


class SparseMaxPool1d(_MaxPool):
    """One axis: largest value of active places."""

    axes = 1


class SparseMaxPool2d(_MaxPool):
    """Two axes: largest value of active places."""

    axes = 2


class SparseMaxPool3d(_MaxPool):
    """Three axes: largest value of active places."""

    axes = 3


class SparseAvgPool1d(_AvgPool):
    """One axis: average over active places."""

    axes = 1


class SparseAvgPool2d(_AvgPool):
    """Two axes: average over active places."""

    axes = 2


class SparseAvgPool3d(_AvgPool):
    """Three axes: average over active places."""

    axes = 3


class _GlobalPool(SparseModule):
    reduce = ""

    def __init__(self, name: str | None = None) -> None:
        """name: of no effect."""
        super().__init__()

    def forward(self, input: SparseConvTensor) -> Tensor:
        check_input(type(self).__name__, input, None)
        return sparse_global_pool(input.features, input.coords[:, 0], input.batch_size, self.reduce)


class SparseGlobalMaxPool(_GlobalPool):
    """SparseConvTensor -> [B, C], the largest value of each sample; 0 for a sample without a place."""

    reduce = "max"


class SparseGlobalAvgPool(_GlobalPool):
    """SparseConvTensor -> [B, C], the mean of each sample; 0 for a sample without a place."""

    reduce = "mean"
