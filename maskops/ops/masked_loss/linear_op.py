"""The op of linear_cross_entropy and its gradient. N rows, D width, G codebooks, V classes."""

from typing import Any

import torch
from torch import Tensor

from maskops._checks import FLOATS, check_tensor, fail, number
from maskops._registry import OpSpec, define_op
from maskops.reference import masked_loss as reference
from maskops.reference.visible_tokens import accumulation_dtype

FUNCTION = "linear_cross_entropy"
INT64 = (torch.int64,)


def check_linear(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore: int, scale: float,
    smoothing: float, z_loss: float,
) -> None:  # fmt: skip
    check_tensor(op, "hidden", hidden, "[N, D]", FLOATS, (None, None), hidden)
    check_tensor(op, "weight", weight, "[G, V, D]", (hidden.dtype,), (None, None, hidden.shape[1]), hidden)
    if bias is not None:
        check_tensor(op, "bias", bias, "[G, V]", (hidden.dtype,), weight.shape[:2], hidden)
    check_tensor(op, "target", target, "[N, G]", INT64, (hidden.shape[0], weight.shape[0]), hidden)
    if not 0 <= smoothing <= 1:
        fail(op, "label_smoothing", "be in [0, 1]", f"{smoothing:g}")
    if not z_loss >= 0:
        fail(op, "z_loss", "be at least 0", f"{z_loss:g}")
    if not scale > 0:
        fail(op, "scale", "be above 0", f"{scale:g}")


def positive(op: str, name: str, value: float) -> float:
    value = number(op, name, value)
    if not value > 0:
        fail(op, name, "be above 0", f"{value:g}")
    return value


def check_sample(op: str, hidden: Tensor, seed: Tensor, temperature: float) -> None:
    check_tensor(op, "seed", seed, "[2]", INT64, (2,), hidden)
    positive(op, "sample_temperature", temperature)


def check_target(op: str, target: Tensor, ignore: int, classes: int) -> None:
    """IndexError for a target that counts and is no class."""
    good = (target == ignore) | ((target >= 0) & (target < classes))
    if good.device.type != "cpu":
        torch._assert_async(good.all(), f"{op}: target must be in [0, {classes})")
    elif not good.all():
        n, g = torch.nonzero(~good)[0].tolist()
        raise IndexError(f"{op}: target[{n}, {g}] must be in [0, {classes}) or {ignore}, got {int(target[n, g])}")


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, target, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, bias, target, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ops: Any, ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple:
    return linear_gradients(ops, ctx, grad, ctx.options)


def linear_gradients(ops: Any, ctx: Any, grad: Tensor, options: tuple) -> tuple:
    hidden, weight, bias, target, lse = ctx.saved_tensors
    found = ops._masked_loss_linear_backward(grad, hidden, weight, bias, target, lse, *options)
    grad_bias = found[2] if bias is not None else None
    return found[0], found[1], grad_bias, *[None] * (len(ctx.needs) - 3)


def check_linear_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor, *options: Any
) -> None:
    check_linear(FUNCTION, hidden, weight, bias, target, *options)
    dtypes = (accumulation_dtype(hidden.dtype),)
    check_tensor(FUNCTION, "grad", grad, "[N, G]", dtypes, target.shape, hidden)
    check_tensor(FUNCTION, "lse", lse, "[N, G]", dtypes, target.shape, hidden)


def fake_loss(hidden: Tensor, target: Tensor) -> Tensor:
    return hidden.new_empty(target.shape, dtype=accumulation_dtype(hidden.dtype))


LINEAR = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target"
OPTIONS = "int ignore, float scale, float smoothing, float z_loss"
define_op(
    OpSpec(
        f"masked_loss_linear({LINEAR}, {OPTIONS}) -> (Tensor loss, Tensor lse)",
        family="masked_loss",
        reference=reference.masked_loss_linear,
        check=lambda *args: check_linear(FUNCTION, *args),
        check_data=lambda hidden, weight, bias, target, ignore, *rest: check_target(
            FUNCTION, target, ignore, weight.shape[1]
        ),
        fake=lambda hidden, weight, bias, target, *rest: (fake_loss(hidden, target), fake_loss(hidden, target)),
        setup=_setup,
        backward=_backward,
        cuda=False,
        autocast="lower",
    )
)
define_op(
    OpSpec(
        f"_masked_loss_linear_backward(Tensor grad, {LINEAR}, Tensor lse, {OPTIONS})"
        " -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
        family="masked_loss",
        reference=reference._masked_loss_linear_backward,
        check=check_linear_backward,
        check_data=lambda grad, hidden, weight, bias, target, lse, ignore, *rest: check_target(
            FUNCTION, target, ignore, weight.shape[1]
        ),
        fake=lambda grad, hidden, weight, *rest: (
            hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])
        ),
        cuda=False,
    )
)  # fmt: skip
