"""Products with a dense weight under a bit-packed mask, one for all samples or one per sample.

S samples of M rows, N outputs, K inputs; bit k of a row of bits [1 or S, N, ceil(K/8)] says whether the row keeps column k.
Without bits the same kernels are the plain products that the soft masks need.
"""

import triton
import triton.language as tl
from maskops.kernels._common import accumulator, cdiv, dot_add, launch, rounded, rows_of
from maskops.kernels.nm_matmul.tiles import gemm_tile, tile_position


@triton.jit
def _kept_tile(bits_ptr, row, k0, live_row, row_bytes, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Bits of rows x columns [k0, k0 + BLOCK_K) as bool [BLOCK_N, BLOCK_K]; every byte is loaded once."""
    at = k0 // 8 + tl.arange(0, BLOCK_K // 8)
    mask = live_row[:, None] & (at < row_bytes)[None, :]
    byte = tl.load(bits_ptr + (row * row_bytes)[:, None] + at[None, :], mask=mask, other=0).to(tl.int32)
    bit = (byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bit, [BLOCK_N, BLOCK_K]) != 0


@triton.jit
def _weight_tile(weight_ptr, bits_ptr, row, k0, N, K, row_bytes, s_w, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tile [BLOCK_N, BLOCK_K] of the masked weight: selected, not multiplied, so a hidden NaN is gone."""
    k = k0 + tl.arange(0, BLOCK_K)
    at = (row * s_w)[:, None] + k[None, :]
    w = tl.load(weight_ptr + at, mask=(row < N)[:, None] & (k < K)[None, :], other=0.0)
    if bits_ptr is not None:
        w = tl.where(_kept_tile(bits_ptr, row, k0, row < N, row_bytes, BLOCK_N, BLOCK_K), w, 0.0)
    return w


@triton.jit
def _masked_linear_kernel(x_ptr, weight_ptr, bits_ptr, bias_ptr, out_ptr, M, N, K, row_bytes, s_xs, s_xm, s_w, s_bits,
                          ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
                          BLOCK_K: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_N outputs x BLOCK_M rows of one sample of out [S, M, N] and walks over the K inputs. It
    # computes the transpose, W x^T: the weight fills the matrix instruction however few rows a sample has.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    sample = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    at_n, at_m = tile_position(tl.program_id(0) % (tiles_m * tiles_n), tiles_n, tiles_m)
    row = at_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = at_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    if bits_ptr is not None:
        bits_ptr += sample * s_bits
    total = tl.zeros([BLOCK_N, BLOCK_M], ACC)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        at = (sample * s_xs + m * s_xm)[:, None] + k[None, :]
        x = tl.load(x_ptr + at, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        w = _weight_tile(weight_ptr, bits_ptr, row, k0, N, K, row_bytes, s_w, BLOCK_N, BLOCK_K)
        total = dot_add(w, tl.trans(x), total, PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(ACC)[:, None]
    at = ((sample * M + m) * N)[None, :] + row[:, None]
    tl.store(out_ptr + at, rounded(total, out_ptr.dtype.element_ty), mask=(row < N)[:, None] & (m < M)[None, :])


def _bits_facts(bits):
    """(bits, bytes of a row, step from sample to sample)."""
    if bits is None:
        return None, 0, 0
    bits = bits.contiguous()
    return bits, bits.shape[2], bits.stride(0) if bits.shape[0] > 1 else 0


def masked_product(x, weight, bits, bias):
    """x [S, M, K] @ (W * mask)^T + bias -> [S, M, N]; bits None: all of W."""
    x, weight = rows_of(x), rows_of(weight)
    (S, M, K), N = x.shape, weight.shape[0]
    out = x.new_empty((S, M, N))
    (block_n, block_m, block_k), options = gemm_tile(x.dtype, N, M, batch=S, depth=32)
    bits, row_bytes, s_bits = _bits_facts(bits)
    launch(
        _masked_linear_kernel, S * cdiv(N, block_n) * cdiv(M, block_m), x, weight, bits,
        None if bias is None else bias.contiguous(), out, M, N, K, row_bytes, x.stride(0), x.stride(1),
        weight.stride(0), s_bits, ACC=accumulator(x)[1], BLOCK_N=block_n, BLOCK_M=block_m, BLOCK_K=block_k, **options,
    )  # fmt: skip
    return out


def nm_matmul_bitmask(x, weight, bits, bias, scores):
    if bits.shape[0] == 1:  # one mask for all: the samples are just more rows
        S, M, K = x.shape
        return masked_product(x.reshape(1, S * M, K), weight, bits, bias).view(S, M, weight.shape[0])
    return masked_product(x, weight, bits, bias)


@triton.jit
def _masked_grad_x_kernel(grad_ptr, weight_ptr, bits_ptr, out_ptr, M, N, K, row_bytes, s_gs, s_gm, s_w, s_bits,
                          ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
                          BLOCK_N: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M rows x BLOCK_K inputs of one sample of out [S, M, K] = grad [S, M, N] @ (W * mask) and
    # walks over the N outputs; neighbours share the rows of grad or the weight tiles in L2.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_k = tl.cdiv(K, BLOCK_K)
    sample = (tl.program_id(0) // (tiles_m * tiles_k)).to(tl.int64)
    at_m, at_k = tile_position(tl.program_id(0) % (tiles_m * tiles_k), tiles_m, tiles_k)
    m = at_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = at_k * BLOCK_K
    if bits_ptr is not None:
        bits_ptr += sample * s_bits
    total = tl.zeros([BLOCK_M, BLOCK_K], ACC)
    for n0 in range(0, N, BLOCK_N):
        row = n0 + tl.arange(0, BLOCK_N).to(tl.int64)
        at = (sample * s_gs + m * s_gm)[:, None] + row[None, :]
        grad = tl.load(grad_ptr + at, mask=(m < M)[:, None] & (row < N)[None, :], other=0.0)
        w = _weight_tile(weight_ptr, bits_ptr, row, k0, N, K, row_bytes, s_w, BLOCK_N, BLOCK_K)
        total = dot_add(grad, w, total, PRECISION)
    k = k0 + tl.arange(0, BLOCK_K)
    at = ((sample * M + m) * K)[:, None] + k[None, :]
    tl.store(out_ptr + at, rounded(total, out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (k < K)[None, :])


def masked_grad_x(grad, weight, bits):
    """grad [S, M, N] @ (W * mask) -> [S, M, K]."""
    grad, weight = rows_of(grad), rows_of(weight)
    (S, M, N), K = grad.shape, weight.shape[1]
    out = grad.new_empty((S, M, K))
    (block_m, block_k, block_n), options = gemm_tile(
        grad.dtype, M, K, batch=S, shortest=-1, depth=64 if bits is None else 32
    )
    bits, row_bytes, s_bits = _bits_facts(bits)
    launch(
        _masked_grad_x_kernel, S * cdiv(M, block_m) * cdiv(K, block_k), grad, weight, bits, out, M, N, K, row_bytes,
        grad.stride(0), grad.stride(1), weight.stride(0), s_bits, ACC=accumulator(grad)[1],
        BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_N=block_n, **options,
    )  # fmt: skip
    return out


@triton.jit
def _masked_grad_weight_kernel(grad_ptr, x_ptr, weight_ptr, bits_ptr, grad_weight_ptr, grad_scores_ptr, S, M, N, K,
                               row_bytes, s_gs, s_gm, s_xs, s_xm, s_w, s_bits, PER_SAMPLE: tl.constexpr,
                               ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
                               BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_N x BLOCK_K of grad_weight [N, K] = sum_s mask_s * (grad_s^T x_s) and of grad_scores =
    # (grad_s^T x_s) * W, [S, N, K] with PER_SAMPLE, else [N, K] summed over samples. It walks over all samples and rows,
    # so sums have one order and no second pass. None: not needed.
    tiles_k = tl.cdiv(K, BLOCK_K)
    at_n, at_k = tile_position(tl.program_id(0), tl.cdiv(N, BLOCK_N), tiles_k)
    row = at_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k0 = at_k * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    inside = (row < N)[:, None] & (k < K)[None, :]
    at_weight = row[:, None] * K + k[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_K], ACC)
    everywhere = tl.zeros([BLOCK_N, BLOCK_K], ACC)
    for s in range(S):
        sample = tl.zeros([], tl.int64) + s
        part = tl.zeros([BLOCK_N, BLOCK_K], ACC)
        for m0 in range(0, M, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
            at_grad = (sample * s_gs + m * s_gm)[:, None] + row[None, :]
            grad = tl.load(grad_ptr + at_grad, mask=(m < M)[:, None] & (row < N)[None, :], other=0.0)
            at_x = (sample * s_xs + m * s_xm)[:, None] + k[None, :]
            x = tl.load(x_ptr + at_x, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
            part = dot_add(tl.trans(grad), x, part, PRECISION)
        if grad_weight_ptr is not None:
            kept = part
            if bits_ptr is not None:
                bit = _kept_tile(bits_ptr + sample * s_bits, row, k0, row < N, row_bytes, BLOCK_N, BLOCK_K)
                kept = tl.where(bit, part, 0.0)
            total += kept
        if grad_scores_ptr is not None:
            if PER_SAMPLE:
                w = tl.load(weight_ptr + (row * s_w)[:, None] + k[None, :], mask=inside, other=0.0).to(ACC)
                value = rounded(part * w, grad_scores_ptr.dtype.element_ty)
                tl.store(grad_scores_ptr + sample * N * K + at_weight, value, mask=inside)
            else:
                everywhere += part
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + at_weight, rounded(total, grad_weight_ptr.dtype.element_ty), mask=inside)
    if grad_scores_ptr is not None and not PER_SAMPLE:
        w = tl.load(weight_ptr + (row * s_w)[:, None] + k[None, :], mask=inside, other=0.0).to(ACC)
        value = rounded(everywhere * w, grad_scores_ptr.dtype.element_ty)
        tl.store(grad_scores_ptr + at_weight, value, mask=inside)


def masked_grad_weight(grad, x, weight, bits, grad_weight, grad_scores, per_sample):
    """Fill grad_weight [N, K] and grad_scores [N, K] or [S, N, K], where they are not None."""
    grad, x, weight = rows_of(grad), rows_of(x), rows_of(weight)
    (S, M, N), K = grad.shape, weight.shape[1]
    largest, depth = (0, 64) if bits is None else (1, 32)
    (block_n, block_k, block_m), options = gemm_tile(x.dtype, N, K, largest=largest, shortest=-1, depth=depth)
    if bits is not None:
        options["num_stages"] = min(2, options["num_stages"])  # a third spills 8 bytes on Ampere
    bits, row_bytes, s_bits = _bits_facts(bits)
    launch(
        _masked_grad_weight_kernel, cdiv(N, block_n) * cdiv(K, block_k), grad, x, weight, bits, grad_weight, grad_scores,
        S, M, N, K, row_bytes, grad.stride(0), grad.stride(1), x.stride(0), x.stride(1), weight.stride(0), s_bits,
        PER_SAMPLE=per_sample, ACC=accumulator(x)[1], BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_M=block_m, **options,
    )  # fmt: skip


def _nm_matmul_bitmask_backward(grad, x, weight, bits, need_x, need_weight, need_scores, scores_per_sample):
    (S, M, K), N = x.shape, weight.shape[0]
    none = x.new_empty(0)
    grad_x, grad_weight, grad_scores = none, None, None
    if need_weight:
        grad_weight = x.new_empty((N, K))
    if need_scores:
        grad_scores = x.new_empty((S, N, K) if scores_per_sample else (N, K))
    per_sample = need_scores and scores_per_sample
    if bits.shape[0] == 1 and not per_sample:  # one mask for all: the samples are just more rows
        grad, x = grad.reshape(1, S * M, N), x.reshape(1, S * M, K)
    if need_x:
        grad_x = masked_grad_x(grad, weight, bits).view(S, M, K)
    if need_weight or need_scores:
        masked_grad_weight(grad, x, weight, bits, grad_weight, grad_scores, per_sample)
    return grad_x, none if grad_weight is None else grad_weight, none if grad_scores is None else grad_scores
