"""Triton kernels of sparse convolution: a hash of places, the map it answers, and the implicit products over gathered rows."""

import math

import torch
import triton
import triton.language as tl
from maskops.kernels._common import Arg, accumulator, cdiv, dot_add, launch, rounded, rows_of

AXES = 3
EMPTY = tl.constexpr(-1)
ROWS, PLACES, PAIRS = 128, 128, 128


# ---------------------------------------------------------------- places and their hash


@triton.jit
def _mixed(x):
    x = x ^ (x >> 31)
    x = x * 0x9E3779B97F4A7C15
    x = x ^ (x >> 29)
    x = x * 0xBF58476D1CE4E5B9
    return x ^ (x >> 32)


@triton.jit
def _slot_of(batch, a0, a1, a2, size):
    low = (batch.to(tl.uint32).to(tl.uint64) << 32) | a0.to(tl.uint32).to(tl.uint64)
    high = (a1.to(tl.uint32).to(tl.uint64) << 32) | a2.to(tl.uint32).to(tl.uint64)
    return _mixed(low ^ _mixed(high)).to(tl.int64, bitcast=True) & (size - 1)


@triton.jit
def _place_of(ptr, row, mask):
    """The four numbers of rows of [N, 4]."""
    at = ptr + row.to(tl.int64) * 4
    batch = tl.load(at, mask=mask, other=0)
    return (
        batch,
        tl.load(at + 1, mask=mask, other=0),
        tl.load(at + 2, mask=mask, other=0),
        tl.load(at + 3, mask=mask, other=0),
    )


@triton.jit
def _insert_kernel(coords_ptr, table_ptr, N, size, BLOCK: tl.constexpr):
    # One program owns BLOCK rows of coords [N, 4] and puts their numbers into table [size + 1], at the first free slot from that of
    # the hash on. The last slot is for lanes that are done. Which slot a row gets depends on the order, what is found does not.
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pending = row < N
    batch, a0, a1, a2 = _place_of(coords_ptr, row, pending)
    slot = _slot_of(batch, a0, a1, a2, size)
    while tl.max(pending.to(tl.int32), 0) > 0:
        at = tl.where(pending, slot, size)
        before = tl.atomic_cas(table_ptr + at, tl.full([BLOCK], -1, tl.int32), row.to(tl.int32))
        pending = pending & (before != EMPTY)
        slot = (slot + 1) & (size - 1)


@triton.jit
def _source(at, k, stride, padding, dilation, DIVIDES: tl.constexpr):
    """(the place on one axis that kernel place k reads, whether there is one), as ConvGeometry::source."""
    shift = k.to(tl.int64) * dilation - padding
    if DIVIDES:
        found = at.to(tl.int64) - shift
        exists = found % stride == 0
        found = tl.where(exists, found, 0) // stride
    else:
        found = at.to(tl.int64) * stride + shift
        exists = found == found
    exists = exists & (found >= -2147483648) & (found <= 2147483647)
    return found.to(tl.int32), exists


@triton.jit
def _sources(a0, a1, a2, k, s1, s2, t0, t1, t2, p0, p1, p2, d0, d1, d2, DIVIDES: tl.constexpr):
    """(the place on each axis that kernel place k of s0 x s1 x s2 reads, whether there is one)"""
    f0, e0 = _source(a0, k // (s1 * s2), t0, p0, d0, DIVIDES)
    f1, e1 = _source(a1, k // s2 % s1, t1, p1, d1, DIVIDES)
    f2, e2 = _source(a2, k % s2, t2, p2, d2, DIVIDES)
    return f0, f1, f2, e0 & e1 & e2


@triton.jit
def _map_kernel(coords_ptr, table_ptr, out_coords_ptr, map_ptr, M, size, s1, s2, t0, t1, t2, p0, p1, p2, d0, d1, d2,
                DIVIDES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # One program owns BLOCK rows of the result and one kernel place: a run of map [K, M].
    blocks = tl.cdiv(M, BLOCK)
    k = tl.program_id(0) // blocks
    m = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = m < M
    batch, a0, a1, a2 = _place_of(out_coords_ptr, m, inside)
    f0, f1, f2, exists = _sources(a0, a1, a2, k, s1, s2, t0, t1, t2, p0, p1, p2, d0, d1, d2, DIVIDES)
    seeking = inside & exists
    slot = _slot_of(batch, f0, f1, f2, size)
    result = tl.full([BLOCK], -1, tl.int32)
    while tl.max(seeking.to(tl.int32), 0) > 0:
        row = tl.load(table_ptr + slot, mask=seeking, other=-1)
        seeking = seeking & (row != EMPTY)
        c, c0, c1, c2 = _place_of(coords_ptr, row, seeking)
        same = seeking & (c == batch) & (c0 == f0) & (c1 == f1) & (c2 == f2)
        result = tl.where(same, row, result)
        seeking = seeking & (same == 0)
        slot = (slot + 1) & (size - 1)
    tl.store(map_ptr + k.to(tl.int64) * M + m, result, mask=inside)


@triton.jit
def _reach_kernel(coords_ptr, out_ptr, N, s1, s2, t0, t1, t2, p0, p1, p2, d0, d1, d2, n0, n1, n2, DIVIDES: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    # One program owns BLOCK places and one kernel place: the places of the result [K, N, 4] that they reach, batch -1 if none.
    blocks = tl.cdiv(N, BLOCK)
    k = tl.program_id(0) // blocks
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    _, a0, a1, a2 = _place_of(coords_ptr, n, inside)
    f0, f1, f2, exists = _sources(a0, a1, a2, k, s1, s2, t0, t1, t2, p0, p1, p2, d0, d1, d2, DIVIDES)
    good = exists & (f0 >= 0) & (f1 >= 0) & (f2 >= 0) & (f0 < n0) & (f1 < n1) & (f2 < n2)
    at = out_ptr + (k.to(tl.int64) * N + n) * 4
    tl.store(at, tl.where(good, 1, 0), mask=inside)
    tl.store(at + 1, tl.where(good, f0, 0), mask=inside)
    tl.store(at + 2, tl.where(good, f1, 0), mask=inside)
    tl.store(at + 3, tl.where(good, f2, 0), mask=inside)


@triton.jit
def _reverse_kernel(map_ptr, out_ptr, M, rows, BLOCK: tl.constexpr):
    # One program owns BLOCK entries of a row of map [K, M] and writes the places they name in out [K, rows], which holds -1.
    blocks = tl.cdiv(M, BLOCK)
    k = (tl.program_id(0) // blocks).to(tl.int64)
    m = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    n = tl.load(map_ptr + k * M + m, mask=m < M, other=-1)
    tl.store(out_ptr + k * rows + n, m, mask=n >= 0)


def _padded(coords):
    """int32 [N, 4]: missing axes lead and are 0."""
    return torch.nn.functional.pad(torch.cat([coords[:, 1:], coords[:, :1]], 1), (AXES + 1 - coords.shape[1], 0))[
        :, (3, 0, 1, 2)
    ].contiguous()


def _three(values, fill):
    return (*(fill for _ in range(AXES - len(values))), *values)


def _geometry(kernel_size, stride, padding, dilation):
    return (*_three(kernel_size, 1)[1:], *_three(stride, 1), *_three(padding, 0), *_three(dilation, 1))


def sparse_conv_map(coords, out_coords, kernel_size, stride, padding, dilation, transposed):
    N, M = len(coords), len(out_coords)
    K = math.prod(kernel_size)
    known, wanted = _padded(coords), _padded(out_coords)
    size = triton.next_power_of_2(max(2 * N, 16))
    table = torch.full((size + 1,), -1, dtype=torch.int32, device=coords.device)
    launch(_insert_kernel, cdiv(N, PLACES), known, table, N, size, BLOCK=PLACES, num_warps=4)
    result = torch.empty((K, M), dtype=torch.int32, device=coords.device)
    launch(
        _map_kernel, K * cdiv(M, PLACES), known, table, wanted, result, M, size, *_geometry(kernel_size, stride, padding, dilation),
        DIVIDES=transposed, BLOCK=PLACES, num_warps=4,
    )  # fmt: skip
    return result


def sparse_conv_outputs(coords, out_shape, kernel_size, stride, padding, dilation, transposed):
    N, K, columns = len(coords), math.prod(kernel_size), coords.shape[1]
    reached = torch.empty((K, N, AXES + 1), dtype=torch.int32, device=coords.device)
    launch(
        _reach_kernel, K * cdiv(N, PLACES), _padded(coords), reached, N, *_geometry(kernel_size, stride, padding, dilation),
        *_three(out_shape, 1), DIVIDES=not transposed, BLOCK=PLACES, num_warps=4,
    )  # fmt: skip
    if coords.is_meta:  # recorded for ahead-of-time compilation
        return coords.new_empty((0, columns))
    good = reached[..., 0] != 0
    batch = coords[:, 0].expand(K, N)[good][:, None]
    return torch.unique(torch.cat([batch, reached[good][:, AXES + 2 - columns :]], 1), dim=0)


def sparse_conv_reverse(map, rows):
    map = map.contiguous()
    K, M = map.shape
    result = torch.full((K, rows), -1, dtype=torch.int32, device=map.device)
    launch(_reverse_kernel, K * cdiv(M, PAIRS), map, result, M, rows, BLOCK=PAIRS, num_warps=4)
    return result


# ---------------------------------------------------------------- products


@triton.jit
def _conv_kernel(x_ptr, weight_ptr, bias_ptr, map_ptr, out_ptr, M, K, sx, C, D, GROUPS, ACC: tl.constexpr, PRECISION: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M rows x BLOCK_D columns of one group of out [M, GROUPS, D], and walks over the kernel places, of which
    # those that no row of it reads are skipped. C, D: channels of a group.
    columns = tl.cdiv(D, BLOCK_D)
    m = (tl.program_id(0) // (columns * GROUPS)) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(0) // columns % GROUPS
    d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    wide = GROUPS * D
    total = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for k in range(0, K):
        n = tl.load(map_ptr + tl.cast(k, tl.int64) * M + m, mask=m < M, other=-1)
        if tl.max(n, 0) >= 0:
            rows = x_ptr + n.to(tl.int64)[:, None] * sx + group * C
            weight = weight_ptr + tl.cast(k, tl.int64) * C * wide + group * D
            for c0 in range(0, C, BLOCK_C):
                c = c0 + tl.arange(0, BLOCK_C)
                x = tl.load(rows + c[None, :], mask=(n >= 0)[:, None] & (c < C)[None, :], other=0.0)
                at = c.to(tl.int64)[:, None] * wide + d[None, :]
                w = tl.load(weight + at, mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
                total = dot_add(x, w, total, PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + group * D + d, mask=d < D, other=0.0).to(ACC)[None, :]
    at = m.to(tl.int64)[:, None] * wide + group * D + d[None, :]
    tl.store(out_ptr + at, rounded(total, out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (d < D)[None, :])


@triton.jit
def _depthwise_kernel(x_ptr, weight_ptr, bias_ptr, map_ptr, out_ptr, M, K, sx, D, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
                      BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M rows x BLOCK_D channels of out [M, D]; each channel has a weight of its own.
    columns = tl.cdiv(D, BLOCK_D)
    m = (tl.program_id(0) // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for k in range(0, K):
        n = tl.load(map_ptr + tl.cast(k, tl.int64) * M + m, mask=m < M, other=-1)
        x = tl.load(
            x_ptr + n.to(tl.int64)[:, None] * sx + d[None, :], mask=(n >= 0)[:, None] & (d < D)[None, :], other=0.0
        )
        w = tl.load(weight_ptr + tl.cast(k, tl.int64) * D + d, mask=d < D, other=0.0)
        total += x.to(ACC) * w.to(ACC)[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(ACC)[None, :]
    at = m.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out_ptr + at, rounded(total, out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (d < D)[None, :])


@triton.jit
def _grad_weight_kernel(grad_ptr, x_ptr, map_ptr, out_ptr, M, K, sg, sx, C, D, GROUPS, PER_CHUNK, ACC: tl.constexpr,
                        PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_C x BLOCK_D of one group and kernel place of out [chunks, K, C, GROUPS, D], sums over PER_CHUNK rows of
    # the result; sums over the chunks follow, in order. C, D: channels of a group.
    across, columns = tl.cdiv(C, BLOCK_C), tl.cdiv(D, BLOCK_D)
    own = tl.program_id(0)
    d = own % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    c = own // columns % across * BLOCK_C + tl.arange(0, BLOCK_C)
    own = own // (columns * across)
    group, own = own % GROUPS, own // GROUPS
    k = (own % K).to(tl.int64)
    chunk = own // K
    total = tl.zeros([BLOCK_C, BLOCK_D], ACC)
    for m0 in range(chunk * PER_CHUNK, tl.minimum((chunk + 1) * PER_CHUNK, M), BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        n = tl.load(map_ptr + k * M + m, mask=m < M, other=-1)
        if tl.max(n, 0) >= 0:
            seen = (n >= 0)[:, None]
            x = tl.load(
                x_ptr + n.to(tl.int64)[:, None] * sx + group * C + c[None, :], mask=seen & (c < C)[None, :], other=0.0
            )
            at = m.to(tl.int64)[:, None] * sg + group * D + d[None, :]
            grad = tl.load(grad_ptr + at, mask=seen & (d < D)[None, :], other=0.0)
            total = dot_add(tl.trans(x), grad, total, PRECISION)
    at = (tl.cast(own, tl.int64) * C + c)[:, None] * (GROUPS * D) + group * D + d[None, :]
    tl.store(out_ptr + at, total, mask=(c < C)[:, None] & (d < D)[None, :])


@triton.jit
def _grad_weight_depthwise_kernel(grad_ptr, x_ptr, map_ptr, out_ptr, M, K, sg, sx, D, PER_CHUNK, ACC: tl.constexpr,
                                  BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_D channels of one kernel place of out [chunks, K, D], sums over PER_CHUNK rows of the result.
    columns = tl.cdiv(D, BLOCK_D)
    own = tl.program_id(0) // columns
    d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    k = (own % K).to(tl.int64)
    chunk = own // K
    total = tl.zeros([BLOCK_D], ACC)
    for m0 in range(chunk * PER_CHUNK, tl.minimum((chunk + 1) * PER_CHUNK, M), BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        n = tl.load(map_ptr + k * M + m, mask=m < M, other=-1)
        mask = (n >= 0)[:, None] & (d < D)[None, :]
        x = tl.load(x_ptr + n.to(tl.int64)[:, None] * sx + d[None, :], mask=mask, other=0.0)
        grad = tl.load(grad_ptr + m.to(tl.int64)[:, None] * sg + d[None, :], mask=mask, other=0.0)
        total += tl.sum(x.to(ACC) * grad.to(ACC), 0)
    tl.store(out_ptr + tl.cast(own, tl.int64) * D + d, total, mask=d < D)


def _precision(x):
    exact = x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return {"ACC": accumulator(x)[1], "PRECISION": "ieee" if exact else "tf32"}


def _tile(channels, most):
    return min(most, max(16, triton.next_power_of_2(channels)))


def sparse_conv(x, weight, bias, map, reverse, groups):
    x, weight, map = rows_of(x), weight.contiguous(), map.contiguous()
    (K, C, D), M = weight.shape, map.shape[1]
    out = x.new_empty((M, D))
    bias = None if bias is None else bias.contiguous()
    if C == 1 and groups == D:
        block = _tile(D, 64)
        launch(
            _depthwise_kernel, cdiv(M, 32) * cdiv(D, block), x, weight, bias, map, out, M, K, x.stride(0), D, ACC=accumulator(x)[1],
            BLOCK_M=32, BLOCK_D=block, num_warps=4,
        )  # fmt: skip
        return out
    each = D // groups
    wide = x.dtype.itemsize > 2
    block_m, block_d, block_c = (32 if wide else 64), _tile(each, 32 if wide else 64), 16 if wide else _tile(C, 32)
    launch(
        _conv_kernel, cdiv(M, block_m) * groups * cdiv(each, block_d), x, weight, bias, map, out, M, K, x.stride(0), C, each,
        groups, **_precision(x), BLOCK_M=block_m, BLOCK_C=block_c, BLOCK_D=block_d, num_warps=4, num_stages=1 if wide else 3,
    )  # fmt: skip
    return out


def _sparse_conv_grad_weight(grad, x, map, groups):
    grad, x, map = rows_of(grad), rows_of(x), map.contiguous()
    (K, M), C, D = map.shape, x.shape[1] // groups, grad.shape[1] // groups
    chunks = min(32, max(1, cdiv(M, 4096)))
    per_chunk = cdiv(M, chunks)
    sums = torch.empty((chunks, K, C, groups * D), dtype=accumulator(x)[0], device=x.device)
    if C == 1 and D == 1:
        block = _tile(groups, 64)
        launch(
            _grad_weight_depthwise_kernel, chunks * K * cdiv(groups, block), grad, x, map, sums, M, K, grad.stride(0), x.stride(0),
            groups, per_chunk, ACC=accumulator(x)[1], BLOCK_M=32, BLOCK_D=block, num_warps=4,
        )  # fmt: skip
    else:
        wide = x.dtype.itemsize > 2
        block_c, block_d = _tile(C, 32 if wide else 64), _tile(D, 32 if wide else 64)
        launch(
            _grad_weight_kernel, chunks * K * groups * cdiv(C, block_c) * cdiv(D, block_d), grad, x, map, sums, M, K,
            grad.stride(0), x.stride(0), C, D, groups, per_chunk, **_precision(x), BLOCK_M=16 if wide else 32, BLOCK_C=block_c,
            BLOCK_D=block_d, num_warps=4, num_stages=1 if wide else 3,
        )  # fmt: skip
    return sums.sum(0).to(x.dtype)


# ---------------------------------------------------------------- AOT samples

_N, _K3 = 10000, ([3, 3, 3], [1, 1, 1], [1, 1, 1], [1, 1, 1])
_COORDS, _MAP = Arg("int32", (_N, 4)), Arg("int32", (27, _N))


def _conv_sample(C, D, groups, bias=True):
    return (
        Arg("float", (_N, C)),
        Arg("float", (27, C // groups, D)),
        Arg("float", (D,)) if bias else None,
        _MAP,
        None,
        groups,
    )


AOT_SAMPLES = {
    "sparse_conv_map": ((_COORDS, _COORDS, *_K3, False), (_COORDS, _COORDS, [3, 3, 3], [2, 2, 2], [1, 1, 1], [1, 1, 1], True)),
    "sparse_conv_outputs": (
        (_COORDS, [20, 400, 400], [3, 3, 3], [2, 2, 2], [1, 1, 1], [1, 1, 1], False), (_COORDS, [20, 400, 400], *_K3, True),
    ),
    "sparse_conv_reverse": ((_MAP, _N),),
    "sparse_conv": tuple(_conv_sample(*s) for s in ((64, 64, 1), (16, 32, 1, False), (20, 37, 1), (64, 128, 4), (96, 96, 96))),
    "_sparse_conv_grad_weight": tuple(
        (Arg("float", (_N, D)), Arg("float", (_N, C)), _MAP, groups)
        for C, D, groups in ((64, 64, 1), (16, 32, 1), (20, 37, 1), (64, 128, 4), (96, 96, 96))
    ),
}  # fmt: skip
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NO_FLOATS = {"dtypes": (), "reason": "takes no floating tensor"}
LIMITS = {
    "sparse_conv_map": _NO_FLOATS,
    "sparse_conv_outputs": _NO_FLOATS,
    "sparse_conv_reverse": _NO_FLOATS,
    "sparse_conv": {"dtypes": _FLOATS, "reason": ""},
    "_sparse_conv_grad_weight": {"dtypes": _FLOATS, "reason": ""},
}
