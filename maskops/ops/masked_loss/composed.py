"""Losses composed of PyTorch ops, for positions that count only. B samples, N positions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from maskops._checks import FLOATS, check_is_dense, check_tensor, finite
from maskops.ops.masked_loss.linear import INT64, check_is_dense_or_none, check_reduced, reduced


def replaced_token_loss(
    logits: Tensor, original: Tensor, corrupted: Tensor, mask: Tensor | None = None, *, reduction: str = "mean",
    denominator: str | float | Tensor = "count",
) -> Tensor:  # fmt: skip
    """Tell replaced tokens from original ones, at every position.

        label = corrupted != original;  loss = -log sigmoid(logits) where label, else -log sigmoid(-logits)

    Args:
        logits: float [...], above 0 for a replaced token.
        original: int64 [...], the text.
        corrupted: int64 [...], what the discriminator reads; a sample that equals the original is no replacement.
        mask: bool [...], which positions count, those that are no padding. Default: all.
        reduction: "mean" (sum / denominator), "sum", or "none".
        denominator: "count", "all" or a number, as in linear_cross_entropy.

    Returns:
        A scalar, or [...] with reduction="none"; float32, float64 for float64. Differentiable in logits.

    Notes:
        Logits that do not count are not used: NaN there reaches neither the loss nor the gradient. Nothing that counts gives 0.

    Raises:
        ValueError: wrong dtype, shape, device or option.  TypeError: an argument of another type.

    Source:
        ELECTRA (Clark et al., 2020, arXiv 2003.10555).

    Example:
        >>> text = torch.tensor([[5, 6]])
        >>> maskops.replaced_token_loss(torch.tensor([[0.0, 1.0]]), text, torch.tensor([[5, 7]]), reduction="none")
        tensor([[0.6931, 0.3133]])
    """
    op = "replaced_token_loss"
    for name, x in (("logits", logits), ("original", original), ("corrupted", corrupted)):
        check_is_dense(op, name, x)
    check_is_dense_or_none(op, "mask", mask)
    check_tensor(op, "logits", logits, "[...]", FLOATS, logits.shape, logits)
    for name, x in (("original", original), ("corrupted", corrupted)):
        check_tensor(op, name, x, "[...]", INT64, logits.shape, logits)
    mask = torch.ones_like(original, dtype=torch.bool) if mask is None else mask
    check_tensor(op, "mask", mask, "[...]", (torch.bool,), logits.shape, logits)
    check_reduced(op, mask, None, reduction, denominator, "[...]")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    clean = torch.where(mask, wide, 0)
    loss = F.binary_cross_entropy_with_logits(clean, (corrupted != original).to(clean.dtype), reduction="none")
    return reduced(torch.where(mask, loss, 0), mask, None, reduction, denominator)


def pairwise_rank_loss(
    scores: Tensor, target: Tensor, mask: Tensor | None = None, *, margin: float = 0.0, reduction: str = "mean",
    denominator: str | float | Tensor = "count",
) -> Tensor:  # fmt: skip
    """Order scores as a target is ordered: for each pair of positions a logistic loss on the difference.

        loss[b, i, j] = -log sigmoid(scores[b, i] - scores[b, j])   for the pairs with target[b, i] > target[b, j] + margin

    Args:
        scores: float [B, N].
        target: float [B, N], say the reconstruction loss of each patch; a constant.
        mask: bool [B, N]; a pair counts if both of its positions do. Default: all.
        margin: how much the targets of a pair must differ, >= 0.
        reduction: "mean" (sum / denominator), "sum", or "none".
        denominator: "count" = the pairs that count, "all" = B N N, or a number.

    Returns:
        A scalar, or [B, N, N] with reduction="none"; float32, float64 for float64. Differentiable in scores.

    Notes:
        Equal targets make no pair, and no pair gives 0. NaN at positions that do not count reaches nothing.

    Raises:
        ValueError: wrong dtype, shape, device or option.  TypeError: an argument of another type.

    Source:
        Relative loss prediction of HPM (Wang et al., 2023, arXiv 2304.05919).

    Example:
        >>> maskops.pairwise_rank_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor(0.1269)
    """
    op = "pairwise_rank_loss"
    check_is_dense(op, "scores", scores)
    check_is_dense(op, "target", target)
    check_is_dense_or_none(op, "mask", mask)
    check_tensor(op, "scores", scores, "[B, N]", FLOATS, (None, None), scores)
    check_tensor(op, "target", target, "[B, N]", FLOATS, scores.shape, scores)
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    check_tensor(op, "mask", mask, "[B, N]", (torch.bool,), scores.shape, scores)
    margin = finite(op, "margin", margin)
    if not margin >= 0:
        raise ValueError(f"{op}: margin must be at least 0, got {margin:g}")
    wide = scores if scores.dtype == torch.float64 else scores.float()
    clean, goal = torch.where(mask, wide, 0), torch.where(mask, target.detach(), 0)
    check_reduced(op, mask, None, reduction, denominator, "[B, N, N]")
    pairs = mask[:, :, None] & mask[:, None] & (goal[:, :, None] > goal[:, None] + margin)
    loss = torch.where(pairs, F.softplus(clean[:, None] - clean[:, :, None]), 0)
    return reduced(loss, pairs, None, reduction, denominator)
