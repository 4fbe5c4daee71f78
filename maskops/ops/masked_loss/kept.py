"""The gradient of linear_cross_entropy's weight has room for what it is made of. N rows, D width, G codebooks, V classes.

powers [G, V, D], weight's dtype: row v holds exp(logit - top) of the first rows that count: of all, or of D // 64 * 64 where more than
D count. tops [G, tiles, D]: the highest logit of 96 classes. What lies behind those rows is not defined. The gradient of the
weight is then written where the powers are, tile by tile, so that nothing is multiplied twice and nothing else is stored.
On the CPU alone: a GPU's programs would have to wait for each other before they write.
"""

from typing import Any

import torch
from torch import Tensor

from maskops._checks import check_tensor
from maskops._registry import OpSpec, define_op
from maskops.ops.masked_loss.linear import (
    FUNCTION,
    LINEAR,
    OPTIONS,
    check_linear,
    check_linear_backward,
    check_target,
    fake_loss,
    linear_gradients,
)
from maskops.reference import masked_loss as reference
from maskops.reference.visible_tokens import accumulation_dtype


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, target, *ctx.options = inputs
    _, lse, picked, powers, tops = output
    ctx.save_for_backward(hidden, weight, bias, target, lse)
    ctx.mark_non_differentiable(*output[1:])
    ctx.kept = picked, powers, tops  # not among the saved tensors, which nobody may write


def _backward(ops: Any, ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
    # A retained graph that is walked through again has lost them; with create_graph, the other op refuses a second derivative.
    if ctx.kept is None or torch.is_grad_enabled():
        return linear_gradients(ops, ctx, grad, ctx.options)
    (picked, powers, tops), ctx.kept = ctx.kept, None
    hidden, weight, bias, target, lse = ctx.saved_tensors
    grad_hidden, grad_bias = torch.empty_like(hidden), weight.new_empty(weight.shape[:2])
    ops._masked_loss_linear_kept_backward_(
        grad, hidden, weight, bias, target, lse, picked, powers, tops, grad_hidden, grad_bias, *ctx.options
    )
    return grad_hidden, powers, grad_bias if bias is not None else None, *[None] * (len(ctx.needs) - 3)


def _check_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor, picked: Tensor,
    powers: Tensor, tops: Tensor, grad_hidden: Tensor, grad_bias: Tensor, *options: Any,
) -> None:  # fmt: skip
    check_linear_backward(grad, hidden, weight, bias, target, lse, *options)
    books, classes, width = weight.shape
    sums, dtype = (accumulation_dtype(hidden.dtype),), (weight.dtype,)
    check_tensor(FUNCTION, "picked", picked, "[N, G]", sums, target.shape, hidden)
    check_tensor(FUNCTION, "powers", powers, "[G, V, D]", dtype, weight.shape, hidden)
    check_tensor(FUNCTION, "tops", tops, "[G, tiles, D]", sums, (books, reference.tiles_of(classes), width), hidden)
    check_tensor(FUNCTION, "grad_hidden", grad_hidden, "[N, D]", dtype, hidden.shape, hidden)
    check_tensor(FUNCTION, "grad_bias", grad_bias, "[G, V]", dtype, weight.shape[:2], hidden)


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *_: Any) -> tuple:
    books, classes, width = weight.shape
    tops = hidden.new_empty((books, reference.tiles_of(classes), width), dtype=accumulation_dtype(hidden.dtype))
    return *(fake_loss(hidden, target) for _ in range(3)), weight.new_empty(weight.shape), tops


define_op(
    OpSpec(
        f"masked_loss_linear_kept({LINEAR}, {OPTIONS})"
        " -> (Tensor loss, Tensor lse, Tensor picked, Tensor powers, Tensor tops)",
        family="masked_loss",
        reference=reference.masked_loss_linear_kept,
        check=lambda *args: check_linear(FUNCTION, *args),
        check_data=lambda hidden, weight, bias, target, ignore, *rest: check_target(
            FUNCTION, target, ignore, weight.shape[1]
        ),
        fake=_fake,
        setup=_setup,
        backward=_backward,
        cuda=False,
        triton=False,
        autocast="lower",
    )
)
define_op(
    OpSpec(
        f"_masked_loss_linear_kept_backward_(Tensor grad, {LINEAR}, Tensor lse, Tensor picked, Tensor(a!) powers, Tensor tops,"
        f" Tensor(b!) grad_hidden, Tensor(c!) grad_bias, {OPTIONS}) -> ()",
        family="masked_loss",
        reference=reference._masked_loss_linear_kept_backward_,
        check=_check_backward,
        check_data=lambda grad, hidden, weight, bias, target, *rest: check_target(
            FUNCTION, target, rest[6], weight.shape[1]
        ),
        fake=lambda *args: None,
        cuda=False,
        triton=False,
    )
)
