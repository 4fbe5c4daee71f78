"""The packed form [total, D] of kept tokens, for attention over cu_seqlens."""

from typing import Any

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import FLOATS, check_ids, check_is_tensor, check_tensor, check_values, fail, integer
from maskops._registry import OpSpec, define_op
from maskops.ops.visible_tokens.gather import FILL_SHAPES, INT64, check_fill, fill_gradient, squeeze_front
from maskops.ops.visible_tokens.split import TokenSplit, check_split
from maskops.reference import visible_tokens as reference

PACK, UNPACK = "pack_tokens", "unpack_tokens"


@public("visible_tokens_pack")
def pack_tokens(x: Tensor, split: TokenSplit, *, total: int | None = None, backend: str = "auto") -> Tensor:
    """Pack the kept rows of all samples behind each other, for attention over cu_seqlens.

        packed[cu_seqlens[b] + j] = x[b, ids_keep[b, j]]   for j < num_keep[b]

    Args:
        x: float [B, N, D].
        split: which rows to keep, in which order.
        total: rows of the result, at least the sum of num_keep; rows past it are zero. Default: split.total, or a host sync.
        backend: "auto", "native", "triton", "reference".

    Returns:
        [total, D] in x's dtype, differentiable in x (twice).

    Notes:
        Rows with no kept token take no space. Deterministic.

    Raises:
        ValueError: wrong dtype, shape or device, total too small.  IndexError: ids_restore is no permutation.

    Source:
        The variable-length layout of FlashAttention (Dao, 2023, arXiv 2307.08691).

    Example:
        >>> split = maskops.split_tokens(torch.tensor([[True, False], [False, False]]))
        >>> maskops.pack_tokens(torch.arange(4.0).view(2, 2, 1), split).flatten().tolist()
        [1.0, 2.0, 3.0]
    """
    check_is_tensor(PACK, "x", x)
    check_split(PACK, split)
    if total is None:
        total = int(split.cu_seqlens[-1]) if split.total is None else split.total
    total = integer(PACK, "total", total)
    return find_op("visible_tokens_pack", x.device.type, backend)(x, split.ids_restore, split.cu_seqlens, total)


@public("visible_tokens_unpack")
def unpack_tokens(packed: Tensor, split: TokenSplit, fill: Tensor, *, backend: str = "auto") -> Tensor:
    """Put packed rows back in their places and fill the rest: the inverse of pack_tokens.

        out[b, n] = packed[cu_seqlens[b] + j] if j < num_keep[b] else fill,  j = ids_restore[b, n]

    Args:
        packed: float [total, D].
        split: the TokenSplit that they were packed by.
        fill: [D], [N, D] or [B, N, D], same dtype.
        backend: "auto", "native", "triton", "reference".

    Returns:
        [B, N, D], differentiable (twice) in packed and fill.

    Notes:
        Deterministic; rows of packed past the sum of num_keep are never read, their gradient is 0.

    Raises:
        ValueError: wrong dtype, shape or device, packed too short.  IndexError: ids_restore is no permutation.

    Source:
        The variable-length layout of FlashAttention (Dao, 2023, arXiv 2307.08691).

    Example:
        >>> split = maskops.split_tokens(torch.tensor([[True, False], [False, False]]))
        >>> maskops.unpack_tokens(torch.tensor([[1.0], [2.0], [3.0]]), split, torch.zeros(1)).flatten().tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    check_is_tensor(UNPACK, "packed", packed)
    check_is_tensor(UNPACK, "fill", fill)
    check_split(UNPACK, split)
    op = find_op("visible_tokens_unpack", packed.device.type, backend)
    return op(packed, split.ids_restore, split.cu_seqlens, squeeze_front(fill, 1))


def _check_rows(
    op: str, ids_restore: Tensor, cu_seqlens: Tensor, batch: int | None, tokens: int | None, like: Tensor
) -> None:
    check_tensor(op, "ids_restore", ids_restore, "[B, N]", INT64, (batch, tokens), like)
    check_tensor(op, "cu_seqlens", cu_seqlens, "[B + 1]", (torch.int32,), (ids_restore.shape[0] + 1,), like)


def _check_rows_data(op: str, ids_restore: Tensor, cu_seqlens: Tensor, total: int) -> None:
    tokens = ids_restore.shape[1]
    check_ids(op, "ids_restore", ids_restore, tokens, allow_pad=False)
    check_values(op, "cu_seqlens", cu_seqlens[:1] == 0, "start at 0", cu_seqlens)
    count = cu_seqlens[1:] - cu_seqlens[:-1]
    check_values(op, "row lengths of cu_seqlens", (count >= 0) & (count <= tokens), f"be in [0, {tokens}]", count)
    check_values(op, "last cu_seqlens", cu_seqlens[-1:] <= total, f"be at most total = {total}", cu_seqlens[-1:])


def _check_pack(x: Tensor, ids_restore: Tensor, cu_seqlens: Tensor, total: int) -> None:
    check_tensor(PACK, "x", x, "[B, N, D]", FLOATS, (None, None, None), x)
    _check_rows(PACK, ids_restore, cu_seqlens, x.shape[0], x.shape[1], x)
    if total < 0:
        fail(PACK, "total", "be at least 0", total)


def _setup_pack(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _backward_pack(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    grad_x = ops.visible_tokens_unpack(grad, *ctx.saved_tensors, grad.new_zeros(grad.shape[1]))
    return grad_x, None, None, None


def _check_unpack(packed: Tensor, ids_restore: Tensor, cu_seqlens: Tensor, fill: Tensor) -> None:
    check_tensor(UNPACK, "packed", packed, "[total, D]", FLOATS, (None, None), packed)
    _check_rows(UNPACK, ids_restore, cu_seqlens, None, None, packed)
    check_fill(UNPACK, fill, ids_restore.shape[0], ids_restore.shape[1], packed)


def _setup_unpack(ctx: Any, inputs: tuple, output: Tensor) -> None:
    packed, ids_restore, cu_seqlens, fill = inputs
    ctx.save_for_backward(ids_restore, cu_seqlens)
    ctx.total, ctx.fill_dim = packed.shape[0], fill.dim()


def _backward_unpack(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    need = [ctx.needs[i] for i in (0, 3)]
    grads = ops._visible_tokens_unpack_backward(grad, *ctx.saved_tensors, ctx.total, ctx.fill_dim, *need)
    return grads[0] if need[0] else None, None, None, grads[1] if need[1] else None


def _check_unpack_backward(
    grad: Tensor, ids_restore: Tensor, cu_seqlens: Tensor, total: int, fill_dim: int, *need: bool
) -> None:
    check_tensor(UNPACK, "grad", grad, "[B, N, D]", FLOATS, (None, None, None), grad)
    _check_rows(UNPACK, ids_restore, cu_seqlens, grad.shape[0], grad.shape[1], grad)
    if total < 0:
        fail(UNPACK, "total", "be at least 0", total)
    if fill_dim not in (1, 2, 3):
        fail(UNPACK, "fill", f"have shape {FILL_SHAPES}", f"{fill_dim} dimensions")


def _fake_unpack_backward(
    grad: Tensor, ids_restore: Tensor, cu_seqlens: Tensor, total: int, fill_dim: int, need_packed: bool, need_fill: bool
) -> tuple:
    grad_packed = grad.new_empty((total, grad.shape[2]) if need_packed else 0)
    return grad_packed, fill_gradient(grad, grad.shape[1], fill_dim) if need_fill else grad.new_empty(0)


def _setup_unpack_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad, ids_restore, cu_seqlens, ctx.total, _, *ctx.need = inputs
    ctx.save_for_backward(ids_restore, cu_seqlens)
    ctx.channels = grad.shape[2]


def _backward_unpack_backward(ops: Any, ctx: Any, packed: Tensor, fill: Tensor) -> tuple:
    """The gradient of unpack is linear in grad, and unpack is its transpose."""
    packed = packed if ctx.need[0] else packed.new_zeros(ctx.total, ctx.channels)
    fill = fill if ctx.need[1] else fill.new_zeros(ctx.channels)
    return ops.visible_tokens_unpack(packed, *ctx.saved_tensors, fill), *[None] * 6


define_op(
    OpSpec(
        "visible_tokens_pack(Tensor x, Tensor ids_restore, Tensor cu_seqlens, SymInt total) -> Tensor",
        family="visible_tokens",
        reference=reference.visible_tokens_pack,
        check=_check_pack,
        check_data=lambda x, ids, cu_seqlens, total: _check_rows_data(PACK, ids, cu_seqlens, total),
        fake=lambda x, ids, cu_seqlens, total: x.new_empty(total, x.shape[2]),
        setup=_setup_pack,
        backward=_backward_pack,
    )
)
define_op(
    OpSpec(
        "visible_tokens_unpack(Tensor packed, Tensor ids_restore, Tensor cu_seqlens, Tensor fill) -> Tensor",
        family="visible_tokens",
        reference=reference.visible_tokens_unpack,
        check=_check_unpack,
        check_data=lambda packed, ids, cu_seqlens, fill: _check_rows_data(UNPACK, ids, cu_seqlens, packed.shape[0]),
        fake=lambda packed, ids, cu_seqlens, fill: packed.new_empty(*ids.shape, packed.shape[1]),
        setup=_setup_unpack,
        backward=_backward_unpack,
        autocast="promote",
    )
)
define_op(
    OpSpec(
        "_visible_tokens_unpack_backward(Tensor grad, Tensor ids_restore, Tensor cu_seqlens, SymInt total, int fill_dim,"
        " bool need_packed, bool need_fill) -> (Tensor grad_packed, Tensor grad_fill)",
        family="visible_tokens",
        reference=reference._visible_tokens_unpack_backward,
        check=_check_unpack_backward,
        check_data=lambda grad, ids, cu_seqlens, total, *rest: _check_rows_data(UNPACK, ids, cu_seqlens, total),
        fake=_fake_unpack_backward,
        setup=_setup_unpack_backward,
        backward=_backward_unpack_backward,
    )
)
