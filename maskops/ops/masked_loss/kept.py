"""The gradient of linear_cross_entropy's weight has room for what it is made of. N rows, D width, G codebooks, V classes.

powers [G, V, D], weight's dtype: row v holds exp(logit - top) of the rows that count, or, where more than D count, of the first
D // 64 * 64 of them. tops [G, tiles, D]: their highest logits of 96 classes. Columns past those rows are not defined. The gradient
of the weight is then written where the powers are, tile by tile, so that nothing is multiplied twice and nothing else is stored.
On the CPU alone: a GPU's programs would have to wait for each other before they write.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from maskops._backends import has_kernel
from maskops._checks import check_tensor
from maskops._registry import OpSpec, castable, define_op
from maskops.ops.masked_loss.linear_op import (
    FUNCTION,
    LINEAR,
    OPTIONS,
    check_linear,
    check_linear_backward,
    check_sample,
    check_target,
    fake_loss,
    linear_gradients,
)
from maskops.reference import masked_loss as reference
from maskops.reference.visible_tokens import accumulation_dtype


class KeptLoss(torch.autograd.Function):
    """(hidden, weight, bias, target, seed, options, temperature) -> loss, sample [N, G]. A Function on two ops, since what an op
    returns nobody may write."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, seed: Tensor | None, options: tuple,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        args = hidden, weight, bias, target
        loss, lse, sample, *ctx.kept = torch.ops.maskops._masked_loss_linear_kept(*args, seed, *options, temperature)
        ctx.options = options
        ctx.save_for_backward(*args, lse)
        ctx.mark_non_differentiable(sample)
        return loss, sample

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
        if torch.is_grad_enabled():  # create_graph: this op refuses a second derivative
            ctx.needs = ctx.needs_input_grad
            return linear_gradients(torch.ops.maskops, ctx, grad, ctx.options)
        hidden, weight, bias, target, lse = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        if kept is None:  # a retained graph, walked through once more
            args = hidden, weight, bias, target, None
            kept = torch.ops.maskops._masked_loss_linear_kept(*args, *ctx.options, 1.0)[3:]
        grad_hidden, grad_bias = torch.empty_like(hidden), weight.new_empty(weight.shape[:2])
        torch.ops.maskops._masked_loss_linear_kept_backward_(
            grad, hidden, weight, bias, target, lse, *kept, grad_hidden, grad_bias, *ctx.options
        )
        return grad_hidden, kept[0], grad_bias if bias is not None else None, *[None] * 4


def keeps(weight: Tensor, backend: str) -> bool:
    """Whether the CPU may keep the powers: a gradient of the weight is wanted, of a program that runs as it is written."""
    if weight.device.type != "cpu" or backend not in ("auto", "native") or torch.compiler.is_compiling():
        return False
    if not has_kernel("native", "_masked_loss_linear_kept", "cpu"):  # the reference would only store more
        return False
    # A private name, as in find_op, whose op refuses tangents by their names.
    return torch.is_grad_enabled() and weight.requires_grad and getattr(forward_ad, "_current_level", -1) < 0


def kept_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore: int, scale: float, smoothing: float,
    z_loss: float, seed: Tensor | None = None, temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """loss and sample [N, G]; the sample is empty without a seed."""
    if torch.is_autocast_enabled("cpu"):  # outside of the Function, where the casts are part of the graph
        dtype = torch.get_autocast_dtype("cpu")
        hidden, weight, bias = (x.to(dtype) if castable(x) else x for x in (hidden, weight, bias))
    return KeptLoss.apply(hidden, weight, bias, target, seed, (ignore, scale, smoothing, z_loss), temperature)


def _function(seed: Tensor | None) -> str:
    return FUNCTION if seed is None else "linear_sample"


def check_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, seed: Tensor | None, ignore: int, scale: float,
    smoothing: float, z_loss: float, temperature: float,
) -> None:  # fmt: skip
    check_linear(_function(seed), hidden, weight, bias, target, ignore, scale, smoothing, z_loss)
    if seed is not None:
        check_sample(_function(seed), hidden, seed, temperature)


def check_forward_data(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, seed: Tensor | None, ignore: int, *_: float
) -> None:
    check_target(_function(seed), target, ignore, weight.shape[1])


def _check_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor, powers: Tensor,
    tops: Tensor, grad_hidden: Tensor, grad_bias: Tensor, *options: Any,
) -> None:  # fmt: skip
    check_linear_backward(grad, hidden, weight, bias, target, lse, *options)
    books, classes, width = weight.shape
    sums, dtype = (accumulation_dtype(hidden.dtype),), (weight.dtype,)
    check_tensor(FUNCTION, "powers", powers, "[G, V, D]", dtype, weight.shape, hidden)
    check_tensor(FUNCTION, "tops", tops, "[G, tiles, D]", sums, (books, reference.tiles_of(classes), width), hidden)
    check_tensor(FUNCTION, "grad_hidden", grad_hidden, "[N, D]", dtype, hidden.shape, hidden)
    check_tensor(FUNCTION, "grad_bias", grad_bias, "[G, V]", dtype, weight.shape[:2], hidden)


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, seed: Tensor | None, *_: Any) -> tuple:
    books, classes, width = weight.shape
    sample = target.new_empty(target.shape if seed is not None else (0,))
    tops = hidden.new_empty((books, reference.tiles_of(classes), width), dtype=accumulation_dtype(hidden.dtype))
    return *(fake_loss(hidden, target) for _ in range(2)), sample, weight.new_empty(weight.shape), tops


define_op(
    OpSpec(
        f"_masked_loss_linear_kept({LINEAR}, Tensor? seed, {OPTIONS}, float temperature)"
        " -> (Tensor loss, Tensor lse, Tensor sample, Tensor powers, Tensor tops)",
        family="masked_loss",
        reference=reference._masked_loss_linear_kept,
        check=check_forward,
        check_data=check_forward_data,
        fake=_fake,
        cuda=False,
        triton=False,
    )
)
define_op(
    OpSpec(
        f"_masked_loss_linear_kept_backward_(Tensor grad, {LINEAR}, Tensor lse, Tensor(a!) powers, Tensor tops,"
        f" Tensor(b!) grad_hidden, Tensor(c!) grad_bias, {OPTIONS}) -> ()",
        family="masked_loss",
        reference=reference._masked_loss_linear_kept_backward_,
        check=_check_backward,
        check_data=lambda grad, hidden, weight, bias, target, *rest: check_target(
            FUNCTION, target, rest[5], weight.shape[1]
        ),
        fake=lambda *args: None,
        cuda=False,
        triton=False,
    )
)
