"""Masks of nm_matmul: the n largest of every group of m, and packed bits.

R rows, K columns, G = ceil(K / m) groups.
"""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import accumulator, cdiv, launch, rows_of


@triton.jit
def _mask_kernel(scores_ptr, out_ptr, R, K, s_r, KEEP: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
                 BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_R rows x BLOCK_K columns of out [R, K]. A column is kept if fewer than KEEP of its group come
    # before it; the group is read once more per member, which hits the L1 cache, and any width needs no padding.
    tiles_k = tl.cdiv(K, BLOCK_K)
    r = (tl.program_id(0) // tiles_k).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    live = (r < R)[:, None] & (k < K)[None, :]
    score = tl.load(scores_ptr + (r * s_r)[:, None] + k[None, :], mask=live, other=0.0).to(ACC)
    first = k // GROUP * GROUP
    before = tl.zeros([BLOCK_R, BLOCK_K], tl.int32)
    for i in range(GROUP):
        j = first + i
        inside = live & (j < K)[None, :]
        other = tl.load(scores_ptr + (r * s_r)[:, None] + j[None, :], mask=inside, other=float("nan")).to(ACC)
        # NaN comes after every number. Equal scores, and two NaNs: the lower column comes first.
        larger = (other > score) | ((other == other) & (score != score))
        equal = (other == score) | ((other != other) & (score != score))
        before += (inside & (larger | (equal & (j < k)[None, :]))).to(tl.int32)
    tl.store(out_ptr + r[:, None] * K + k[None, :], (before < KEEP).to(tl.uint8), mask=live)


def nm_matmul_mask(scores, n, m):
    scores = rows_of(scores)
    (R, K), out = scores.shape, torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    block_k = min(1024, max(16, triton.next_power_of_2(K)))
    block_r = 1024 // block_k
    launch(
        _mask_kernel, cdiv(R, block_r) * cdiv(K, block_k), scores, out.view(torch.uint8), R, K, scores.stride(0),
        KEEP=n, GROUP=m, ACC=accumulator(scores)[1], BLOCK_R=block_r, BLOCK_K=block_k, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _pack_kernel(mask_ptr, out_ptr, total, K, row_bytes, s_r, BLOCK: tl.constexpr):
    # One program owns BLOCK bytes of out [R, row_bytes], and reads the eight columns of each side by side.
    b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    r = b // row_bytes
    lane = tl.arange(0, 8)
    k = (b % row_bytes * 8)[:, None] + lane[None, :]
    bit = tl.load(mask_ptr + (r * s_r)[:, None] + k, mask=(b < total)[:, None] & (k < K), other=0) != 0
    byte = tl.sum(bit.to(tl.int32) << lane[None, :], 1)
    tl.store(out_ptr + b, byte.to(tl.uint8), mask=b < total)


def nm_matmul_pack(mask):
    mask = rows_of(mask)
    (R, K), row_bytes = mask.shape, cdiv(mask.shape[1], 8)
    out = torch.empty((R, row_bytes), dtype=torch.uint8, device=mask.device)
    total = R * row_bytes
    launch(
        _pack_kernel, cdiv(total, 256), mask.view(torch.uint8), out, total, K, row_bytes, mask.stride(0),
        BLOCK=256, num_warps=4,
    )  # fmt: skip
    return out
