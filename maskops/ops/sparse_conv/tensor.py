"""SparseTensor: features of active places, and the places with the kernel maps that were built over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from maskops._checks import FLOATS, check_is_tensor, check_tensor, fail, integer, integers
from maskops.ops.sparse_conv.map import INT32, MOST_AXES, KernelMap, kernel_map, shape_after
from maskops.ops.sparse_conv.segments import Segments, reduce_segments

FUNCTION = "SparseTensor"
REDUCTIONS = ("sum", "mean", "max", "min")


@dataclass(frozen=True, eq=False)
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
            self._maps[key] = kernel_map(self.coords, kernel_size, dilation=dilation)
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
            self._maps[key] = Places(found.out_coords, shape, self.batch_size, scale, (self, found)), found
        return self._maps[key]


class SparseTensor:
    """Features of the active places of a batch of grids; immutable. Layers over the same places share their kernel maps.

    Args:
        features: float [N, C].
        coords: int32 [N, 1 + axes] = (sample, place), one to three axes, each row once.
        spatial_shape: sizes of the grid, one per axis.
        batch_size: samples.
        stride: of the grid, in units of the one it began with: int, or one per axis.

    Raises:
        ValueError: wrong dtype, shape or device, places outside of the grid.  TypeError: an argument of another type.
        IndexError (from the first convolution): a place that is there twice. SparseTensor.reduced joins such places.

    Example:
        >>> x = maskops.SparseTensor(torch.ones(2, 3), torch.tensor([[0, 1, 1], [1, 0, 2]], dtype=torch.int32), (4, 4), 2)
        >>> x.dense().shape, SparseTensor.from_dense(x.dense()).coords.tolist()
        (torch.Size([2, 3, 4, 4]), [[0, 1, 1], [1, 0, 2]])
    """

    def __init__(
        self,
        features: Tensor,
        coords: Tensor,
        spatial_shape: Sequence[int],
        batch_size: int,
        stride: int | Sequence[int] = 1,
    ) -> None:
        check_is_tensor(FUNCTION, "features", features)
        check_is_tensor(FUNCTION, "coords", coords)
        shape = tuple(integers(FUNCTION, "spatial_shape", spatial_shape))
        if not 1 <= len(shape) <= MOST_AXES or any(size < 0 for size in shape):
            fail(FUNCTION, "spatial_shape", "be one to three sizes of at least 0", list(shape))
        check_tensor(FUNCTION, "features", features, "[N, C]", FLOATS, (None, None), features)
        check_tensor(FUNCTION, "coords", coords, "[N, 1 + axes]", INT32, (len(features), 1 + len(shape)), features)
        batch_size = integer(FUNCTION, "batch_size", batch_size)
        stride = tuple(stride) if isinstance(stride, Sequence) else (stride,) * len(shape)
        if not torch.compiler.is_compiling():
            _check_inside(coords, (batch_size, *shape))
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
        """Like SparseTensor, for coords that may repeat: rows of one place become their sum, mean, max or min; ascending.

        Differentiable and deterministic, as sparse_global_pool."""
        if reduce not in REDUCTIONS:
            fail(FUNCTION, "reduce", f"be one of {REDUCTIONS}", repr(reduce))
        check_is_tensor(FUNCTION, "features", features)
        check_tensor(FUNCTION, "coords", coords, "[N, 1 + axes]", INT32, (len(features), None), features)
        unique, number = torch.unique(coords, dim=0, return_inverse=True)
        segments = Segments.of(number, len(unique))
        sign = -1 if reduce == "min" else 1
        joined = reduce_segments(FUNCTION, sign * features, segments, "max" if reduce == "min" else reduce, "auto")
        return cls(sign * joined, unique, spatial_shape, batch_size)

    @classmethod
    def stack(cls, tensors: Sequence[SparseTensor]) -> SparseTensor:
        """The samples of several tensors over grids of one shape, one batch after the other."""
        if not tensors:
            fail(FUNCTION, "tensors", "hold at least one", "none")
        first, before, coords = tensors[0].places, 0, []
        for x in tensors:
            if x.places.shape != first.shape or x.places.stride != first.stride:
                fail(FUNCTION, "tensors", f"all have the grid {first.shape}, stride {first.stride}", x.places.shape)
            coords.append(torch.cat([x.coords[:, :1] + before, x.coords[:, 1:]], 1))
            before += x.batch_size
        places = Places(torch.cat(coords), first.shape, before, first.stride)
        return cls.over(torch.cat([x.features for x in tensors]), places)

    @classmethod
    def from_dense(cls, x: Tensor, active: Tensor | None = None) -> SparseTensor:
        """From x [B, C, *shape]: the places that active [B, *shape] marks; default: those with a channel that is not 0."""
        check_is_tensor(FUNCTION, "x", x)
        if not 3 <= x.dim() <= 2 + MOST_AXES:
            fail(FUNCTION, "x", "have shape [B, C, *shape] with one to three axes", f"{x.dim()} axes")
        active = (x != 0).any(1) if active is None else active
        at = torch.nonzero(active)
        return cls(x.movedim(1, -1)[active], at.int(), tuple(x.shape[2:]), x.shape[0])

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
        if (
            features.dim() != 2 or features.shape[0] != self.coords.shape[0]
        ):  # no len: it makes a number of a traced size
            fail(FUNCTION, "features", f"have shape [{self.coords.shape[0]}, *]", list(features.shape))
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
        if not 0 <= b < self.batch_size:
            raise IndexError(f"{FUNCTION}: b must be in [0, {self.batch_size}), got {b}")
        own = self.coords[:, 0] == b
        coords = self.coords[own].clone()
        coords[:, 0] = 0
        return self.over(self.features[own], replace(self.places, coords=coords, batch_size=1, origin=None, _maps={}))

    def to(self, *args: object, **kwargs: object) -> SparseTensor:
        """Features to a dtype, or all of it to a device."""
        features = self.features.to(*args, **kwargs)
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

    def __neg__(self) -> SparseTensor:
        return self.replace(-self.features)

    __radd__, __rmul__ = __add__, __mul__

    def _combined(self, sign: str, other: SparseTensor | Tensor | float, function: Callable) -> SparseTensor:
        if isinstance(other, SparseTensor):
            other = self._same_places(sign, other)
        return self.replace(function(self.features, other))

    def _same_places(self, what: str, other: SparseTensor) -> Tensor:
        if other.places is not self.places and not torch.equal(other.coords, self.coords):
            fail(FUNCTION, f"the other tensor of {what}", "have the same places in the same order", "others")
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


def _check_inside(coords: Tensor, sizes: tuple[int, ...]) -> None:
    outside = (coords < 0) | (coords >= coords.new_tensor(sizes))
    if coords.device.type != "cpu":
        torch._assert_async(~outside.any(), f"{FUNCTION}: coords must be inside of {list(sizes)}")
    elif outside.any():
        row = int(torch.nonzero(outside)[0, 0])
        fail(FUNCTION, f"coords[{row}]", f"be at least 0 and below {list(sizes)}", coords[row].tolist())
