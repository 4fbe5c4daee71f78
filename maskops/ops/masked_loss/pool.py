"""linear_max_pool and mask_pool: what many positions say, in one vector. B samples, L tokens, D width, V classes, Q masks."""

from typing import Any

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import FLOATS, check_is_dense, check_tensor, check_values
from maskops._registry import OpSpec, define_op
from maskops.ops.masked_loss.linear import INT64, NATIVE, check_is_dense_or_none, one_of
from maskops.reference import masked_loss as reference
from maskops.reference.visible_tokens import accumulation_dtype

FUNCTION = "linear_max_pool"
POOLS = ("mean", "softmax", "max")


@public("masked_loss_max_pool", native=NATIVE)
def linear_max_pool(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Take the highest logit of each class over the tokens of a sample; the [B, L, V] logits are never made.

        out[b, v] = max over the tokens l of mask[b] of hidden[b, l] weight[v] + bias[v]

    Args:
        hidden: float [B, L, D].
        weight: hidden's dtype [V, D].
        bias: hidden's dtype [V].
        mask: bool [B, L], which tokens count. Default: all.
        backend: "auto", "native", "triton", "reference".

    Returns:
        float32 [B, V], float64 for float64; -inf for a sample without tokens. Differentiable (once) in hidden, weight and bias:
        the gradient goes to the first token that has the highest logit.

    Notes:
        Tokens that do not count are not read: NaN there reaches nothing. Deterministic, for every number of threads too.

    Raises:
        ValueError: wrong dtype, shape or device.  TypeError: an argument of another type.

    Source:
        Bag-of-words decoding of DupMAE (Xiao et al., 2022, arXiv 2211.08769).

    Example:
        >>> hidden = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
        >>> maskops.linear_max_pool(hidden, torch.eye(2), mask=torch.tensor([[True, True, False]]))
        tensor([[1., 2.]])
    """
    check_is_dense(FUNCTION, "hidden", hidden)
    check_is_dense(FUNCTION, "weight", weight)
    check_is_dense_or_none(FUNCTION, "bias", bias)
    check_is_dense_or_none(FUNCTION, "mask", mask)
    if mask is None:
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    op = find_op("masked_loss_max_pool", hidden.device.type, backend)
    return op(hidden, weight, bias, mask)[0]


def mask_pool(features: Tensor, masks: Tensor, kind: str = "mean") -> Tensor:
    """Pool features under each of several masks.

        mean:    out[b, q] = sum over n of masks[b, q, n] features[b, n] / sum over n of masks[b, q, n]
        softmax: out[b, q] = sum over n of softmax(masks[b, q])[n] features[b, n]
        max:     out[b, q] = max over the n of masks[b, q] of features[b, n]

    Args:
        features: float [B, N, D].
        masks: [B, Q, N]: bool, or for "mean" non-negative weights, for "softmax" scores of features' dtype, -inf = hidden.
        kind: "mean", "softmax" or "max".

    Returns:
        features' dtype [B, Q, D]; differentiable in features and in weights or scores. A mask of nothing gives 0.

    Notes:
        Composed of PyTorch's products. NaN at positions that no mask of the sample shows reaches nothing. Of "max" the masks are
        walked one by one in memory: [B, Q, N, D] values exist.

    Raises:
        ValueError: wrong dtype, shape, device or kind.  TypeError: an argument of another type.

    Source:
        Mask pooling of FC-CLIP; map-softmax pooling of Mask-Adapter (Li et al., 2024, arXiv 2412.04533).

    Example:
        >>> features = torch.tensor([[[1.0], [3.0], [8.0]]])
        >>> maskops.mask_pool(features, torch.tensor([[[True, True, False], [False, False, False]]]))
        tensor([[[2.],
                 [0.]]])
    """
    function = "mask_pool"
    check_is_dense(function, "features", features)
    check_is_dense(function, "masks", masks)
    one_of(function, "kind", kind, POOLS)
    check_tensor(function, "features", features, "[B, N, D]", FLOATS, (None, None, None), features)
    batch, count, _ = features.shape
    dtypes = {"mean": (torch.bool, features.dtype), "softmax": (features.dtype,), "max": (torch.bool,)}[kind]
    check_tensor(function, "masks", masks, "[B, Q, N]", dtypes, (batch, None, count), features)
    if kind == "softmax":
        shown = masks != -torch.inf
        seen = shown.any(2, keepdim=True)
        share = torch.where(seen, masks, 0).softmax(2) * seen
    else:
        shown = masks != 0
        share = masks.to(features.dtype)
    clean = torch.where(shown.any(1)[:, :, None], features, 0)
    if kind == "max":
        found = clean[:, None].masked_fill(~masks[..., None], -torch.inf)
        found = found.amax(2) if count else features.new_full((batch, masks.shape[1], features.shape[2]), -torch.inf)
        return torch.where(masks.any(2)[..., None], found, 0)
    if kind == "softmax":
        return share @ clean
    # Shares of at most 1, by a power of two, which rounds nothing: sums of float16 would overflow.
    total = share.sum(2, keepdim=True, dtype=accumulation_dtype(share.dtype))
    scale = (-total.detach().clamp(min=1).log2().ceil()).exp2()
    out = (share * scale.to(share.dtype)) @ clean
    return torch.where(total == 0, 0, out / torch.where(total == 0, 1, total * scale)).to(features.dtype)


# ---------------------------------------------------------------- the op


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> None:
    check_tensor(FUNCTION, "hidden", hidden, "[B, L, D]", FLOATS, (None, None, None), hidden)
    check_tensor(FUNCTION, "weight", weight, "[V, D]", (hidden.dtype,), (None, hidden.shape[2]), hidden)
    if bias is not None:
        check_tensor(FUNCTION, "bias", bias, "[V]", (hidden.dtype,), weight.shape[:1], hidden)
    if mask is not None:
        check_tensor(FUNCTION, "mask", mask, "[B, L]", (torch.bool,), hidden.shape[:2], hidden)


def _check_backward(grad: Tensor, hidden: Tensor, weight: Tensor, at: Tensor) -> None:
    _check(hidden, weight, None, None)
    shape = hidden.shape[0], weight.shape[0]
    check_tensor(FUNCTION, "grad", grad, "[B, V]", (accumulation_dtype(hidden.dtype),), shape, hidden)
    check_tensor(FUNCTION, "at", at, "[B, V]", INT64, shape, hidden)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, _ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(hidden, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ops: Any, ctx: Any, grad: Tensor, _grad_at: Tensor) -> tuple:
    hidden, weight, at = ctx.saved_tensors
    grad_hidden, grad_weight, grad_bias = ops._masked_loss_max_pool_backward(grad, hidden, weight, at)
    return grad_hidden, grad_weight, grad_bias if ctx.has_bias else None, None


def _fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = hidden.shape[0], weight.shape[0]
    return hidden.new_empty(shape, dtype=accumulation_dtype(hidden.dtype)), hidden.new_empty(shape, dtype=torch.int64)


define_op(
    OpSpec(
        "masked_loss_max_pool(Tensor hidden, Tensor weight, Tensor? bias, Tensor mask) -> (Tensor out, Tensor at)",
        family="masked_loss",
        reference=reference.masked_loss_max_pool,
        check=_check,
        fake=_fake,
        setup=_setup,
        backward=_backward,
        cuda=False,
        autocast="lower",
    )
)
define_op(
    OpSpec(
        "_masked_loss_max_pool_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor at)"
        " -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
        family="masked_loss",
        reference=reference._masked_loss_max_pool_backward,
        check=_check_backward,
        check_data=lambda grad, hidden, weight, at: check_values(
            FUNCTION, "at", (at >= -1) & (at < hidden.shape[1]), f"be in [-1, {hidden.shape[1]})", at
        ),
        fake=lambda grad, hidden, weight, at: (
            hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])
        ),
        cuda=False,
    )
)  # fmt: skip
