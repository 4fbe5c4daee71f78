"""Index kernels of visible_tokens: the split of a mask, and the inverse of an id list."""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import cdiv, cu_seqlens_of, launch, write_padding


@triton.jit
def _split_kernel(mask_ptr, keep_ptr, hide_ptr, restore_ptr, count_ptr, N, max_keep, max_mask, BLOCK: tl.constexpr):
    # One program owns one row of mask [B, N]: a first pass counts the kept tokens, a second gives every token its slot.
    # Rows are short (N is some hundreds to thousands), so a running scan in one program beats a device-wide one.
    b = tl.program_id(0).to(tl.int64)
    kept = tl.zeros([], tl.int32)
    for n0 in range(0, N, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        kept += tl.sum((tl.load(mask_ptr + b * N + n, mask=n < N, other=1) == 0).to(tl.int32), 0)
    tl.store(count_ptr + b, kept.to(tl.int64))
    before = tl.zeros([], tl.int32)  # kept tokens in the blocks already done
    for n0 in range(0, N, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        keep = tl.load(mask_ptr + b * N + n, mask=n < N, other=1) == 0
        rank = before + tl.cumsum(keep.to(tl.int32), 0) - keep.to(tl.int32)
        hidden_rank = n - rank
        tl.store(restore_ptr + b * N + n, tl.where(keep, rank, kept + hidden_rank).to(tl.int64), mask=n < N)
        tl.store(keep_ptr + b * max_keep + rank, n.to(tl.int64), mask=keep & (rank < max_keep))
        hide = (n < N) & (keep == 0) & (hidden_rank < max_mask)
        tl.store(hide_ptr + b * max_mask + hidden_rank, n.to(tl.int64), mask=hide)
        before += tl.sum(keep.to(tl.int32), 0)
    write_padding(keep_ptr + b * max_keep, kept, max_keep, BLOCK)
    write_padding(hide_ptr + b * max_mask, N - kept, max_mask, BLOCK)


def visible_tokens_split(mask, max_keep, max_mask):
    B, N = mask.shape
    empty = {"dtype": torch.int64, "device": mask.device}
    ids_keep = torch.empty((B, max_keep), **empty)
    ids_mask = torch.empty((B, max_mask), **empty)
    ids_restore = torch.empty((B, N), **empty)
    num_keep = torch.empty(B, **empty)
    bits = mask.contiguous().view(torch.uint8)
    outputs = (ids_keep, ids_mask, ids_restore, num_keep)
    launch(_split_kernel, B, bits, *outputs, N, max_keep, max_mask, BLOCK=1024 if N > 256 else 256, num_warps=4)
    return *outputs, cu_seqlens_of(num_keep)


@triton.jit
def patch_of_row(ids_ptr, r, rows, slots):
    """Of rows r = (b, k): b, k, the token n that ids [B, K] name (k itself without ids), and whether there is one."""
    b = r // slots
    k = r % slots
    n = k
    if ids_ptr is not None:
        n = tl.load(ids_ptr + r, mask=r < rows, other=-1)
    return b, k, n, (r < rows) & (n >= 0)


@triton.jit
def _invert_kernel(ids_ptr, out_ptr, total, K, N, BLOCK: tl.constexpr):
    # One program owns BLOCK entries of ids [B*K]; ids are unique within a row, so no two stores meet.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = tl.load(ids_ptr + i, mask=i < total, other=-1)
    tl.store(out_ptr + (i // K) * N + n, i % K, mask=n >= 0)


def invert_ids(ids, N):
    """ids [B, K] -> [B, N]: the slot k with ids[b, k] == n, or -1."""
    B, K = ids.shape
    out = torch.full((B, N), -1, dtype=torch.int64, device=ids.device)
    launch(_invert_kernel, cdiv(B * K, 1024), ids.contiguous(), out, B * K, K, N, BLOCK=1024, num_warps=4)
    return out
