"""Triton kernels of normalisation over active positions. Images are rows [B, H, W, C]; statistics [S, C], S = 1 or B."""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import Arg, accumulator, cdiv, launch, rounded
from maskops.kernels.sparse_conv.block import as_bytes, empty_images, is_active, rows_of_images
from maskops.kernels.sparse_conv.conv import _tile

ROWS, CHUNK = 32, 1024


@triton.jit
def _seen(cells_ptr, image, p, HW, W, h, w, ch, cw):
    """Whether positions p of an image are active."""
    return is_active(cells_ptr, image, p // W, p % W, h, w, ch, cw, p < HW)


@triton.jit
def _stat(ptr, image, PER_SAMPLE: tl.constexpr, c, C):
    row = 0
    if PER_SAMPLE:
        row = image
    return tl.load(ptr + tl.cast(row, tl.int64) * C + c, mask=c < C, other=0.0)


@triton.jit
def _normalise_kernel(x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, cells_ptr, out_ptr, HW, W, C, h, w, ch, cw,
                      PER_SAMPLE: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M positions of one image x BLOCK_C channels: out = (x - mean) rstd weight + bias, 0 where hidden.
    columns, tiles = tl.cdiv(C, BLOCK_C), tl.cdiv(HW, BLOCK_M)
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) // columns % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    image = tl.program_id(0) // (columns * tiles)
    seen = _seen(cells_ptr, image, p, HW, W, h, w, ch, cw)
    at = (tl.cast(image, tl.int64) * HW + p)[:, None] * C + c[None, :]
    x = tl.load(x_ptr + at, mask=seen[:, None] & (c < C)[None, :], other=0.0).to(ACC)
    y = (x - _stat(mean_ptr, image, PER_SAMPLE, c, C)[None, :]) * _stat(rstd_ptr, image, PER_SAMPLE, c, C)[None, :]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + c, mask=c < C, other=0.0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=c < C, other=0.0)[None, :]
    y = tl.where(seen[:, None], y, 0.0)
    tl.store(out_ptr + at, rounded(y, out_ptr.dtype.element_ty), mask=(p < HW)[:, None] & (c < C)[None, :])


@triton.jit
def _norm_backward_kernel(grad_ptr, x_ptr, mean_ptr, of_grad_ptr, of_x_ptr, constant_ptr, cells_ptr, out_ptr, HW, W, C, h, w, ch,
                          cw, PER_SAMPLE: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
                          BLOCK_C: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M positions of one image x BLOCK_C channels: grad of_grad + (x - mean) of_x + constant, 0 where hidden.
    columns, tiles = tl.cdiv(C, BLOCK_C), tl.cdiv(HW, BLOCK_M)
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) // columns % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    image = tl.program_id(0) // (columns * tiles)
    seen = _seen(cells_ptr, image, p, HW, W, h, w, ch, cw)
    at = (tl.cast(image, tl.int64) * HW + p)[:, None] * C + c[None, :]
    mask = seen[:, None] & (c < C)[None, :]
    off = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC) - _stat(mean_ptr, image, PER_SAMPLE, c, C)[None, :]
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(ACC)
    y = (
        grad * _stat(of_grad_ptr, image, PER_SAMPLE, c, C)[None, :]
        + off * _stat(of_x_ptr, image, PER_SAMPLE, c, C)[None, :]
    )
    y = tl.where(seen[:, None], y + _stat(constant_ptr, image, PER_SAMPLE, c, C)[None, :], 0.0)
    tl.store(out_ptr + at, rounded(y, out_ptr.dtype.element_ty), mask=(p < HW)[:, None] & (c < C)[None, :])


@triton.jit
def _moments_kernel(x_ptr, cells_ptr, out_ptr, HW, W, C, h, w, ch, cw, PER_CHUNK, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_C: tl.constexpr):  # fmt: skip
    # One program owns PER_CHUNK positions of one image x BLOCK_C channels: count, mean and squares in out [chunks, 3, C].
    columns, chunks = tl.cdiv(C, BLOCK_C), tl.cdiv(HW, PER_CHUNK)
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    own = tl.program_id(0) // columns
    image, begin = own // chunks, own % chunks * PER_CHUNK
    total, count = tl.zeros([BLOCK_C], ACC), 0
    for p0 in range(begin, tl.minimum(begin + PER_CHUNK, HW), BLOCK_M):
        p = p0 + tl.arange(0, BLOCK_M)
        seen = _seen(cells_ptr, image, p, tl.minimum(begin + PER_CHUNK, HW), W, h, w, ch, cw)
        at = (tl.cast(image, tl.int64) * HW + p)[:, None] * C + c[None, :]
        total += tl.sum(tl.load(x_ptr + at, mask=seen[:, None] & (c < C)[None, :], other=0.0).to(ACC), 0)
        count += tl.sum(seen.to(tl.int32), 0)
    mean = total / tl.maximum(count, 1).to(ACC)
    square = tl.zeros([BLOCK_C], ACC)
    for p0 in range(begin, tl.minimum(begin + PER_CHUNK, HW), BLOCK_M):
        p = p0 + tl.arange(0, BLOCK_M)
        seen = _seen(cells_ptr, image, p, tl.minimum(begin + PER_CHUNK, HW), W, h, w, ch, cw)
        at = (tl.cast(image, tl.int64) * HW + p)[:, None] * C + c[None, :]
        off = tl.load(x_ptr + at, mask=seen[:, None] & (c < C)[None, :], other=0.0).to(ACC) - mean[None, :]
        off = tl.where(seen[:, None], off, 0.0)
        square += tl.sum(off * off, 0)
    to = out_ptr + tl.cast(own, tl.int64) * 3 * C + c
    tl.store(to, tl.zeros([BLOCK_C], ACC) + count.to(ACC), mask=c < C)
    tl.store(to + C, mean, mask=c < C)
    tl.store(to + 2 * C, square, mask=c < C)


@triton.jit
def _sums_kernel(grad_ptr, x_ptr, mean_ptr, cells_ptr, out_ptr, HW, W, C, h, w, ch, cw, PER_CHUNK, PER_SAMPLE: tl.constexpr,
                 ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    # One program owns PER_CHUNK positions of one image x BLOCK_C channels: sums of grad and grad (x - mean) in out [chunks, 2, C].
    columns, chunks = tl.cdiv(C, BLOCK_C), tl.cdiv(HW, PER_CHUNK)
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    own = tl.program_id(0) // columns
    image, begin = own // chunks, own % chunks * PER_CHUNK
    mean = _stat(mean_ptr, image, PER_SAMPLE, c, C)
    plain, crossed = tl.zeros([BLOCK_C], ACC), tl.zeros([BLOCK_C], ACC)
    for p0 in range(begin, tl.minimum(begin + PER_CHUNK, HW), BLOCK_M):
        p = p0 + tl.arange(0, BLOCK_M)
        seen = _seen(cells_ptr, image, p, tl.minimum(begin + PER_CHUNK, HW), W, h, w, ch, cw)
        at = (tl.cast(image, tl.int64) * HW + p)[:, None] * C + c[None, :]
        mask = seen[:, None] & (c < C)[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(ACC)
        plain += tl.sum(grad, 0)
        crossed += tl.sum(grad * (tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC) - mean[None, :]), 0)
    to = out_ptr + tl.cast(own, tl.int64) * 2 * C + c
    tl.store(to, plain, mask=c < C)
    tl.store(to + C, crossed, mask=c < C)


@triton.jit
def _row_norm(x_ptr, at, mask, C, eps, ACC: tl.constexpr):
    """(normalised rows, 0 outside the mask; 1 / deviation) of a tile [BLOCK_M, BLOCK_C] that holds whole rows."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    size = tl.cast(C, ACC)
    off = tl.where(mask, x - (tl.sum(x, 1) / size)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(off * off, 1) / size + tl.cast(eps, ACC))
    return off * rstd[:, None], rstd


@triton.jit
def _layer_kernel(x_ptr, weight_ptr, bias_ptr, cells_ptr, out_ptr, total, HW, W, C, h, w, ch, cw, eps, ACC: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M positions of all images with all their channels.
    m, c = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    seen = is_active(cells_ptr, m // HW, m % HW // W, m % W, h, w, ch, cw, m < total)
    at = m.to(tl.int64)[:, None] * C + c[None, :]
    y, _ = _row_norm(x_ptr, at, seen[:, None] & (c < C)[None, :], C, eps, ACC)
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + c, mask=c < C, other=0.0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=c < C, other=0.0)[None, :]
    y = tl.where(seen[:, None], y, 0.0)
    tl.store(out_ptr + at, rounded(y, out_ptr.dtype.element_ty), mask=(m < total)[:, None] & (c < C)[None, :])


@triton.jit
def _layer_backward_kernel(grad_ptr, x_ptr, weight_ptr, cells_ptr, out_ptr, sums_ptr, total, HW, W, C, h, w, ch, cw, eps,
                           PER_CHUNK, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    # One program owns PER_CHUNK positions, all channels, and their part of the gradients of weight and bias [chunks, 2, C].
    c = tl.arange(0, BLOCK_C)
    of_weight, of_bias = tl.zeros([BLOCK_C], ACC), tl.zeros([BLOCK_C], ACC)
    begin = tl.program_id(0) * PER_CHUNK
    for m0 in range(begin, tl.minimum(begin + PER_CHUNK, total), BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        inside = m < tl.minimum(begin + PER_CHUNK, total)
        seen = is_active(cells_ptr, m // HW, m % HW // W, m % W, h, w, ch, cw, inside)
        at = m.to(tl.int64)[:, None] * C + c[None, :]
        mask = seen[:, None] & (c < C)[None, :]
        y, rstd = _row_norm(x_ptr, at, mask, C, eps, ACC)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(ACC)
        of_weight += tl.sum(grad * y, 0)
        of_bias += tl.sum(grad, 0)
        if weight_ptr is not None:
            grad *= tl.load(weight_ptr + c, mask=c < C, other=0.0)[None, :]
        size = tl.cast(C, ACC)
        found = (grad - (tl.sum(grad, 1) / size)[:, None] - y * (tl.sum(grad * y, 1) / size)[:, None]) * rstd[:, None]
        found = tl.where(seen[:, None], found, 0.0)
        tl.store(out_ptr + at, rounded(found, out_ptr.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])
    to = sums_ptr + tl.cast(tl.program_id(0), tl.int64) * 2 * C + c
    tl.store(to, of_weight, mask=c < C)
    tl.store(to + C, of_bias, mask=c < C)


# ---------------------------------------------------------------- launchers


def _like(rows):
    B, H, W, C = rows.shape
    return empty_images(rows, B, C, H, W)


def _sizes(x, cells):
    """HW, W, C, h, w and the positions of a cell, of rows x."""
    _, H, W, C = x.shape
    h, w = cells.shape[1:]
    return H * W, W, C, h, w, H // h, W // w


def _elementwise(x):
    block = _tile(x.shape[3], 64)
    rows = ROWS // 2  # more spill on sm_90
    programs = x.shape[0] * cdiv(x.shape[1] * x.shape[2], rows) * cdiv(x.shape[3], block)
    return programs, {"ACC": accumulator(x)[1], "BLOCK_M": rows, "BLOCK_C": block, "num_warps": 4}


def _chunked(x):
    """(programs, chunks of all images, meta)"""
    block = _tile(x.shape[3], 64)
    chunks = x.shape[0] * cdiv(x.shape[1] * x.shape[2], CHUNK)
    return (
        chunks * cdiv(x.shape[3], block),
        chunks,
        {"ACC": accumulator(x)[1], "BLOCK_M": ROWS, "BLOCK_C": block, "num_warps": 4},
    )


def _sparse_conv_block_moments(x, cells, per_sample):
    x, cells = rows_of_images(x), as_bytes(cells)
    programs, chunks, meta = _chunked(x)
    parts = torch.empty((chunks, 3, x.shape[3]), dtype=accumulator(x)[0], device=x.device)
    launch(_moments_kernel, programs, x, cells, parts, *_sizes(x, cells), CHUNK, **meta)
    S = x.shape[0] if per_sample else 1
    # Not unflatten, which cannot tell the chunks of no sample.
    count, mean, square = parts.view(S, chunks // max(S, 1), 3, x.shape[3]).unbind(2)
    joined = (count * mean).sum(1) / count.sum(1).clamp(min=1)
    return joined, (square + count * (mean - joined[:, None]).square()).sum(1)


def sparse_conv_block_norm(x, mean, rstd, weight, bias, cells, count, groups, process_group):
    x, cells, mean, rstd = rows_of_images(x), as_bytes(cells), mean.contiguous(), rstd.contiguous()
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    out = _like(x)
    programs, meta = _elementwise(x)
    launch(
        _normalise_kernel, programs, x, mean, rstd, weight, bias, cells, out, *_sizes(x, cells), PER_SAMPLE=mean.shape[0] > 1,
        **meta,
    )  # fmt: skip
    return out


def _sparse_conv_block_norm_sums(grad, x, mean, cells):
    grad, x, cells, mean = rows_of_images(grad), rows_of_images(x), as_bytes(cells), mean.contiguous()
    programs, chunks, meta = _chunked(x)
    parts = torch.empty((chunks, 2, x.shape[3]), dtype=accumulator(x)[0], device=x.device)
    S = mean.shape[0]
    launch(_sums_kernel, programs, grad, x, mean, cells, parts, *_sizes(x, cells), CHUNK, PER_SAMPLE=S > 1, **meta)
    return parts.view(S, chunks // max(S, 1), 2, x.shape[3]).sum(1).transpose(0, 1).contiguous()


def _sparse_conv_block_norm_backward(grad, x, mean, of_grad, of_x, constant, cells):
    grad, x, cells = rows_of_images(grad), rows_of_images(x), as_bytes(cells)
    stats = [t.contiguous() for t in (mean, of_grad, of_x, constant)]
    out = _like(x)
    programs, meta = _elementwise(x)
    launch(
        _norm_backward_kernel,
        programs,
        grad,
        x,
        *stats,
        cells,
        out,
        *_sizes(x, cells),
        PER_SAMPLE=mean.shape[0] > 1,
        **meta,
    )
    return out


def _whole_rows(x):
    block = max(16, triton.next_power_of_2(x.shape[3]))
    rows = max(1, min(8 if x.dtype == torch.float64 else 16, 2048 // block))
    return {"ACC": accumulator(x)[1], "BLOCK_M": rows, "BLOCK_C": block, "num_warps": 4}


def sparse_conv_block_layer_norm(x, weight, bias, cells, eps):
    x, cells = rows_of_images(x), as_bytes(cells)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    out, meta, total = _like(x), _whole_rows(x), x.shape[0] * x.shape[1] * x.shape[2]
    programs = cdiv(total, meta["BLOCK_M"]) if x.shape[3] else 0
    launch(_layer_kernel, programs, x, weight, bias, cells, out, total, *_sizes(x, cells), eps, **meta)
    return out


def _sparse_conv_block_layer_norm_backward(grad, x, weight, cells, eps):
    grad, x, cells = rows_of_images(grad), rows_of_images(x), as_bytes(cells)
    weight = None if weight is None else weight.contiguous()
    out, meta, total = _like(x), _whole_rows(x), x.shape[0] * x.shape[1] * x.shape[2]
    per_chunk = max(64, cdiv(total, 1024))
    chunks = cdiv(total, per_chunk) if x.shape[3] else 0
    sums = torch.empty((chunks, 2, x.shape[3]), dtype=accumulator(x)[0], device=x.device)
    launch(
        _layer_backward_kernel,
        chunks,
        grad,
        x,
        weight,
        cells,
        out,
        sums,
        total,
        *_sizes(x, cells),
        eps,
        per_chunk,
        **meta,
    )
    of_weight, of_bias = sums.sum(0)
    return out, of_weight.clone(), of_bias.clone()


# ---------------------------------------------------------------- AOT samples

_CELLS = Arg("bool", (8, 7, 7))
_X = tuple(Arg("float", (8, C, 28, 28)) for C in (64, 100))


def _stats(x, S, count=1):
    return tuple(Arg("accumulator", (S, x.shape[1])) for _ in range(count))


def _affine(x):
    return Arg("accumulator", (x.shape[1],)), Arg("accumulator", (x.shape[1],))


AOT_SAMPLES = {
    "_sparse_conv_block_moments": tuple((x, _CELLS, False) for x in _X),
    "sparse_conv_block_norm": (
        (_X[0], *_stats(_X[0], 1, 2), *_affine(_X[0]), _CELLS, None, 1, ""),
        (_X[1], *_stats(_X[1], 8, 2), None, None, _CELLS, None, 1, ""),
    ),
    "_sparse_conv_block_norm_sums": tuple((x, x, *_stats(x, S), _CELLS) for x, S in zip(_X, (1, 8), strict=True)),
    "_sparse_conv_block_norm_backward": tuple((x, x, *_stats(x, S, 4), _CELLS) for x, S in zip(_X, (1, 8), strict=True)),
    "sparse_conv_block_layer_norm": ((_X[0], *_affine(_X[0]), _CELLS, 1e-6), (_X[1], None, None, _CELLS, 1e-6)),
    "_sparse_conv_block_layer_norm_backward": ((_X[0], _X[0], _affine(_X[0])[0], _CELLS, 1e-6), (_X[1], _X[1], None, _CELLS, 1e-6)),
}  # fmt: skip
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LIMITS = {name: {"dtypes": _FLOATS, "reason": ""} for name in AOT_SAMPLES}
