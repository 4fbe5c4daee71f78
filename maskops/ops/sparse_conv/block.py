"""block_masked_conv and block_masked_max_pool: dense [B, C, H, W] under a mask of cells; hidden cells cost nothing."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import (
    FLOATS,
    check_is_tensor,
    check_is_tensor_or_none,
    check_tensor,
    describe,
    fail,
    integer,
    integers,
)
from maskops._registry import OpSpec, define_op
from maskops.reference import sparse_conv_block as reference

BOOL, MOST = (torch.bool,), 7
WEIGHT = "[O, C / groups, kh, kw]"
NATIVE = "C++ on CPU (AVX-512, AVX2, portable); on CUDA the Triton kernel; float32, float64, bfloat16, float16"
CONV, POOL = "block_masked_conv", "block_masked_max_pool"


@public("sparse_conv_block", native=NATIVE)
def block_masked_conv(
    x: Tensor, weight: Tensor, cells: Tensor, bias: Tensor | None = None, *, stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | None = None, groups: int = 1, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Convolve the active cells of dense images, as conv2d does between two multiplications by the mask.

        mask = cells, each entry repeated over H/h x W/w positions
        out = conv2d(where(mask, x, 0), weight, bias, stride, padding, groups=groups), 0 where not active

    Args:
        x: float [B, C, H, W], contiguous or channels_last (which needs no copy).
        weight: x's dtype [O, C / groups, kh, kw], kh and kw from 1 to 7; that of a Conv2d.
        cells: bool [B, h, w]; True = active: this mask keeps. h divides H and w divides W.
        bias: x's dtype [O].
        stride: int or two; divides the positions of a cell, so that cells stay cells.
        padding: int or two; default (k - 1) // 2 for odd kernels, 0 for even ones. The result has H / stride positions.
        groups: of channels. groups = C = O is a depthwise convolution.
        backend: "auto", "native", "triton", "reference".

    Returns:
        x's dtype [B, O, H / stride, W / stride], channels_last in memory, 0 in hidden cells. Differentiable, once, in x, weight
        and bias.

    Notes:
        A halo is read from active neighbours; elsewhere it is 0. What stands in hidden cells is never read, NaN included, and
        their gradient is 0. Sums are in float32 (float64 for float64), in one order for any number of threads. No active cell
        gives zeros.

    Raises:
        ValueError: wrong dtype, shape, device, stride, padding or groups.  TypeError: an argument of another type.

    Source:
        Tian et al., SparK, 2023 (arXiv 2301.03580): its convolutions, computed where they are not multiplied by 0.

    Example:
        >>> cells = torch.tensor([[[True, False]]])
        >>> maskops.block_masked_conv(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 3, 3), cells)[0, 0].tolist()
        [[4.0, 4.0, 0.0, 0.0], [4.0, 4.0, 0.0, 0.0]]
    """
    for name, value in (("x", x), ("weight", weight), ("cells", cells)):
        check_is_tensor(CONV, name, value)
    check_is_tensor_or_none(CONV, "bias", bias)
    check_cells(CONV, x, cells)
    check_tensor(CONV, "weight", weight, WEIGHT, FLOATS, (None,) * 4, x)
    if padding is None:
        padding = [(k - 1) // 2 if k % 2 else 0 for k in weight.shape[2:]]
    op = find_op("sparse_conv_block", x.device.type, backend)
    stride, padding = two(CONV, "stride", stride), two(CONV, "padding", padding)
    return op(x, weight, bias, cells, stride, padding, integer(CONV, "groups", groups))


@public("sparse_conv_block_max_pool", native=NATIVE)
def block_masked_max_pool(
    x: Tensor, cells: Tensor, kernel_size: int | Sequence[int], *, stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Pool the largest value of windows in active cells, as max_pool2d does between two multiplications by the mask.

        out = max_pool2d(where(mask, x, 0), kernel_size, stride, padding), 0 where not active

    Args:
        x: float [B, C, H, W], contiguous or channels_last.
        cells: bool [B, h, w]; True = active. h divides H and w divides W.
        kernel_size: int or two, 1 to 7.
        stride: int or two; default kernel_size; divides the positions of a cell.
        padding: int or two, with less than any value; at most half of kernel_size. The result has H / stride positions.
        backend: "auto", "native", "triton", "reference".

    Returns:
        x's dtype [B, C, H / stride, W / stride], channels_last in memory, 0 in hidden cells. Differentiable, once, in x.

    Notes:
        A hidden neighbour counts as 0, as in SparK; behind a ReLU that is as if it were not there. Of equal values the first of
        the window gets the gradient; a hidden one keeps it. NaN in an active cell is the largest value.

    Raises:
        ValueError: wrong dtype, shape, device, kernel_size, stride or padding.  TypeError: an argument of another type.

    Source:
        Tian et al., SparK, 2023 (arXiv 2301.03580).

    Example:
        >>> x, cells = torch.arange(8.0).view(1, 1, 2, 4), torch.tensor([[[True, False]]])
        >>> maskops.block_masked_max_pool(x, cells, 2).tolist()
        [[[[5.0, 0.0]]]]
    """
    check_is_tensor(POOL, "x", x)
    check_is_tensor(POOL, "cells", cells)
    op = find_op("sparse_conv_block_max_pool", x.device.type, backend)
    sizes = (kernel_size, kernel_size if stride is None else stride, padding)
    names = ("kernel_size", "stride", "padding")
    return op(x, cells, *(two(POOL, name, value) for name, value in zip(names, sizes, strict=True)))[0]


def two(op: str, name: str, value: int | Sequence[int]) -> list[int]:
    found = integers(op, name, value if isinstance(value, Sequence) else (value, value))
    if len(found) != 2:
        fail(op, name, "be one or two numbers", list(value))
    return found


# ---------------------------------------------------------------- checks


def check_cells(op: str, x: Tensor, cells: Tensor) -> tuple[int, int]:
    """Positions of a cell along height and width."""
    check_tensor(op, "x", x, "[B, C, H, W]", FLOATS, (None, None, None, None), x)
    check_tensor(op, "cells", cells, "[B, h, w]", BOOL, (x.shape[0], None, None), x)
    (H, W), (h, w) = x.shape[2:], cells.shape[1:]
    if all(isinstance(n, int) for n in x.shape) and x.shape[0] * max(H, 1) * max(W, 1) >= 2**31:
        fail(op, "x", "have fewer than 2^31 positions", describe(x))
    if h < 1 or w < 1 or H % h or W % w:
        fail(op, "cells", f"divide {int(H)} x {int(W)} positions", describe(cells))
    return H // h, W // w


def check_windows(
    op: str, x: Tensor, cells: Tensor, kernel_size: Sequence[int], stride: list[int], padding: list[int], kernel_of: str
) -> tuple[int, int]:
    """Positions of the result along height and width."""
    cell = check_cells(op, x, cells)
    kernel = [int(k) for k in kernel_size]
    if len(kernel) != 2 or not all(1 <= k <= MOST for k in kernel):
        fail(op, kernel_of, f"have two kernel sizes from 1 to {MOST}", kernel)
    if len(stride) != 2 or not all(s >= 1 and c % s == 0 for c, s in zip(cell, stride, strict=True)):
        fail(op, "stride", f"divide the {int(cell[0])} x {int(cell[1])} positions of a cell", list(stride))
    sizes = x.shape[2] // stride[0], x.shape[3] // stride[1]
    given = list(zip(x.shape[2:], kernel, stride, padding, sizes, strict=len(padding) == 2))
    if len(padding) != 2 or not all(
        0 <= p < k and (n == 0 or (n + 2 * p - k) // s + 1 == m) for n, k, s, p, m in given
    ):
        fail(op, "padding", f"give {int(sizes[0])} x {int(sizes[1])} positions", list(padding))
    return sizes


def _check_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, cells: Tensor, stride: list[int], padding: list[int], groups: int
) -> tuple[int, int]:
    check_cells(CONV, x, cells)
    check_tensor(CONV, "weight", weight, WEIGHT, (x.dtype,), (None, None, None, None), x)
    _check_groups(x.shape[1], weight.shape[0], groups)
    check_tensor(CONV, "weight", weight, WEIGHT, (x.dtype,), (None, x.shape[1] // groups, None, None), x)
    if bias is not None:
        check_tensor(CONV, "bias", bias, "[O]", (x.dtype,), (weight.shape[0],), x)
    return check_windows(CONV, x, cells, weight.shape[2:], stride, padding, "weight")


def _check_groups(C: int, O: int, groups: int) -> None:
    if groups < 1 or C % groups or O % groups:
        fail(CONV, "groups", f"divide {int(C)} and {int(O)} channels", groups)


def _check_grad_input(
    grad: Tensor, weight: Tensor, cells: Tensor, size: list[int], stride: list[int], padding: list[int], groups: int
) -> None:
    check_tensor(CONV, "grad", grad, "[B, O, H, W]", FLOATS, (None, None, None, None), grad)
    check_tensor(CONV, "weight", weight, WEIGHT, (grad.dtype,), (grad.shape[1], None, None, None), grad)
    _check_groups(weight.shape[1] * max(groups, 1), weight.shape[0], groups)
    if len(size) != 2:
        fail(CONV, "size", "be two numbers", list(size))
    x = grad.new_empty((1,)).expand(grad.shape[0], 1, *size)
    sizes = check_windows(CONV, x, cells, weight.shape[2:], stride, padding, "weight")
    check_tensor(CONV, "grad", grad, "[B, O, H, W]", FLOATS, (None, None, *sizes), grad)


def _check_grad_weight(
    grad: Tensor, x: Tensor, cells: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], groups: int
) -> None:
    sizes = check_windows(CONV, x, cells, kernel_size, stride, padding, "kernel_size")
    check_tensor(CONV, "grad", grad, "[B, O, H, W]", (x.dtype,), (x.shape[0], None, *sizes), x)
    _check_groups(x.shape[1], grad.shape[1], groups)


def _check_pool(
    x: Tensor, cells: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]
) -> tuple[int, int]:
    sizes = check_windows(POOL, x, cells, kernel_size, stride, padding, "kernel_size")
    if any(2 * p > k for p, k in zip(padding, kernel_size, strict=True)):
        fail(POOL, "padding", "be at most half of kernel_size", list(padding))
    return sizes


def _check_pool_backward(
    grad: Tensor, taps: Tensor, cells: Tensor, size: list[int], kernel_size: list[int], stride: list[int], padding: list[int]
) -> None:  # fmt: skip
    check_tensor(POOL, "grad", grad, "[B, C, H, W]", FLOATS, (None, None, None, None), grad)
    if len(size) != 2:
        fail(POOL, "size", "be two numbers", list(size))
    x = grad.new_empty((1,)).expand(*grad.shape[:2], *size)
    sizes = _check_pool(x, cells, kernel_size, stride, padding)
    check_tensor(POOL, "grad", grad, "[B, C, H, W]", FLOATS, (None, None, *sizes), grad)
    check_tensor(POOL, "taps", taps, "[B, C, H, W]", (torch.uint8,), grad.shape, grad)


def empty_channels_last(like: Tensor, B: int, C: int, H: int, W: int, dtype: torch.dtype | None = None) -> Tensor:
    """No view of another tensor: what follows may write in place."""
    return torch.empty((B, C, H, W), dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


# ---------------------------------------------------------------- the ops


def _fake_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, cells: Tensor, stride: list[int], padding: list[int], groups: int
) -> Tensor:
    return empty_channels_last(x, x.shape[0], weight.shape[0], x.shape[2] // stride[0], x.shape[3] // stride[1])


def _setup_conv(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _, cells, ctx.stride, ctx.padding, ctx.groups = inputs
    ctx.save_for_backward(x, weight, cells)


def _backward_conv(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    x, weight, cells = ctx.saved_tensors
    rest = (ctx.stride, ctx.padding, ctx.groups)
    grad_x = grad_weight = grad_bias = None
    if ctx.needs[0]:
        grad_x = ops._sparse_conv_block_grad_input(grad, weight, cells, list(x.shape[2:]), *rest)
    if ctx.needs[1] or ctx.needs[2]:
        grad_weight, grad_bias = ops._sparse_conv_block_grad_weight(grad, x, cells, list(weight.shape[2:]), *rest)
    return grad_x, grad_weight, grad_bias if ctx.needs[2] else None, None, None, None, None


def _fake_pool(x: Tensor, cells: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]) -> tuple:
    sizes = (*x.shape[:2], x.shape[2] // stride[0], x.shape[3] // stride[1])
    return empty_channels_last(x, *sizes), empty_channels_last(x, *sizes, dtype=torch.uint8)


def _setup_pool(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, cells, *ctx.sizes = inputs
    ctx.size = list(x.shape[2:])
    ctx.save_for_backward(output[1], cells)
    ctx.mark_non_differentiable(output[1])


def _backward_pool(ops: Any, ctx: Any, grad: Tensor, _grad_taps: Tensor) -> tuple:
    taps, cells = ctx.saved_tensors
    return ops._sparse_conv_block_max_pool_backward(grad, taps, cells, ctx.size, *ctx.sizes), None, None, None, None


SIZES = "SymInt[] stride, SymInt[] padding"
define_op(
    OpSpec(
        f"sparse_conv_block(Tensor x, Tensor weight, Tensor? bias, Tensor cells, {SIZES}, SymInt groups) -> Tensor",
        family="sparse_conv",
        reference=reference.sparse_conv_block,
        check=_check_conv,
        fake=_fake_conv,
        setup=_setup_conv,
        backward=_backward_conv,
        cuda=False,
        autocast="lower",
    )
)
define_op(
    OpSpec(
        f"_sparse_conv_block_grad_input(Tensor grad, Tensor weight, Tensor cells, SymInt[] size, {SIZES}, SymInt groups) -> Tensor",
        family="sparse_conv",
        reference=reference._sparse_conv_block_grad_input,
        check=_check_grad_input,
        fake=lambda grad, weight, cells, size, stride, padding, groups: empty_channels_last(
            grad, grad.shape[0], weight.shape[1] * groups, *size
        ),
        cuda=False,
    )
)
define_op(
    OpSpec(
        f"_sparse_conv_block_grad_weight(Tensor grad, Tensor x, Tensor cells, SymInt[] kernel_size, {SIZES}, SymInt groups)"
        " -> (Tensor grad_weight, Tensor grad_bias)",
        family="sparse_conv",
        reference=reference._sparse_conv_block_grad_weight,
        check=_check_grad_weight,
        fake=lambda grad, x, cells, kernel_size, stride, padding, groups: (
            x.new_empty((grad.shape[1], x.shape[1] // groups, *kernel_size)),
            x.new_empty((grad.shape[1],)),
        ),
        cuda=False,
    )
)
define_op(
    OpSpec(
        f"sparse_conv_block_max_pool(Tensor x, Tensor cells, SymInt[] kernel_size, {SIZES}) -> (Tensor out, Tensor taps)",
        family="sparse_conv",
        reference=reference.sparse_conv_block_max_pool,
        check=_check_pool,
        fake=_fake_pool,
        setup=_setup_pool,
        backward=_backward_pool,
        cuda=False,
    )
)
define_op(
    OpSpec(
        "_sparse_conv_block_max_pool_backward(Tensor grad, Tensor taps, Tensor cells, SymInt[] size, SymInt[] kernel_size,"
        f" {SIZES}) -> Tensor",
        family="sparse_conv",
        reference=reference._sparse_conv_block_max_pool_backward,
        check=_check_pool_backward,
        fake=lambda grad, taps, cells, size, *rest: empty_channels_last(grad, *grad.shape[:2], *size),
        cuda=False,
    )
)
