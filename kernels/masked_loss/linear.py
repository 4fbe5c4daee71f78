"""Triton kernels of linear_cross_entropy and linear_sample: logits live in a tile of registers only.

N rows of which M count, D width, G codebooks, V classes. `order` lists the rows that count first, `count` [1] says how many:
programs beyond it end at once, so nothing waits for the host.
"""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import accumulator, cdiv, dot_add, launch, philox4x32, rounded, rows_of

MOST_SLOPES = 1 << 24  # elements of the gradient of the logits that exist at a time


@triton.jit
def _logits(hidden_ptr, weight_ptr, bias_ptr, row, real, v, s_h, D, V, SCALE: tl.constexpr, ACC: tl.constexpr,
            PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """SCALE (hidden weight^T + bias) of rows [BLOCK_M] and classes v [BLOCK_V]; rows that are not real are not read."""
    total = tl.zeros([BLOCK_M, BLOCK_V], ACC)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        x = tl.load(hidden_ptr + row[:, None] * s_h + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
        w = tl.load(
            weight_ptr + v.to(tl.int64)[None, :] * D + d[:, None], mask=(v < V)[None, :] & (d < D)[:, None], other=0.0
        )
        total = dot_add(x, w, total, PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + v, mask=v < V, other=0.0).to(ACC)[None, :]
    return total * SCALE


@triton.jit
def _gumbel(word, ACC: tl.constexpr):
    """-log(-log(u)) of the upper 23 bits of a word."""
    u = ((word >> 9).to(ACC) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(u))


@triton.jit
def _forward_kernel(hidden_ptr, weight_ptr, bias_ptr, target_ptr, order_ptr, count_ptr, seed_ptr, sums_ptr, best_ptr, sample_ptr,
                    N, D, V, G, g, s_h, per_split, splits, SCALE: tl.constexpr, COOL: tl.constexpr, ACC: tl.constexpr,
                    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M of the rows that count and per_split classes: the highest logit, the sum of exponentials beside it,
    # the sum of logits and the target's, in sums [splits, 4, N]; with a seed also the highest noisy logit and its class.
    m = (tl.program_id(0) // splits).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = (tl.program_id(0) % splits).to(tl.int64)
    real = m < tl.load(count_ptr)
    if tl.max(real.to(tl.int32), 0) > 0:
        row = tl.load(order_ptr + m, mask=real, other=0)
        target = tl.load(target_ptr + row * G + g, mask=real, other=-1)
        top = tl.full([BLOCK_M], float("-inf"), ACC)
        total = tl.zeros([BLOCK_M], ACC)
        plain = tl.zeros([BLOCK_M], ACC)
        picked = tl.zeros([BLOCK_M], ACC)
        best = tl.full([BLOCK_M], float("-inf"), ACC)
        found = tl.zeros([BLOCK_M], tl.int64)
        for v0 in range(split * per_split, tl.minimum((split + 1) * per_split, V), BLOCK_V):
            v = v0 + tl.arange(0, BLOCK_V)
            x = _logits(
                hidden_ptr,
                weight_ptr,
                bias_ptr,
                row,
                real,
                v,
                s_h,
                D,
                V,
                SCALE,
                ACC,
                PRECISION,
                BLOCK_M,
                BLOCK_V,
                BLOCK_D,
            )
            inside = (v < V)[None, :]
            plain += tl.sum(tl.where(inside, x, 0.0), 1)
            picked += tl.sum(tl.where(v[None, :] == target[:, None], x, 0.0), 1)
            x = tl.where(inside, x, float("-inf"))
            higher = tl.maximum(top, tl.max(x, 1))
            base = tl.maximum(higher, -3e38)
            total = total * tl.exp(tl.maximum(top, -3e38) - base) + tl.sum(tl.exp(x - base[:, None]), 1)
            top = higher
            if seed_ptr is not None:
                word = (row * G + g)[:, None] * V + v[None, :]
                w0, w1, w2, w3 = philox4x32(word // 4, tl.load(seed_ptr + 1), tl.load(seed_ptr))
                lane = word % 4
                drawn = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
                noisy = tl.where(inside, x * COOL + _gumbel(drawn, ACC), float("-inf"))
                high, at = tl.max(noisy, 1), tl.argmax(noisy, 1)
                found = tl.where(high > best, v0 + at, found)
                best = tl.maximum(high, best)
        out = sums_ptr + split * 4 * N + m
        tl.store(out, top, mask=real)
        tl.store(out + N, total, mask=real)
        tl.store(out + 2 * N, plain, mask=real)
        tl.store(out + 3 * N, picked, mask=real)
        if seed_ptr is not None:
            tl.store(best_ptr + split * N + m, best, mask=real)
            tl.store(sample_ptr + split * N + m, found, mask=real)


@triton.jit
def _join_kernel(target_ptr, order_ptr, count_ptr, sums_ptr, best_ptr, drawn_ptr, loss_ptr, lse_ptr, sample_ptr, N, V, G, g, ignore,
                 splits, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # One program owns BLOCK of the rows that count and joins their splits, in order, into loss, lse and sample [N, G].
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = m < tl.load(count_ptr)
    row = tl.load(order_ptr + m, mask=real, other=0)
    target = tl.load(target_ptr + row * G + g, mask=real, other=0)
    counted = real & (target != ignore)
    top = tl.full([BLOCK], float("-inf"), ACC)
    for split in range(0, splits):
        top = tl.maximum(top, tl.load(sums_ptr + tl.cast(split, tl.int64) * 4 * N + m, mask=real, other=0.0))
    base = tl.maximum(top, -3e38)
    total = tl.zeros([BLOCK], ACC)
    plain = tl.zeros([BLOCK], ACC)
    picked = tl.zeros([BLOCK], ACC)
    best = tl.full([BLOCK], float("-inf"), ACC)
    found = tl.full([BLOCK], -1, tl.int64)
    for split in range(0, splits):
        at = sums_ptr + tl.cast(split, tl.int64) * 4 * N + m
        high = tl.maximum(tl.load(at, mask=real, other=0.0), -3e38)
        total += tl.load(at + N, mask=real, other=0.0) * tl.exp(high - base)
        plain += tl.load(at + 2 * N, mask=real, other=0.0)
        picked += tl.load(at + 3 * N, mask=real, other=0.0)
        if best_ptr is not None:
            noisy = tl.load(best_ptr + tl.cast(split, tl.int64) * N + m, mask=real, other=0.0)
            drawn = tl.load(drawn_ptr + tl.cast(split, tl.int64) * N + m, mask=real, other=0)
            found = tl.where((found < 0) | (noisy > best), drawn, found)
            best = tl.maximum(best, noisy)
    lse = base + tl.log(tl.where(real, total, 1.0))
    loss = lse - (1 - SMOOTHING) * picked - SMOOTHING * (plain / tl.cast(V, ACC)) + Z_LOSS * lse * lse
    tl.store(lse_ptr + row * G + g, lse, mask=counted)
    tl.store(loss_ptr + row * G + g, loss, mask=counted)
    if best_ptr is not None:
        tl.store(sample_ptr + row * G + g, found, mask=counted)


@triton.jit
def _slope_kernel(grad_ptr, hidden_ptr, weight_ptr, bias_ptr, target_ptr, lse_ptr, order_ptr, count_ptr, out_ptr, D, V, G, g, s_h,
                  first, width, ignore, SCALE: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, ACC: tl.constexpr,
                  PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M rows that count by BLOCK_V of the classes [first, first + width): the gradient of their logits before
    # scale and bias, in out [M, width]. The logits are made again.
    columns = tl.cdiv(width, BLOCK_V)
    m = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) % columns * BLOCK_V + tl.arange(0, BLOCK_V)
    real = m < tl.load(count_ptr)
    if tl.max(real.to(tl.int32), 0) > 0:
        v = first + j
        row = tl.load(order_ptr + m, mask=real, other=0)
        target = tl.load(target_ptr + row * G + g, mask=real, other=0)
        counted = real & (target != ignore)
        x = _logits(
            hidden_ptr, weight_ptr, bias_ptr, row, real, v, s_h, D, V, SCALE, ACC, PRECISION, BLOCK_M, BLOCK_V, BLOCK_D
        )
        lse = tl.load(lse_ptr + row * G + g, mask=counted, other=0.0)
        slope = tl.load(grad_ptr + row * G + g, mask=counted, other=0.0) * SCALE
        weight = tl.exp(x - lse[:, None]) * (1 + 2 * Z_LOSS * lse)[:, None] - SMOOTHING / tl.cast(V, ACC)
        weight -= (v[None, :] == target[:, None]).to(ACC) * (1 - SMOOTHING)
        value = tl.where(counted[:, None], weight * slope[:, None], 0.0)
        tl.store(
            out_ptr + m[:, None] * width + j[None, :],
            rounded(value, out_ptr.dtype.element_ty),
            mask=real[:, None] & (j < width)[None, :],
        )


@triton.jit
def _grad_weight_kernel(slope_ptr, hidden_ptr, order_ptr, count_ptr, out_ptr, bias_ptr, D, s_h, width, ACC: tl.constexpr,
                        PRECISION: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_V classes by BLOCK_D columns of the weight's gradient, and walks over the rows that count.
    columns = tl.cdiv(D, BLOCK_D)
    j = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    count = tl.load(count_ptr)
    total = tl.zeros([BLOCK_V, BLOCK_D], ACC)
    shift = tl.zeros([BLOCK_V], ACC)
    for m0 in range(0, count, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        row = tl.load(order_ptr + m, mask=m < count, other=0)
        slope = tl.load(
            slope_ptr + m[:, None] * width + j[None, :], mask=(m < count)[:, None] & (j < width)[None, :], other=0.0
        )
        x = tl.load(
            hidden_ptr + row[:, None] * s_h + d[None, :], mask=(m < count)[:, None] & (d < D)[None, :], other=0.0
        )
        total = dot_add(tl.trans(slope), x.to(slope.dtype), total, PRECISION)
        shift += tl.sum(slope.to(ACC), 0)
    tl.store(
        out_ptr + j[:, None] * D + d[None, :],
        rounded(total, out_ptr.dtype.element_ty),
        mask=(j < width)[:, None] & (d < D)[None, :],
    )
    if tl.program_id(0) % columns == 0:
        tl.store(bias_ptr + j, rounded(shift, bias_ptr.dtype.element_ty), mask=j < width)


@triton.jit
def _grad_hidden_kernel(slope_ptr, weight_ptr, count_ptr, out_ptr, D, width, ACC: tl.constexpr, PRECISION: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M rows that count by BLOCK_D columns of out [M, D], to which the classes of this piece are added.
    columns = tl.cdiv(D, BLOCK_D)
    m = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    real = m < tl.load(count_ptr)
    if tl.max(real.to(tl.int32), 0) > 0:
        at = out_ptr + m[:, None] * D + d[None, :]
        mask = real[:, None] & (d < D)[None, :]
        total = tl.load(at, mask=mask, other=0.0)
        for j0 in range(0, width, BLOCK_V):
            j = j0 + tl.arange(0, BLOCK_V)
            slope = tl.load(
                slope_ptr + m[:, None] * width + j[None, :], mask=real[:, None] & (j < width)[None, :], other=0.0
            )
            w = tl.load(
                weight_ptr + j.to(tl.int64)[:, None] * D + d[None, :],
                mask=(j < width)[:, None] & (d < D)[None, :],
                other=0.0,
            )
            total = dot_add(slope, w.to(slope.dtype), total, PRECISION)
        tl.store(at, total, mask=mask)


def _options(x):
    exact = x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return {"ACC": accumulator(x)[1], "PRECISION": "ieee" if exact else "tf32"}


def _tile(x):
    wide = x.dtype.itemsize > 2
    if x.dtype == torch.float64:
        return {"BLOCK_M": 16, "BLOCK_V": 32, "BLOCK_D": 16, "num_warps": 4, "num_stages": 1, "maxnreg": 255}
    return {
        "BLOCK_M": 32 if wide else 64, "BLOCK_V": 32 if wide else 64, "BLOCK_D": 16 if wide else 32, "num_warps": 4 if wide else 8,
        "num_stages": 1 if wide else 3, "maxnreg": 255,
    }  # fmt: skip


def _counted_first(target, ignore):
    """order [N], the rows in which something counts first, each part in its order; count [1]."""
    counted = (target != ignore).any(1)
    return counted.logical_not().to(torch.int8).argsort(stable=True), counted.sum(dtype=torch.int64).reshape(1)


def _forward(hidden, weight, bias, target, seed, ignore, scale, smoothing, z_loss, temperature):
    hidden, weight, target = rows_of(hidden), weight.contiguous(), target.contiguous()
    bias = None if bias is None else bias.contiguous()
    (N, D), (G, V) = hidden.shape, weight.shape[:2]
    acc, device = accumulator(hidden)[0], hidden.device
    order, count = _counted_first(target, ignore)
    loss, lse = (torch.zeros((N, G), dtype=acc, device=device) for _ in range(2))
    sample = None if seed is None else torch.full((N, G), -1, dtype=torch.int64, device=device)
    if V == 0:
        return loss, lse, sample
    tile = _tile(hidden)
    # About 512 programs, however few rows count.
    splits = max(1, min(cdiv(V, 4 * tile["BLOCK_V"]), 512 // max(1, cdiv(N, tile["BLOCK_M"]))))
    per_split = cdiv(cdiv(V, splits), tile["BLOCK_V"]) * tile["BLOCK_V"]
    splits = cdiv(V, per_split)
    sums = torch.empty((splits, 4, N), dtype=acc, device=device)
    best = None if seed is None else torch.empty((splits, N), dtype=acc, device=device)
    drawn = None if seed is None else torch.empty((splits, N), dtype=torch.int64, device=device)
    for g in range(G):
        launch(
            _forward_kernel, cdiv(N, tile["BLOCK_M"]) * splits, hidden, weight[g], None if bias is None else bias[g], target, order,
            count, seed, sums, best, drawn, N, D, V, G, g, hidden.stride(0), per_split, splits,
            SCALE=float(scale), COOL=1.0 / temperature, **_options(hidden), **tile,
        )  # fmt: skip
        launch(
            _join_kernel, cdiv(N, 128), target, order, count, sums, best, drawn, loss, lse, sample, N, V, G, g, ignore, splits,
            SMOOTHING=float(smoothing), Z_LOSS=float(z_loss), ACC=accumulator(hidden)[1], BLOCK=128, num_warps=4,
        )  # fmt: skip
    return loss, lse, sample


def masked_loss_linear(hidden, weight, bias, target, ignore, scale, smoothing, z_loss):
    return _forward(hidden, weight, bias, target, None, ignore, scale, smoothing, z_loss, 1.0)[:2]


def masked_loss_sample(hidden, weight, bias, target, seed, ignore, scale, smoothing, z_loss, temperature):
    return _forward(hidden, weight, bias, target, seed.contiguous(), ignore, scale, smoothing, z_loss, temperature)


def _masked_loss_linear_backward(grad, hidden, weight, bias, target, lse, ignore, scale, smoothing, z_loss):
    hidden, weight, target, grad, lse = (
        rows_of(hidden),
        weight.contiguous(),
        target.contiguous(),
        grad.contiguous(),
        lse.contiguous(),
    )
    bias = None if bias is None else bias.contiguous()
    (N, D), (G, V) = hidden.shape, weight.shape[:2]
    if D == 0:  # no columns, and yet the bias has a gradient
        one = hidden.new_zeros(N, 1), weight.new_zeros(G, V, 1)
        options = ignore, scale, smoothing, z_loss
        grad_bias = _masked_loss_linear_backward(grad, *one, bias, target, lse, *options)[2]
        return torch.empty_like(hidden), torch.empty_like(weight), grad_bias
    order, count = _counted_first(target, ignore)
    grad_weight, grad_bias = weight.new_empty((G, V, D)), weight.new_empty((G, V))
    sums = torch.zeros((N, D), dtype=accumulator(hidden)[0], device=hidden.device)
    tile, options = _tile(hidden), _options(hidden)
    rows, columns = tile["BLOCK_M"], tile["BLOCK_V"]
    width = max(columns, min(V, MOST_SLOPES // max(N, 1) // columns * columns))
    # float16 rounds what is below 6e-8 to nothing, and gradients of a mean are as small: there slopes stay in float32, and the
    # products in tf32 have the fraction of float16 and the exponent of float32.
    half = hidden.dtype == torch.float16
    slope = torch.empty((N, min(width, V)), dtype=torch.float32 if half else hidden.dtype, device=hidden.device)
    product = options | {"PRECISION": "tf32"} if half else options
    for g in range(G):
        for first in range(0, V, width):
            part = min(width, V - first)
            piece = weight[g, first : first + part]
            launch(
                _slope_kernel, cdiv(N, rows) * cdiv(part, columns), grad, hidden, weight[g], None if bias is None else bias[g],
                target, lse, order, count, slope, D, V, G, g, hidden.stride(0), first, part, ignore, SCALE=float(scale),
                SMOOTHING=float(smoothing), Z_LOSS=float(z_loss), **options, **tile,
            )  # fmt: skip
            tiles = {"BLOCK_V": columns, "BLOCK_D": columns, "BLOCK_M": 16 if hidden.dtype.itemsize > 2 else 32}
            launch(
                _grad_weight_kernel, cdiv(part, columns) * cdiv(D, columns), slope, hidden, order, count,
                grad_weight[g, first : first + part], grad_bias[g, first : first + part], D, hidden.stride(0), part,
                **product, **tiles,
                num_warps=tile["num_warps"], num_stages=tile["num_stages"], maxnreg=255,
            )  # fmt: skip
            tiles = {"BLOCK_M": rows, "BLOCK_D": columns, "BLOCK_V": 16 if hidden.dtype.itemsize > 2 else 32}
            launch(
                _grad_hidden_kernel, cdiv(N, rows) * cdiv(D, columns), slope, piece, count, sums, D, part, **product, **tiles,
                num_warps=tile["num_warps"], num_stages=tile["num_stages"], maxnreg=255,
            )  # fmt: skip
    # Row m of sums is row order[m]; rows past the count hold zeros.
    grad_hidden = torch.empty((N, D), dtype=hidden.dtype, device=hidden.device)
    grad_hidden[order] = sums.to(hidden.dtype)
    return grad_hidden, grad_weight, grad_bias
