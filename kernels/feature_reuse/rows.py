"""Rows of the cache: write them, hide them, compare them."""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import accumulator, cdiv, launch, row_tile, rows_of


@triton.jit
def _write_kernel(ids_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, valid_ptr, U, N, width, D, sx_b, sx_h, sx_u, sx_d, sy_b, sy_h,
                  sy_u, sy_d, sk_b, sk_h, sk_n, sk_d, sv_b, sv_h, sv_n, sv_d, sm_b, sm_n, BLOCK: tl.constexpr):  # fmt: skip
    # One program owns a local slot of a row: the keys and values of all heads of its token, width = H * D values each, BLOCK at a
    # time. Slots of a row name different tokens, so no two programs write the same place.
    slot = tl.program_id(0).to(tl.int64)
    b = slot // U
    u = slot % U
    token = tl.load(ids_ptr + slot)
    if token >= 0:
        tl.store(valid_ptr + b * sm_b + token * sm_n, 1)
        for c0 in range(0, width, BLOCK):
            c = c0 + tl.arange(0, BLOCK)
            h = (c // D).to(tl.int64)
            d = (c % D).to(tl.int64)
            k = tl.load(k_ptr + b * sx_b + h * sx_h + u * sx_u + d * sx_d, mask=c < width)
            tl.store(k_cache_ptr + b * sk_b + h * sk_h + token * sk_n + d * sk_d, k, mask=c < width)
            v = tl.load(v_ptr + b * sy_b + h * sy_h + u * sy_u + d * sy_d, mask=c < width)
            tl.store(v_cache_ptr + b * sv_b + h * sv_h + token * sv_n + d * sv_d, v, mask=c < width)


def feature_reuse_write_(k_cache, v_cache, valid, k, v, ids):
    B, H, U, D = k.shape
    block = min(1024, max(16, triton.next_power_of_2(H * D)))
    launch(
        _write_kernel, B * U, ids.contiguous(), k, v, k_cache, v_cache, valid.view(torch.uint8), U, k_cache.shape[2], H * D, D,
        *k.stride(), *v.stride(), *k_cache.stride(), *v_cache.stride(), *valid.stride(), BLOCK=block, num_warps=4,
    )  # fmt: skip


@triton.jit
def _exclude_kernel(valid_ptr, ids_ptr, seen_ptr, B, N, U, BLOCK: tl.constexpr):
    # One program owns a row of valid [L, B, N]: it copies the flags and, when all of its threads have, clears those of the ids.
    row = tl.program_id(0).to(tl.int64)
    for n0 in range(0, N, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        tl.store(seen_ptr + row * N + n, tl.load(valid_ptr + row * N + n, mask=n < N, other=0), mask=n < N)
    tl.debug_barrier()
    for u0 in range(0, U, BLOCK):
        u = u0 + tl.arange(0, BLOCK)
        token = tl.load(ids_ptr + row % B * U + u, mask=u < U, other=-1)
        tl.store(seen_ptr + row * N + token, tl.zeros([BLOCK], tl.uint8), mask=token >= 0)


def feature_reuse_exclude(valid, ids):
    L, B, N = valid.shape
    seen = torch.empty(valid.shape, dtype=torch.bool, device=valid.device)
    launch(
        _exclude_kernel, L * B, valid.contiguous().view(torch.uint8), ids.contiguous(), seen.view(torch.uint8), B, N, ids.shape[1],
        BLOCK=256, num_warps=4,
    )  # fmt: skip
    return seen


@triton.jit
def _drift_kernel(new_ptr, cached_ptr, out_ptr, rows, N, D, sx_b, sx_n, sy_b, sy_n, KIND: tl.constexpr, ACC: tl.constexpr,
                  BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_R rows of new and cached [B, N, D] and reads each once, BLOCK_D channels at a time.
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    x_row = (r // N * sx_b + r % N * sx_n)[:, None]
    y_row = (r // N * sy_b + r % N * sy_n)[:, None]
    xx = tl.zeros([BLOCK_R, BLOCK_D], ACC)
    yy = tl.zeros([BLOCK_R, BLOCK_D], ACC)
    xy = tl.zeros([BLOCK_R, BLOCK_D], ACC)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)[None, :]
        mask = (r < rows)[:, None] & (d < D)
        x = tl.load(new_ptr + x_row + d, mask=mask, other=0.0).to(ACC)
        y = tl.load(cached_ptr + y_row + d, mask=mask, other=0.0).to(ACC)
        if KIND == 0:
            xx += x * x
            yy += y * y
            xy += x * y
        else:
            xx += (x - y) * (x - y)
    first = tl.sqrt(tl.sum(xx, 1))
    if KIND == 0:
        other = tl.sqrt(tl.sum(yy, 1))
        lengths = first * other
        some = ((first != 0) | (other != 0)).to(ACC)
        drift = tl.where(lengths == 0, some, 1 - tl.sum(xy, 1) / tl.where(lengths == 0, 1.0, lengths))
    else:
        drift = first
    tl.store(out_ptr + r, drift, mask=r < rows)


def feature_reuse_drift(new, cached, kind):
    (B, N, D), (dtype, acc) = new.shape, accumulator(new)
    out = torch.empty((B, N), dtype=dtype, device=new.device)
    new, cached = rows_of(new), rows_of(cached)
    tile = row_tile(D)
    tile["BLOCK_R"] = min(8, tile["BLOCK_R"])  # three sums of each value
    launch(
        _drift_kernel, cdiv(B * N, tile["BLOCK_R"]), new, cached, out, B * N, N, D, *new.stride()[:2], *cached.stride()[:2],
        KIND=kind, ACC=acc, **tile,
    )  # fmt: skip
    return out
