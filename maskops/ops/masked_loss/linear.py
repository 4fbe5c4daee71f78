"""linear_cross_entropy: cross-entropy of a linear layer without memory for its logits. N rows, D width, G codebooks, V classes."""

from typing import NamedTuple

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
from maskops.ops.masked_loss.kept import keeps, kept_loss
from maskops.ops.masked_loss.linear_op import FUNCTION, INT64
from maskops.ops.masked_loss.patch import REDUCTIONS
from maskops.reference.visible_tokens import accumulation_dtype

DENOMINATORS = ("count", "weight", "all")
NATIVE = "C++ on CPU (AVX-512, AVX2, portable); on CUDA the Triton kernel; float32, float64, bfloat16, float16"


@public("masked_loss_linear", native=NATIVE)
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, mask: Tensor | None = None, ids: Tensor | None = None,
    bias: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0, weight_per_token: Tensor | None = None,
    temperature: float = 1.0, cosine: bool = False, z_loss: float = 0.0, reduction: str = "mean",
    denominator: str | float | Tensor = "count", backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Take the cross-entropy of a linear layer at the masked positions, tile by tile, without memory for the logits.

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
        counts gives 0. Deterministic, for every number of threads too. Memory: the gradients' and some MB. On the CPU the
        gradient of weight has its memory from the forward pass on, until the graph is freed: before it is one it holds the
        exponentials of the logits, so that the backward pass does not multiply again (torch.compile and the GPU do).

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
    args = rows.hidden, rows.weight, rows.bias, rows.target, rows.ignore, scale, smoothing, z_loss
    op = find_op("masked_loss_linear", hidden.device.type, backend)
    loss = kept_loss(*args)[0] if keeps(rows.weight, backend) else op(*args)[0]
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
