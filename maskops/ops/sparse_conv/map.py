"""Kernel maps: which active place each kernel place reads for each place of the result, and the ops that build them."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import boolean, check_is_tensor, check_is_tensor_or_none, check_tensor, describe, fail, sizes_of
from maskops._registry import OpSpec, define_op, dynamic_size
from maskops.reference import sparse_conv as reference

FUNCTION = "kernel_map"
MOST_AXES = 3
INT32 = (torch.int32,)
Sizes = int | Sequence[int]


@dataclass(eq=False)
class KernelMap:
    """Which row of x each kernel place reads for each row of the result. Made by kernel_map, shared by every layer that fits.

    Args:
        map: int32 [K, M], -1 where nothing is read.
        rows: N, of x.
        out_coords: int32 [M, 1 + axes].
        kernel_size: whose product is K.
        symmetric: whether the result has the places of x in their order, read alike in both directions.
    """

    map: Tensor
    rows: int
    out_coords: Tensor
    kernel_size: tuple[int, ...]
    symmetric: bool = False
    _reverse: list[Tensor] = field(default_factory=list, repr=False)
    _counts: list[Tensor] = field(default_factory=list, repr=False)

    def reverse(self, backend: str = "auto") -> Tensor:
        """int32 [K, N]: which row of the result reads each row of x. Built once."""
        if not self._reverse:
            op = find_op("sparse_conv_reverse", self.map.device.type, backend, FUNCTION)
            with plain_tensors():
                found = self.map.flip(0) if self.symmetric else op(self.map, self.rows)
            if is_of_trace(found, self.map):
                return found
            self._reverse.append(found)
        return self._reverse[0]

    def inverse(self, coords: Tensor) -> "KernelMap":
        """The map of the convolution back to `coords`, the places of x: what SparseInverseConv takes."""
        check_tensor(
            FUNCTION, "coords", coords, "[N, 1 + axes]", INT32, (self.rows, self.out_coords.shape[1]), self.map
        )
        back = KernelMap(self.reverse(), self.map.shape[1], coords, self.kernel_size)
        back._reverse.append(self.map)
        return back

    def counts(self) -> Tensor:
        """int32 [M]: how many rows each row of the result reads. Counted once."""
        if not self._counts:
            with plain_tensors():
                found = (self.map >= 0).sum(0, dtype=torch.int32)
            if is_of_trace(found, self.map):
                return found
            self._counts.append(found)
        return self._counts[0]

    def pairs(self) -> int:
        """How many rows are read in all: a convolution has 2 C D multiplications and additions for each."""
        return int((self.map >= 0).sum())


def plain_tensors() -> contextlib.AbstractContextManager:
    """What is kept for later layers is a plain tensor, also where the first of them runs in inference mode."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)


def is_of_trace(found: Tensor, source: Tensor) -> bool:
    """Whether torch.export runs over places from outside of the program: what it makes of them must not stay with them."""
    return type(found) is not type(source)


@public("sparse_conv_map", native="C++ on CPU and CUDA C++", triton="CUDA, ROCm and XPU")
def kernel_map(
    coords: Tensor, kernel_size: Sizes, *, stride: Sizes = 1, padding: Sizes | None = None, dilation: Sizes = 1,
    out_coords: Tensor | None = None, in_shape: Sequence[int] | None = None, out_shape: Sequence[int] | None = None,
    transposed: bool = False, backend: str = "auto",
) -> KernelMap:  # fmt: skip
    """Find which active place each place of a kernel reads.

        place of x = place of the result * stride - padding + k * dilation     (transposed: the two change roles)

    Args:
        coords: int32 [N, 1 + axes] = (batch, place), each row once; one to three axes.
        kernel_size, stride, padding, dilation: int, or one per axis. Without padding the kernel lies around its place:
            dilation * (kernel_size - 1) / 2, which needs an odd size.
        out_coords: int32 [M, 1 + axes], the places of the result; default: with stride 1 the places of x (a submanifold), else
            every place of out_shape that some place of x reaches, ascending.
        in_shape: sizes of the grid of x, from which out_shape follows as for a dense convolution.
        out_shape: sizes of the grid of the result.
        transposed: whether the map is one of a transposed convolution.
        backend: "auto", "native", "triton", "reference".

    Returns:
        KernelMap, with rows of the result in the order of out_coords.

    Notes:
        Deterministic. Places may lie anywhere in 32 bits; N = 0 is as good as any other.

    Raises:
        ValueError: wrong shape or dtype, sizes that are not positive, neither out_shape nor in_shape where one is needed.
        IndexError: a place that coords has twice.

    Source:
        Graham, Engelcke, van der Maaten: 3D Semantic Segmentation with Submanifold Sparse Convolutional Networks, 2018.

    Example:
        >>> coords = torch.tensor([[0, 4], [0, 5], [0, 9]], dtype=torch.int32)
        >>> maskops.kernel_map(coords, 3).map.tolist()
        [[-1, 0, -1], [0, 1, 2], [1, -1, -1]]
    """
    check_is_tensor(FUNCTION, "coords", coords)
    check_is_tensor_or_none(FUNCTION, "out_coords", out_coords)
    boolean(FUNCTION, "transposed", transposed)
    axes = check_coords(coords)
    size, stride, dilation = (sizes_of(FUNCTION, name, value, axes, 1) for name, value in
                              (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)))  # fmt: skip
    padding = centred(size, dilation) if padding is None else sizes_of(FUNCTION, "padding", padding, axes, 0)
    device = coords.device.type
    submanifold = (
        out_coords is None and out_shape is None and in_shape is None and not transposed and set(stride) == {1}
    )
    if submanifold:
        out_coords = coords
    elif out_coords is None:
        if out_shape is None:
            if in_shape is None:
                fail(FUNCTION, "in_shape", "be given with a stride, or out_shape or out_coords", None)
            in_shape = sizes_of(FUNCTION, "in_shape", in_shape, axes, 0)
            out_shape = shape_after(in_shape, size, stride, padding, dilation, transposed)
        shape = sizes_of(FUNCTION, "out_shape", out_shape, axes, 0)
        with plain_tensors():
            out_coords = find_op("sparse_conv_outputs", device, backend, FUNCTION)(
                coords, shape, size, stride, padding, dilation, transposed
            )
    op = find_op("sparse_conv_map", device, backend)
    with plain_tensors():
        found = op(coords, out_coords, size, stride, padding, dilation, transposed)
    symmetric = submanifold and padding == [d * (k - 1) // 2 for k, d in zip(size, dilation, strict=True)]
    return KernelMap(found, coords.shape[0], out_coords, tuple(size), symmetric and all(k % 2 for k in size))


def centred(size: list[int], dilation: list[int]) -> list[int]:
    if any(k % 2 == 0 for k in size):
        fail(FUNCTION, "padding", "be given for a kernel of even size", None)
    return [d * (k - 1) // 2 for k, d in zip(size, dilation, strict=True)]


def shape_after(
    shape: Sequence[int], size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    transposed: bool,
) -> list[int]:  # fmt: skip
    """Sizes of the grid after a dense convolution."""
    out = []
    for n, k, s, p, d in zip(shape, size, stride, padding, dilation, strict=True):
        reach = d * (k - 1) + 1
        out.append(max((n - 1) * s - 2 * p + reach if transposed else (n + 2 * p - reach) // s + 1, 0))
    return out


# ---------------------------------------------------------------- the ops


def check_coords(coords: Tensor, name: str = "coords") -> int:
    """The axes of coords int32 [N, 1 + axes]."""
    check_tensor(FUNCTION, name, coords, "[N, 1 + axes]", INT32, (None, None), coords)
    axes = coords.shape[1] - 1
    if not 1 <= axes <= MOST_AXES:
        fail(FUNCTION, name, "have 2 to 4 columns: batch and one to three axes", describe(coords))
    return axes


def _check_sizes(
    coords: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> None:
    axes = check_coords(coords)
    for name, values, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        _check_each(name, values, axes, least)
    if math.prod(kernel_size) >= 2**31:
        fail(FUNCTION, "kernel_size", "have fewer than 2^31 places", f"[{', '.join(map(str, kernel_size))}]")


def _check_each(name: str, values: list[int], axes: int, least: int) -> None:
    if len(values) != axes or any(not least <= value < 2**31 for value in values):
        got = ", ".join(str(int(value)) for value in values)
        fail(FUNCTION, name, f"be {axes} numbers from {least} to 2^31 - 1", f"[{got}]")


def _check_map(
    coords: Tensor, out_coords: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool,
) -> None:  # fmt: skip
    _check_sizes(coords, kernel_size, stride, padding, dilation)
    check_tensor(FUNCTION, "out_coords", out_coords, "[N, 1 + axes]", INT32, (None, coords.shape[1]), coords)


def _first_rows(coords: Tensor) -> tuple[Tensor, Tensor]:
    """(the number of each row, that of the first row of its place)"""
    number = torch.unique(coords, dim=0, return_inverse=True)[1]
    rows = torch.arange(len(coords), device=coords.device)
    return rows, torch.full_like(rows, len(coords)).scatter_reduce_(0, number, rows, "amin")[number]


def _check_unique(coords: Tensor, *rest: object) -> None:
    """Every place at most once; on a GPU without saying which."""
    rows, first = _first_rows(coords)
    if coords.device.type != "cpu":
        torch._assert_async((first == rows).all(), f"{FUNCTION}: coords must be unique")
    elif (first < rows).any():
        raise_repeated(FUNCTION, "coords", coords)


def raise_repeated(function: str, name: str, coords: Tensor) -> None:
    """The error of the first row whose place was there before."""
    rows, first = _first_rows(coords)
    again = int(torch.nonzero(first < rows)[0, 0])
    raise IndexError(
        f"{function}: {name}[{again}] must be unique, got {coords[again].tolist()} as in row {int(first[again])}"
    )


def _fake_map(coords: Tensor, out_coords: Tensor, kernel_size: list[int], *rest: object) -> Tensor:
    return coords.new_empty(math.prod(kernel_size), out_coords.shape[0])


def _check_outputs(
    coords: Tensor, out_shape: list[int], kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool,
) -> None:  # fmt: skip
    _check_sizes(coords, kernel_size, stride, padding, dilation)
    _check_each("out_shape", out_shape, coords.shape[1] - 1, 0)


def _check_reverse(map: Tensor, rows: int) -> None:
    check_tensor(FUNCTION, "map", map, "[K, M]", INT32, (None, None), map)
    # A traced size that only the data tells is checked when the program runs.
    if isinstance(rows, int) and not 0 <= rows < 2**31:
        fail(FUNCTION, "rows", "be in [0, 2^31)", int(rows))


def check_rows(op: str, map: Tensor, rows: int, name: str = "map") -> None:
    """Every entry of the map is a row, or -1."""
    outside = (map < -1) | (map >= rows)
    if map.device.type != "cpu":
        torch._assert_async(~outside.any(), f"{op}: {name} must be in [-1, {rows})")
    elif outside.any():
        at = torch.nonzero(outside)[0].tolist()
        raise IndexError(f"{op}: {name}[{at[0]}, {at[1]}] must be in [-1, {rows}), got {int(map[tuple(at)])}")


def _check_reverse_data(map: Tensor, rows: int) -> None:
    check_rows(FUNCTION, map, rows)
    if map.device.type != "cpu" or not map.numel():
        return
    for k, row in enumerate(map):
        m = torch.nonzero(row >= 0)[:, 0]
        first = torch.full((rows,), len(row)).scatter_reduce_(0, row[m].long(), m, "amin")
        again = m[first[row[m].long()] < m]
        if len(again):
            raise IndexError(
                f"{FUNCTION}: map[{k}, {int(again[0])}] must be unique in its row, got {int(row[again[0]])} again"
            )


define_op(
    OpSpec(
        "sparse_conv_map(Tensor coords, Tensor out_coords, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding,"
        " SymInt[] dilation, bool transposed) -> Tensor",
        family="sparse_conv",
        reference=reference.sparse_conv_map,
        check=_check_map,
        check_data=_check_unique,
        fake=_fake_map,
    )
)
define_op(
    OpSpec(
        "sparse_conv_outputs(Tensor coords, SymInt[] out_shape, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding,"
        " SymInt[] dilation, bool transposed) -> Tensor",
        family="sparse_conv",
        reference=reference.sparse_conv_outputs,
        check=_check_outputs,
        fake=lambda coords, *rest: coords.new_empty(dynamic_size(), coords.shape[1]),
        cuda=False,
    )
)
define_op(
    OpSpec(
        "sparse_conv_reverse(Tensor map, SymInt rows) -> Tensor",
        family="sparse_conv",
        reference=reference.sparse_conv_reverse,
        check=_check_reverse,
        check_data=_check_reverse_data,
        fake=lambda map, rows: map.new_empty(map.shape[0], rows),
    )
)
