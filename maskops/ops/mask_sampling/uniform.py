"""The family mask_sampling: draw random masks on the device, the same ones on every backend.

Size letters: B rows, N tokens, K kept slots, M masked slots.
"""

import math

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import (
    any_integer,
    check_generator,
    check_is_dense,
    check_tensor,
    check_values,
    fail,
    integer,
    number,
)
from maskops._registry import OpSpec, define_op
from maskops.ops.visible_tokens.split import TokenSplit
from maskops.reference import mask_sampling as reference

__all__ = ["random_masking"]

FUNCTION = "random_masking"
INT64 = (torch.int64,)
MAX_TOKENS = 2**30
Seed = int | Tensor | None


@public("mask_sampling_uniform")
def random_masking(
    B: int, N: int, mask_ratio: float | None = None, *, num_keep: int | Tensor | None = None, rounding: str = "floor",
    lengths: Tensor | None = None, max_seqlen: int | None = None, noise: Tensor | None = None, seed: Seed = None,
    generator: torch.Generator | None = None, device: torch.device | str | None = None, order: str = "random",
    backend: str = "auto",
) -> TokenSplit:  # fmt: skip
    """Keep a uniformly random subset of the tokens of each row.

        noise[b, n] ~ Philox(seed, offset)[b * N + n];  kept = the num_keep tokens of row b with the smallest noise

    Args:
        B, N: rows, tokens per row (N < 2^30).
        mask_ratio: share of masked tokens, in [0, 1]; kept per row = floor or round of (1 - mask_ratio) * length.
        num_keep: instead of mask_ratio: the exact number to keep, an int or int64 [B].
        rounding: "floor" = int(length * (1 - mask_ratio)), the rule of MAE; "round" = half to even, the rule of OpenBEATs.
        lengths: int64 [B], tokens of each row that are real; the rest is padding, neither kept nor masked. Default: N.
        max_seqlen: an upper bound of the kept tokens per row, for num_keep or lengths given as tensors: saves a host sync.
        noise: float [B, N] to rank instead of drawing (smallest kept; ties by index, NaN last).
        seed: int, or an int64 tensor on the device, 0-d or [2] = (seed, offset), so that compiled and captured programs draw
            fresh masks. Default: drawn from `generator`, else from PyTorch's generator of the device.
        generator: a torch.Generator to draw the seed from.
        device: where the masks are drawn. Default: that of noise, seed, lengths or num_keep if one is a tensor, else the CPU.
        order: "random" leaves ids_keep and ids_mask shuffled, as MAE; "ascending" sorts them.
        backend: "auto", "native", "triton", "reference".

    Returns:
        TokenSplit; nothing in it is differentiable.

    Notes:
        The same seed gives the same mask on every backend and for every number of threads. Equal 32-bit noise (chance about
        N^2 / 2^33 per row) is settled by the lower index. mask_ratio 0 and 1, B = 0 and N = 0 work.

    Raises:
        ValueError: neither or both of mask_ratio and num_keep, a value out of range, wrong dtype, shape or device.

    Source:
        random_masking of MAE (He et al., 2021, arXiv 2111.06377); Philox: Salmon et al., 2011.

    Example:
        >>> split = maskops.random_masking(2, 16, 0.75, seed=0)
        >>> split.ids_keep.shape, int(split.mask.sum())
        (torch.Size([2, 4]), 24)
    """
    device = _device(device, noise, seed, lengths, num_keep, generator)
    B, N = integer(FUNCTION, "B", B), integer(FUNCTION, "N", N)
    if num_keep is not None and not isinstance(num_keep, Tensor):
        num_keep = integer(FUNCTION, "num_keep", num_keep)
    mask_ratio = None if mask_ratio is None else number(FUNCTION, "mask_ratio", mask_ratio)
    max_seqlen = None if max_seqlen is None else integer(FUNCTION, "max_seqlen", max_seqlen)
    if max_seqlen is not None and not 0 <= max_seqlen < MAX_TOKENS:
        fail(FUNCTION, "max_seqlen", "be in [0, 2^30)", max_seqlen)
    _check_arguments(B, N, mask_ratio, num_keep, rounding, order, noise)
    counts, max_keep, max_mask, total = _keep_counts(B, N, mask_ratio, num_keep, rounding, lengths, max_seqlen, device)
    if noise is None:
        op = find_op("mask_sampling_uniform", device.type, backend)
        out = op(
            seed_tensor(seed, generator, device), counts, lengths, None, N, max_keep, max_mask, order == "ascending"
        )
    else:
        op = find_op("mask_sampling_rank", device.type, backend)
        noise = noise.float() if noise.dtype in (torch.bfloat16, torch.float16) else noise
        out = op(noise, counts, lengths, max_keep, max_mask, order == "ascending")
    ids_keep, ids_mask, ids_restore, num_mask, cu_seqlens = out
    return TokenSplit(ids_keep, ids_mask, ids_restore, counts, num_mask, cu_seqlens, max_keep, total)


def shuffled_split(
    mask: Tensor, max_keep: int, max_mask: int, total: int | None, seed: Seed, generator: torch.Generator | None, backend: str,
    function: str,
) -> TokenSplit:  # fmt: skip
    """The split of a given mask, kept and masked tokens each in random order: split_tokens(order="random").

    function: what errors name; it has checked the mask and its bounds.
    """
    num_keep = mask.shape[1] - mask.sum(1)
    op = find_op("mask_sampling_uniform", mask.device.type, backend, function)
    seed = seed_tensor(seed, generator, mask.device, function)
    out = op(seed, num_keep, None, mask, mask.shape[1], max_keep, max_mask, False)
    ids_keep, ids_mask, ids_restore, num_mask, cu_seqlens = out
    return TokenSplit(ids_keep, ids_mask, ids_restore, num_keep, num_mask, cu_seqlens, max_keep, total)


def seed_tensor(
    seed: Seed, generator: torch.Generator | None, device: torch.device, function: str = FUNCTION
) -> Tensor:
    """int64 [2] = (seed, offset) on the device.  function: the public function that errors name."""
    check_generator(function, generator)
    if seed is not None and generator is not None:
        raise ValueError(f"{function}: seed and generator must not both be given: one of them would be ignored")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or tuple(seed.shape) not in ((), (2,)):
            fail(function, "seed", "be int, or int64 [] or [2]", f"{seed.dtype} {list(seed.shape)}")
        check_is_dense(function, "seed", seed)
        if seed.is_meta and device.type != "meta":
            fail(function, "seed", f"be on {device}", "a tensor on meta")
        seed = seed.to(device)
        return seed if seed.dim() else torch.stack([seed, torch.zeros_like(seed)])
    if seed is not None:
        signed = (any_integer(function, "seed", seed) + 2**63) % 2**64 - 2**63
        return torch.tensor([signed, 0], dtype=torch.int64, device=device)
    source = device if generator is None else generator.device
    return torch.randint(2**63 - 1, (2,), generator=generator, device=source).to(device)


def _device(
    device: torch.device | str | None, noise: Tensor | None, seed: Seed, lengths: Tensor | None,
    num_keep: int | Tensor | None, generator: torch.Generator | None,
) -> torch.device:  # fmt: skip
    if device is not None:
        try:
            return torch.device(device)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{FUNCTION}: device must be a device or its name, got {device!r}") from None
    for x in (noise, lengths, num_keep, seed, generator):
        if isinstance(x, Tensor | torch.Generator):
            return x.device
    return torch.device("cpu")


def _check_arguments(
    B: int,
    N: int,
    mask_ratio: float | None,
    num_keep: int | Tensor | None,
    rounding: str,
    order: str,
    noise: Tensor | None,
) -> None:
    if B < 0 or not 0 <= N < MAX_TOKENS:
        fail(FUNCTION, "B and N", "be at least 0, N below 2^30", (B, N))
    if (mask_ratio is None) == (num_keep is None):
        fail(FUNCTION, "mask_ratio or num_keep", "be given, one of them", f"{mask_ratio} and {num_keep}")
    if mask_ratio is not None and not 0 <= mask_ratio <= 1:
        fail(FUNCTION, "mask_ratio", "be in [0, 1]", mask_ratio)
    if rounding not in ("floor", "round"):
        fail(FUNCTION, "rounding", "be 'floor' or 'round'", repr(rounding))
    if order not in ("random", "ascending"):
        fail(FUNCTION, "order", "be 'random' or 'ascending'", repr(order))
    if noise is not None:
        check_is_dense(FUNCTION, "noise", noise)
    if noise is not None and tuple(noise.shape) != (B, N):
        fail(FUNCTION, "noise", f"have shape [B, N] = [{B}, {N}]", f"{list(noise.shape)}")


def _keep_counts(
    B: int, N: int, mask_ratio: float | None, num_keep: int | Tensor | None, rounding: str, lengths: Tensor | None,
    max_seqlen: int | None, device: torch.device,
) -> tuple[Tensor, int, int, int | None]:  # fmt: skip
    """num_keep [B], K, M and the total of kept tokens where it needs no question to the device."""
    if lengths is None and not isinstance(num_keep, Tensor):
        keep = _keep_of(N, mask_ratio, rounding) if num_keep is None else num_keep
        if not 0 <= keep <= N:
            fail(FUNCTION, "num_keep", f"be in [0, {N}]", keep)
        return torch.full((B,), keep, dtype=torch.int64, device=device), keep, N - keep, B * keep
    if lengths is None:
        lengths = torch.full((B,), N, dtype=torch.int64, device=device)
    check_tensor(FUNCTION, "lengths", lengths, "[B]", INT64, (B,), lengths)
    if num_keep is None:
        exact = lengths.double() * (1 - mask_ratio)
        counts = (exact.floor() if rounding == "floor" else exact.round()).long()
    else:
        counts = num_keep if isinstance(num_keep, Tensor) else torch.full_like(lengths, num_keep)
    check_tensor(FUNCTION, "num_keep", counts, "[B]", INT64, (B,), lengths)
    if max_seqlen is not None or B == 0:
        return counts, max_seqlen or 0, N, None
    most_kept, most_masked, total = torch.stack([counts.max(), (lengths - counts).max(), counts.sum()]).tolist()
    return counts, max(most_kept, 0), max(most_masked, 0), total


def _keep_of(length: int, mask_ratio: float, rounding: str) -> int:
    exact = length * (1 - mask_ratio)
    return math.floor(exact) if rounding == "floor" else round(exact)


# ---------------------------------------------------------------- the two ops


def _check_counts(num_keep: Tensor, lengths: Tensor | None, batch: int | None, max_keep: int, max_mask: int) -> None:
    check_tensor(FUNCTION, "num_keep", num_keep, "[B]", INT64, (batch,), num_keep)
    if lengths is not None:
        check_tensor(FUNCTION, "lengths", lengths, "[B]", INT64, (num_keep.shape[0],), num_keep)
    for name, bound in (("max_keep", max_keep), ("max_mask", max_mask)):
        if bound < 0:
            fail(FUNCTION, name, "be at least 0", bound)


def _check_uniform(
    seed: Tensor, num_keep: Tensor, lengths: Tensor | None, mask: Tensor | None, N: int, max_keep: int, max_mask: int,
    ascending: bool, across: int, high: int, wide: int,
) -> None:  # fmt: skip
    _check_counts(num_keep, lengths, None, max_keep, max_mask)
    check_tensor(FUNCTION, "seed", seed, "[2]", INT64, (2,), num_keep)
    if mask is not None:
        check_tensor(FUNCTION, "mask", mask, "[B, N]", (torch.bool,), (num_keep.shape[0], N), num_keep)
    sizes, single = [("N", N), ("high", high), ("wide", wide)], high == 1 and wide == 1
    if not single:
        sizes += [
            ("high wide", high * wide),
            ("high wide N", high * wide * N),
            ("max_keep", max_keep),
            ("max_mask", max_mask),
        ]
    for name, value in sizes:
        if not 0 <= value < MAX_TOKENS:
            fail(FUNCTION, name, "be in [0, 2^30)", value)
    if single:
        return
    if across < 1 or N % across:
        fail(FUNCTION, "across", f"divide N = {N}", across)
    if lengths is not None:
        fail(FUNCTION, "high and wide", "be 1 where lengths are given", f"{high} and {wide}")
    if not ascending:
        fail(FUNCTION, "high and wide", "be 1 in random order", f"{high} and {wide}")


def _check_rank(
    noise: Tensor, num_keep: Tensor, lengths: Tensor | None, max_keep: int, max_mask: int, ascending: bool
) -> None:
    check_tensor(FUNCTION, "noise", noise, "[B, N]", (torch.float32, torch.float64), (None, None), noise)
    _check_counts(num_keep, lengths, noise.shape[0], max_keep, max_mask)
    if num_keep.device != noise.device:
        fail(FUNCTION, "num_keep", f"be on {noise.device}", f"a tensor on {num_keep.device}")
    if noise.shape[1] >= MAX_TOKENS:
        fail(FUNCTION, "N", "be in [0, 2^30)", noise.shape[1])


def _check_counts_data(num_keep: Tensor, lengths: Tensor | None, tokens: int, max_keep: int, max_mask: int) -> None:
    if lengths is not None:
        check_values(FUNCTION, "lengths", (lengths >= 0) & (lengths <= tokens), f"be in [0, {tokens}]", lengths)
    room = tokens if lengths is None else lengths
    inside = (num_keep >= 0) & (num_keep <= room) & (num_keep <= max_keep)
    check_values(FUNCTION, "num_keep", inside, f"be in [0, length] and at most {max_keep}", num_keep)
    check_values(FUNCTION, "masked tokens", room - num_keep <= max_mask, f"be at most {max_mask}", room - num_keep)


def _fake_split(num_keep: Tensor, tokens: int, max_keep: int, max_mask: int) -> tuple[Tensor, ...]:
    batch = num_keep.shape[0]
    ids = [num_keep.new_empty(batch, width) for width in (max_keep, max_mask, tokens)]
    return *ids, num_keep.new_empty(batch), num_keep.new_empty(batch + 1, dtype=torch.int32)


define_op(
    OpSpec(
        "mask_sampling_uniform(Tensor seed, Tensor num_keep, Tensor? lengths, Tensor? mask, SymInt N, SymInt max_keep,"
        " SymInt max_mask, bool ascending, SymInt across=1, SymInt high=1, SymInt wide=1)"
        " -> (Tensor ids_keep, Tensor ids_mask, Tensor ids_restore, Tensor num_mask, Tensor cu_seqlens)",
        family="mask_sampling",
        reference=reference.mask_sampling_uniform,
        check=_check_uniform,
        check_data=lambda seed, num_keep, lengths, mask, N, max_keep, max_mask, *_: _check_counts_data(
            num_keep, lengths, N, max_keep, max_mask
        ),
        fake=lambda seed, num_keep, lengths, mask, N, max_keep, max_mask, ascending, across, high, wide: _fake_split(
            num_keep, *(size * (high * wide) for size in (N, max_keep, max_mask))
        ),
    )
)
define_op(
    OpSpec(
        "mask_sampling_rank(Tensor noise, Tensor num_keep, Tensor? lengths, SymInt max_keep, SymInt max_mask,"
        " bool ascending) -> (Tensor ids_keep, Tensor ids_mask, Tensor ids_restore, Tensor num_mask, Tensor cu_seqlens)",
        family="mask_sampling",
        reference=reference.mask_sampling_rank,
        check=_check_rank,
        check_data=lambda noise, num_keep, lengths, max_keep, max_mask, ascending: _check_counts_data(
            num_keep, lengths, noise.shape[1], max_keep, max_mask
        ),
        fake=lambda noise, num_keep, lengths, max_keep, max_mask, ascending: _fake_split(
            num_keep, noise.shape[1], max_keep, max_mask
        ),
    )
)
