"""Triton kernels of pooling: over a kernel map, and over segments, long ones in parts. Without atomics."""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import Arg, accumulator, cdiv, launch, rounded, rows_of

ROWS = 32
PART = 64  # rows of a long segment that a program sums


# ---------------------------------------------------------------- over a map


@triton.jit
def _sum_pool_kernel(x_ptr, map_ptr, read_scale_ptr, scale_ptr, out_ptr, M, K, sx, C, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
                     BLOCK_C: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M rows x BLOCK_C channels of out [M, C] and walks over the kernel places.
    columns = tl.cdiv(C, BLOCK_C)
    m = (tl.program_id(0) // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    for k in range(0, K):
        n = tl.load(map_ptr + tl.cast(k, tl.int64) * M + m, mask=m < M, other=-1)
        mask = (n >= 0)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + n.to(tl.int64)[:, None] * sx + c[None, :], mask=mask, other=0.0).to(ACC)
        if read_scale_ptr is not None:
            x *= tl.load(read_scale_ptr + n, mask=n >= 0, other=0.0)[:, None]
        total += x
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + m, mask=m < M, other=0.0)[:, None]
    at = m.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(out_ptr + at, rounded(total, out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (c < C)[None, :])


@triton.jit
def _larger(x, n, best, arg):
    """Whether x of row n takes the place of best: the first one, a larger one, or the first NaN."""
    return (n >= 0) & ((arg < 0) | (x > best) | ((x != x) & (best == best)))


@triton.jit
def _max_pool_kernel(x_ptr, map_ptr, out_ptr, arg_ptr, M, K, sx, C, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
                     BLOCK_C: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M rows x BLOCK_C channels of out and arg [M, C] and walks over the kernel places.
    columns = tl.cdiv(C, BLOCK_C)
    m = (tl.program_id(0) // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    best = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    arg = tl.full([BLOCK_M, BLOCK_C], -1, tl.int32)
    for k in range(0, K):
        n = tl.load(map_ptr + tl.cast(k, tl.int64) * M + m, mask=m < M, other=-1)
        mask = (n >= 0)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + n.to(tl.int64)[:, None] * sx + c[None, :], mask=mask, other=0.0).to(ACC)
        takes = _larger(x, n[:, None], best, arg)
        best = tl.where(takes, x, best)
        arg = tl.where(takes, n[:, None], arg)
    at = m.to(tl.int64)[:, None] * C + c[None, :]
    inside = (m < M)[:, None] & (c < C)[None, :]
    tl.store(out_ptr + at, rounded(best, out_ptr.dtype.element_ty), mask=inside)
    tl.store(arg_ptr + at, arg, mask=inside)


@triton.jit
def _max_backward_kernel(grad_ptr, arg_ptr, reverse_ptr, out_ptr, N, K, sg, C, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
                         BLOCK_C: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_N rows x BLOCK_C channels of out [N, C]: what the results that read a row took from it.
    columns = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    for k in range(0, K):
        m = tl.load(reverse_ptr + tl.cast(k, tl.int64) * N + n, mask=n < N, other=-1)
        mask = (m >= 0)[:, None] & (c < C)[None, :]
        arg = tl.load(arg_ptr + m.to(tl.int64)[:, None] * C + c[None, :], mask=mask, other=-1)
        grad = tl.load(grad_ptr + m.to(tl.int64)[:, None] * sg + c[None, :], mask=mask & (arg == n[:, None]), other=0.0)
        total += grad.to(ACC)
    at = n.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(out_ptr + at, rounded(total, out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (c < C)[None, :])


def _tiles(x, rows):
    """(programs for `rows` rows, what all kernels take)"""
    block = min(64, max(16, triton.next_power_of_2(x.shape[1])))
    return cdiv(rows, ROWS) * cdiv(x.shape[1], block), {"ACC": accumulator(x)[1], "BLOCK_C": block, "num_warps": 4}


def sparse_conv_sum_pool(x, map, reverse, read_scale, scale):
    x, map = rows_of(x), map.contiguous()
    read_scale, scale = (None if s is None else s.contiguous() for s in (read_scale, scale))
    (K, M), C = map.shape, x.shape[1]
    out = x.new_empty((M, C))
    programs, tile = _tiles(x, M)
    launch(_sum_pool_kernel, programs, x, map, read_scale, scale, out, M, K, x.stride(0), C, BLOCK_M=ROWS, **tile)
    return out


def sparse_conv_max_pool(x, map, reverse):
    x, map = rows_of(x), map.contiguous()
    (K, M), C = map.shape, x.shape[1]
    out, arg = x.new_empty((M, C)), map.new_empty((M, C))
    programs, tile = _tiles(x, M)
    launch(_max_pool_kernel, programs, x, map, out, arg, M, K, x.stride(0), C, BLOCK_M=ROWS, **tile)
    return out, arg


def _sparse_conv_max_backward(grad, arg, reverse):
    grad, arg, reverse = rows_of(grad), arg.contiguous(), reverse.contiguous()
    (K, N), C = reverse.shape, grad.shape[1]
    out = grad.new_empty((N, C))
    programs, tile = _tiles(grad, N)
    launch(_max_backward_kernel, programs, grad, arg, reverse, out, N, K, grad.stride(0), C, BLOCK_N=ROWS, **tile)
    return out


# ---------------------------------------------------------------- over segments


@triton.jit
def _segment_sum_kernel(x_ptr, order_ptr, begin_ptr, count_ptr, scale_ptr, out_ptr, S, sx, C, ACC: tl.constexpr,
                        BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_S segments x BLOCK_C channels of out [S, C]; without order, a segment's rows lie side by side.
    columns = tl.cdiv(C, BLOCK_C)
    s = (tl.program_id(0) // columns) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.load(begin_ptr + s, mask=s < S, other=0).to(tl.int64)
    count = tl.load(count_ptr + s, mask=s < S, other=0)
    total = tl.zeros([BLOCK_S, BLOCK_C], ACC)
    for i in range(0, tl.max(count, 0)):
        n = begin + i
        if order_ptr is not None:
            n = tl.load(order_ptr + n, mask=i < count, other=0).to(tl.int64)
        mask = (i < count)[:, None] & (c < C)[None, :]
        total += tl.load(x_ptr + n[:, None] * sx + c[None, :], mask=mask, other=0.0).to(ACC)
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + s, mask=s < S, other=0.0)[:, None]
    at = s.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(out_ptr + at, rounded(total, out_ptr.dtype.element_ty), mask=(s < S)[:, None] & (c < C)[None, :])


@triton.jit
def _segment_max_kernel(x_ptr, order_ptr, begin_ptr, count_ptr, from_ptr, out_ptr, arg_ptr, S, sx, C, ACC: tl.constexpr,
                        BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    # As _segment_sum_kernel. from [rows, C]: the rows that x itself was taken from, where x are maxima of parts.
    columns = tl.cdiv(C, BLOCK_C)
    s = (tl.program_id(0) // columns) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.load(begin_ptr + s, mask=s < S, other=0).to(tl.int64)
    count = tl.load(count_ptr + s, mask=s < S, other=0)
    best = tl.zeros([BLOCK_S, BLOCK_C], ACC)
    arg = tl.full([BLOCK_S, BLOCK_C], -1, tl.int32)
    for i in range(0, tl.max(count, 0)):
        n = begin + i
        if order_ptr is not None:
            n = tl.load(order_ptr + n, mask=i < count, other=0).to(tl.int64)
        mask = (i < count)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + n[:, None] * sx + c[None, :], mask=mask, other=0.0).to(ACC)
        if from_ptr is not None:
            row = tl.load(from_ptr + n[:, None] * C + c[None, :], mask=mask, other=-1)
        else:
            row = tl.where(mask, n[:, None].to(tl.int32), -1)
        takes = _larger(x, row, best, arg)
        best = tl.where(takes, x, best)
        arg = tl.where(takes, row, arg)
    at = s.to(tl.int64)[:, None] * C + c[None, :]
    inside = (s < S)[:, None] & (c < C)[None, :]
    tl.store(out_ptr + at, rounded(best, out_ptr.dtype.element_ty), mask=inside)
    tl.store(arg_ptr + at, arg, mask=inside)


def _in_parts(order, begin, count):
    """Segments cut into parts of PART rows: (begin and count of the parts, begin and count of each segment among the parts).

    As many parts as there may be at most: nothing is read back from the device. Parts too many are empty.
    """
    parts = (count + PART - 1) // PART
    ends = parts.cumsum(0)
    part = torch.arange(len(count) + len(order) // PART, device=count.device)
    segment = torch.searchsorted(ends, part, right=True).clamp(max=len(count) - 1)
    done = (part - (ends - parts)[segment]) * PART
    length = torch.where(part < ends[-1:], (count[segment] - done).clamp(max=PART), 0)
    return (begin[segment] + done).int(), length.int(), (ends - parts).int(), parts.int()


def _are_long(order, count):
    """Whether segments are so long, as those of the samples of a batch, that one program each would leave a GPU idle."""
    return len(count) > 0 and len(order) > 4 * PART * len(count)


def sparse_conv_segment_sum(x, order, begin, count, inverse, scale):
    x, order, begin, count = rows_of(x), order.contiguous(), begin.contiguous(), count.contiguous()
    scale = None if scale is None else scale.contiguous()
    S, C = len(count), x.shape[1]
    out = x.new_empty((S, C))
    if _are_long(order, count):
        first, length, begin, count = _in_parts(order, begin, count)
        sums = torch.empty((len(first), C), dtype=accumulator(x)[0], device=x.device)
        programs, tile = _tiles(x, len(first))
        launch(
            _segment_sum_kernel,
            programs,
            x,
            order,
            first,
            length,
            None,
            sums,
            len(first),
            x.stride(0),
            C,
            BLOCK_S=ROWS,
            **tile,
        )
        x, order = sums, None
    programs, tile = _tiles(x, S)
    launch(_segment_sum_kernel, programs, x, order, begin, count, scale, out, S, x.stride(0), C, BLOCK_S=ROWS, **tile)
    return out


def sparse_conv_segment_max(x, order, begin, count, inverse):
    x, order, begin, count = rows_of(x), order.contiguous(), begin.contiguous(), count.contiguous()
    S, C = len(count), x.shape[1]
    out, arg, taken = x.new_empty((S, C)), order.new_empty((S, C)), None
    if _are_long(order, count):
        first, length, begin, count = _in_parts(order, begin, count)
        best, taken = x.new_empty((len(first), C)), order.new_empty((len(first), C))
        programs, tile = _tiles(x, len(first))
        launch(
            _segment_max_kernel, programs, x, order, first, length, None, best, taken, len(first), x.stride(0), C, BLOCK_S=ROWS,
            **tile,
        )  # fmt: skip
        x, order = best, None
    programs, tile = _tiles(x, S)
    launch(
        _segment_max_kernel, programs, x, order, begin, count, taken, out, arg, S, x.stride(0), C, BLOCK_S=ROWS, **tile
    )
    return out, arg


def sparse_conv_segment_spread(x, order, begin, count, inverse, scale):
    return sparse_conv_sum_pool(x, inverse[None], None, scale, None)


# ---------------------------------------------------------------- AOT samples

_N = 10000
_MAP, _ROWS = Arg("int32", (27, _N)), Arg("int32", (_N,))
_X, _SCALE = Arg("float", (_N, 64)), Arg("accumulator", (_N,))
_VOXELS, _SAMPLES = Arg("int32", (_N // 4,)), Arg("int32", (4,))

AOT_SAMPLES = {
    "sparse_conv_sum_pool": ((_X, _MAP, None, None, _SCALE), (_X, _MAP, None, _SCALE, None)),
    "sparse_conv_max_pool": ((_X, _MAP, None), (Arg("float", (_N, 5)), _MAP, None)),
    "_sparse_conv_max_backward": ((_X, Arg("int32", (_N, 64)), _MAP),),
    "sparse_conv_segment_sum": (
        (_X, _ROWS, _VOXELS, _VOXELS, _ROWS, Arg("accumulator", (_N // 4,))), (_X, _ROWS, _SAMPLES, _SAMPLES, _ROWS, None),
    ),
    "sparse_conv_segment_max": ((_X, _ROWS, _VOXELS, _VOXELS, _ROWS), (_X, _ROWS, _SAMPLES, _SAMPLES, _ROWS)),
    "sparse_conv_segment_spread": ((Arg("float", (4, 64)), _ROWS, _SAMPLES, _SAMPLES, _ROWS, Arg("accumulator", (4,))),),
}  # fmt: skip
LIMITS = {
    name: {"dtypes": (torch.float32, torch.float64, torch.bfloat16, torch.float16), "reason": ""}
    for name in AOT_SAMPLES
}
