"""Samples, error samples and traffic of the family sparse_conv."""

from collections.abc import Callable

import torch
from torch import Tensor

from maskops.reference import sparse_conv as reference
from maskops.testing import ErrorSample, Sample, randn
from maskops.testing import sparse_conv_block as block
from maskops.testing import sparse_conv_fill as fill
from maskops.testing import sparse_conv_pool as pool

G = torch.Generator
MAP, OUTPUTS, REVERSE = "sparse_conv_map", "sparse_conv_outputs", "sparse_conv_reverse"
CONV, GRAD_WEIGHT = "sparse_conv", "_sparse_conv_grad_weight"


def places(g: G, count: int, batch: int, *shape: int) -> Tensor:
    """int32 [N, 1 + axes]: about `count` different places in no order."""
    sizes = torch.tensor((batch, *shape))
    drawn = (torch.rand(count, len(sizes), generator=g) * sizes).int()
    unique = torch.unique(drawn, dim=0)
    return unique[torch.randperm(len(unique), generator=g)]


def lidar_like(count: int, spread: float, shape: tuple[int, int, int] = (41, 640, 640), seed: int = 0) -> Tensor:
    """int32 [count, 4]: places of one scan, ascending: ground around the middle of the grid, and walls that stand on it.

    spread: of the scan; the wider, the fewer neighbours a place has.
    """
    g = torch.Generator().manual_seed(seed)
    points = 12 * count
    distance = spread * count**0.5 * torch.rand(points, generator=g).sqrt()
    angle = torch.rand(points, generator=g) * 2 * torch.pi
    walls = torch.rand(points, generator=g) < 0.15
    height = 6 + 1.5 * torch.sin(angle * 3) + 0.45 * torch.randn(points, generator=g)
    height = torch.where(walls, 6 + 20 * torch.rand(points, generator=g), height)
    at = torch.stack([height, distance * torch.cos(angle), distance * torch.sin(angle)], 1)
    at[walls, 1] = (at[walls, 1] / 40).round() * 40 + 0.3 * torch.randn(int(walls.sum()), generator=g)
    at = (at + torch.tensor([0.0, shape[1] / 2, shape[2] / 2])).floor().int()
    at = at[(at >= 0).all(1) & (at < torch.tensor(shape)).all(1)]
    unique, number = torch.unique(at, dim=0, return_inverse=True)
    first = torch.full((len(unique),), len(at)).scatter_reduce_(0, number, torch.arange(len(at)), "amin")
    found = torch.unique(unique[first.argsort()[:count]], dim=0)
    return torch.cat([found.new_zeros(len(found), 1), found], 1)


# ---------------------------------------------------------------- maps

SIZES = {
    "line": (30, (2, 20), [3], [1], [1], [1]),
    "plane": (40, (2, 9, 8), [3, 3], [1, 1], [1, 1], [1, 1]),
    "space": (60, (2, 6, 7, 90), [3, 3, 3], [1, 1, 1], [1, 1, 1], [1, 1, 1]),
    "stride": (60, (2, 6, 7, 90), [3, 2, 3], [2, 1, 2], [1, 0, 1], [1, 1, 1]),
    "dilation": (50, (1, 12, 13), [3, 5], [1, 2], [2, 4], [2, 2]),
    "column": (300, (1, 1, 1, 400), [1, 1, 7], [1, 1, 1], [0, 0, 3], [1, 1, 1]),
}


def _out_shape(
    shape: tuple[int, ...], size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    rows = zip(shape[1:], size, stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in rows]


def _map(
    name: str, *, transposed: bool = False, same: bool = False, empty: bool = False, far: bool = False
) -> Callable:
    count, shape, *sizes = SIZES[name]

    def make(dtype: torch.dtype, g: G) -> tuple:
        coords = places(g, 0 if empty else count, *shape)
        if far:
            coords = coords * 1_000_003 - 2**30
        out = coords if same else places(g, count, shape[0], *(n if transposed else n // 2 + 1 for n in shape[1:]))
        return coords, out, *sizes, transposed

    return make


def _outputs(name: str, *, transposed: bool = False, empty: bool = False) -> Callable:
    count, shape, *sizes = SIZES[name]

    def make(dtype: torch.dtype, g: G) -> tuple:
        coords = places(g, 0 if empty else count, *shape)
        out_shape = [2 * n for n in shape[1:]] if transposed else _out_shape(shape, *sizes)
        return coords, out_shape, *sizes, transposed

    return make


def _reverse(name: str) -> Callable:
    forward = _map(name)

    def make(dtype: torch.dtype, g: G) -> tuple:
        args = forward(dtype, g)
        return reference.sparse_conv_map(*args), len(args[0])

    return make


# ---------------------------------------------------------------- convolutions


def _conv(
    name: str, channels: tuple[int, int], *, groups: int = 1, bias: bool = True, reverse: bool = False, strided: bool = False,
    poison: bool = False, empty: bool = False, same: bool = True,
) -> Callable:  # fmt: skip
    make_map = _map(name, same=same, empty=empty)
    C, D = channels

    def make(dtype: torch.dtype, g: G) -> tuple:
        args = make_map(dtype, g)
        found = reference.sparse_conv_map(*args)
        x = randn(g, dtype, len(args[0]), 2 * C)[:, :C] if strided else randn(g, dtype, len(args[0]), C)
        if poison:  # a row that nobody reads
            found = torch.where(found == 0, -1, found)
            x[0] = torch.nan
        weight = randn(g, dtype, len(found), C // groups, D) / (len(found) * C // groups) ** 0.5
        back = reference.sparse_conv_reverse(found, len(x)) if reverse else None
        return x, weight, randn(g, dtype, D) if bias else None, found, back, groups

    return make


def _grad_weight(*args: object, **options: object) -> Callable:
    forward = _conv(*args, **options)

    def make(dtype: torch.dtype, g: G) -> tuple:
        x, weight, _, found, _, groups = forward(dtype, g)
        return randn(g, dtype, found.shape[1], weight.shape[2]), x, found, groups

    return make


SAMPLES = [
    *(Sample(MAP, name, _map(name, same=name in ("line", "space"))) for name in SIZES),
    Sample(MAP, "transposed", _map("stride", transposed=True)),
    Sample(MAP, "empty", _map("plane", empty=True)),
    Sample(MAP, "far", _map("space", same=True, far=True)),
    *(Sample(OUTPUTS, name, _outputs(name)) for name in ("line", "stride", "dilation", "column")),
    Sample(OUTPUTS, "transposed", _outputs("stride", transposed=True)),
    Sample(OUTPUTS, "empty", _outputs("plane", empty=True)),
    *(Sample(REVERSE, name, _reverse(name)) for name in ("plane", "stride")),
    Sample(CONV, "plane", _conv("plane", (16, 32))),
    Sample(CONV, "space", _conv("space", (20, 37), reverse=True)),
    Sample(CONV, "other_places", _conv("stride", (8, 70), same=False, reverse=True)),
    Sample(CONV, "groups", _conv("plane", (12, 20), groups=4)),
    Sample(CONV, "depthwise", _conv("plane", (21, 21), groups=21)),
    Sample(CONV, "strided", _conv("line", (16, 16), strided=True, bias=False)),
    Sample(CONV, "poison", _conv("plane", (16, 16), poison=True)),
    Sample(CONV, "empty", _conv("plane", (16, 16), empty=True)),
    Sample(GRAD_WEIGHT, "space", _grad_weight("space", (20, 37))),
    Sample(GRAD_WEIGHT, "groups", _grad_weight("plane", (12, 20), groups=4)),
    Sample(GRAD_WEIGHT, "depthwise", _grad_weight("plane", (21, 21), groups=21)),
    *pool.SAMPLES,
    *fill.SAMPLES,
    *block.SAMPLES,
]


def _at(index: int, value: Callable) -> Callable:
    return lambda *args: (*args[:index], value(args[index]), *args[index + 1 :])


ERRORS = [
    ErrorSample(MAP, "coords_dtype", _at(0, Tensor.long), ValueError, "kernel_map: coords must be int32"),
    ErrorSample(MAP, "coords_axes", _at(0, lambda c: c[:, :1]), ValueError, "coords must have 2 to 4 columns"),
    ErrorSample(
        MAP,
        "repeated",
        _at(0, lambda c: torch.cat([c, c[:1]])),
        IndexError,
        r"coords\[\d+\] must be unique, got .* as in row 0",
    ),
    ErrorSample(MAP, "out_coords", _at(1, lambda c: c[:, 1:]), ValueError, "out_coords must have shape"),
    ErrorSample(MAP, "kernel_places", _at(2, lambda k: [2**31]), ValueError, "kernel_size must be 1 numbers from 1"),
    ErrorSample(MAP, "kernel_size", _at(2, lambda k: [0]), ValueError, "kernel_size must be 1 numbers from 1"),
    ErrorSample(MAP, "stride", _at(3, lambda k: [1, 1]), ValueError, "stride must be 1 numbers from 1"),
    ErrorSample(MAP, "padding", _at(4, lambda k: [-1]), ValueError, "padding must be 1 numbers from 0"),
    ErrorSample(OUTPUTS, "out_shape", _at(1, lambda s: [-1]), ValueError, "out_shape must be 1 numbers from 0"),
    ErrorSample(REVERSE, "outside", _at(0, lambda m: m + 99), IndexError, r"kernel_map: map\[\d+, \d+\] must be in"),
    ErrorSample(
        REVERSE,
        "repeated",
        _at(0, lambda m: m * 0),
        IndexError,
        r"map\[\d+, \d+\] must be unique in its row, got 0 again",
    ),
    ErrorSample(REVERSE, "rows", _at(1, lambda r: -1), ValueError, "rows must be in"),
    ErrorSample(CONV, "weight", _at(1, lambda w: w[:, 1:]), ValueError, "sparse_conv: weight must have shape"),
    ErrorSample(CONV, "bias", _at(2, lambda b: b[1:]), ValueError, "bias must have shape"),
    ErrorSample(CONV, "map", _at(3, lambda m: m[1:]), ValueError, "map must have shape"),
    ErrorSample(CONV, "map_row", _at(3, lambda m: m + 99), IndexError, r"sparse_conv: map\[\d+, \d+\] must be in"),
    ErrorSample(CONV, "groups", _at(5, lambda g: 3), ValueError, "groups must divide 16 and 32 channels"),
    ErrorSample(GRAD_WEIGHT, "grad", _at(0, lambda g: g[1:]), ValueError, "grad must have shape"),
    *pool.ERRORS,
    *fill.ERRORS,
    *block.ERRORS,
]


def _map_bytes(coords: Tensor, out_coords: Tensor, kernel_size: list[int], *rest: object) -> int:
    return 4 * (coords.numel() + out_coords.numel() + torch.tensor(kernel_size).prod().item() * len(out_coords))


def _conv_bytes(x: Tensor, weight: Tensor, bias: Tensor | None, map: Tensor, *rest: object) -> int:
    return (x.numel() + weight.numel() + map.shape[1] * weight.shape[2]) * x.element_size() + 4 * map.numel()


TRAFFIC = {
    MAP: _map_bytes,
    OUTPUTS: lambda coords, *rest: 8 * coords.numel(),
    REVERSE: lambda map, rows: 4 * (map.numel() + map.shape[0] * rows),
    CONV: _conv_bytes,
    GRAD_WEIGHT: lambda grad, x, map, groups: (grad.numel() + x.numel()) * x.element_size() + 4 * map.numel(),
    **pool.TRAFFIC,
    **fill.TRAFFIC,
    **block.TRAFFIC,
}
