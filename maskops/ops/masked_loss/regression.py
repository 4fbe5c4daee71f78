"""masked_regression: features of masked positions against those of a teacher. N rows, D width."""

from typing import Any

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import FLOATS, above_zero, boolean, check_is_dense, check_tensor, fail
from maskops._registry import OpSpec, define_op
from maskops.ops.masked_loss.linear import (
    NATIVE,
    check_is_dense_or_none,
    check_reduced,
    one_of,
    reduced,
    rows_first,
)
from maskops.reference import masked_loss as reference
from maskops.reference.visible_tokens import accumulation_dtype

FUNCTION = "masked_regression"
KINDS = ("l2", "l1", "smooth_l1", "cosine")


@public("masked_loss_regression", native=NATIVE)
def masked_regression(
    pred: Tensor, target: Tensor, mask: Tensor | None = None, kind: str = "l2", normalise: bool = False,
    denominator: str | float | Tensor = "count", *, beta: float = 1.0, eps: float = 1e-6, weight_per_token: Tensor | None = None,
    reduction: str = "mean", backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Regress the features of the masked positions; those of the others are not read.

        if normalise: target = (target - mean) / sqrt(var + eps), per position, as a layer norm without parameters
        loss[n] = mean over D of (pred - target)^2  (l2; l1; smooth_l1 with beta);   1 - cos(pred, target)  (cosine)

    Args:
        pred: float [..., D].
        target: pred's dtype and shape.
        mask: bool [...], which positions count. Default: all.
        kind: "l2", "l1", "smooth_l1" or "cosine".
        normalise: the target, by its own mean and deviation.
        denominator: "count" = the positions that count, so that the loss is a mean over their elements; "weight" = the sum of
            their weights; "all" = all positions, counted or not; or the number itself. Nothing to divide by gives 0.
        beta: where smooth_l1 turns from square to linear, > 0.
        eps: > 0, added to the variance.
        weight_per_token: float [...]: a factor of each position's loss.
        reduction: "mean" (sum / denominator), "sum", or "none".
        backend: "auto", "native", "triton", "reference".

    Returns:
        A scalar, or [...] with reduction="none" (0 where nothing counts); float32, float64 for float64. Differentiable (once)
        in pred and weight_per_token; the target is a constant.

    Notes:
        For several terms with denominators of their own, one call each: none of them makes a copy. NaN in positions that do not
        count reaches neither the loss nor the gradient, which is 0 there. A vector of zeros has cosine 0. Deterministic.

    Raises:
        ValueError: wrong dtype, shape, device or option.  TypeError: an argument of another type.

    Source:
        data2vec (Baevski et al., 2022, arXiv 2202.03555); MaskAlign (Xue et al., 2022, arXiv 2211.08887).

    Example:
        >>> mask = torch.tensor([True, False])
        >>> maskops.masked_regression(torch.ones(2, 4), torch.zeros(2, 4), mask).item()
        1.0
    """
    for name, x in (("pred", pred), ("target", target)):
        check_is_dense(FUNCTION, name, x)
    check_is_dense_or_none(FUNCTION, "mask", mask)
    one_of(FUNCTION, "kind", kind, KINDS)
    if pred.dim() < 1:
        fail(FUNCTION, "pred", "have shape [..., D]", list(pred.shape))
    # Whether the two dtypes agree is the op's to say: autocast may make them so.
    check_tensor(FUNCTION, "pred", pred, "[..., D]", FLOATS, pred.shape, pred)
    check_tensor(FUNCTION, "target", target, "[..., D]", FLOATS, pred.shape, pred)
    places = pred.shape[:-1]
    if mask is None:
        mask = torch.ones(places, dtype=torch.bool, device=pred.device)
    check_tensor(FUNCTION, "mask", mask, "[...]", (torch.bool,), places, pred)
    check_reduced(FUNCTION, mask, weight_per_token, reduction, denominator, "[...]")
    op = find_op("masked_loss_regression", pred.device.type, backend)
    options = (
        kind,
        above_zero(FUNCTION, "beta", beta),
        boolean(FUNCTION, "normalise", normalise),
        above_zero(FUNCTION, "eps", eps),
    )
    loss = op(rows_first(pred), rows_first(target.detach()), mask.flatten(), *options).reshape(places)
    return reduced(loss, mask, weight_per_token, reduction, denominator)


# ---------------------------------------------------------------- the op


def _check(pred: Tensor, target: Tensor, mask: Tensor, kind: str, beta: float, normalise: bool, eps: float) -> None:
    check_tensor(FUNCTION, "pred", pred, "[N, D]", FLOATS, (None, None), pred)
    check_tensor(FUNCTION, "target", target, "[N, D]", (pred.dtype,), pred.shape, pred)
    check_tensor(FUNCTION, "mask", mask, "[N]", (torch.bool,), pred.shape[:1], pred)
    if not beta > 0:
        fail(FUNCTION, "beta", "be above 0", f"{beta:g}")
    if not eps > 0:
        fail(FUNCTION, "eps", "be above 0", f"{eps:g}")
    if kind not in KINDS:
        fail(FUNCTION, "kind", f"be one of {KINDS}", repr(kind))


def _check_backward(grad: Tensor, pred: Tensor, *rest: Any) -> None:
    _check(pred, *rest)
    check_tensor(FUNCTION, "grad", grad, "[N]", (accumulation_dtype(pred.dtype),), pred.shape[:1], pred)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    pred, target, mask, *ctx.options = inputs
    ctx.save_for_backward(pred, target, mask)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    return ops._masked_loss_regression_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 6


OPTIONS = "Tensor pred, Tensor target, Tensor mask, str kind, float beta, bool normalise, float eps"
define_op(
    OpSpec(
        f"masked_loss_regression({OPTIONS}) -> Tensor",
        family="masked_loss",
        reference=reference.masked_loss_regression,
        check=_check,
        fake=lambda pred, *rest: pred.new_empty(pred.shape[0], dtype=accumulation_dtype(pred.dtype)),
        setup=_setup,
        backward=_backward,
        constants=("target",),
        cuda=False,
        autocast="promote",
    )
)
define_op(
    OpSpec(
        f"_masked_loss_regression_backward(Tensor grad, {OPTIONS}) -> Tensor",
        family="masked_loss",
        reference=reference._masked_loss_regression_backward,
        check=_check_backward,
        fake=lambda grad, pred, *rest: pred.new_empty(pred.shape),
        cuda=False,
    )
)
