"""Which tokens are visible: a boolean mask becomes ids, in one counting pass."""

from typing import NamedTuple

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import any_integer, check_generator, check_is_tensor, check_tensor, check_values, fail, integer
from maskops._registry import OpSpec, define_op
from maskops.reference import visible_tokens as reference

FUNCTION = "split_tokens"


class TokenSplit(NamedTuple):
    """Which tokens of each row are kept and which are masked, in every form that the ops need.

    Attributes:
        ids_keep: int64 [B, K], the kept tokens of each row, -1 in the slots past num_keep.
        ids_mask: int64 [B, M], the masked tokens of each row, -1 in the slots past num_mask.
        ids_restore: int64 [B, N], the slot of each token: kept tokens first, then masked ones, then padding.
        num_keep: int64 [B], kept tokens per row.
        num_mask: int64 [B], masked tokens per row; num_keep + num_mask is the row's length without padding.
        cu_seqlens: int32 [B + 1], where each row starts in the packed form: exclusive cumulative sum of num_keep.
        max_seqlen: an upper bound of num_keep, the width K.
        total: sum of num_keep where it is known without asking the device, else None.
    """

    ids_keep: Tensor
    ids_mask: Tensor
    ids_restore: Tensor
    num_keep: Tensor
    num_mask: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    total: int | None

    @property
    def mask(self) -> Tensor:
        """bool [B, N], True where a token is not kept."""
        return self.ids_restore >= self.num_keep[:, None]


def check_split(op: str, split: object) -> None:
    """TypeError unless split is a TokenSplit of tensors."""
    if not isinstance(split, TokenSplit):
        raise TypeError(f"{op}: split must be a TokenSplit, got {type(split).__name__}")
    for name, x in zip(split._fields[:6], split, strict=False):
        check_is_tensor(op, f"split.{name}", x)


@public("visible_tokens_split")
def split_tokens(
    mask: Tensor, *, order: str = "ascending", max_seqlen: int | None = None, max_masked: int | None = None,
    seed: "int | Tensor | None" = None, generator: torch.Generator | None = None, backend: str = "auto",
) -> TokenSplit:  # fmt: skip
    """Turn a boolean mask into the ids of its kept and masked tokens.

        ids_keep[b] = nonzero(~mask[b]);  ids_mask[b] = nonzero(mask[b]);  ids_restore[b, n] = slot of token n

    Args:
        mask: bool [B, N], True = masked.
        order: "ascending" keeps index order; "random" shuffles kept and masked tokens (by seed or generator), as MAE does.
        max_seqlen: an upper bound of the kept tokens per row. Without it the counts are read from the device (a host sync;
            under torch.compile(fullgraph=True) pass it).
        max_masked: an upper bound of the masked tokens per row. Default: N if max_seqlen is given, else the exact maximum.
        seed: for order="random": int, or int64 tensor (0-d, or [2] = seed and offset) on the mask's device.
        generator: for order="random": a torch.Generator to draw the seed from.
        backend: "auto", "native", "triton", "reference".

    Returns:
        TokenSplit; nothing in it is differentiable.

    Notes:
        Rows may keep different counts, none or all: unused slots hold -1. B = 0 and N = 0 work. Deterministic.

    Raises:
        ValueError: wrong dtype or shape, unknown order, a row with more tokens than a given bound.

    Source:
        The mask bookkeeping of MAE (He et al., 2021, arXiv 2111.06377), without its two sorts.

    Example:
        >>> split = maskops.split_tokens(torch.tensor([[True, False, True, False]]))
        >>> split.ids_keep.tolist(), split.ids_mask.tolist(), split.ids_restore.tolist()
        ([[1, 3]], [[0, 2]], [[2, 0, 3, 1]])
    """
    if order not in ("ascending", "random"):
        fail(FUNCTION, "order", "be 'ascending' or 'random'", repr(order))
    check_tensor(FUNCTION, "mask", mask, "[B, N]", (torch.bool,), (None, None), mask)
    check_generator(FUNCTION, generator)
    if seed is not None and not isinstance(seed, Tensor):
        any_integer(FUNCTION, "seed", seed)
    max_keep, max_mask, total = _widths(mask, max_seqlen, max_masked)
    if order == "random":
        from maskops.ops.mask_sampling import shuffled_split

        _check(mask, max_keep, max_mask)
        if not torch.compiler.is_compiling():  # there the op itself checks, in the words of random_masking
            _check_data(mask, max_keep, max_mask)
        return shuffled_split(mask, max_keep, max_mask, total, seed, generator, backend, FUNCTION)
    split = find_op("visible_tokens_split", mask.device.type, backend)
    ids_keep, ids_mask, ids_restore, num_keep, cu_seqlens = split(mask, max_keep, max_mask)
    num_mask = mask.shape[1] - num_keep
    return TokenSplit(ids_keep, ids_mask, ids_restore, num_keep, num_mask, cu_seqlens, max_keep, total)


def _widths(mask: Tensor, max_seqlen: int | None, max_masked: int | None) -> tuple[int, int, int | None]:
    """K, M and, where the counts were read anyway, their total."""
    batch, tokens = mask.shape
    max_masked = None if max_masked is None else integer(FUNCTION, "max_masked", max_masked)
    if max_seqlen is not None:
        max_seqlen = integer(FUNCTION, "max_seqlen", max_seqlen)
        return max_seqlen, tokens if max_masked is None else max_masked, None
    if batch == 0 or tokens == 0:
        return 0, 0, 0
    masked = mask.sum(1)
    low, high, total = torch.stack([masked.min(), masked.max(), masked.sum()]).tolist()
    return tokens - low, high if max_masked is None else max_masked, batch * tokens - total


def _check(mask: Tensor, max_keep: int, max_mask: int) -> None:
    check_tensor(FUNCTION, "mask", mask, "[B, N]", (torch.bool,), (None, None), mask)
    for name, bound in (("max_seqlen", max_keep), ("max_masked", max_mask)):
        if bound < 0:
            fail(FUNCTION, name, "be at least 0", bound)


def _check_data(mask: Tensor, max_keep: int, max_mask: int) -> None:
    masked = mask.sum(1)
    kept = mask.shape[1] - masked
    check_values(FUNCTION, "kept tokens of mask", kept <= max_keep, f"be at most max_seqlen = {max_keep}", kept)
    check_values(FUNCTION, "masked tokens of mask", masked <= max_mask, f"be at most max_masked = {max_mask}", masked)


def _fake(mask: Tensor, max_keep: int, max_mask: int) -> tuple[Tensor, ...]:
    def ids(*size: int) -> Tensor:
        return mask.new_empty(size, dtype=torch.int64)

    batch, tokens = mask.shape
    cu_seqlens = mask.new_empty(batch + 1, dtype=torch.int32)
    return ids(batch, max_keep), ids(batch, max_mask), ids(batch, tokens), ids(batch), cu_seqlens


define_op(
    OpSpec(
        "visible_tokens_split(Tensor mask, SymInt max_keep, SymInt max_mask)"
        " -> (Tensor ids_keep, Tensor ids_mask, Tensor ids_restore, Tensor num_keep, Tensor cu_seqlens)",
        family="visible_tokens",
        reference=reference.visible_tokens_split,
        check=_check,
        check_data=_check_data,
        fake=_fake,
    )
)
