"""Triton kernels of block-masked dense convolution and max pooling.

Images are rows [B, H, W, C]. The cells of all images are put in order, active ones first, without a look from the host: a tile of
rows lies in active cells as long as there are any, and the others only write zeros.
"""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import Arg, accumulator, cdiv, dot_add, launch, rounded
from maskops.kernels.sparse_conv.conv import _precision, _tile


def rows_of_images(x):
    """[B, C, H, W] -> [B, H, W, C], contiguous; channels_last memory is not copied."""
    return x.permute(0, 2, 3, 1).contiguous()


def empty_images(like, B, C, H, W, dtype=None):
    """A new [B, C, H, W] in channels_last memory, which the kernels see as rows; no view, as what follows may write in place."""
    options = {"dtype": dtype or like.dtype, "device": like.device}
    return torch.empty((B, C, H, W), **options, memory_format=torch.channels_last)


def in_order(cells):
    """(int32 [B h w], active cells first; int32 [1], how many of them)"""
    hidden = cells.flatten().logical_not()
    return hidden.to(torch.uint8).sort(stable=True)[1].int(), (~hidden).sum(dtype=torch.int32)[None]


def as_bytes(cells):
    return cells.contiguous().view(torch.uint8)


@triton.jit
def is_active(cells_ptr, image, y, x, h, w, ch, cw, mask):
    at = (image * h + y // ch) * w + x // cw
    return mask & (tl.load(cells_ptr + at, mask=mask, other=0) != 0)


@triton.jit
def _source(at, k, stride, padding, REVERSED: tl.constexpr):
    """(the position that kernel place k reads for position `at`, whether there is one); -1 and below are outside."""
    if REVERSED:
        found = at + padding - k
        exists = (found >= 0) & (found % stride == 0)
        return tl.where(exists, found // stride, -1), exists
    else:
        found = at * stride + k - padding
        return found, found >= 0


@triton.jit
def _places(order_ptr, m, total, P, h, w, th, tw):
    """(image, y, x) of rows m of the result in the order of cells; th, tw: positions of a cell of it."""
    cell = tl.load(order_ptr + m // P, mask=m < total, other=0)
    p = m % P
    image = cell // (h * w)
    return image, cell // w % h * th + p // tw, cell % w * tw + p % tw


@triton.jit
def _block_conv_kernel(x_ptr, weight_ptr, bias_ptr, cells_ptr, order_ptr, count_ptr, out_ptr, total, P, h, w, fh, fw, th, tw, kw, K,
                       ty, tx, py, px, C, D, GROUPS, REVERSED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
                       BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M rows x BLOCK_D columns of one group of out [rows, GROUPS, D] and walks over the kernel places. Rows
    # are the positions of cells in order; fh x fw positions of a cell are read, th x tw written. weight [K, C, GROUPS, D].
    columns = tl.cdiv(D, BLOCK_D)
    m = (tl.program_id(0) // (columns * GROUPS)) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(0) // columns % GROUPS
    d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    wide = GROUPS * D
    image, y, x = _places(order_ptr, m, total, P, h, w, th, tw)
    active = m < tl.load(count_ptr) * P
    sums = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    if tl.max(active.to(tl.int32), 0) > 0:
        for k in range(0, K):
            sy, found_y = _source(y, k // kw, ty, py, REVERSED)
            sx, found_x = _source(x, k % kw, tx, px, REVERSED)
            inside = active & found_y & found_x & (sy < h * fh) & (sx < w * fw)
            seen = is_active(cells_ptr, image, sy, sx, h, w, fh, fw, inside)
            if tl.max(seen.to(tl.int32), 0) > 0:
                row = ((image * (h * fh) + sy).to(tl.int64) * (w * fw) + sx) * (GROUPS * C) + group * C
                weight = weight_ptr + tl.cast(k, tl.int64) * C * wide + group * D
                for c0 in range(0, C, BLOCK_C):
                    c = c0 + tl.arange(0, BLOCK_C)
                    a = tl.load(x_ptr + row[:, None] + c[None, :], mask=seen[:, None] & (c < C)[None, :], other=0.0)
                    at = c.to(tl.int64)[:, None] * wide + d[None, :]
                    b = tl.load(weight + at, mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
                    sums = dot_add(a, b, sums, PRECISION)
        if bias_ptr is not None:
            sums += tl.load(bias_ptr + group * D + d, mask=d < D, other=0.0).to(ACC)[None, :]
        sums = tl.where(active[:, None], sums, 0.0)
    at = ((image * (h * th) + y).to(tl.int64) * (w * tw) + x) * wide + group * D
    tl.store(
        out_ptr + at[:, None] + d[None, :],
        rounded(sums, out_ptr.dtype.element_ty),
        mask=(m < total)[:, None] & (d < D)[None, :],
    )


@triton.jit
def _block_depthwise_kernel(x_ptr, weight_ptr, bias_ptr, cells_ptr, order_ptr, count_ptr, out_ptr, total, P, h, w, fh, fw, th, tw,
                            kw, K, ty, tx, py, px, D, REVERSED: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
                            BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M rows x BLOCK_D channels of out [rows, D]; each channel has a weight of its own, [K, D].
    columns = tl.cdiv(D, BLOCK_D)
    m = (tl.program_id(0) // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    image, y, x = _places(order_ptr, m, total, P, h, w, th, tw)
    active = m < tl.load(count_ptr) * P
    sums = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    if tl.max(active.to(tl.int32), 0) > 0:
        for k in range(0, K):
            sy, found_y = _source(y, k // kw, ty, py, REVERSED)
            sx, found_x = _source(x, k % kw, tx, px, REVERSED)
            inside = active & found_y & found_x & (sy < h * fh) & (sx < w * fw)
            seen = is_active(cells_ptr, image, sy, sx, h, w, fh, fw, inside)
            row = ((image * (h * fh) + sy).to(tl.int64) * (w * fw) + sx) * D
            a = tl.load(x_ptr + row[:, None] + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
            b = tl.load(weight_ptr + tl.cast(k, tl.int64) * D + d, mask=d < D, other=0.0)
            sums += a.to(ACC) * b.to(ACC)[None, :]
        if bias_ptr is not None:
            sums += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(ACC)[None, :]
        sums = tl.where(active[:, None], sums, 0.0)
    at = ((image * (h * th) + y).to(tl.int64) * (w * tw) + x) * D
    tl.store(
        out_ptr + at[:, None] + d[None, :],
        rounded(sums, out_ptr.dtype.element_ty),
        mask=(m < total)[:, None] & (d < D)[None, :],
    )


@triton.jit
def _block_grad_weight_kernel(grad_ptr, x_ptr, cells_ptr, order_ptr, count_ptr, out_ptr, bias_ptr, total, P, h, w, fh, fw, th, tw,
                              kw, K, ty, tx, py, px, C, D, GROUPS, PER_CHUNK, DEPTHWISE: tl.constexpr, ACC: tl.constexpr,
                              PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
                              BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_C x BLOCK_D of one group and kernel place of out [chunks, K, C, GROUPS, D], sums over PER_CHUNK rows in
    # active cells; the programs of place 0 and the first channels also sum grad, [chunks, GROUPS, D]. DEPTHWISE: C is 1.
    across, columns = tl.cdiv(C, BLOCK_C), tl.cdiv(D, BLOCK_D)
    own = tl.program_id(0)
    d = own % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    first = own // columns % across
    c = first * BLOCK_C + tl.arange(0, BLOCK_C)
    own = own // (columns * across)
    group, own = own % GROUPS, own // GROUPS
    k = own % K
    chunk = own // K
    wide = GROUPS * D
    if DEPTHWISE:  # the channels are those of the group
        wide = D
    sums = tl.zeros([BLOCK_C, BLOCK_D], ACC)
    bias = tl.zeros([BLOCK_D], ACC)
    end = tl.minimum(tl.minimum((chunk + 1) * PER_CHUNK, total), tl.load(count_ptr) * P)
    for m0 in range(chunk * PER_CHUNK, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        active = m < end
        image, y, x = _places(order_ptr, m, end, P, h, w, th, tw)
        sy, found_y = _source(y, k // kw, ty, py, False)
        sx, found_x = _source(x, k % kw, tx, px, False)
        inside = active & found_y & found_x & (sy < h * fh) & (sx < w * fw)
        seen = is_active(cells_ptr, image, sy, sx, h, w, fh, fw, inside)
        at = ((image * (h * th) + y).to(tl.int64) * (w * tw) + x) * wide + group * D
        grad = tl.load(grad_ptr + at[:, None] + d[None, :], mask=active[:, None] & (d < D)[None, :], other=0.0)
        if (k == 0) & (first == 0):
            bias += tl.sum(grad.to(ACC), 0)
        if DEPTHWISE:
            row = ((image * (h * fh) + sy).to(tl.int64) * (w * fw) + sx) * D
            a = tl.load(x_ptr + row[:, None] + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
            sums += tl.sum(a.to(ACC) * grad.to(ACC), 0)[None, :]
        else:
            row = ((image * (h * fh) + sy).to(tl.int64) * (w * fw) + sx) * (GROUPS * C) + group * C
            a = tl.load(x_ptr + row[:, None] + c[None, :], mask=seen[:, None] & (c < C)[None, :], other=0.0)
            sums = dot_add(tl.trans(a), grad, sums, PRECISION)
    at = ((tl.cast(chunk, tl.int64) * K + k) * C + c)[:, None] * wide + group * D + d[None, :]
    tl.store(out_ptr + at, sums, mask=(c < C)[:, None] & (d < D)[None, :])
    if (k == 0) & (first == 0):
        tl.store(bias_ptr + tl.cast(chunk, tl.int64) * wide + group * D + d, bias, mask=d < D)


# ---------------------------------------------------------------- max pooling


@triton.jit
def _pool_kernel(x_ptr, cells_ptr, out_ptr, taps_ptr, total, h, w, fh, fw, th, tw, kw, K, ty, tx, py, px, D, ACC: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M positions x BLOCK_D channels of out [B, H, W, D] and of taps. Hidden neighbours are 0, named 255.
    columns = tl.cdiv(D, BLOCK_D)
    m = (tl.program_id(0) // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    y, x = m // (w * tw) % (h * th), m % (w * tw)
    image = m // (w * tw * h * th)
    active = is_active(cells_ptr, image, y, x, h, w, th, tw, m < total)
    best = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    tap = tl.full([BLOCK_M, BLOCK_D], 255, tl.int32)
    if tl.max(active.to(tl.int32), 0) > 0:
        any_yet = tl.zeros([BLOCK_M], tl.int32)
        for k in range(0, K):
            sy, found_y = _source(y, k // kw, ty, py, False)
            sx, found_x = _source(x, k % kw, tx, px, False)
            inside = active & found_y & found_x & (sy < h * fh) & (sx < w * fw)
            seen = is_active(cells_ptr, image, sy, sx, h, w, fh, fw, inside)
            row = ((image * (h * fh) + sy).to(tl.int64) * (w * fw) + sx) * D
            value = tl.load(x_ptr + row[:, None] + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0).to(ACC)
            more = (any_yet == 0)[:, None] | ((value > best) | (value != value)) & (best == best)
            more = more & inside[:, None]
            best = tl.where(more, value, best)
            tap = tl.where(more, tl.where(seen[:, None], k, 255), tap)
            any_yet = tl.where(inside, 1, any_yet)
    at = m.to(tl.int64)[:, None] * D + d[None, :]
    mask = (m < total)[:, None] & (d < D)[None, :]
    tl.store(out_ptr + at, rounded(tl.where(active[:, None], best, 0.0), out_ptr.dtype.element_ty), mask=mask)
    tl.store(taps_ptr + at, tap.to(tl.uint8), mask=mask)


@triton.jit
def _pool_backward_kernel(grad_ptr, taps_ptr, cells_ptr, out_ptr, total, h, w, fh, fw, th, tw, kw, K, ty, tx, py, px, D,
                          ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M positions x BLOCK_D channels of out, the finer grid: it asks each window that holds them.
    columns = tl.cdiv(D, BLOCK_D)
    m = (tl.program_id(0) // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    y, x = m // (w * tw) % (h * th), m % (w * tw)
    image = m // (w * tw * h * th)
    active = is_active(cells_ptr, image, y, x, h, w, th, tw, m < total)
    sums = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    if tl.max(active.to(tl.int32), 0) > 0:
        for k in range(0, K):
            sy, found_y = _source(y, k // kw, ty, py, True)
            sx, found_x = _source(x, k % kw, tx, px, True)
            inside = active & found_y & found_x & (sy < h * fh) & (sx < w * fw)
            seen = is_active(cells_ptr, image, sy, sx, h, w, fh, fw, inside)
            row = ((image * (h * fh) + sy).to(tl.int64) * (w * fw) + sx) * D
            mask = seen[:, None] & (d < D)[None, :]
            tap = tl.load(taps_ptr + row[:, None] + d[None, :], mask=mask, other=255).to(tl.int32)
            grad = tl.load(grad_ptr + row[:, None] + d[None, :], mask=mask & (tap == k), other=0.0)
            sums += grad.to(ACC)
    at = m.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out_ptr + at, rounded(sums, out_ptr.dtype.element_ty), mask=(m < total)[:, None] & (d < D)[None, :])


# ---------------------------------------------------------------- launchers


def _geometry(cells, read, written):
    """h, w, and the positions of a cell of what is read and of what is written."""
    h, w = cells.shape[1:]
    return h, w, read[0] // h, read[1] // w, written[0] // h, written[1] // w


def _convolve(x, weight, bias, cells, sizes, kernel, stride, padding, groups, reverse):
    """x rows [B, H, W, groups C], weight [K, C, groups D] -> rows of `sizes`."""
    K, C, wide = weight.shape
    out = empty_images(x, x.shape[0], wide, *sizes)
    order, count = in_order(cells)
    total, P = out.shape[0] * sizes[0] * sizes[1], sizes[0] // cells.shape[1] * (sizes[1] // cells.shape[2])
    common = (total, P, *_geometry(cells, x.shape[1:3], sizes), kernel[1], K, *stride, *padding)
    bias = None if bias is None else bias.contiguous()
    cells = as_bytes(cells)
    if C == 1 and groups == wide:
        block = _tile(wide, 64)
        launch(
            _block_depthwise_kernel, cdiv(total, 32) * cdiv(wide, block), x, weight, bias, cells, order, count, out, *common, wide,
            REVERSED=reverse, ACC=accumulator(x)[1], BLOCK_M=32, BLOCK_D=block, num_warps=4,
        )  # fmt: skip
        return out
    D, big = wide // groups, x.dtype.itemsize > 2
    block_m, block_d, block_c = (32 if big else 64), _tile(D, 32 if big else 64), 16 if big else _tile(C, 32)
    launch(
        _block_conv_kernel, cdiv(total, block_m) * groups * cdiv(D, block_d), x, weight, bias, cells, order, count, out, *common, C,
        D, groups, REVERSED=reverse, **_precision(x), BLOCK_M=block_m, BLOCK_C=block_c, BLOCK_D=block_d, num_warps=4,
        **({"num_stages": 1, "maxnreg": 255} if big else {"num_stages": 3}),  # left alone, ptxas takes 64 registers and spills
    )  # fmt: skip
    return out


def sparse_conv_block(x, weight, bias, cells, stride, padding, groups):
    packed = weight.flatten(2).permute(2, 1, 0).contiguous()
    sizes = x.shape[2] // stride[0], x.shape[3] // stride[1]
    return _convolve(rows_of_images(x), packed, bias, cells, sizes, weight.shape[2:], stride, padding, groups, False)


def _sparse_conv_block_grad_input(grad, weight, cells, size, stride, padding, groups):
    O, C, kh, kw = weight.shape
    packed = (
        weight.reshape(groups, O // groups, C, kh * kw).permute(3, 1, 0, 2).reshape(kh * kw, O // groups, groups * C)
    )
    return _convolve(
        rows_of_images(grad), packed.contiguous(), None, cells, size, (kh, kw), stride, padding, groups, True
    )


def _sparse_conv_block_grad_weight(grad, x, cells, kernel_size, stride, padding, groups):
    grad, x = rows_of_images(grad), rows_of_images(x)
    sizes, wide = grad.shape[1:3], grad.shape[3]
    K, C, D = kernel_size[0] * kernel_size[1], x.shape[3] // groups, wide // groups
    total, P = grad.shape[0] * sizes[0] * sizes[1], sizes[0] // cells.shape[1] * (sizes[1] // cells.shape[2])
    options = {"dtype": accumulator(x)[0], "device": x.device}
    if C == 0:  # no program for the weight, and so none that sums the bias
        active = cells.repeat_interleave(sizes[0] // cells.shape[1], 1).repeat_interleave(sizes[1] // cells.shape[2], 2)
        bias = torch.where(active[..., None], grad, 0).sum((0, 1, 2), dtype=options["dtype"])
        return x.new_empty((wide, 0, *kernel_size)), bias.to(x.dtype)
    chunks = min(32, max(1, cdiv(total, 4096)))
    per_chunk = cdiv(total, chunks)
    sums, bias = torch.empty((chunks, K, C, wide), **options), torch.empty((chunks, wide), **options)
    order, count = in_order(cells)
    depthwise = C == 1 and D == 1
    big = x.dtype.itemsize > 2
    # A depthwise layer is one group whose channels are summed each for itself.
    C, D, G = (1, wide, 1) if depthwise else (C, D, groups)
    block_c, block_d = (1 if depthwise else _tile(C, 32 if big else 64)), _tile(D, 32 if big and not depthwise else 64)
    launch(
        _block_grad_weight_kernel, chunks * K * G * cdiv(C, block_c) * cdiv(D, block_d), grad, x, as_bytes(cells), order, count,
        sums, bias, total, P, *_geometry(cells, x.shape[1:3], sizes), kernel_size[1], K, *stride, *padding, C, D, G, per_chunk,
        DEPTHWISE=depthwise, **_precision(x), BLOCK_M=16 if big else 32, BLOCK_C=block_c, BLOCK_D=block_d, num_warps=4,
        num_stages=1 if big else 3, maxnreg=255,
    )  # fmt: skip
    found = sums.sum(0).permute(2, 1, 0).reshape(wide, C, *kernel_size)
    return found.to(x.dtype).contiguous(), bias.sum(0).to(x.dtype)


def sparse_conv_block_max_pool(x, cells, kernel_size, stride, padding):
    x, cells = rows_of_images(x), as_bytes(cells)
    B, H, W, D = x.shape
    sizes = H // stride[0], W // stride[1]
    out, taps = empty_images(x, B, D, *sizes), empty_images(x, B, D, *sizes, torch.uint8)
    block = _tile(D, 64)
    launch(
        _pool_kernel, cdiv(B * sizes[0] * sizes[1], 16) * cdiv(D, block), x, cells, out, taps, B * sizes[0] * sizes[1],
        *_geometry(cells, (H, W), sizes), kernel_size[1], kernel_size[0] * kernel_size[1], *stride, *padding, D,
        ACC=accumulator(x)[1], BLOCK_M=16, BLOCK_D=block, num_warps=4,
    )  # fmt: skip
    return out, taps


def _sparse_conv_block_max_pool_backward(grad, taps, cells, size, kernel_size, stride, padding):
    grad, taps, cells = rows_of_images(grad), rows_of_images(taps), as_bytes(cells)
    B, h, w, D = grad.shape
    out = empty_images(grad, B, D, *size)
    block, total = _tile(D, 64), B * size[0] * size[1]
    launch(
        _pool_backward_kernel, cdiv(total, 32) * cdiv(D, block), grad, taps, cells, out, total, *_geometry(cells, (h, w), size),
        kernel_size[1], kernel_size[0] * kernel_size[1], *stride, *padding, D, ACC=accumulator(grad)[1], BLOCK_M=32, BLOCK_D=block,
        num_warps=4,
    )  # fmt: skip
    return out


# ---------------------------------------------------------------- AOT samples

_CELLS = Arg("bool", (8, 7, 7))


def _layer(C, O, size, kernel, stride, groups=1, bias=False):
    x, weight = Arg("float", (8, C, size, size)), Arg("float", (O, C // groups, kernel, kernel))
    padding = (kernel - 1) // 2 if kernel % 2 else 0
    return x, weight, Arg("float", (O,)) if bias else None, _CELLS, [stride] * 2, [padding] * 2, groups


_LAYERS = [
    _layer(*a)
    for a in ((64, 64, 56, 3, 1), (20, 37, 56, 3, 2, 1, True), (64, 128, 28, 3, 1, 4), (96, 96, 56, 7, 1, 96, True))
]


def _grad(layer):
    x, weight, stride = layer[0], layer[1], layer[4]
    return Arg("float", (8, weight.shape[0], x.shape[2] // stride[0], x.shape[3] // stride[1]))


_POOL = Arg("float", (8, 64, 112, 112)), _CELLS, [3, 3], [2, 2], [1, 1]
AOT_SAMPLES = {
    "sparse_conv_block": tuple(_LAYERS),
    "_sparse_conv_block_grad_input": tuple((_grad(a), a[1], a[3], list(a[0].shape[2:]), *a[4:]) for a in _LAYERS),
    "_sparse_conv_block_grad_weight": tuple((_grad(a), a[0], a[3], list(a[1].shape[2:]), *a[4:]) for a in _LAYERS),
    "sparse_conv_block_max_pool": (_POOL,),
    "_sparse_conv_block_max_pool_backward": (
        (Arg("float", (8, 64, 56, 56)), Arg("uint8", (8, 64, 56, 56)), _CELLS, [112, 112], [3, 3], [2, 2], [1, 1]),
    ),
}  # fmt: skip
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LIMITS = {name: {"dtypes": _FLOATS, "reason": ""} for name in AOT_SAMPLES}
