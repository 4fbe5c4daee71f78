"""Triton kernels of masked_regression and contrastive_loss: one program for each row, keys gathered by id."""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import accumulator, cdiv, launch, rounded, rows_of

COSINE_EPS = tl.constexpr(1e-8)

# ---------------------------------------------------------------- regression: N rows, D width


@triton.jit
def _target(target_ptr, n, d, mask, D, NORMALISE: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr):
    """The target of a row, normalised; zero past D."""
    wanted = tl.load(target_ptr + d, mask=mask, other=0.0).to(ACC)
    if NORMALISE:
        count = tl.maximum(D, 1)  # a width of 0 is no division by it
        mean = tl.sum(wanted, 0) / count
        wanted = tl.where(mask, wanted - mean, 0.0)
        # What is left of the mean after rounding would show in a constant row, whose deviation is next to nothing.
        rest = tl.sum(wanted, 0) / count
        wanted = tl.where(mask, wanted - rest, 0.0)
        wanted = wanted / tl.sqrt(tl.sum(wanted * wanted, 0) / count + EPS)
    return wanted


@triton.jit
def _regression_kernel(pred_ptr, target_ptr, mask_ptr, loss_ptr, out_ptr, D, s_p, s_t, KIND: tl.constexpr, BETA: tl.constexpr,
                       NORMALISE: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns a row of pred [N, D]: its loss, or with out_ptr its gradient, loss_ptr then being that of the loss.
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    counted = tl.load(mask_ptr + n) != 0
    mask = (d < D) & (tl.load(mask_ptr + n + tl.zeros_like(d)) != 0)
    pred = tl.load(pred_ptr + n * s_p + d, mask=mask, other=0.0).to(ACC)
    wanted = _target(target_ptr + n * s_t, n, d, mask, D, NORMALISE, EPS, ACC)
    if KIND == "cosine":
        product = tl.sum(pred * wanted, 0)
        square = tl.sum(pred * pred, 0)
        size = tl.sqrt(square) * tl.sqrt(tl.sum(wanted * wanted, 0))
        lengths = tl.maximum(size, COSINE_EPS)
        total = 1 - product / lengths
        along = tl.where(size > COSINE_EPS, product / tl.where(square > 0, square, 1.0), 0.0)
        slope = (along * pred - wanted) / lengths
    else:
        error = pred - wanted
        size = tl.abs(error)
        if KIND == "l2":
            value = error * error
            slope = 2.0 * error
        else:
            value = size
            slope = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, error))
            if KIND == "smooth_l1":
                value = tl.where(size < BETA, 0.5 * error * error / BETA, size - 0.5 * BETA)
                slope = tl.where(size < BETA, error / BETA, slope)
        total = tl.sum(tl.where(mask, value, 0.0), 0) / tl.maximum(D, 1)
        slope = slope / tl.maximum(D, 1)
    if out_ptr is None:
        tl.store(loss_ptr + n, tl.where(counted, total, 0.0))
    else:
        grad = tl.load(loss_ptr + n)
        value = tl.where(mask, slope * grad, 0.0)
        tl.store(out_ptr + n * D + d, rounded(value, out_ptr.dtype.element_ty), mask=inside)


def _regression(loss, out, pred, target, mask, kind, beta, normalise, eps):
    pred, target = rows_of(pred), rows_of(target)
    N, D = pred.shape
    block = max(16, triton.next_power_of_2(D))
    launch(
        _regression_kernel, N, pred, target, mask.contiguous().view(torch.uint8), loss, out, D, pred.stride(0), target.stride(0),
        KIND=kind, BETA=float(beta), NORMALISE=normalise, EPS=float(eps), ACC=accumulator(pred)[1], BLOCK_D=block,
        num_warps=8 if block >= 1024 else 4,
    )  # fmt: skip


def masked_loss_regression(pred, target, mask, kind, beta, normalise, eps):
    loss = torch.empty(pred.shape[0], dtype=accumulator(pred)[0], device=pred.device)
    _regression(loss, None, pred, target, mask, kind, beta, normalise, eps)
    return loss


def _masked_loss_regression_backward(grad, pred, target, mask, kind, beta, normalise, eps):
    out = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    _regression(grad.contiguous(), out, pred, target, mask, kind, beta, normalise, eps)
    return out


# ---------------------------------------------------------------- contrast: M queries, P keys, K negatives, D width


@triton.jit
def _key_logits(query_ptr, keys_ptr, first, ids, s_k, D, SCALE: tl.constexpr, COLLIDE: tl.constexpr, ACC: tl.constexpr,
                BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Logits of the keys ids [BLOCK_K] of a query, -inf where there is none or where its values are those of key `first`."""
    total = tl.zeros([BLOCK_K], ACC)
    other = tl.zeros([BLOCK_K], tl.int32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        q = tl.load(query_ptr + d, mask=d < D, other=0.0).to(ACC)
        k = tl.load(keys_ptr + ids[:, None] * s_k + d[None, :], mask=(ids >= 0)[:, None] & (d < D)[None, :], other=0.0)
        total += tl.sum(k.to(ACC) * q[None, :], 1)
        if COLLIDE:
            p = tl.load(keys_ptr + first * s_k + d, mask=d < D, other=0.0)
            other += tl.sum((k.to(ACC) != p.to(ACC)[None, :]).to(tl.int32), 1)
    hidden = ids < 0
    if COLLIDE:
        hidden = hidden | (other == 0)
    return tl.where(hidden, float("-inf"), total * SCALE)


@triton.jit
def _positive_logit(query_ptr, keys_ptr, first, s_k, D, SCALE: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr):
    total = tl.zeros([BLOCK_D], ACC)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        q = tl.load(query_ptr + d, mask=d < D, other=0.0).to(ACC)
        total += q * tl.load(keys_ptr + first * s_k + d, mask=d < D, other=0.0).to(ACC)
    return tl.sum(total, 0) * SCALE


@triton.jit
def _contrast_kernel(query_ptr, keys_ptr, positive_ptr, negatives_ptr, loss_ptr, lse_ptr, K, D, s_q, s_k, SCALE: tl.constexpr,
                     COLLIDE: tl.constexpr, ACC: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns a query and walks over its negatives, BLOCK_K at a time (online softmax).
    m = tl.program_id(0).to(tl.int64)
    first = tl.load(positive_ptr + m)
    loss = tl.zeros([], ACC)
    lse = tl.zeros([], ACC)
    if first >= 0:
        own = _positive_logit(query_ptr + m * s_q, keys_ptr, first, s_k, D, SCALE, ACC, BLOCK_D)
        top = own
        total = tl.full([], 1.0, ACC)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            ids = tl.load(negatives_ptr + m * K + k, mask=k < K, other=-1)
            x = _key_logits(query_ptr + m * s_q, keys_ptr, first, ids, s_k, D, SCALE, COLLIDE, ACC, BLOCK_K, BLOCK_D)
            higher = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
            top = higher
        lse = top + tl.log(total)
        loss = lse - own
    tl.store(loss_ptr + m, loss)
    tl.store(lse_ptr + m, lse)


@triton.jit
def _contrast_slope_kernel(grad_ptr, query_ptr, keys_ptr, positive_ptr, negatives_ptr, lse_ptr, slope_ptr, out_ptr, K, D, s_q, s_k,
                           SCALE: tl.constexpr, COLLIDE: tl.constexpr, ACC: tl.constexpr, BLOCK_K: tl.constexpr,
                           BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns a query: the gradient of its logits, in slope [M, 1 + K], and that of the query itself.
    m = tl.program_id(0).to(tl.int64)
    first = tl.load(positive_ptr + m)
    at = slope_ptr + m * (K + 1)
    grad = tl.load(grad_ptr + m) * SCALE
    lse = tl.load(lse_ptr + m)
    own = tl.zeros([], ACC)
    if first >= 0:
        own = _positive_logit(query_ptr + m * s_q, keys_ptr, first, s_k, D, SCALE, ACC, BLOCK_D)
        own = (tl.exp(own - lse) - 1) * grad
    tl.store(at, own)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        value = tl.zeros([BLOCK_K], ACC)
        if first >= 0:
            ids = tl.load(negatives_ptr + m * K + k, mask=k < K, other=-1)
            x = _key_logits(query_ptr + m * s_q, keys_ptr, first, ids, s_k, D, SCALE, COLLIDE, ACC, BLOCK_K, BLOCK_D)
            value = tl.exp(x - lse) * grad
        tl.store(at + 1 + k, value, mask=k < K)
    tl.debug_barrier()
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_D], ACC)
        if first >= 0:
            total += own * tl.load(keys_ptr + first * s_k + d, mask=d < D, other=0.0).to(ACC)
            for k0 in range(0, K, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                ids = tl.load(negatives_ptr + m * K + k, mask=k < K, other=-1)
                key = tl.load(
                    keys_ptr + ids[:, None] * s_k + d[None, :], mask=(ids >= 0)[:, None] & (d < D)[None, :], other=0.0
                )
                value = tl.load(at + 1 + k, mask=k < K, other=0.0)
                total += tl.sum(key.to(ACC) * value[:, None], 0)
        tl.store(out_ptr + m * D + d, rounded(total, out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _contrast_keys_kernel(query_ptr, slope_ptr, order_ptr, starts_ptr, out_ptr, K, D, s_q, ACC: tl.constexpr, BLOCK_E: tl.constexpr,
                          BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_D columns of the gradient of a key: the slots that name it, order[starts[p] : starts[p + 1]], in order.
    columns = tl.cdiv(D, BLOCK_D)
    p = (tl.program_id(0) // columns).to(tl.int64)
    d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], ACC)
    begin, end = tl.load(starts_ptr + p), tl.load(starts_ptr + p + 1)
    for e0 in range(begin, end, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        slot = tl.load(order_ptr + e, mask=e < end, other=0)
        value = tl.load(slope_ptr + slot, mask=e < end, other=0.0)
        rows = query_ptr + (slot // (K + 1))[:, None] * s_q + d[None, :]
        # A query that does not count has no slope, and is not read.
        used = (e < end) & (value != 0)
        total += tl.sum(tl.load(rows, mask=used[:, None] & (d < D)[None, :], other=0.0).to(ACC) * value[:, None], 0)
    tl.store(out_ptr + p * D + d, rounded(total, out_ptr.dtype.element_ty), mask=d < D)


def _contrast_options(query, scale, collide):
    return {
        "SCALE": float(scale),
        "COLLIDE": collide,
        "ACC": accumulator(query)[1],
        "BLOCK_K": 16,
        "BLOCK_D": 64,
        "num_warps": 2,
        "maxnreg": 128,
    }


def masked_loss_contrast(query, keys, positive, negatives, scale, collide):
    query, keys, negatives = rows_of(query), rows_of(keys), negatives.contiguous()
    (M, D), K = query.shape, negatives.shape[1]
    loss, lse = (torch.empty(M, dtype=accumulator(query)[0], device=query.device) for _ in range(2))
    launch(
        _contrast_kernel, M, query, keys, positive.contiguous(), negatives, loss, lse, K, D, query.stride(0), keys.stride(0),
        **_contrast_options(query, scale, collide),
    )  # fmt: skip
    return loss, lse


def _masked_loss_contrast_backward(grad, query, keys, positive, negatives, lse, scale, collide):
    query, keys, positive, negatives = rows_of(query), rows_of(keys), positive.contiguous(), negatives.contiguous()
    (M, D), K, P = query.shape, negatives.shape[1], keys.shape[0]
    slope = torch.empty((M, K + 1), dtype=accumulator(query)[0], device=query.device)
    grad_query, grad_keys = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, keys))
    launch(
        _contrast_slope_kernel, M, grad.contiguous(), query, keys, positive, negatives, lse.contiguous(), slope, grad_query, K, D,
        query.stride(0), keys.stride(0), **_contrast_options(query, scale, collide),
    )  # fmt: skip
    # Slots of queries that do not count go with the empty ones, before the first key.
    ids = torch.cat([positive[:, None], torch.where(positive[:, None] >= 0, negatives, -1)], 1).flatten()
    ordered, order = ids.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(P + 1, device=ids.device))
    launch(
        _contrast_keys_kernel, P * cdiv(D, 64), query, slope, order, starts, grad_keys, K, D, query.stride(0),
        ACC=accumulator(query)[1], BLOCK_E=16, BLOCK_D=64, num_warps=4,
    )  # fmt: skip
    return grad_query, grad_keys
