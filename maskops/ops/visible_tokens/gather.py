"""Move rows between all tokens [B, N, D] and kept tokens [B, K, D]."""

from typing import Any

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import (
    FLOATS,
    check_ids,
    check_is_tensor,
    check_is_tensor_or_none,
    check_tensor,
    check_values,
    fail,
    integer,
)
from maskops._registry import OpSpec, define_op
from maskops.ops.visible_tokens.split import TokenSplit, check_split
from maskops.reference import visible_tokens as reference

INT64 = (torch.int64,)
FILL_SHAPES = "[D], [N, D] or [B, N, D]"


@public("visible_tokens_gather")
def gather_tokens(x: Tensor, ids: Tensor, *, backend: str = "auto") -> Tensor:
    """Gather the rows of x that ids name.

        out[b, k] = x[b, ids[b, k]]   (0 where ids[b, k] = -1)

    Args:
        x: float [B, N, D]; any strides, rows contiguous in D are read in place.
        ids: int64 [B, K], unique in each row, -1 for an empty slot; `TokenSplit.ids_keep` or `ids_mask`.
        backend: "auto", "native", "triton", "reference".

    Returns:
        [B, K, D] in x's dtype, differentiable in x (twice).

    Notes:
        An empty slot gives a zero row and no gradient. K = 0 works. Deterministic, forward and backward: the gradient goes
        through the inverse map, without atomics.

    Raises:
        ValueError: wrong dtype, shape or device.  IndexError: an id out of range or twice in a row (on a GPU a device-side
        assertion).

    Source:
        Visible-token encoding of MAE (He et al., 2021, arXiv 2111.06377).

    Example:
        >>> x = torch.arange(8.0).view(1, 4, 2)
        >>> maskops.gather_tokens(x, torch.tensor([[2, 0, -1]])).tolist()
        [[[4.0, 5.0], [0.0, 1.0], [0.0, 0.0]]]
    """
    check_is_tensor("gather_tokens", "x", x)
    check_is_tensor("gather_tokens", "ids", ids)
    return find_op("visible_tokens_gather", x.device.type, backend)(x, ids)


@public("visible_tokens_restore")
def restore_tokens(
    x_keep: Tensor,
    split: TokenSplit,
    fill: Tensor,
    *,
    pos: Tensor | None = None,
    prefix: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Put kept rows back in their places, fill the rest and add a position embedding, in one pass.

        out[:, :P] = x_keep[:, :P] + pos[:P]
        out[b, P + n] = (x_keep[b, P + j] if j < num_keep[b] else fill) + pos[P + n],  j = ids_restore[b, n]

    Args:
        x_keep: float [B, P + K, D]: P prefix rows, then the kept rows in the order of split.ids_keep.
        split: the TokenSplit that they were gathered by.
        fill: the mask token [D], a fill per position [N, D] or per sample and position [B, N, D]; leading axes of size 1 of a
            mask token ([1, 1, D]) are dropped. Same dtype as x_keep.
        pos: position embedding [P + N, D] or [1, P + N, D], or None.
        prefix: P, the rows at the front that are copied (class token, registers).
        backend: "auto", "native", "triton", "reference".

    Returns:
        [B, P + N, D] in x_keep's dtype, differentiable (twice) in x_keep, fill and pos.

    Notes:
        Rows may keep different counts; slots past num_keep are never read, their gradient is 0. Deterministic: the sums for
        fill and pos are taken in float32 (float64 for float64) in a fixed order. Autocast promotes to the widest dtype.

    Raises:
        ValueError: wrong dtype, shape or device, a count that does not fit.  IndexError: ids_restore is no permutation.

    Source:
        The decoder input of MAE (He et al., 2021, arXiv 2111.06377).

    Example:
        >>> split = maskops.split_tokens(torch.tensor([[True, False, True]]))
        >>> maskops.restore_tokens(torch.ones(1, 1, 2), split, torch.zeros(2)).tolist()
        [[[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]]
    """
    check_is_tensor("restore_tokens", "x_keep", x_keep)
    check_is_tensor("restore_tokens", "fill", fill)
    check_is_tensor_or_none("restore_tokens", "pos", pos)
    check_split("restore_tokens", split)
    prefix = integer("restore_tokens", "prefix", prefix)
    op = find_op("visible_tokens_restore", x_keep.device.type, backend)
    return op(x_keep, split.ids_restore, split.num_keep, squeeze_front(fill, 1), squeeze_front(pos, 2), prefix)


def squeeze_front(x: Tensor | None, dims: int) -> Tensor | None:
    """Drop leading axes of size 1 while more than `dims` axes are left."""
    while x is not None and x.dim() > dims and x.shape[0] == 1:
        x = x[0]
    return x


# ---------------------------------------------------------------- gather


def _check_gather(x: Tensor, ids: Tensor) -> None:
    check_tensor("gather_tokens", "x", x, "[B, N, D]", FLOATS, (None, None, None), x)
    check_tensor("gather_tokens", "ids", ids, "[B, K]", INT64, (x.shape[0], None), x)


def _setup_gather(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, ids = inputs
    ctx.save_for_backward(ids)
    ctx.tokens = x.shape[1]


def _backward_gather(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    return ops._visible_tokens_gather_backward(grad, ctx.saved_tensors[0], ctx.tokens), None


def _check_gather_backward(grad: Tensor, ids: Tensor, N: int) -> None:
    check_tensor("gather_tokens", "grad", grad, "[B, K, D]", FLOATS, (None, None, None), grad)
    check_tensor("gather_tokens", "ids", ids, "[B, K]", INT64, grad.shape[:2], grad)
    if N < 0:
        fail("gather_tokens", "N", "be at least 0", N)


def _setup_gather_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


define_op(
    OpSpec(
        "visible_tokens_gather(Tensor x, Tensor ids) -> Tensor",
        family="visible_tokens",
        reference=reference.visible_tokens_gather,
        check=_check_gather,
        check_data=lambda x, ids: check_ids("gather_tokens", "ids", ids, x.shape[1]),
        fake=lambda x, ids: x.new_empty(*ids.shape, x.shape[2]),
        setup=_setup_gather,
        backward=_backward_gather,
    )
)
define_op(
    OpSpec(
        "_visible_tokens_gather_backward(Tensor grad, Tensor ids, SymInt N) -> Tensor",
        family="visible_tokens",
        reference=reference._visible_tokens_gather_backward,
        check=_check_gather_backward,
        check_data=lambda grad, ids, N: check_ids("gather_tokens", "ids", ids, N),
        fake=lambda grad, ids, N: grad.new_empty(grad.shape[0], N, grad.shape[2]),
        setup=_setup_gather_backward,
        backward=lambda ops, ctx, grad: (ops.visible_tokens_gather(grad, ctx.saved_tensors[0]), None, None),
    )
)

# ---------------------------------------------------------------- restore


def check_fill(op: str, fill: Tensor, batch: int, tokens: int, like: Tensor) -> None:
    channels = like.shape[-1]
    if fill.dim() not in (1, 2, 3):
        fail(op, "fill", f"have shape {FILL_SHAPES}", f"{fill.dim()} dimensions")
    check_tensor(op, "fill", fill, FILL_SHAPES, (like.dtype,), (batch, tokens, channels)[3 - fill.dim() :], like)


def _check_restore(
    x_keep: Tensor, ids_restore: Tensor, num_keep: Tensor, fill: Tensor, pos: Tensor | None, prefix: int
) -> None:
    op = "restore_tokens"
    check_tensor(op, "x_keep", x_keep, "[B, P + K, D]", FLOATS, (None, None, None), x_keep)
    check_tensor(op, "ids_restore", ids_restore, "[B, N]", INT64, (x_keep.shape[0], None), x_keep)
    check_tensor(op, "num_keep", num_keep, "[B]", INT64, (x_keep.shape[0],), x_keep)
    if not 0 <= prefix <= x_keep.shape[1]:
        fail(op, "prefix", f"be in [0, {x_keep.shape[1]}], the rows of x_keep", prefix)
    check_fill(op, fill, x_keep.shape[0], ids_restore.shape[1], x_keep)
    if pos is not None:
        sizes = (prefix + ids_restore.shape[1], x_keep.shape[2])
        check_tensor(op, "pos", pos, "[P + N, D]", (x_keep.dtype,), sizes, x_keep)


def check_restore_data(op: str, ids_restore: Tensor, num_keep: Tensor, slots: int) -> None:
    tokens = ids_restore.shape[1]
    check_ids(op, "ids_restore", ids_restore, tokens, allow_pad=False)
    most = min(slots, tokens)
    check_values(op, "num_keep", (num_keep >= 0) & (num_keep <= most), f"be in [0, {most}]", num_keep)


def _setup_restore(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x_keep, ids_restore, num_keep, fill, _, prefix = inputs
    ctx.save_for_backward(ids_restore, num_keep)
    ctx.slots, ctx.prefix, ctx.fill_dim = x_keep.shape[1] - prefix, prefix, fill.dim()


def _backward_restore(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    ids_restore, num_keep = ctx.saved_tensors
    need = [ctx.needs[i] for i in (0, 3, 4)]
    grads = ops._visible_tokens_restore_backward(
        grad, ids_restore, num_keep, ctx.slots, ctx.prefix, ctx.fill_dim, *need
    )
    grad_x, grad_fill, grad_pos = (g if n else None for g, n in zip(grads, need, strict=True))
    return grad_x, None, None, grad_fill, grad_pos, None


def _check_restore_backward(
    grad: Tensor, ids_restore: Tensor, num_keep: Tensor, num_slots: int, prefix: int, fill_dim: int, *need: bool
) -> None:
    op = "restore_tokens"
    check_tensor(op, "grad", grad, "[B, P + N, D]", FLOATS, (None, None, None), grad)
    if not 0 <= prefix <= grad.shape[1]:
        fail(op, "prefix", f"be in [0, {grad.shape[1]}], the rows of grad", prefix)
    sizes = (grad.shape[0], grad.shape[1] - prefix)
    check_tensor(op, "ids_restore", ids_restore, "[B, N]", INT64, sizes, grad)
    check_tensor(op, "num_keep", num_keep, "[B]", INT64, (grad.shape[0],), grad)
    if num_slots < 0:
        fail(op, "num_slots", "be at least 0", num_slots)
    if fill_dim not in (1, 2, 3):
        fail(op, "fill", f"have shape {FILL_SHAPES}", f"{fill_dim} dimensions")


def fill_gradient(grad: Tensor, tokens: int, fill_dim: int) -> Tensor:
    return grad.new_empty((grad.shape[0], tokens, grad.shape[2])[3 - fill_dim :])


def _fake_restore_backward(
    grad: Tensor, ids_restore: Tensor, num_keep: Tensor, num_slots: int, prefix: int, fill_dim: int,
    need_x: bool, need_fill: bool, need_pos: bool,
) -> tuple:  # fmt: skip
    grad_x = grad.new_empty((grad.shape[0], prefix + num_slots, grad.shape[2]) if need_x else 0)
    grad_fill = fill_gradient(grad, ids_restore.shape[1], fill_dim) if need_fill else grad.new_empty(0)
    return grad_x, grad_fill, grad.new_empty(grad.shape[1:] if need_pos else 0)


def _setup_restore_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad, ids_restore, num_keep, ctx.slots, ctx.prefix, _, *ctx.need = inputs
    ctx.save_for_backward(ids_restore, num_keep)
    ctx.sizes = grad.shape[0], grad.shape[2]


def _backward_restore_backward(ops: Any, ctx: Any, x: Tensor, fill: Tensor, pos: Tensor) -> tuple:
    """The gradient of restore is linear in grad, and restore is its transpose."""
    batch, channels = ctx.sizes
    x = x if ctx.need[0] else x.new_zeros(batch, ctx.prefix + ctx.slots, channels)
    fill = fill if ctx.need[1] else fill.new_zeros(channels)
    grad = ops.visible_tokens_restore(x, *ctx.saved_tensors, fill, pos if ctx.need[2] else None, ctx.prefix)
    return grad, *[None] * 8


define_op(
    OpSpec(
        "visible_tokens_restore(Tensor x_keep, Tensor ids_restore, Tensor num_keep, Tensor fill, Tensor? pos=None,"
        " SymInt prefix=0) -> Tensor",
        family="visible_tokens",
        reference=reference.visible_tokens_restore,
        check=_check_restore,
        check_data=lambda x_keep, ids, num_keep, fill, pos, prefix: check_restore_data(
            "restore_tokens", ids, num_keep, x_keep.shape[1] - prefix
        ),
        fake=lambda x_keep, ids, num_keep, fill, pos, prefix: x_keep.new_empty(
            x_keep.shape[0], prefix + ids.shape[1], x_keep.shape[2]
        ),
        setup=_setup_restore,
        backward=_backward_restore,
        autocast="promote",
    )
)
define_op(
    OpSpec(
        "_visible_tokens_restore_backward(Tensor grad, Tensor ids_restore, Tensor num_keep, SymInt num_slots,"
        " SymInt prefix, int fill_dim, bool need_x, bool need_fill, bool need_pos)"
        " -> (Tensor grad_x, Tensor grad_fill, Tensor grad_pos)",
        family="visible_tokens",
        reference=reference._visible_tokens_restore_backward,
        check=_check_restore_backward,
        check_data=lambda grad, ids, num_keep, slots, *rest: check_restore_data("restore_tokens", ids, num_keep, slots),
        fake=_fake_restore_backward,
        setup=_setup_restore_backward,
        backward=_backward_restore_backward,
    )
)
