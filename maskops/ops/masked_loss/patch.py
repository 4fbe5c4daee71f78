"""masked_patch_loss: pixels of masked patches, targets read straight from the image. B batch, N patches, V values per patch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import FLOATS, boolean, check_ids, check_is_tensor, check_tensor, check_values, fail, number
from maskops._registry import OpSpec, define_op
from maskops.ops.visible_tokens.patches import check_images, patch_sizes
from maskops.ops.visible_tokens.split import TokenSplit, check_split
from maskops.reference import masked_loss as reference
from maskops.reference.visible_tokens import accumulation_dtype

FUNCTION = "masked_patch_loss"
INT64 = (torch.int64,)
KINDS, SELECTIONS, REDUCTIONS = ("l2", "l1", "smooth_l1"), ("masked", "visible", "all"), ("mean", "sum", "none")


@public("masked_loss_patch")
def masked_patch_loss(
    pred: Tensor, images: Tensor, split: TokenSplit, patch_size: int | Sequence[int], *, norm_pix: bool = True,
    kind: str = "l2", beta: float = 1.0, reduction: str = "mean", on: str = "masked", backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Regress the pixels of the selected patches, reading the targets straight from the image.

        target = patchify(images);  if norm_pix: target = (target - mean) / sqrt(var + 1e-6), per patch, var unbiased
        per_patch[b, n] = mean over V of |pred - target|^2  (l2; l1; smooth_l1 with beta)   for the selected patches

    Args:
        pred: float [B, N, V], values of a patch in patchify's default order; rows may be strided (`decoded[:, 1:]`).
        images: [B, C, H, W] or [B, C, T, H, W], pred's dtype or float32.
        split: which patches are masked.
        patch_size: as in patchify.
        norm_pix: normalise each target patch.
        kind: "l2", "l1" or "smooth_l1".
        beta: where smooth_l1 turns from square to linear, > 0.
        reduction: "mean" over the selected patches (0 if there are none), "sum" over them, "none" = per_patch.
        on: "masked", "visible" or "all" patches; padding counts in none of them.
        backend: "auto", "native", "triton", "reference".

    Returns:
        A scalar, or [B, N] with reduction="none" (0 where not selected); float32, float64 for float64. Differentiable (once)
        in pred. Images are the target: no gradient flows to them.

    Notes:
        The variance is taken in two passes, so constant patches are exact. NaN outside the selected patches reaches neither
        the loss nor the gradient, which is 0 there. Deterministic.

    Raises:
        ValueError: wrong dtype, shape or device, unknown kind, reduction or selection.  IndexError: ids_restore is no
        permutation.

    Source:
        forward_loss of MAE (He et al., 2021, arXiv 2111.06377).

    Example:
        >>> split = maskops.split_tokens(torch.tensor([[True, False]]))
        >>> pred, images = torch.ones(1, 2, 4), torch.zeros(1, 1, 2, 4)
        >>> maskops.masked_patch_loss(pred, images, split, 2, norm_pix=False).item()
        1.0
    """
    if reduction not in REDUCTIONS:
        fail(FUNCTION, "reduction", f"be one of {REDUCTIONS}", repr(reduction))
    check_is_tensor(FUNCTION, "pred", pred)
    check_is_tensor(FUNCTION, "images", images)
    check_split(FUNCTION, split)
    norm_pix, beta = boolean(FUNCTION, "norm_pix", norm_pix), number(FUNCTION, "beta", beta)
    for name, value in (("kind", kind), ("on", on)):
        if not isinstance(value, str):
            raise TypeError(f"{FUNCTION}: {name} must be str, got {value!r}")
    op = find_op("masked_loss_patch", pred.device.type, backend)
    sizes = patch_sizes(FUNCTION, patch_size, images.dim() - 2)
    rows = split.ids_restore, split.num_keep, split.num_mask
    per_patch, _ = op(pred, images.detach(), *rows, sizes, norm_pix, kind, beta, on)
    if reduction == "none":
        return per_patch
    if reduction == "sum":
        return per_patch.sum()
    counts = {"masked": split.num_mask, "visible": split.num_keep, "all": split.num_keep + split.num_mask}
    return per_patch.sum() / counts[on].sum().clamp(min=1)


# ---------------------------------------------------------------- the op


def _check(
    pred: Tensor, images: Tensor, ids_restore: Tensor, num_keep: Tensor, num_mask: Tensor, patch_size: list[int],
    norm_pix: bool, kind: str, beta: float, on: str,
) -> None:  # fmt: skip
    check_tensor(FUNCTION, "pred", pred, "[B, N, V]", FLOATS, (None, None, None), pred)
    allowed = (pred.dtype, torch.float32) if pred.dtype != torch.float64 else (pred.dtype,)
    tokens = check_images(FUNCTION, images, patch_size, allowed)
    values = images.shape[1]
    for size in patch_size:
        values = values * size
    check_tensor(FUNCTION, "images", images, "[B, C, ...]", allowed, (pred.shape[0], *images.shape[1:]), pred)
    check_tensor(FUNCTION, "pred", pred, "[B, N, V]", FLOATS, (None, tokens, values), pred)
    check_tensor(FUNCTION, "ids_restore", ids_restore, "[B, N]", INT64, pred.shape[:2], pred)
    check_tensor(FUNCTION, "num_keep", num_keep, "[B]", INT64, pred.shape[:1], pred)
    check_tensor(FUNCTION, "num_mask", num_mask, "[B]", INT64, pred.shape[:1], pred)
    if kind not in KINDS:
        fail(FUNCTION, "kind", f"be one of {KINDS}", repr(kind))
    if on not in SELECTIONS:
        fail(FUNCTION, "on", f"be one of {SELECTIONS}", repr(on))
    if not beta > 0:
        fail(FUNCTION, "beta", "be above 0", f"{beta:g}")


def _check_data(
    pred: Tensor, images: Tensor, ids_restore: Tensor, num_keep: Tensor, num_mask: Tensor, *rest: Any
) -> None:
    tokens = ids_restore.shape[1]
    check_ids(FUNCTION, "ids_restore", ids_restore, tokens, allow_pad=False)
    check_values(FUNCTION, "num_keep", (num_keep >= 0) & (num_keep <= tokens), f"be in [0, {tokens}]", num_keep)
    fits = (num_mask >= 0) & (num_mask <= tokens - num_keep)
    check_values(FUNCTION, "num_mask", fits, f"be at least 0 and num_keep + num_mask at most {tokens}", num_mask)


def _fake(pred: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(pred.dtype)
    return pred.new_empty(pred.shape[:2], dtype=dtype), pred.new_empty(*pred.shape[:2], 2, dtype=dtype)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    pred, images, ids_restore, num_keep, num_mask, *ctx.options = inputs
    ctx.save_for_backward(pred, images, output[1], ids_restore, num_keep, num_mask)
    ctx.mark_non_differentiable(output[1])


def _backward(ops: Any, ctx: Any, grad: Tensor, _grad_stats: Tensor) -> tuple:
    grad_pred = ops._masked_loss_patch_backward(grad, *ctx.saved_tensors, *ctx.options)
    return grad_pred, *[None] * 9


def _check_backward(
    grad: Tensor, pred: Tensor, images: Tensor, stats: Tensor, ids_restore: Tensor, num_keep: Tensor, num_mask: Tensor,
    *options: Any,
) -> None:  # fmt: skip
    _check(pred, images, ids_restore, num_keep, num_mask, *options)
    dtypes = (accumulation_dtype(pred.dtype),)
    check_tensor(FUNCTION, "grad", grad, "[B, N]", dtypes, pred.shape[:2], pred)
    check_tensor(FUNCTION, "stats", stats, "[B, N, 2]", dtypes, (*pred.shape[:2], 2), pred)


define_op(
    OpSpec(
        "masked_loss_patch(Tensor pred, Tensor images, Tensor ids_restore, Tensor num_keep, Tensor num_mask,"
        " SymInt[] patch_size, bool norm_pix, str kind, float beta, str on) -> (Tensor per_patch, Tensor stats)",
        family="masked_loss",
        reference=reference.masked_loss_patch,
        check=_check,
        check_data=_check_data,
        fake=_fake,
        setup=_setup,
        backward=_backward,
        constants=("images",),
    )
)
define_op(
    OpSpec(
        "_masked_loss_patch_backward(Tensor grad, Tensor pred, Tensor images, Tensor stats, Tensor ids_restore,"
        " Tensor num_keep, Tensor num_mask, SymInt[] patch_size, bool norm_pix, str kind, float beta, str on) -> Tensor",
        family="masked_loss",
        reference=reference._masked_loss_patch_backward,
        check=_check_backward,
        check_data=lambda grad, pred, images, stats, *rest: _check_data(pred, images, *rest),
        fake=lambda grad, pred, *rest: pred.new_empty(pred.shape),
    )
)
