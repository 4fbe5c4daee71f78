"""SparseTensor: features of active places, and the places with the kernel maps that were built over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real

import torch
from torch import Tensor

from maskops._checks import FLOATS, check_is_tensor, check_tensor, describe, fail, integer, integers, one_of, sizes_of
from maskops.ops.sparse_conv.map import (
    INT32,
    MOST_AXES,
    KernelMap,
    is_of_trace,
    kernel_map,
    raise_repeated,
    shape_after,
)
from maskops.ops.sparse_conv.pool import check_features
from maskops.ops.sparse_conv.segments import Segments, reduce_segments

FUNCTION = "SparseTensor"
REDUCTIONS = ("sum", "mean", "max", "min")


@dataclass(eq=False)
class Places:
    """The active places of a grid, shared by all tensors over them, with their kernel maps.

    Args:
        coords: int32 [N, 1 + axes].
        shape: of the grid.
        batch_size: samples.
        stride: of the grid, in units of the one it began with.
        origin: (places, map) that a convolution with a stride made these from; what an inverse convolution returns to.
    """

    coords: Tensor
    shape: tuple[int, ...]
    batch_size: int
    stride: tuple[int, ...]
    origin: tuple[Places, KernelMap] | None = None
    _maps: dict = field(default_factory=dict, repr=False)

    def submanifold(self, kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> KernelMap:
        """The map onto the same places. Built once for each kernel."""
        key = ("submanifold", kernel_size, dilation)
        if key not in self._maps:
            found = kernel_map(self.coords, kernel_size, dilation=dilation)
            if not is_of_trace(found.map, self.coords):
                self._maps[key] = found
            return found
        return self._maps[key]

    def convolved(
        self, kernel_size: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...],
        transposed: bool = False,
    ) -> tuple[Places, KernelMap]:  # fmt: skip
        """(the places that a convolution reaches, the map onto them). Built once for each kernel."""
        key = (kernel_size, stride, padding, dilation, transposed)
        if key not in self._maps:
            shape = tuple(shape_after(self.shape, *key))
            found = kernel_map(
                self.coords,
                kernel_size,
                stride=stride,
                padding=padding,
                dilation=dilation,
                out_shape=shape,
                transposed=transposed,
            )
            scales = zip(self.stride, stride, strict=True)
            scale = tuple(max(a // b, 1) if transposed else a * b for a, b in scales)
            made = Places(found.out_coords, shape, self.batch_size, scale, (self, found)), found
            if not is_of_trace(found.map, self.coords):
                self._maps[key] = made
            return made
        return self._maps[key]


class SparseTensor:
    """Features of the active places of a batch of grids; immutable. Layers over the same places share their kernel maps.

    Args:
        features: float [N, C].
        coords: int32 [N, 1 + axes] = (sample, place), one to three axes.
        spatial_shape: sizes of the grid, one per axis, below 2^31.
        batch_size: samples.
        stride: of the grid, in units of the one it began with: int, or one per axis.
        duplicates: "error" refuses a place that is there twice; "sum", "mean", "max" or "min" make one row of its rows,
            differentiable, and places then ascend. Coords that ascend already are checked in one pass, others are sorted for it.

    Raises:
        ValueError: wrong dtype, shape or device, places outside of the grid.  TypeError: an argument of another type.
        IndexError: a place that is there twice.  On a GPU and in compiled programs what coords hold ends in an assertion.

    Example:
        >>> x = maskops.SparseTensor(torch.ones(2, 3), torch.tensor([[0, 1, 1], [1, 0, 2]], dtype=torch.int32), (4, 4), 2)
        >>> x.dense().shape, maskops.SparseTensor.from_dense(x.dense()).coords.tolist()
        (torch.Size([2, 3, 4, 4]), [[0, 1, 1], [1, 0, 2]])
        >>> twice = torch.tensor([[0, 1], [0, 1], [0, 3]], dtype=torch.int32)
        >>> maskops.SparseTensor(torch.ones(3, 1), twice, (4,), 1, duplicates="sum").features.tolist()
        [[2.0], [1.0]]
    """

    _called = (FUNCTION, "coords")  # what errors name

    def __init__(
        self, features: Tensor, coords: Tensor, spatial_shape: Sequence[int], batch_size: int, stride: int | Sequence[int] = 1,
        *, duplicates: str = "error",
    ) -> None:  # fmt: skip
        name, arg = self._called
        check_is_tensor(name, "features", features)
        check_is_tensor(name, arg, coords)
        one_of(name, "duplicates", duplicates, ("error", *REDUCTIONS))
        shape = tuple(integers(name, "spatial_shape", spatial_shape))
        if not 1 <= len(shape) <= MOST_AXES or any(isinstance(n, int) and not 0 <= n < 2**31 for n in shape):
            fail(name, "spatial_shape", "be one to three sizes from 0 to 2^31 - 1", list(shape))
        check_features(name, features)
        check_tensor(name, arg, coords, "[N, 1 + axes]", INT32, (features.shape[0], 1 + len(shape)), features)
        batch_size = integer(name, "batch_size", batch_size)
        if isinstance(batch_size, int) and not 0 <= batch_size < 2**31:
            fail(name, "batch_size", "be in [0, 2^31)", batch_size)
        stride = tuple(sizes_of(name, "stride", stride, len(shape), 1))
        _check_inside(name, arg, coords, (batch_size, *shape))
        if duplicates == "error":
            _check_once(name, arg, coords, (batch_size, *shape))
        else:
            features, coords = _joined(features, coords, duplicates)
        self.features, self.places = features, Places(coords, shape, batch_size, stride)

    @classmethod
    def over(cls, features: Tensor, places: Places) -> SparseTensor:
        """Features [N, C] over places that are known to be good."""
        made = cls.__new__(cls)
        made.features, made.places = features, places
        return made

    @classmethod
    def reduced(
        cls, features: Tensor, coords: Tensor, spatial_shape: Sequence[int], batch_size: int, reduce: str = "sum"
    ) -> SparseTensor:
        """Like SparseTensor with duplicates=reduce: rows of one place become their sum, mean, max or min; ascending."""
        one_of(FUNCTION, "reduce", reduce, REDUCTIONS)
        made = SparseTensor(features, coords, spatial_shape, batch_size, duplicates=reduce)
        return cls.over(made.features, made.places)

    @classmethod
    def from_points(
        cls, points: Tensor, voxel_size: float | Sequence[float], range: Sequence[float] | None = None, *,
        batch_index: Tensor | None = None, batch_size: int | None = None, reduce: str = "mean",
        max_points: int | None = None, outside: str = "drop", backend: str = "auto",
    ) -> SparseTensor:  # fmt: skip
        """The voxels of points [P, axes + F], with the mean (or other reduction) of their rows; ascending.

        `voxelize(...).tensor`, whose arguments these are; voxelize also tells the voxel of each point.

        Example:
            >>> points = torch.tensor([[0.1, 0.1, 5.0], [3.9, 0.2, 1.0], [0.9, 0.8, 7.0]])
            >>> maskops.SparseTensor.from_points(points, (1.0, 1.0), (0, 0, 4, 4)).coords.tolist()
            [[0, 0, 0], [0, 3, 0]]
        """
        from maskops.ops.sparse_conv.voxelize import voxelize

        found = voxelize(
            points, voxel_size, range, batch_index=batch_index, batch_size=batch_size, reduce=reduce, max_points=max_points,
            outside=outside, backend=backend,
        ).tensor  # fmt: skip
        return cls.over(found.features, found.places)

    @classmethod
    def stack(cls, tensors: Sequence[SparseTensor]) -> SparseTensor:
        """The samples of several tensors over grids of one shape, one batch after the other."""
        if not isinstance(tensors, Sequence) or not all(isinstance(x, SparseTensor) for x in tensors):
            raise TypeError(f"{FUNCTION}.stack: tensors must be a sequence of SparseTensor, got {_kinds(tensors)}")
        if not tensors:
            fail(f"{FUNCTION}.stack", "tensors", "hold at least one", "none")
        first, before, coords = tensors[0].places, 0, []
        for i, x in enumerate(tensors):
            if x.places.shape != first.shape or x.places.stride != first.stride:
                expected, got = (f"grid {p.shape}, stride {p.stride}" for p in (first, x.places))
                fail(f"{FUNCTION}.stack", f"tensors[{i}]", f"have the {expected}", got)
            own = tensors[0].features
            check_tensor(
                f"{FUNCTION}.stack", f"tensors[{i}]", x.features, "[N, C]", (own.dtype,), (None, own.shape[1]), own
            )
            coords.append(torch.cat([x.coords[:, :1] + before, x.coords[:, 1:]], 1))
            before += x.batch_size
        places = Places(torch.cat(coords), first.shape, before, first.stride)
        return cls.over(torch.cat([x.features for x in tensors]), places)

    @classmethod
    def from_dense(cls, x: Tensor, active: Tensor | None = None) -> SparseTensor:
        """From x [B, C, *shape]: the places that active [B, *shape] marks; default: those with a channel that is not 0."""
        function = f"{FUNCTION}.from_dense"
        check_is_tensor(function, "x", x)
        if not 3 <= x.dim() <= 2 + MOST_AXES:
            fail(function, "x", "have shape [B, C, *shape] with one to three axes", describe(x))
        sizes = (x.shape[0], *x.shape[2:])
        check_tensor(function, "x", x, "[B, C, *shape]", FLOATS, (None,) * x.dim(), x)
        if active is None:
            active = (x != 0).any(1)
        check_tensor(function, "active", active, "[B, *shape]", (torch.bool,), sizes, x)
        at = torch.nonzero(active)
        return cls.over(x.movedim(1, -1)[active], Places(at.int(), sizes[1:], sizes[0], (1,) * len(sizes[1:])))

    @property
    def coords(self) -> Tensor:
        return self.places.coords

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        return self.places.shape

    @property
    def batch_size(self) -> int:
        return self.places.batch_size

    @property
    def stride(self) -> tuple[int, ...]:
        return self.places.stride

    def replace(self, features: Tensor) -> SparseTensor:
        """The same places with other features [N, *]."""
        function = f"{FUNCTION}.replace"
        check_is_tensor(function, "features", features)  # no len: it makes a number of a traced size
        check_tensor(function, "features", features, "[N, C]", FLOATS, (self.coords.shape[0], None), self.coords)
        return self.over(features, self.places)

    def dense(self) -> Tensor:
        """[B, C, *spatial_shape], 0 where no place is active."""
        sizes = (self.batch_size, *self.spatial_shape)
        at = flat_index(self.coords, sizes)
        flat = self.features.new_zeros((math.prod(sizes), self.features.shape[1]))
        return flat.index_copy(0, at, self.features).unflatten(0, sizes).movedim(-1, 1)

    def cat(self, *others: SparseTensor) -> SparseTensor:
        """Channels of tensors over the same places, side by side."""
        return self.replace(torch.cat([self.features, *(self._same_places("cat", o) for o in others)], 1))

    def sample(self, b: int) -> SparseTensor:
        """Sample b alone, as a batch of one."""
        if not 0 <= integer(f"{FUNCTION}.sample", "b", b) < self.batch_size:
            raise IndexError(f"{FUNCTION}.sample: b must be in [0, {self.batch_size}), got {b}")
        own = self.coords[:, 0] == b
        coords = self.coords[own].clone()
        coords[:, 0] = 0
        return self.over(self.features[own], replace(self.places, coords=coords, batch_size=1, origin=None, _maps={}))

    def to(self, *args: object, **kwargs: object) -> SparseTensor:
        """Features to a dtype, or all of it to a device."""
        features = self.features.to(*args, **kwargs)
        if features.dtype not in FLOATS:
            fail(f"{FUNCTION}.to", "dtype", "be float32, float64, bfloat16 or float16", features.dtype)
        if features.device == self.coords.device:
            return self.over(features, self.places)
        places = replace(self.places, coords=self.coords.to(features.device), origin=None, _maps={})
        return self.over(features, places)

    def __add__(self, other: SparseTensor | Tensor | float) -> SparseTensor:
        return self._combined("+", other, torch.add)

    def __sub__(self, other: SparseTensor | Tensor | float) -> SparseTensor:
        return self._combined("-", other, torch.sub)

    def __mul__(self, other: SparseTensor | Tensor | float) -> SparseTensor:
        return self._combined("*", other, torch.mul)

    def __truediv__(self, other: SparseTensor | Tensor | float) -> SparseTensor:
        return self._combined("/", other, torch.div)

    def __rsub__(self, other: Tensor | float) -> SparseTensor:
        return -self + other

    def __rtruediv__(self, other: Tensor | float) -> SparseTensor:
        return self._combined("/", other, lambda own, given: given / own)

    def __neg__(self) -> SparseTensor:
        return self.replace(-self.features)

    __radd__, __rmul__ = __add__, __mul__

    def _combined(self, sign: str, other: SparseTensor | Tensor | float, function: Callable) -> SparseTensor:
        if isinstance(other, SparseTensor):
            other = self._same_places(sign, other)
        elif isinstance(other, Tensor) or (isinstance(other, Real) and not isinstance(other, bool)):
            shape, (N, C) = other.shape if isinstance(other, Tensor) else (), self.features.shape
            if len(shape) > 2 or any(n not in (1, own) for n, own in zip(reversed(shape), (C, N), strict=False)):
                fail(FUNCTION, f"the other side of {sign}", f"fit {describe(self.features)}", describe(other))
        else:
            expected = "a SparseTensor, a tensor or a number"
            raise TypeError(f"{FUNCTION}: the other side of {sign} must be {expected}, got {type(other).__name__}")
        return self.replace(function(self.features, other))

    def _same_places(self, what: str, other: SparseTensor) -> Tensor:
        name = f"the other tensor of {what}"
        if not isinstance(other, SparseTensor):
            raise TypeError(f"{FUNCTION}: {name} must be a SparseTensor, got {type(other).__name__}")
        own, theirs = self.places, other.places
        if theirs is own:
            return other.features
        for grid in ("shape", "batch_size", "stride"):
            if getattr(theirs, grid) != getattr(own, grid):
                fail(FUNCTION, name, f"have {grid} {getattr(own, grid)}", getattr(theirs, grid))
        if theirs.coords.device != own.coords.device:
            fail(FUNCTION, name, f"be on {own.coords.device}", f"a tensor on {theirs.coords.device}")
        if not torch.equal(theirs.coords, own.coords):
            fail(FUNCTION, name, "have the same places in the same order", "others")
        return other.features

    def __len__(self) -> int:
        return len(self.features)

    def __repr__(self) -> str:
        shape = "x".join(str(size) for size in self.spatial_shape)
        size = math.prod((self.batch_size, *self.spatial_shape))
        share = len(self) / size if size else 0.0
        return (
            f"SparseTensor({len(self)} places x {self.features.shape[1]} channels of {self.batch_size} grids {shape},"
            f" {share:.2%} active, {str(self.features.dtype)[6:]}, {self.features.device})"
        )


def flat_index(coords: Tensor, sizes: Sequence[int]) -> Tensor:
    """int64 [N]: the place of each row in a dense grid of these sizes, the batch first."""
    at = coords[:, 0].long()
    for axis, size in enumerate(sizes[1:], 1):
        at = at * size + coords[:, axis]
    return at


def _joined(features: Tensor, coords: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    """(a row for each place, the places in ascending order)"""
    unique, number = torch.unique(coords, dim=0, return_inverse=True)
    segments = Segments.of(number, unique.shape[0])
    sign = -1 if reduce == "min" else 1
    rows = reduce_segments(FUNCTION, sign * features, segments, "max" if reduce == "min" else reduce, "auto")
    return sign * rows, unique


def _kinds(tensors: object) -> str:
    if not isinstance(tensors, Sequence):
        return type(tensors).__name__
    return f"[{', '.join(type(x).__name__ for x in tensors)}]"


def _check_inside(name: str, arg: str, coords: Tensor, sizes: tuple[int, ...]) -> None:
    outside = coords < 0
    for axis, size in enumerate(sizes):  # no tensor of the sizes: it would be moved to the device
        outside[:, axis] |= coords[:, axis] >= size
    if coords.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(~outside.any(), f"{name}: {arg} must be inside of the grid")
    elif outside.any():
        row = int(torch.nonzero(outside)[0, 0])
        fail(name, f"{arg}[{row}]", f"be at least 0 and below {list(sizes)}", coords[row].tolist())


def _check_once(name: str, arg: str, coords: Tensor, sizes: tuple[int, ...]) -> None:
    """Every place at most once."""
    watched = coords.device.type == "cpu" and not torch.compiler.is_compiling()
    if all(isinstance(n, int) for n in sizes) and math.prod(sizes) < 2**62:
        flat = flat_index(coords, sizes)
        if watched and bool((flat[1:] > flat[:-1]).all()):
            return
        ordered, order = flat.sort(stable=True)
        again = ordered[1:] == ordered[:-1]
    else:
        ordered = order = coords
        for axis in range(coords.shape[1] - 1, -1, -1):  # the last axis first: what a stable sort has done stays
            order = ordered[:, axis].argsort(stable=True)
            ordered = ordered[order]
        again = (ordered[1:] == ordered[:-1]).all(1)
    if not watched:
        torch._assert_async(~again.any(), f"{name}: {arg} must be unique")
    elif again.any():
        raise_repeated(name, arg, coords)
