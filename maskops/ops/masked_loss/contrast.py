"""contrastive_loss: each query's positive among chosen negatives, keys read in place. M queries, P keys, K negatives, D width."""

from typing import Any

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import FLOATS, above_zero, boolean, check_is_dense, check_tensor, fail
from maskops._registry import OpSpec, define_op
from maskops.ops.masked_loss.linear import INT64, NATIVE, check_reduced, one_of, reduced, unit_rows
from maskops.reference import masked_loss as reference
from maskops.reference.visible_tokens import accumulation_dtype

FUNCTION = "contrastive_loss"
COLLISIONS = ("-inf", "keep")


@public("masked_loss_contrast", native=NATIVE)
def contrastive_loss(
    query: Tensor, keys: Tensor, positives: Tensor, negatives_ids: Tensor, temperature: float = 0.1, collide: str = "-inf", *,
    cosine: bool = True, weight_per_token: Tensor | None = None, reduction: str = "mean",
    denominator: str | float | Tensor = "count", backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Tell each query's positive key from chosen negatives; the [M, K, D] tensor of those is never made.

        logits[m, k] = cos(query[m], keys[id[m, k]]) / temperature,   id[m] = positives[m], negatives_ids[m]
        loss[m] = logsumexp(logits[m]) - logits[m, 0]

    Args:
        query: float [M, D].
        keys: query's dtype [P, D].
        positives: int64 [M], the key of each query; -1 = this query does not count.
        negatives_ids: int64 [M, K], with repetition as they come; -1 = empty slot.
        temperature: > 0.
        collide: what becomes of a negative that equals the positive, in values: "-inf" = it is left out; "keep".
        cosine: unit vectors; otherwise plain dot products.
        weight_per_token: float [M]: a factor of each loss.
        reduction: "mean" (sum / denominator), "sum", or "none".
        denominator: "count", "weight", "all" or a number, as in linear_cross_entropy.
        backend: "auto", "native", "triton", "reference".

    Returns:
        A scalar, or [M] with reduction="none"; float32, float64 for float64. Differentiable (once) in query, keys and
        weight_per_token.

    Notes:
        Without negatives the loss is 0. Queries that do not count and keys that no counted query names are not read: NaN there
        reaches nothing. A vector of zeros has cosine 0 with all, without a gradient. Gradients of keys are summed in the order of
        the queries: deterministic, for every number of threads too.

    Raises:
        ValueError: wrong dtype, shape, device or option.  IndexError: an id out of range.  TypeError: another type.

    Source:
        wav2vec 2.0 (Baevski et al., 2020, arXiv 2006.11477).

    Example:
        >>> keys = torch.eye(3)
        >>> negatives = torch.tensor([[1, 2], [0, -1], [0, 1]])
        >>> maskops.contrastive_loss(keys, keys, torch.tensor([0, 1, -1]), negatives, 1.0, reduction="none")
        tensor([0.5514, 0.3133, 0.0000])
    """
    for name, x in (("query", query), ("keys", keys), ("positives", positives), ("negatives_ids", negatives_ids)):
        check_is_dense(FUNCTION, name, x)
    one_of(FUNCTION, "collide", collide, COLLISIONS)
    scale = 1 / above_zero(FUNCTION, "temperature", temperature)
    _check(query, keys, positives, negatives_ids, scale, True, FLOATS)
    counted = positives >= 0
    check_reduced(FUNCTION, counted, weight_per_token, reduction, denominator, "[M]")
    if boolean(FUNCTION, "cosine", cosine):
        query, keys = unit_rows(query, counted), unit_rows(keys, _named(keys, positives, negatives_ids))
    op = find_op("masked_loss_contrast", query.device.type, backend)
    loss, _ = op(query, keys, positives, negatives_ids, scale, collide == "-inf")
    return reduced(loss, counted, weight_per_token, reduction, denominator)


def _named(keys: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """bool [P]: the keys that a counted query names. What is no id at all is the op's to refuse."""
    ids = torch.cat([positives[:, None], negatives], 1)
    last = keys.shape[0]
    ids = torch.where((positives >= 0)[:, None] & (ids >= 0) & (ids < last), ids, last)
    return torch.zeros(last + 1, dtype=torch.bool, device=keys.device).scatter(0, ids.flatten(), True)[:-1]


# ---------------------------------------------------------------- the op


def _check(
    query: Tensor, keys: Tensor, positive: Tensor, negatives: Tensor, scale: float, collide: bool,
    dtypes: tuple[torch.dtype, ...] = (),
) -> None:  # fmt: skip
    """dtypes: what keys may be before autocast. Default: query's."""
    check_tensor(FUNCTION, "query", query, "[M, D]", FLOATS, (None, None), query)
    check_tensor(FUNCTION, "keys", keys, "[P, D]", dtypes or (query.dtype,), (None, query.shape[1]), query)
    check_tensor(FUNCTION, "positives", positive, "[M]", INT64, query.shape[:1], query)
    check_tensor(FUNCTION, "negatives_ids", negatives, "[M, K]", INT64, (query.shape[0], None), query)
    if not scale > 0:
        fail(FUNCTION, "scale", "be above 0", f"{scale:g}")


def _check_ids(keys: Tensor, **ids: Tensor) -> None:
    for name, x in ids.items():
        good = (x >= -1) & (x < keys.shape[0])
        if good.device.type != "cpu":
            torch._assert_async(good.all(), f"{FUNCTION}: {name} must be in [-1, {keys.shape[0]})")
        elif not good.all():
            at = torch.nonzero(~good)[0].tolist()
            where = ", ".join(str(i) for i in at)
            got = int(x[tuple(at)])
            raise IndexError(f"{FUNCTION}: {name}[{where}] must be in [-1, {keys.shape[0]}), got {got}")


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, keys, positive, negatives, *ctx.options = inputs
    ctx.save_for_backward(query, keys, positive, negatives, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ops: Any, ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple:
    return *ops._masked_loss_contrast_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 4


def _check_backward(
    grad: Tensor, query: Tensor, keys: Tensor, positive: Tensor, negatives: Tensor, lse: Tensor, *options: Any
) -> None:
    _check(query, keys, positive, negatives, *options)
    for name, x in (("grad", grad), ("lse", lse)):
        check_tensor(FUNCTION, name, x, "[M]", (accumulation_dtype(query.dtype),), query.shape[:1], query)


ROWS = "Tensor query, Tensor keys, Tensor positive, Tensor negatives"
define_op(
    OpSpec(
        f"masked_loss_contrast({ROWS}, float scale, bool collide) -> (Tensor loss, Tensor lse)",
        family="masked_loss",
        reference=reference.masked_loss_contrast,
        check=_check,
        check_data=lambda query, keys, positive, negatives, *_: _check_ids(
            keys, positives=positive, negatives_ids=negatives
        ),
        fake=lambda query, *rest: tuple(
            query.new_empty(query.shape[0], dtype=accumulation_dtype(query.dtype)) for _ in range(2)
        ),
        setup=_setup,
        backward=_backward,
        cuda=False,
        autocast="promote",
    )
)
define_op(
    OpSpec(
        f"_masked_loss_contrast_backward(Tensor grad, {ROWS}, Tensor lse, float scale, bool collide)"
        " -> (Tensor grad_query, Tensor grad_keys)",
        family="masked_loss",
        reference=reference._masked_loss_contrast_backward,
        check=_check_backward,
        check_data=lambda grad, query, keys, positive, negatives, *_: _check_ids(
            keys, positives=positive, negatives_ids=negatives
        ),
        fake=lambda grad, query, keys, *rest: (query.new_empty(query.shape), keys.new_empty(keys.shape)),
        cuda=False,
    )
)
