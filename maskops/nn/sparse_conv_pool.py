"""Pooling modules of the family sparse_conv: of a SparseTensor in one to three axes, and of whole samples."""

from __future__ import annotations

from torch import Tensor, nn

from maskops._checks import boolean, one_of, sizes_of
from maskops.nn.sparse_conv import Sizes, check_sparse
from maskops.ops.sparse_conv import KernelMap, SparseTensor, sparse_avg_pool, sparse_global_pool, sparse_max_pool
from maskops.ops.sparse_conv.segments import REDUCTIONS
from maskops.ops.sparse_conv.tensor import Places


class SparsePool(nn.Module):
    """What the sparse pools share: sizes, and the places of the result.

    Args:
        kernel_size, padding, dilation: int, or one per axis.
        stride: int, or one per axis; default: kernel_size, or 1 for a submanifold.
        submanifold: the result has the places of x, each pooled over its surroundings; needs odd sizes, stride 1, no padding.
            Otherwise it has every place that is reached.

    Raises:
        ValueError: sizes that are not positive; of a submanifold, even sizes, a stride or padding.
    """

    axes = 0  # 1, 2 or 3, by class

    def __init__(
        self, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, dilation: Sizes = 1, submanifold: bool = False
    ) -> None:  # fmt: skip
        super().__init__()
        name, axes = type(self).__name__, self.axes
        self.submanifold = boolean(name, "submanifold", submanifold)
        stride = (1 if submanifold else kernel_size) if stride is None else stride
        given = (
            ("kernel_size", kernel_size, 1),
            ("stride", stride, 1),
            ("padding", padding, 0),
            ("dilation", dilation, 1),
        )
        for argument, value, least in given:
            setattr(self, argument, tuple(sizes_of(name, argument, value, axes, least)))
        if not submanifold:
            return
        if any(size % 2 == 0 for size in self.kernel_size):
            raise ValueError(f"{name}: kernel_size must be odd for a submanifold, got {kernel_size}")
        for argument, usual in (("stride", 1), ("padding", 0)):
            if set(getattr(self, argument)) != {usual}:
                raise ValueError(f"{name}: {argument} must be {usual} for a submanifold, got {getattr(self, argument)}")

    def target(self, places: Places) -> tuple[Places, KernelMap]:
        """(places of the result, the map onto them)"""
        if self.submanifold:
            return places, places.submanifold(self.kernel_size, self.dilation)
        return places.convolved(self.kernel_size, self.stride, self.padding, self.dilation)

    def pooled(self, features: Tensor, found: KernelMap) -> Tensor:
        raise NotImplementedError

    def forward(self, x: SparseTensor) -> SparseTensor:
        check_sparse(type(self).__name__, x, self.axes)
        places, found = self.target(x.places)
        return SparseTensor.over(self.pooled(x.features, found), places)

    def extra_repr(self) -> str:
        parts = [f"kernel_size={self.kernel_size}, stride={self.stride}"]
        for name, usual in (("padding", 0), ("dilation", 1)):
            if set(getattr(self, name)) != {usual}:
                parts.append(f"{name}={getattr(self, name)}")
        return ", ".join(parts + (["submanifold=True"] if self.submanifold else []))


class _Max(SparsePool):
    """The largest value of the active places under the kernel; those that are not active do not count, not even as 0."""

    def pooled(self, features: Tensor, found: KernelMap) -> Tensor:
        return sparse_max_pool(features, found)


class _Average(SparsePool):
    """The average over the active places under the kernel, or, with count_include_inactive, over all places of it."""

    def __init__(
        self, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, dilation: Sizes = 1,
        submanifold: bool = False, count_include_inactive: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(kernel_size, stride, padding, dilation, submanifold)
        self.count_include_inactive = boolean(type(self).__name__, "count_include_inactive", count_include_inactive)

    def pooled(self, features: Tensor, found: KernelMap) -> Tensor:
        return sparse_avg_pool(features, found, self.count_include_inactive)


class SparseMaxPool1d(_Max):
    """Largest value of active places, one axis. Arguments as of SparsePool."""

    axes = 1


class SparseMaxPool2d(_Max):
    """Largest value of active places, two axes. Arguments as of SparsePool."""

    axes = 2


class SparseMaxPool3d(_Max):
    """Largest value of active places, three axes. Arguments as of SparsePool."""

    axes = 3


class SparseAvgPool1d(_Average):
    """Average over active places, one axis. Arguments as of SparsePool, and count_include_inactive."""

    axes = 1


class SparseAvgPool2d(_Average):
    """Average over active places, two axes. Arguments as of SparsePool, and count_include_inactive."""

    axes = 2


class SparseAvgPool3d(_Average):
    """Average over active places, three axes. Arguments as of SparsePool, and count_include_inactive."""

    axes = 3


class SparseGlobalPool(nn.Module):
    """All active places of each sample reduced to one row [B, C]; 0 for a sample without a place.

    Args:
        reduce: "max", "mean" or "sum".

    Example:
        >>> x = maskops.SparseTensor(torch.rand(2, 8), torch.tensor([[0, 1, 1], [0, 5, 2]], dtype=torch.int32), (8, 8), 2)
        >>> maskops.nn.SparseGlobalPool("max")(x).shape
        torch.Size([2, 8])
    """

    def __init__(self, reduce: str = "mean") -> None:
        super().__init__()
        self.reduce = one_of("SparseGlobalPool", "reduce", reduce, REDUCTIONS)

    def forward(self, x: SparseTensor) -> Tensor:
        check_sparse("SparseGlobalPool", x)
        return sparse_global_pool(x.features, x.coords[:, 0], x.batch_size, self.reduce)

    def extra_repr(self) -> str:
        return repr(self.reduce)
