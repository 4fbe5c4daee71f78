"""cached_attention: softmax(scale q k^T) v of a few local queries over the seen keys of a cache and over the local keys."""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import LN2, LOG2E, accumulator, bits_of, cdiv, dot_add, float_of, heads_of, launch, rounded

# element size -> channels -> (BLOCK_M, BLOCK_N, CHUNK, warps, stages), as the forward pass of masked_attention has them
CONFIGS = {
    2: {32: (32, 64, 32, 4, 3), 64: (32, 64, 64, 4, 3), 128: (32, 32, 64, 8, 1), 256: (16, 32, 64, 8, 1)},
    4: {32: (32, 32, 16, 4, 1), 64: (32, 32, 16, 4, 1), 128: (32, 16, 16, 8, 1), 256: (16, 16, 16, 8, 1)},
    8: {32: (32, 16, 16, 8, 1), 64: (16, 16, 16, 8, 1), 128: (16, 16, 16, 8, 1), 256: (16, 16, 16, 8, 1)},
}  # fmt: skip


@triton.jit
def _rows(ptr, row, stride, seen, D, d0, BLOCK: tl.constexpr):
    """Rows x channels [d0, d0 + BLOCK), zeros where a row is not seen: what is hidden is never loaded."""
    d = d0 + tl.arange(0, BLOCK)
    return tl.load(
        ptr + (row.to(tl.int64) * stride)[:, None] + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0
    )


@triton.jit
def _add_keys(q_ptr, m, real, sq_u, k_ptr, sk_n, v_ptr, sv_n, n, seen, scale2, most, weight, total, D,
              ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
              CHUNK: tl.constexpr):  # fmt: skip
    """One step of the online softmax over the keys n, where seen."""
    score = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for d0 in range(0, BLOCK_D, CHUNK):
        q = _rows(q_ptr, m, sq_u, real, D, d0, CHUNK)
        score = dot_add(q, tl.trans(_rows(k_ptr, n, sk_n, seen, D, d0, CHUNK)), score, PRECISION)
    v = _rows(v_ptr, n, sv_n, seen, D, 0, BLOCK_D)
    score = tl.where(seen[None, :], score * scale2, float("-inf"))
    before = most
    most = tl.maximum(before, tl.max(score, 1))
    level = tl.where(tl.abs(most) == float("inf"), 0.0, most)
    p = tl.exp2(score - level[:, None])
    shrink = tl.exp2(before - level)
    weight = weight * shrink + tl.sum(p, 1)
    total = dot_add(rounded(p, v.dtype), v, total * shrink[:, None], PRECISION)
    return most, weight, total


@triton.jit
def _attention_kernel(q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, seen_ptr, ids_ptr, out_ptr, lse_ptr, scale, H, U, N, D, D16,
                      sq_b, sq_h, sq_u, sk_b, sk_h, sk_u, sv_b, sv_h, sv_u, sc_b, sc_h, sc_n, sw_b, sw_h, sw_n, ACC: tl.constexpr,
                      PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                      CHUNK: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M local queries of one head of out [B, H, U, D]. It walks over the cache BLOCK_N keys at a time, where
    # hidden keys are not loaded, then over the local keys, with one running maximum and sum: no list, no copy, no second pass.
    blocks = tl.cdiv(U, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b = head // H
    h = head % H
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    real = tl.load(ids_ptr + b * U + m, mask=m < U, other=-1) >= 0
    scale2 = (float_of(scale) * LOG2E).to(ACC)
    q_ptr += b * sq_b + h * sq_h
    most = tl.full([BLOCK_M], float("-inf"), ACC)
    weight = tl.zeros([BLOCK_M], ACC)
    total = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        seen = tl.load(seen_ptr + b * N + n, mask=n < N, other=0) != 0
        most, weight, total = _add_keys(q_ptr, m, real, sq_u, k_cache_ptr + b * sc_b + h * sc_h, sc_n,
                                        v_cache_ptr + b * sw_b + h * sw_h, sw_n, n, seen, scale2, most, weight, total, D16, ACC,
                                        PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, CHUNK)  # fmt: skip
    for n0 in range(0, U, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        seen = tl.load(ids_ptr + b * U + n, mask=n < U, other=-1) >= 0
        most, weight, total = _add_keys(q_ptr, m, real, sq_u, k_ptr + b * sk_b + h * sk_h, sk_u, v_ptr + b * sv_b + h * sv_h, sv_u,
                                        n, seen, scale2, most, weight, total, D16, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
                                        CHUNK)  # fmt: skip
    level = tl.where(tl.abs(most) == float("inf"), 0.0, most)
    some = real & (weight != 0)
    lse = tl.where(some, level * LN2 + tl.log(tl.where(some, weight, 1.0)), float("-inf"))
    total = tl.where(some[:, None], total / tl.where(some, weight, 1.0)[:, None], 0.0)
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(lse_ptr + head * U + m, lse, mask=m < U)
    row = (head * U + m)[:, None]
    tl.store(out_ptr + row * D + d, rounded(total, out_ptr.dtype.element_ty), mask=(m < U)[:, None] & (d < D))


def feature_reuse_attention(q_local, k_local, v_local, k_cache, v_cache, seen, local_ids, scale):
    (B, H, U, D), N, (dtype, acc) = q_local.shape, k_cache.shape[2], accumulator(q_local)
    out = torch.empty((B, H, U, D), dtype=q_local.dtype, device=q_local.device)
    lse = torch.empty((B, H, U), dtype=dtype, device=q_local.device)
    (q, s_q), (k, s_k), (v, s_v) = (heads_of(x) for x in (q_local, k_local, v_local))
    (keys, s_keys), (values, s_values) = heads_of(k_cache), heads_of(v_cache)
    channels = max(32, triton.next_power_of_2(D))
    block_m, block_n, chunk, warps, stages = CONFIGS[q.dtype.itemsize][channels]
    exact = q.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    launch(
        _attention_kernel, B * H * cdiv(U, block_m), q, k, v, keys, values, seen.contiguous().view(torch.uint8),
        local_ids.contiguous(), out, lse, bits_of(scale), H, U, N, D, q.shape[3], *s_q, *s_k, *s_v, *s_keys, *s_values, ACC=acc,
        PRECISION="ieee" if exact else "tf32", BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=channels, CHUNK=chunk, num_warps=warps,
        num_stages=stages,
        # Left to itself, the assembler spills a few registers to keep one more block on a multiprocessor.
        maxnreg=255,
    )  # fmt: skip
    return out, lse
