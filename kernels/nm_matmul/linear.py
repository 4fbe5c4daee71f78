"""Products with a compressed weight: tiles of the dense weight are made on chip from values and places.

M rows, N outputs, K inputs in G = ceil(K / m) groups. The dense weight never exists in memory, so the weight's traffic is
that of the compressed form; the matrix units do dense work, which is why any n and m run, on any GPU.
"""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import accumulator, cdiv, dot_add, launch, rounded, rows_of, sum_rows
from maskops.kernels.nm_matmul.compress import dense_tile, group_format, slot_place, tile_columns
from maskops.kernels.nm_matmul.tiles import ENOUGH_PROGRAMS, gemm_tile, groups_per_tile, tile_position


@triton.jit
def _gather_product(x_ptr, values_ptr, indices_ptr, m, row, M, N, K, groups, g_start, g_end, row_bytes, s_x,
                    KEEP: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, ACC: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """The same product slot by slot: columns of x that a row of the weight does not keep are not looked at."""
    total = tl.zeros([BLOCK_N, BLOCK_M], ACC)
    for j in range(g_start * KEEP, g_end * KEEP):
        slot = j + tl.zeros([BLOCK_N], tl.int64)
        place = slot_place(indices_ptr, row * row_bytes, slot, row < N, row_bytes, BITS)
        column = j // KEEP * GROUP + place
        live = (row < N) & (column < K)
        value = tl.load(values_ptr + row * groups * KEEP + j, mask=live, other=0.0).to(ACC)
        x = tl.load(x_ptr + (m * s_x)[None, :] + column[:, None], mask=live[:, None] & (m < M)[None, :], other=0.0)
        total += value[:, None] * x.to(ACC)
    return total


@triton.jit
def _store_tile(out_ptr, bias_ptr, total, start, row, m, M, biased, N):
    """Store total^T as rows start + m, plus the bias of the first `biased` outputs."""
    if bias_ptr is not None:
        total += tl.load(bias_ptr + row, mask=row < biased, other=0.0).to(total.dtype)[:, None]
    mask = (row < N)[:, None] & (m < M)[None, :]
    at = ((start + m) * N)[None, :] + row[:, None]
    tl.store(out_ptr + at, rounded(total, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _linear_kernel(x_ptr, values_ptr, indices_ptr, bias_ptr, out_ptr, M, N, K, groups, groups_per_split, row_bytes, s_x,
                   KEEP: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, GROUP_BYTES: tl.constexpr,
                   PADDED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_N outputs x BLOCK_M rows of one partial result out [splits, M, N] and walks over the groups
    # of its split. It computes the transpose, W x^T: the weight tile, made in registers, fills the matrix instruction
    # whatever M is, and few rows (decoding) cost a narrow tile only. The bias joins the first split.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    split = tl.program_id(0) // (tiles_m * tiles_n)
    at_n, at_m = tile_position(tl.program_id(0) % (tiles_m * tiles_n), tiles_n, tiles_m)
    row = at_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = at_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    g_start = split * groups_per_split
    g_end = min(g_start + groups_per_split, groups)
    total = tl.zeros([BLOCK_N, BLOCK_M], ACC)
    for g0 in range(g_start, g_end, BLOCK_G):
        column, exists = tile_columns(g0, K, GROUP, PADDED, BLOCK_G)
        x = tl.load(x_ptr + (m * s_x)[:, None] + column[None, :], mask=(m < M)[:, None] & exists[None, :], other=0.0)
        w = dense_tile(values_ptr, indices_ptr, row, g0 + tl.arange(0, BLOCK_G), N, groups, row_bytes,
                       KEEP, GROUP, BITS, GROUP_BYTES, PADDED, BLOCK_N, BLOCK_G)  # fmt: skip
        total = dot_add(tl.reshape(w, [BLOCK_N, BLOCK_G * PADDED]), tl.trans(x), total, PRECISION)
    # The zeros of the dense tile times NaN or inf in x are NaN, in outputs that keep no weight there. Where that may have
    # happened the tile is computed again the slow way, a few rows at a time; x - x is 0 except for NaN and inf.
    slow = tl.max(tl.max((total - total != 0.0).to(tl.int32), 1), 0)
    start = split.to(tl.int64) * M
    biased = tl.where(split == 0, N, 0)
    if BLOCK_M <= 16:
        few = _gather_product(x_ptr, values_ptr, indices_ptr, m, row, M, N, K, groups, g_start,
                              tl.where(slow != 0, g_end, g_start), row_bytes, s_x,
                              KEEP, GROUP, BITS, ACC, BLOCK_N, BLOCK_M)  # fmt: skip
        total = tl.where(slow != 0, few, total)
    _store_tile(out_ptr, bias_ptr, total, start, row, m, M, biased, N)
    if BLOCK_M > 16:
        tl.debug_barrier()  # other threads may store again what this one stored
        for m0 in range(0, slow * BLOCK_M, 16):
            m_few = at_m.to(tl.int64) * BLOCK_M + m0 + tl.arange(0, 16)
            few = _gather_product(x_ptr, values_ptr, indices_ptr, m_few, row, M, N, K, groups, g_start, g_end, row_bytes,
                                  s_x, KEEP, GROUP, BITS, ACC, BLOCK_N, 16)  # fmt: skip
            _store_tile(out_ptr, bias_ptr, few, start, row, m_few, M, biased, N)


def _splits(depth, programs, least):
    """(splits, depth of each): enough to fill the device, none shorter than `least`; a function of the sizes alone."""
    splits = max(1, min(cdiv(ENOUGH_PROGRAMS, max(programs, 1)), depth // least))
    per_split = cdiv(max(depth, 1), splits)
    return splits, per_split


def _summed(partial, shape, dtype):
    """Partial results [splits, ...] added in a fixed order."""
    if partial.shape[0] == 1:
        return partial.view(shape)
    return sum_rows(partial.view(partial.shape[0], -1), dtype).view(shape)


def nm_matmul_linear(x, values, indices, bias, n, m):
    x = rows_of(x)
    (M, K), N, groups = x.shape, values.shape[0], cdiv(x.shape[1], m)
    (block_n, block_m, depth), options = gemm_tile(x.dtype, N, M, depth=32)
    # The weight is made dense in registers, beside the sums: where both are large, some bytes spilled on Hopper and Blackwell.
    padded, block_g = groups_per_tile(16 if block_n == 128 else depth, m)
    if padded > depth or x.dtype == torch.float64:
        block_m = max(16, block_m // 2)
    tiles = cdiv(N, block_n) * cdiv(M, block_m)
    # Only with few rows: partial results would cost more than they bring.
    splits, per_split = _splits(groups, tiles if M <= 64 else ENOUGH_PROGRAMS, least=max(1, 512 // m))
    per_split = cdiv(per_split, block_g) * block_g
    acc, tl_acc = accumulator(x)
    partial = torch.empty((splits, M, N), dtype=x.dtype if splits == 1 else acc, device=x.device)
    launch(
        _linear_kernel, splits * tiles, x, values.contiguous(), indices.contiguous(),
        None if bias is None else bias.contiguous(), partial, M, N, K, groups, per_split, indices.shape[1], x.stride(0),
        **group_format(n, m), PADDED=padded, ACC=tl_acc, BLOCK_N=block_n, BLOCK_M=block_m, BLOCK_G=block_g, **options,
    )  # fmt: skip
    return _summed(partial, (M, N), x.dtype)


@triton.jit
def _linear_grad_x_kernel(grad_ptr, values_ptr, indices_ptr, out_ptr, M, N, K, groups, row_bytes, s_g,
                          KEEP: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, GROUP_BYTES: tl.constexpr,
                          PADDED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
                          BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M rows x BLOCK_G groups of out [M, K] = grad [M, N] @ W and walks over the N outputs; the
    # weight tile stands as the forward pass makes it, only its other side is summed over.
    tiles_g = tl.cdiv(groups, BLOCK_G)
    at_m, at_g = tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_g)
    m = at_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    g0 = at_g * BLOCK_G
    column, exists = tile_columns(g0, K, GROUP, PADDED, BLOCK_G)
    total = tl.zeros([BLOCK_M, BLOCK_G * PADDED], ACC)
    for n0 in range(0, N, BLOCK_N):
        row = n0 + tl.arange(0, BLOCK_N).to(tl.int64)
        grad = tl.load(
            grad_ptr + (m * s_g)[:, None] + row[None, :], mask=(m < M)[:, None] & (row < N)[None, :], other=0.0
        )
        w = dense_tile(values_ptr, indices_ptr, row, g0 + tl.arange(0, BLOCK_G), N, groups, row_bytes,
                       KEEP, GROUP, BITS, GROUP_BYTES, PADDED, BLOCK_N, BLOCK_G)  # fmt: skip
        w = tl.reshape(w, [BLOCK_N, BLOCK_G * PADDED])
        if PRECISION == "tf32":
            # Hopper wants this operand transposed, and Triton 3.9 fails to move the transpose through the reshape. With
            # anything in between, here a choice that changes nothing, it does not try.
            w = tl.where(exists[None, :], w, 0.0)
        total = dot_add(grad, w, total, PRECISION)
    at = (m * K)[:, None] + column[None, :]
    tl.store(out_ptr + at, rounded(total, out_ptr.dtype.element_ty), mask=(m < M)[:, None] & exists[None, :])


def _linear_grad_x(grad, values, indices, n, m, K):
    (M, N), groups = grad.shape, cdiv(K, m)
    out = grad.new_empty((M, K))
    (block_m, columns, depth), options = gemm_tile(grad.dtype, M, K, shortest=-1, depth=32)
    padded, block_g = groups_per_tile(columns, m)
    launch(
        _linear_grad_x_kernel, cdiv(M, block_m) * cdiv(groups, block_g), grad, values.contiguous(), indices.contiguous(),
        out, M, N, K, groups, indices.shape[1], grad.stride(0), **group_format(n, m), PADDED=padded,
        ACC=accumulator(grad)[1], BLOCK_M=block_m, BLOCK_N=depth, BLOCK_G=block_g, **options,
    )  # fmt: skip
    return out


@triton.jit
def _linear_grad_values_kernel(grad_ptr, x_ptr, indices_ptr, out_ptr, M, N, K, groups, rows_per_split, row_bytes, s_g,
                               s_x, KEEP: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
                               PADDED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
                               BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    # One program owns the slots of BLOCK_N outputs x BLOCK_G groups of one partial result out [splits, N, J]: the dense
    # grad^T x of its tile over the rows of its split, from which each slot then picks its column. The other columns of
    # the tile are dropped on chip, so the dense weight gradient never exists in memory.
    tiles_g = tl.cdiv(groups, BLOCK_G)
    tiles_n = tl.cdiv(N, BLOCK_N)
    split = (tl.program_id(0) // (tiles_g * tiles_n)).to(tl.int64)
    at_n, at_g = tile_position(tl.program_id(0) % (tiles_g * tiles_n), tiles_n, tiles_g)
    row = at_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    g0 = at_g * BLOCK_G
    column, exists = tile_columns(g0, K, GROUP, PADDED, BLOCK_G)
    m_end = min((split + 1) * rows_per_split, M)
    total = tl.zeros([BLOCK_N, BLOCK_G * PADDED], ACC)
    for m0 in range(split * rows_per_split, m_end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
        inside = (m < m_end)[:, None]
        grad = tl.load(grad_ptr + (m * s_g)[:, None] + row[None, :], mask=inside & (row < N)[None, :], other=0.0)
        x = tl.load(x_ptr + (m * s_x)[:, None] + column[None, :], mask=inside & exists[None, :], other=0.0)
        total = dot_add(tl.trans(grad), x, total, PRECISION)
    dense = tl.reshape(total, [BLOCK_N, BLOCK_G, PADDED])
    g = g0 + tl.arange(0, BLOCK_G)
    live = (row < N)[:, None] & (g < groups)[None, :]
    lane = tl.arange(0, PADDED)[None, None, :]
    start = ((split * N + row) * groups * KEEP)[:, None]
    for s in range(KEEP):
        slot = (g.to(tl.int64) * KEEP + s)[None, :]
        place = slot_place(indices_ptr, (row * row_bytes)[:, None], slot, live, row_bytes, BITS)
        value = tl.sum(tl.where(place[:, :, None] == lane, dense, 0.0), 2)
        tl.store(out_ptr + start + slot, rounded(value, out_ptr.dtype.element_ty), mask=live)


def _linear_grad_values(grad, x, indices, n, m):
    (M, K), N, groups = x.shape, grad.shape[1], cdiv(x.shape[1], m)
    (block_n, columns, depth), options = gemm_tile(x.dtype, N, K, shortest=-1, depth=32)
    # The slots are picked while the sums are still in registers: half a tile leaves room for that.
    padded, block_g = groups_per_tile(min(columns, 64), m)
    tiles = cdiv(N, block_n) * cdiv(groups, block_g)
    splits, per_split = _splits(M, tiles, least=512)
    per_split = cdiv(per_split, depth) * depth
    acc, tl_acc = accumulator(x)
    partial = torch.empty((splits, N, groups * n), dtype=x.dtype if splits == 1 else acc, device=x.device)
    launch(
        _linear_grad_values_kernel, splits * tiles, grad, x, indices.contiguous(), partial, M, N, K, groups, per_split,
        indices.shape[1], grad.stride(0), x.stride(0), KEEP=n, GROUP=m, BITS=(m - 1).bit_length(), PADDED=padded,
        ACC=tl_acc, BLOCK_N=block_n, BLOCK_G=block_g, BLOCK_M=depth, **options,
    )  # fmt: skip
    return _summed(partial, (N, groups * n), x.dtype)


def _nm_matmul_linear_backward(grad, x, values, indices, n, m, need_x, need_values):
    grad, x = rows_of(grad), rows_of(x)
    none = grad.new_empty(0)
    grad_x = _linear_grad_x(grad, values, indices, n, m, x.shape[1]) if need_x else none
    return grad_x, _linear_grad_values(grad, x, indices, n, m) if need_values else none
