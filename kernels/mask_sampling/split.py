"""Triton kernels of mask_sampling: every token gets an integer key, its rank is the number of smaller keys in its row.

Counting takes N^2 comparisons a row and no sort, so N may be anything; up to some thousands of tokens that is little
work, all of it parallel, and the rank is at once the slot of the token.
"""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import cdiv, cu_seqlens_of, launch, philox4x32, write_padding


@triton.jit
def _uniform_keys_kernel(seed_ptr, mask_ptr, key_ptr, total, N, BLOCK: tl.constexpr):
    # One program owns BLOCK Philox counters, i.e. 4*BLOCK consecutive keys of [B*N]: (class, noise, n) in 63 bits.
    # Class 1, tokens that mask asks to hide, comes after class 0; padding never takes part in the ranking.
    counter = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = philox4x32(counter, tl.load(seed_ptr + 1), tl.load(seed_ptr))
    noise = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    key = (noise << 30) | (i % N)
    if mask_ptr is not None:
        key |= tl.load(mask_ptr + i, mask=i < total, other=0).to(tl.int64) << 62
    tl.store(key_ptr + i, key, mask=i < total)


@triton.jit
def _noise_keys_kernel(noise_ptr, key_ptr, total, BLOCK: tl.constexpr):
    # One program owns BLOCK values of noise [B*N] and maps them to integers of the same order: flip the magnitude bits
    # of negative numbers. -0.0 counts as 0.0, NaN is larger than everything.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    noise = tl.load(noise_ptr + i, mask=i < total, other=0.0)
    positive = tl.where(noise == 0.0, tl.zeros_like(noise), noise)
    if noise_ptr.dtype.element_ty == tl.float64:
        bits = positive.to(tl.int64, bitcast=True)
    else:
        bits = positive.to(tl.int32, bitcast=True).to(tl.int64) << 32
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    tl.store(key_ptr + i, tl.where(noise != noise, 0x7FFFFFFFFFFFFFFF, key), mask=i < total)


@triton.jit
def _rank_kernel(key_ptr, count_ptr, length_ptr, keep_ptr, hide_ptr, restore_ptr, num_mask_ptr,
                 blocks, N, max_keep, max_mask,
                 PLACE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_KEYS: tl.constexpr):  # fmt: skip
    # One program owns BLOCK tokens of a row of key [B, N] and compares them with all keys of the row, BLOCK_KEYS at a
    # time; equal keys rank by index. With PLACE the rank is the slot, and the ids are written at once.
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    length = N + tl.zeros([], tl.int64)
    if length_ptr is not None:
        length = tl.load(length_ptr + b)
    key = tl.load(key_ptr + b * N + n, mask=n < N, other=0)
    rank = tl.zeros([BLOCK], tl.int32)
    for m0 in range(0, N, BLOCK_KEYS):
        m = m0 + tl.arange(0, BLOCK_KEYS)
        other = tl.load(key_ptr + b * N + m, mask=m < N, other=0)
        smaller = (other[None, :] < key[:, None]) | ((other[None, :] == key[:, None]) & (m[None, :] < n[:, None]))
        rank += tl.sum((smaller & (m < length)[None, :]).to(tl.int32), 1)
    slot = tl.where(n < length, rank, n).to(tl.int64)
    tl.store(restore_ptr + b * N + n, slot, mask=n < N)
    if PLACE:
        keep = tl.load(count_ptr + b)
        kept = (n < length) & (slot < keep)
        hidden = (n < length) & (slot >= keep)
        tl.store(keep_ptr + b * max_keep + slot, n.to(tl.int64), mask=kept & (slot < max_keep))
        tl.store(hide_ptr + b * max_mask + slot - keep, n.to(tl.int64), mask=hidden & (slot - keep < max_mask))
        if tl.program_id(0) % blocks == 0:
            tl.store(num_mask_ptr + b, length - keep)
            write_padding(keep_ptr + b * max_keep, keep, max_keep, 256)
            write_padding(hide_ptr + b * max_mask, length - keep, max_mask, 256)


@triton.jit
def _ascending_kernel(count_ptr, length_ptr, keep_ptr, hide_ptr, restore_ptr, num_mask_ptr, N, max_keep, max_mask,
                      BLOCK: tl.constexpr):  # fmt: skip
    # One program owns a row: the rank that restore [B, N] holds becomes the slot when the kept and the masked tokens
    # stand in index order each.
    b = tl.program_id(0).to(tl.int64)
    keep = tl.load(count_ptr + b)
    length = N + tl.zeros([], tl.int64)
    if length_ptr is not None:
        length = tl.load(length_ptr + b)
    before = tl.zeros([], tl.int32)  # kept tokens in the blocks already done
    for n0 in range(0, N, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        rank = tl.load(restore_ptr + b * N + n, mask=n < N, other=0)
        kept = (n < length) & (rank < keep)
        hidden = (n < length) & (rank >= keep)
        kept_rank = before + tl.cumsum(kept.to(tl.int32), 0) - kept.to(tl.int32)
        slot = tl.where(hidden, keep + n - kept_rank, n)
        tl.store(restore_ptr + b * N + n, tl.where(kept, kept_rank.to(tl.int64), slot), mask=n < N)
        tl.store(keep_ptr + b * max_keep + kept_rank, n.to(tl.int64), mask=kept & (kept_rank < max_keep))
        tl.store(hide_ptr + b * max_mask + slot - keep, n.to(tl.int64), mask=hidden & (slot - keep < max_mask))
        before += tl.sum(kept.to(tl.int32), 0)
    tl.store(num_mask_ptr + b, length - keep)
    write_padding(keep_ptr + b * max_keep, keep, max_keep, BLOCK)
    write_padding(hide_ptr + b * max_mask, length - keep, max_mask, BLOCK)


@triton.jit
def _kept_before(slot_ptr, c, N, keep, real):
    # Of ascending slots: kept cells before cell c, all of them where c is past the last.
    slot = tl.load(slot_ptr + c, mask=real & (c < N), other=0)
    return tl.where(c < N, tl.where(slot < keep, slot, c - (slot - keep)), keep), slot < keep


@triton.jit
def _cells_kernel(slot_ptr, count_ptr, keep_ptr, hide_ptr, restore_ptr, blocks, across, high, wide, N, max_keep, max_mask,
                  BLOCK: tl.constexpr):  # fmt: skip
    # One program owns BLOCK patches of a row of cells; slot [B, N]: the cells' split, ascending. max_keep, max_mask: of patches.
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    patches = high * wide * N
    real = i < patches
    width = tl.maximum(across * wide, 1)
    line, x = i // width, i % width
    first = line // tl.maximum(high, 1) * across
    cell = first + x // tl.maximum(wide, 1)
    keep = tl.load(count_ptr + b)
    slot_ptr += b * N
    above, _ = _kept_before(slot_ptr, first, N, keep, real)
    ended, _ = _kept_before(slot_ptr, first + across, N, keep, real)
    before, in_kept = _kept_before(slot_ptr, cell, N, keep, real)
    left = wide * (before - above) + tl.where(in_kept, x % tl.maximum(wide, 1), 0)
    before = wide * (high * above + line % tl.maximum(high, 1) * (ended - above)) + left
    kept, hidden = real & in_kept, real & (in_kept == 0)
    slot = tl.where(in_kept, before, high * wide * keep + i - before)
    tl.store(restore_ptr + b * patches + i, slot, mask=real)
    tl.store(keep_ptr + b * max_keep + slot, i, mask=kept & (slot < max_keep))
    slot -= high * wide * keep
    tl.store(hide_ptr + b * max_mask + slot, i, mask=hidden & (slot < max_mask))
    if tl.program_id(0) % blocks == 0:
        write_padding(keep_ptr + b * max_keep, high * wide * keep, max_keep, 256)
        write_padding(hide_ptr + b * max_mask, high * wide * (N - keep), max_mask, 256)


def _place(key, num_keep, lengths, max_keep, max_mask, ascending):
    (B, N), empty = key.shape, {"dtype": torch.int64, "device": key.device}
    num_keep = num_keep.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    ids_keep = torch.empty((B, max_keep), **empty)
    ids_mask = torch.empty((B, max_mask), **empty)
    ids_restore = torch.empty((B, N), **empty)
    num_mask = torch.empty(B, **empty)
    outputs = (ids_keep, ids_mask, ids_restore, num_mask)
    place = not ascending
    # A row of no tokens still needs its padding and its count, so there is at least one program per row.
    blocks = max(1, cdiv(N, 64))
    launch(
        _rank_kernel, B * blocks, key, num_keep, lengths, *outputs, blocks, N, max_keep, max_mask,
        PLACE=place, BLOCK=64, BLOCK_KEYS=64, num_warps=4,
    )  # fmt: skip
    if ascending:
        launch(_ascending_kernel, B, num_keep, lengths, *outputs, N, max_keep, max_mask, BLOCK=256, num_warps=4)
    return *outputs, cu_seqlens_of(num_keep)


def _patches(split, num_keep, across, high, wide):
    counts, N, area = num_keep.contiguous(), split[2].shape[1], high * wide
    out = [ids.new_empty(len(ids), area * ids.shape[1]) for ids in split[:3]]
    blocks = max(1, cdiv(area * N, 256))
    args = (split[2], counts, *out, blocks, across, high, wide, N, out[0].shape[1], out[1].shape[1])
    launch(_cells_kernel, len(counts) * blocks, *args, BLOCK=256, num_warps=4)
    return *out, split[3] * area, cu_seqlens_of(counts * area)


def mask_sampling_uniform(seed, num_keep, lengths, mask, N, max_keep, max_mask, ascending, across, high, wide):
    total = num_keep.shape[0] * N
    key = torch.empty((num_keep.shape[0], N), dtype=torch.int64, device=num_keep.device)
    bits = None if mask is None else mask.contiguous().view(torch.uint8)
    launch(_uniform_keys_kernel, cdiv(total, 1024), seed.contiguous(), bits, key, total, N, BLOCK=256, num_warps=4)
    split = _place(key, num_keep, lengths, max_keep, max_mask, ascending)
    return split if high == wide == 1 else _patches(split, num_keep, across, high, wide)


def mask_sampling_rank(noise, num_keep, lengths, max_keep, max_mask, ascending):
    key = torch.empty(noise.shape, dtype=torch.int64, device=noise.device)
    launch(_noise_keys_kernel, cdiv(key.numel(), 1024), noise.contiguous(), key, key.numel(), BLOCK=1024, num_warps=4)
    return _place(key, num_keep, lengths, max_keep, max_mask, ascending)


def mask_sampling_top(score, count):
    counts = torch.full((len(score),), count, dtype=torch.int64, device=score.device)
    return mask_sampling_rank(-score, counts, None, count, score.shape[1] - count, False)[2] < count
