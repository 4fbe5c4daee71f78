"""Reference of the family mask_sampling: B rows, N tokens, K = max_keep kept slots, M = max_mask masked slots."""

import torch
from torch import Tensor

from maskops.reference.visible_tokens import exclusive_cumsum, ids_of_slots

Split = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def philox_words(seed: Tensor, count: int) -> Tensor:
    """The first `count` 32-bit words of Philox4x32-10 as int64 in [0, 2^32).  seed int64 [2] = (seed, offset)."""
    return philox(seed, torch.arange((count + 3) // 4, device=seed.device)).flatten()[:count]


def philox(seed: Tensor, counters: Tensor) -> Tensor:
    """The four words of every counter, int64 [..., 4]: counter (counter, offset), key = seed.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    low = 0xFFFFFFFF
    seed_value, offset = seed[0], seed[1]
    c = [counters & low, (counters >> 32) & low, (offset & low).expand_as(counters)]
    c.append(((offset >> 32) & low).expand_as(counters))
    k = [seed_value & low, (seed_value >> 32) & low]
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c[0])
        high1, low1 = _multiply(0xCD9E8D57, c[2])
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return torch.stack(c, -1)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product of two unsigned 32-bit numbers; int64 would overflow, so in 16-bit halves."""
    b_low, b_high = b & 0xFFFF, b >> 16
    low, high = a * b_low, a * b_high
    total = (low >> 16) + high
    return (total >> 16) & 0xFFFFFFFF, ((total & 0xFFFF) << 16) | (low & 0xFFFF)


def mask_sampling_uniform(
    seed: Tensor, num_keep: Tensor, lengths: Tensor | None, mask: Tensor | None, N: int, max_keep: int, max_mask: int,
    ascending: bool, across: int = 1, high: int = 1, wide: int = 1,
) -> Split:  # fmt: skip
    noise = philox_words(seed, num_keep.shape[0] * N).view(num_keep.shape[0], N)
    if mask is not None:
        noise = noise + (mask.long() << 32)
    split = _split_by_key(noise, num_keep, lengths, max_keep, max_mask, ascending)
    if high == wide == 1:
        return split
    return _of_patches(split[2] >= num_keep[:, None], num_keep, max_keep, max_mask, across, high, wide)


def _of_patches(
    hidden: Tensor, num_keep: Tensor, max_keep: int, max_mask: int, across: int, high: int, wide: int
) -> Split:
    """The split of the patches of a grid of cells, of which hidden [B, N] are not kept, high x wide patches to a cell."""
    (B, N), area = hidden.shape, high * wide
    if hidden.numel() == 0 or area == 0:  # nothing, however often
        slot = num_keep.new_empty(B, N * area)
    else:
        lines = hidden.view(B, N // across, 1, across, 1).expand(-1, -1, high, -1, wide).reshape(B, N * area)
        order = lines.to(torch.int8).argsort(dim=1, stable=True)
        slot = torch.empty_like(order).scatter_(1, order, torch.arange(N * area, device=order.device).expand_as(order))
    num_keep, num_mask = num_keep * area, (N - num_keep) * area
    ids_keep = ids_of_slots(slot, torch.zeros_like(num_keep), num_keep, max_keep * area)
    ids_mask = ids_of_slots(slot, num_keep, num_mask, max_mask * area)
    return ids_keep, ids_mask, slot, num_mask, exclusive_cumsum(num_keep)


def mask_sampling_rank(
    noise: Tensor, num_keep: Tensor, lengths: Tensor | None, max_keep: int, max_mask: int, ascending: bool
) -> Split:
    return _split_by_key(noise, num_keep, lengths, max_keep, max_mask, ascending)


def mask_sampling_top(score: Tensor, count: int) -> Tensor:
    """bool [B, N]: the `count` highest scores of each row; ties go to the lower index, NaN is lowest."""
    order = (-score).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return rank < count


def _split_by_key(
    key: Tensor, num_keep: Tensor, lengths: Tensor | None, max_keep: int, max_mask: int, ascending: bool
) -> Split:
    batch, tokens = key.shape
    index = torch.arange(tokens, device=key.device).expand(batch, tokens)
    lengths = torch.full_like(num_keep, tokens) if lengths is None else lengths
    by_key = key.argsort(dim=1, stable=True)
    padding = index >= lengths[:, None]
    # Padding goes last, in index order: a stable sort by "is padding" after the sort by key.
    by_key = by_key.gather(1, padding.gather(1, by_key).to(torch.int8).argsort(dim=1, stable=True))
    by_key = torch.where(padding, index, by_key)
    slot = torch.empty_like(by_key).scatter_(1, by_key, index)
    if ascending:
        group = (slot >= num_keep[:, None]).to(torch.int8) + (slot >= lengths[:, None])
        slot = torch.empty_like(slot).scatter_(1, group.argsort(dim=1, stable=True), index)
    num_mask = lengths - num_keep
    ids_keep = ids_of_slots(slot, torch.zeros_like(num_keep), num_keep, max_keep)
    ids_mask = ids_of_slots(slot, num_keep, num_mask, max_mask)
    return ids_keep, ids_mask, slot, num_mask, exclusive_cumsum(num_keep)
