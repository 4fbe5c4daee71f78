"""linear_cross_entropy: cross-entropy of a linear layer, logits never stored. N rows, D width, G codebooks, V classes."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import (
    FLOATS,
    above_zero,
    boolean,
    check_ids,
    check_is_dense,
    check_tensor,
    describe,
    fail,
    finite,
    integer,
    number,
)
from maskops._registry import OpSpec, define_op
from maskops.ops.masked_loss.patch import REDUCTIONS
from maskops.reference import masked_loss as reference
from maskops.reference.visible_tokens import accumulation_dtype

FUNCTION = "linear_cross_entropy"
INT64 = (torch.int64,)
DENOMINATORS = ("count", "weight", "all")
NATIVE = "C++ on CPU (AVX-512, AVX2, portable); on CUDA the Triton kernel; float32, float64, bfloat16, float16"


@public("masked_loss_linear", native=NATIVE)
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, mask: Tensor | None = None, ids: Tensor | None = None,
    bias: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0, weight_per_token: Tensor | None = None,
    temperature: float = 1.0, cosine: bool = False, z_loss: float = 0.0, reduction: str = "mean",
    denominator: str | float | Tensor = "count", backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Take the cross-entropy of a linear layer at the masked positions, tile by tile: the logits are never stored.

        logits = (hidden weight^T + bias) / temperature;   of the unit vectors if cosine
        loss   = logsumexp(logits) - (1 - label_smoothing) logits[target] - label_smoothing mean(logits) + z_loss logsumexp^2

    Args:
        hidden: float [..., D].
        weight: hidden's dtype [V, D], or [G, V, D] for G codebooks at once.
        target: int64 [...], or [..., G]: the class of each row; with ids, of each of them, [B, K] or [B, K, G].
        mask: bool [...], which rows count. Default: all.
        ids: instead of mask: int64 [B, K] of the rows that count of hidden [B, N, D], no row twice; -1 = empty slot.
        bias: hidden's dtype [V] or [G, V].
        ignore_index: the target that does not count.
        label_smoothing: in [0, 1].
        weight_per_token: float, target's shape: a factor of each loss.
        temperature: > 0, divides the logits.
        cosine: unit vectors of hidden and weight, as HuBERT and wav2vec 2.0; a vector of zeros stays one, without a gradient.
        z_loss: factor of logsumexp^2, >= 0.
        reduction: "mean" (sum / denominator), "sum", or "none".
        denominator: "count" = the losses that count, "weight" = the sum of their weights, "all" = target's elements, or the
            number itself, above 0, or a tensor [] of it. Nothing to divide by gives 0, as does a tensor that is 0; one below 0 is
            taken as it is and turns the loss's sign, since to check it would wait for the device.
        backend: "auto", "native", "triton", "reference".

    Returns:
        A scalar, or target's shape with reduction="none" (0 where nothing counts); float32, float64 for float64.
        Differentiable (once) in hidden, weight, bias and weight_per_token, exactly so for every reduction.

    Notes:
        Rows that do not count are never read: NaN there reaches neither the loss nor a gradient, which is 0 there. No row that
        counts gives 0. Deterministic, for every number of threads too.

    Raises:
        ValueError: wrong dtype, shape, device or option.  IndexError: a target that is no class, an id out of range or twice.
        TypeError: an argument of another type.

    Source:
        Fused cross-entropy: Wijmans et al., "Cut Your Losses", 2024 (arXiv 2411.09009); z_loss: PaLM (arXiv 2204.02311).

    Example:
        >>> hidden, weight = torch.zeros(2, 3, 4), torch.zeros(5, 4)
        >>> mask = torch.tensor([[True, False, False], [True, True, False]])
        >>> maskops.linear_cross_entropy(hidden, weight, torch.zeros(2, 3, dtype=torch.long), mask=mask).exp()
        tensor(5.)
    """
    rows = rows_of(FUNCTION, hidden, weight, target, mask, ids, bias, ignore_index, cosine)
    scale = 1 / above_zero(FUNCTION, "temperature", temperature)
    smoothing, z_loss = number(FUNCTION, "label_smoothing", label_smoothing), finite(FUNCTION, "z_loss", z_loss)
    check_reduced(FUNCTION, rows.counted, weight_per_token, reduction, denominator, "target's shape")
    # The CPU keeps the exponentials where the gradient of the weight will be; torch.compile would copy what it writes over.
    native = hidden.device.type == "cpu" and backend in ("auto", "native") and not torch.compiler.is_compiling()
    kept = native and torch.is_grad_enabled() and rows.weight.requires_grad
    op = find_op("masked_loss_linear_kept" if kept else "masked_loss_linear", hidden.device.type, backend)
    loss = op(rows.hidden, rows.weight, rows.bias, rows.target, rows.ignore, scale, smoothing, z_loss)[0]
    return reduced(rows.of_target(loss), rows.counted, weight_per_token, reduction, denominator)


class Rows(NamedTuple):
    """The arguments as the ops take them: hidden [N, D], weight [G, V, D], bias [G, V] or None, target [N, G]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    ignore: int
    counted: Tensor  # bool, the caller's target's shape
    slots: Tensor | None  # int64 [B K], the row of each id; N for an empty slot

    def of_target(self, x: Tensor, fill: int = 0) -> Tensor:
        """x [N, G] in the shape of the caller's target."""
        if self.slots is not None:
            x = F.pad(x, (0, 0, 0, 1), value=fill)[self.slots]
        return x.reshape(self.counted.shape)


def rows_of(
    op: str, hidden: Tensor, weight: Tensor, target: Tensor, mask: Tensor | None, ids: Tensor | None, bias: Tensor | None,
    ignore_index: int, cosine: bool,
) -> Rows:  # fmt: skip
    """Check what is not the ops' to check, and flatten."""
    for name, x in (("hidden", hidden), ("weight", weight), ("target", target)):
        check_is_dense(op, name, x)
    for name, x in (("mask", mask), ("ids", ids), ("bias", bias)):
        check_is_dense_or_none(op, name, x)
    ignore = integer(op, "ignore_index", ignore_index)
    if weight.dim() not in (2, 3) or hidden.dim() < 1:
        name, x, want = ("weight", weight, "[V, D] or [G, V, D]") if hidden.dim() else ("hidden", hidden, "[..., D]")
        fail(op, name, f"have shape {want}", describe(x))
    if mask is not None and ids is not None:
        fail(op, "mask", "not be given with ids", describe(mask))
    books = weight.shape[:-2]
    places = hidden.shape[:-1]
    if ids is not None:
        check_tensor(op, "hidden", hidden, "[B, N, D]", FLOATS, (None, None, None), hidden)
        check_tensor(op, "ids", ids, "[B, K]", INT64, (hidden.shape[0], None), hidden)
        places = ids.shape
    shape = "[..., G]" if books else "[...]"
    check_tensor(op, "target", target, shape, INT64, (*places, *books), hidden)
    counted = target != ignore
    if mask is not None:
        check_tensor(op, "mask", mask, "[...]", (torch.bool,), places, hidden)
        counted = counted & (mask[..., None] if books else mask)
        target = torch.where(counted, target, ignore)
    weight = weight if books else weight[None]
    bias = bias if bias is None or books else bias[None]
    flat, slots = rows_first(target if books else target[..., None]), None
    if ids is not None:
        flat, slots, counted = _at_rows(op, hidden, flat, ids, counted, ignore)
    hidden = rows_first(hidden)
    if boolean(op, "cosine", cosine):
        check_tensor(op, "hidden", hidden, "[N, D]", FLOATS, (None, None), hidden)
        check_tensor(op, "weight", weight, "[G, V, D]", FLOATS, (None, None, hidden.shape[1]), hidden)
        hidden, weight = unit_rows(hidden, (flat != ignore).any(1)), unit_vectors(weight)
    return Rows(hidden, weight, bias, flat, ignore, counted, slots)


def rows_first(x: Tensor) -> Tensor:
    """[..., D] as [N, D], also where D is 0."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def unit_rows(x: Tensor, used: Tensor) -> Tensor:
    """Rows [N, D] of length 1; rows that are not used are 0 before, or NaN there would come back through the gradient."""
    return unit_vectors(torch.where(used[:, None], x, 0))


def unit_vectors(x: Tensor) -> Tensor:
    """Vectors [..., D] of length 1. One of zeros stays as it is, without a gradient: F.normalize gives NaN for it in float16,
    and a gradient of 1e12 in float32."""
    wide = x.to(accumulation_dtype(x.dtype))
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    some = length > 0
    return torch.where(some, wide / torch.where(some, length, 1), 0).to(x.dtype)


def _at_rows(
    op: str, hidden: Tensor, target: Tensor, ids: Tensor, counted: Tensor, ignore: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Targets of slots as targets of all rows; `slots`, the row of each slot; counted without the empty slots."""
    tokens = hidden.shape[1]
    check_ids(op, "ids", ids, tokens)
    rows = hidden.shape[0] * tokens
    first = torch.arange(hidden.shape[0], device=ids.device)[:, None] * tokens
    slots = torch.where(ids >= 0, first + ids, rows).reshape(-1)
    spread = target.new_full((rows + 1, target.shape[1]), ignore)
    spread = spread.scatter(0, slots[:, None].expand_as(target), target)[:-1]
    full = ids >= 0
    return spread, slots, counted & (full[..., None] if counted.dim() > 2 else full)


def one_of(op: str, arg: str, value: object, options: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{op}: {arg} must be str, got {value!r}")
    if value not in options:
        fail(op, arg, f"be one of {options}", repr(value))


def check_reduced(
    op: str, counted: Tensor, weight: Tensor | None, reduction: str, denominator: str | float | Tensor, shape: str
) -> None:
    """What `reduced` takes, checked before any kernel runs.  shape: of the losses, counted's, in words."""
    one_of(op, "reduction", reduction, REDUCTIONS)
    check_is_dense_or_none(op, "weight_per_token", weight)
    if weight is not None:
        check_tensor(op, "weight_per_token", weight, shape, FLOATS, counted.shape, counted)
    if isinstance(denominator, Tensor):
        check_tensor(op, "denominator", denominator, "[]", (*FLOATS, torch.int64), (), counted)
    elif not isinstance(denominator, str):
        above_zero(op, "denominator", denominator)
    elif denominator not in DENOMINATORS:
        fail(op, "denominator", f"be one of {DENOMINATORS} or a number", repr(denominator))


def check_is_dense_or_none(op: str, arg: str, x: object) -> None:
    if x is not None and not isinstance(x, Tensor):
        raise TypeError(f"{op}: {arg} must be a tensor or None, got {type(x).__name__}")
    if x is not None:
        check_is_dense(op, arg, x)


def reduced(
    loss: Tensor, counted: Tensor, weight: Tensor | None, reduction: str, denominator: str | float | Tensor
) -> Tensor:
    """loss [...] of which `counted` count, weighted and reduced as the public functions say, after check_reduced."""
    if weight is not None:
        weight = torch.where(counted, weight.to(loss.dtype), 0)
        loss = loss * weight
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else divided(total, counted, weight, denominator)


def divided(total: Tensor, counted: Tensor, weight: Tensor | None, denominator: str | float | Tensor) -> Tensor:
    """total / denominator, 0 where that is 0."""
    if isinstance(denominator, Tensor):
        by = denominator.to(total.dtype)
    elif denominator == "all":
        by = total.new_full((), float(max(counted.numel(), 1)))
    elif denominator == "count" or (denominator == "weight" and weight is None):
        by = counted.sum().to(total.dtype)
    elif denominator == "weight":
        by = weight.sum()
    else:
        return total / number("reduced", "denominator", denominator)
    return torch.where(by == 0, 0, total / torch.where(by == 0, 1, by))


def positive(op: str, name: str, value: float) -> float:
    value = number(op, name, value)
    if not value > 0:
        fail(op, name, "be above 0", f"{value:g}")
    return value


# ---------------------------------------------------------------- the op


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
