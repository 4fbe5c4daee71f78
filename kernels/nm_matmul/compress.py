"""The compressed weight of nm_matmul: packed places, and the way from dense to compressed and back.

N outputs, K columns in G = ceil(K / m) groups of m, J = G n slots; `indices` [N, row_bytes] holds the place of each slot in
its group, BITS bits each. `dense_tile` is what the products are built on: a tile of the dense weight, made on chip.
"""

import math

import torch
import triton
import triton.language as tl
from maskops.kernels._common import accumulator, cdiv, launch, rows_of


def group_format(n, m):
    """The constexprs that say how a group is stored. GROUP_BYTES: all places of a group fit in so many bytes; 0: too many."""
    bits = (m - 1).bit_length()
    worst_shift = 8 - math.gcd(n * bits, 8)
    group_bytes = cdiv(worst_shift + n * bits, 8)
    return {"KEEP": n, "GROUP": m, "BITS": bits, "GROUP_BYTES": group_bytes if group_bytes <= 4 and n <= 8 else 0}


def row_bytes_of(slots, m):
    return cdiv(slots * (m - 1).bit_length(), 8)


@triton.jit
def slot_place(indices_ptr, row_start, slot, live, row_bytes, BITS: tl.constexpr):
    """The place of a slot in its group; row_start is the offset of the row of indices [N, row_bytes]."""
    bit = slot.to(tl.int64) * BITS
    at = bit // 8
    word = tl.load(indices_ptr + row_start + at, mask=live, other=0).to(tl.int32)
    if 8 % BITS != 0:
        straddles = live & (at + 1 < row_bytes)
        word |= tl.load(indices_ptr + row_start + at + 1, mask=straddles, other=0).to(tl.int32) << 8
    return (word >> (bit % 8).to(tl.int32)) & ((1 << BITS) - 1)


@triton.jit
def _group_word(indices_ptr, row_start, g, live, row_bytes, KEEP: tl.constexpr, BITS: tl.constexpr,
                GROUP_BYTES: tl.constexpr):  # fmt: skip
    """All places of group g as one int32, slot s in bits [s * BITS, (s + 1) * BITS); bits above those are anything."""
    bit = g.to(tl.int64) * (KEEP * BITS)
    at = bit // 8
    word = tl.load(indices_ptr + row_start + at, mask=live, other=0).to(tl.uint32)
    for b in tl.static_range(1, GROUP_BYTES):
        inside = live & (at + b < row_bytes)
        word |= tl.load(indices_ptr + row_start + at + b, mask=inside, other=0).to(tl.uint32) << (8 * b)
    return word >> (bit % 8).to(tl.uint32)


@triton.jit
def _with_slot(tile, values_ptr, value_start, place, s, live, lane):
    value = tl.load(values_ptr + value_start + s, mask=live, other=0.0)
    return tl.where(place[:, :, None] == lane, value[:, :, None], tile)


@triton.jit
def dense_tile(values_ptr, indices_ptr, row, g, rows, groups, row_bytes, KEEP: tl.constexpr, GROUP: tl.constexpr,
               BITS: tl.constexpr, GROUP_BYTES: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr,
               BLOCK_G: tl.constexpr):  # fmt: skip
    """The dense weight of BLOCK_N rows and BLOCK_G groups as [BLOCK_N, BLOCK_G, PADDED], zero beyond both ends.

    row: int64. A group takes PADDED = the next power of two of GROUP columns, so any GROUP tiles; the spare ones are zero.
    Each value and place is read once and spread over its group in registers.
    """
    live = (row < rows)[:, None] & (g < groups)[None, :]
    lane = tl.arange(0, PADDED)[None, None, :]
    value_start = (row * groups)[:, None] * KEEP + (g.to(tl.int64) * KEEP)[None, :]
    row_start = (row * row_bytes)[:, None]
    tile = tl.zeros([BLOCK_N, BLOCK_G, PADDED], values_ptr.dtype.element_ty)
    if GROUP_BYTES > 0:
        word = _group_word(indices_ptr, row_start, g[None, :], live, row_bytes, KEEP, BITS, GROUP_BYTES)
        for s in tl.static_range(KEEP):
            place = ((word >> (s * BITS)) & ((1 << BITS) - 1)).to(tl.int32)
            tile = _with_slot(tile, values_ptr, value_start, place, s, live, lane)
    else:
        for s in range(KEEP):
            place = slot_place(indices_ptr, row_start, (g.to(tl.int64) * KEEP + s)[None, :], live, row_bytes, BITS)
            tile = _with_slot(tile, values_ptr, value_start, place, s, live, lane)
    return tile


@triton.jit
def tile_columns(g0, K, GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK_G: tl.constexpr):
    """(column, whether it exists) of the BLOCK_G * PADDED columns of a dense tile that begins at group g0."""
    q = tl.arange(0, BLOCK_G * PADDED)
    if GROUP == PADDED:
        column = g0 * GROUP + q
        exists = column < K
    else:
        column = (g0 + q // PADDED) * GROUP + q % PADDED
        exists = (q % PADDED < GROUP) & (column < K)
    return column, exists


@triton.jit
def _compress_kernel(weight_ptr, values_ptr, indices_ptr, total, chunks, K, slots, row_bytes, s_n,
                     KEEP: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, ACC: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    # One program owns BLOCK chunks of eight slots, which are BITS whole bytes of indices [N, row_bytes]. Every slot walks
    # over its group of weight [N, K] twice, in the L1 cache: count the nonzeros, then find the kept place that is its own.
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = c // chunks
    eight = tl.arange(0, 8)[None, :]
    slot = (c % chunks * 8)[:, None] + eight
    live = (c < total)[:, None] & (slot < slots)
    first = slot // KEEP * GROUP
    own = slot % KEEP
    start = (row * s_n)[:, None] + first
    nonzeros = tl.zeros([BLOCK, 8], tl.int32)
    for i in range(GROUP):
        w = tl.load(weight_ptr + start + i, mask=live & (first + i < K), other=0.0).to(ACC)
        nonzeros += (w != 0.0).to(tl.int32)
    kept = tl.zeros([BLOCK, 8], tl.int32)
    spare = tl.maximum(KEEP - nonzeros, 0)  # how many zeros are kept, the lowest ones
    place = tl.zeros([BLOCK, 8], tl.int32)
    value = tl.zeros([BLOCK, 8], weight_ptr.dtype.element_ty)
    for i in range(GROUP):
        raw = tl.load(weight_ptr + start + i, mask=live & (first + i < K), other=0.0)
        zero = raw.to(ACC) == 0.0
        keeps = (zero == 0) | (spare > 0)
        mine = keeps & (kept == own)
        place = tl.where(mine, i, place)
        value = tl.where(mine, raw, value)
        kept += keeps.to(tl.int32)
        spare -= zero.to(tl.int32)
    tl.store(values_ptr + row[:, None] * slots + slot, value, mask=live)
    word = tl.sum(tl.where(live, place, 0).to(tl.int64) << (eight * BITS), 1)
    for b in tl.static_range(BITS):
        at = c % chunks * BITS + b
        byte = ((word >> (8 * b)) & 255).to(tl.uint8)
        tl.store(indices_ptr + row * row_bytes + at, byte, mask=(c < total) & (at < row_bytes))


def nm_matmul_compress(weight, n, m):
    weight = rows_of(weight)
    (N, K), slots = weight.shape, cdiv(weight.shape[1], m) * n
    row_bytes, chunks = row_bytes_of(slots, m), cdiv(slots, 8)
    values = weight.new_empty((N, slots))
    indices = torch.empty((N, row_bytes), dtype=torch.uint8, device=weight.device)
    launch(
        _compress_kernel, cdiv(N * chunks, 64), weight, values, indices, N * chunks, chunks, K, slots, row_bytes,
        weight.stride(0), KEEP=n, GROUP=m, BITS=(m - 1).bit_length(), ACC=accumulator(weight)[1], BLOCK=64, num_warps=4,
    )  # fmt: skip
    return values, indices


@triton.jit
def _decompress_kernel(values_ptr, indices_ptr, out_ptr, N, K, groups, row_bytes, KEEP: tl.constexpr,
                       GROUP: tl.constexpr, BITS: tl.constexpr, GROUP_BYTES: tl.constexpr, PADDED: tl.constexpr,
                       BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_N rows x BLOCK_G groups of out [N, K]; a group is a run of GROUP columns of a row.
    tiles_g = tl.cdiv(groups, BLOCK_G)
    row = (tl.program_id(0) // tiles_g).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    g0 = (tl.program_id(0) % tiles_g) * BLOCK_G
    tile = dense_tile(values_ptr, indices_ptr, row, g0 + tl.arange(0, BLOCK_G), N, groups, row_bytes,
                      KEEP, GROUP, BITS, GROUP_BYTES, PADDED, BLOCK_N, BLOCK_G)  # fmt: skip
    column, exists = tile_columns(g0, K, GROUP, PADDED, BLOCK_G)
    tile = tl.reshape(tile, [BLOCK_N, BLOCK_G * PADDED])
    tl.store(out_ptr + (row * K)[:, None] + column[None, :], tile, mask=(row < N)[:, None] & exists[None, :])


def nm_matmul_decompress(values, indices, n, m, K):
    N, groups = values.shape[0], cdiv(K, m)
    out = values.new_empty((N, K))
    padded = triton.next_power_of_2(m)
    block_g = min(256 // padded, max(1, triton.next_power_of_2(groups)))
    block_n = 2048 // (block_g * padded)
    launch(
        _decompress_kernel, cdiv(N, block_n) * cdiv(groups, block_g), values.contiguous(), indices.contiguous(), out,
        N, K, groups, indices.shape[1], **group_format(n, m), PADDED=padded, BLOCK_N=block_n, BLOCK_G=block_g,
        num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _select_kernel(dense_ptr, indices_ptr, out_ptr, N, K, slots, row_bytes, s_n, KEEP: tl.constexpr,
                   GROUP: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_N rows x BLOCK_J slots of out [N, J]; the columns of neighbouring slots are neighbours.
    tiles_j = tl.cdiv(slots, BLOCK_J)
    row = (tl.program_id(0) // tiles_j).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = (tl.program_id(0) % tiles_j) * BLOCK_J + tl.arange(0, BLOCK_J)
    live = (row < N)[:, None] & (j < slots)[None, :]
    place = slot_place(indices_ptr, (row * row_bytes)[:, None], j[None, :], live, row_bytes, BITS)
    column = (j // KEEP * GROUP)[None, :] + place
    value = tl.load(dense_ptr + (row * s_n)[:, None] + column, mask=live & (column < K), other=0.0)
    tl.store(out_ptr + (row * slots)[:, None] + j[None, :], value, mask=live)


def nm_matmul_select(dense, indices, n, m):
    dense = rows_of(dense)
    (N, K), slots = dense.shape, cdiv(dense.shape[1], m) * n
    out = dense.new_empty((N, slots))
    block_j = min(1024, max(16, triton.next_power_of_2(slots)))
    block_n = 1024 // block_j
    launch(
        _select_kernel, cdiv(N, block_n) * cdiv(slots, block_j), dense, indices.contiguous(), out, N, K, slots,
        indices.shape[1], dense.stride(0), KEEP=n, GROUP=m, BITS=(m - 1).bit_length(),
        BLOCK_N=block_n, BLOCK_J=block_j, num_warps=4,
    )  # fmt: skip
    return out
