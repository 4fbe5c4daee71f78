"""Tiles of the attention kernels, lists of the mask tiles that are not empty, and the steps the passes share.

A mask tile is TILE queries x TILE keys. A program works on BLOCK_M queries and BLOCK_N keys at a time, both divisors of TILE, and
on BLOCK_D channels, of which a product over channels takes CHUNK at a time: exact products of float32 and float64 run without
matrix units and hold their operands in registers.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from maskops.kernels._common import (
    INTERPRETED,
    LN2,
    LOG2E,
    accumulator,
    bits_of,
    cdiv,
    dot_add,
    float_of,
    heads_of,
    launch,
    philox4x32,
    rounded,
    rows_of,
    strides_of,
)

__all__ = ["LN2", "LOG2E", "bits_of", "float_of", "heads_of", "strides_of"]  # of _common, for the passes

TILE = tl.constexpr(64)
EMPTY, FULL = tl.constexpr(-1), tl.constexpr(-2)
CHANNELS = (32, 64, 128, 256)

# pass -> element size -> channels -> (BLOCK_M, BLOCK_N, CHUNK, warps, stages)
FAST = {
    "forward": {
        2: {32: (64, 64, 32, 4, 3), 64: (64, 64, 64, 4, 3), 128: (64, 64, 128, 8, 2), 256: (64, 32, 256, 8, 2)},
        4: {32: (32, 32, 16, 4, 1), 64: (32, 32, 16, 4, 1), 128: (32, 16, 16, 8, 1), 256: (16, 16, 16, 8, 1)},
        8: {32: (32, 16, 16, 8, 1), 64: (16, 16, 16, 8, 1), 128: (16, 16, 16, 8, 1), 256: (16, 16, 16, 8, 1)},
    },
    "grad_q": {
        2: {32: (64, 64, 32, 4, 3), 64: (64, 64, 64, 4, 2), 128: (64, 32, 128, 4, 2), 256: (32, 32, 64, 8, 1)},
        4: {32: (32, 32, 16, 4, 1), 64: (32, 16, 16, 4, 1), 128: (32, 16, 16, 8, 1), 256: (16, 16, 16, 8, 1)},
        8: {32: (16, 16, 16, 4, 1), 64: (16, 16, 16, 8, 1), 128: (16, 16, 16, 8, 1), 256: (16, 16, 16, 8, 1)},
    },
    "grad_kv": {
        2: {32: (64, 64, 32, 4, 3), 64: (32, 64, 64, 4, 2), 128: (32, 32, 128, 4, 2), 256: (32, 16, 64, 8, 1)},
        4: {32: (32, 32, 16, 4, 1), 64: (16, 32, 16, 4, 1), 128: (16, 32, 16, 8, 1), 256: (16, 16, 16, 8, 1)},
        8: {32: (16, 16, 16, 4, 1), 64: (16, 16, 16, 8, 1), 128: (16, 16, 16, 8, 1), 256: (16, 16, 16, 8, 1)},
    },
}  # fmt: skip
# The gradient of the bias keeps scores, slopes and their sum: three tiles of accumulators.
GRAD_BIAS = {
    2: {32: (32, 32, 32, 8, 1), 64: (32, 32, 32, 8, 1), 128: (32, 32, 32, 8, 1), 256: (32, 32, 32, 8, 1)},
    4: {32: (16, 16, 16, 8, 1), 64: (16, 32, 16, 8, 1), 128: (16, 32, 16, 8, 1), 256: (16, 32, 16, 8, 1)},
    8: {32: (16, 16, 16, 8, 1), 64: (16, 16, 16, 8, 1), 128: (16, 16, 16, 8, 1), 256: (16, 16, 16, 8, 1)},
}  # fmt: skip
# For the careful kernels, for a bias whose rows no 16-byte load can read, and for bias, dropout and entropy in 16-bit gradients:
# registers go to flags and addresses.
SMALL = {
    2: {32: (32, 32, 32, 4, 1), 64: (32, 32, 64, 4, 1), 128: (16, 32, 64, 4, 1), 256: (16, 32, 64, 8, 1)},
    4: {32: (16, 32, 16, 4, 1), 64: (16, 32, 16, 4, 1), 128: (16, 16, 16, 4, 1), 256: (16, 16, 16, 8, 1)},
    8: {32: (16, 16, 16, 4, 1), 64: (16, 16, 16, 4, 1), 128: (16, 16, 16, 8, 1), 256: (16, 16, 16, 8, 1)},
}
SMALL_KV = {
    2: {32: (32, 32, 32, 4, 1), 64: (16, 32, 32, 4, 1), 128: (16, 32, 64, 4, 1), 256: (16, 32, 64, 8, 1)},
    4: {32: (16, 32, 16, 4, 1), 64: (32, 16, 16, 4, 1), 128: (16, 16, 16, 4, 1), 256: (16, 16, 16, 8, 1)},
    8: SMALL[8],
}


def options_of(kind, q, careful, extras, entropy):
    """Constants and launch options of a pass over q as heads_of made it; entropy: whether it is computed, or its gradient is."""
    channels = max(CHANNELS[0], triton.next_power_of_2(q.shape[3]))
    # Interpreted, a small tile takes as long as a large one: float64 has those of float32.
    size = min(q.dtype.itemsize, 4) if INTERPRETED.value else q.dtype.itemsize
    rich = entropy or extras.bias is not None or extras.seed is not None
    if kind == "grad_bias":
        configs = GRAD_BIAS
    elif careful or (extras.se_l or 0) % 16 or (rich and size == 2 and kind != "forward"):
        configs = SMALL_KV if kind == "grad_kv" else SMALL
    else:
        configs = FAST[kind]
    block_m, block_n, chunk, warps, stages = configs[size][channels]
    # With eight warps a thread has fewer scores, and more registers for each.
    if {2: rich and not careful and kind == "forward", 4: rich or careful, 8: rich and not careful}[size]:
        warps = 8
    exact = q.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return {
        "CAREFUL": careful, "ACC": accumulator(q)[1], "PRECISION": "ieee" if exact else "tf32", "BLOCK_M": block_m,
        "BLOCK_N": block_n, "BLOCK_D": channels, "CHUNK": chunk,
        "PARTS": TILE.value // (block_m if kind == "grad_kv" else block_n), "num_warps": warps, "num_stages": stages,
        # Left to itself, the assembler spills a few registers to keep one more block on a multiprocessor.
        "maxnreg": 255,
    }  # fmt: skip


# ---------------------------------------------------------------- bias, dropout and entropy


class Extras(NamedTuple):
    """Kernel arguments of bias and dropout; all None without them, so that the kernel is compiled as if there were none."""

    bias: torch.Tensor | None  # [B, H, L, S], axes that are shared have stride 0
    se_b: int | None
    se_h: int | None
    se_l: int | None
    seed: torch.Tensor | None
    threshold: int | None  # a weight is kept if its word is at least this
    enlarge: int | None  # bits of 1 / (1 - dropout_p)


def extras_of(q, S, bias, seed, dropout_p):
    added = (None,) * 4
    if bias is not None:
        bias = rows_of(bias)
        added = (bias, *bias.expand(*q.shape[:3], S).stride()[:3])
    drawn = (None,) * 3 if seed is None else (seed.contiguous(), int(dropout_p * 2**32), bits_of(1 / (1 - dropout_p)))
    return Extras(*added, *drawn)


@triton.jit
def with_bias(score, bias_ptr, m, n, stride, L, S):
    """score + bias in units of log2; m and n have the place of their axis in score, e.g. m[:, None] and n[None, :]."""
    bias = tl.load(bias_ptr + m.to(tl.int64) * stride + n, mask=(m < L) & (n < S), other=0.0)
    return score + bias.to(score.dtype) * LOG2E


@triton.jit
def left_by_dropout(seed_ptr, threshold, row, key, S, BLOCK: tl.constexpr):
    """bool [queries, BLOCK], which weights of keys [key, key + BLOCK) dropout leaves; row: (batch * H + head) * L + query.
    A counter has the words of four keys, and a row those of whole tiles, so that no counter is drawn twice."""
    counter = (row * (tl.cdiv(S, TILE) * (TILE // 4)) + key // 4)[:, None] + tl.arange(0, BLOCK // 4)[None, :]
    w0, w1, w2, w3 = philox4x32(counter, tl.load(seed_ptr + 1), tl.load(seed_ptr))
    least = (tl.zeros([], tl.int64) + threshold).to(tl.uint32)
    # As bytes, the flags take a quarter of the words' way through shared memory.
    even = tl.interleave((w0 >= least).to(tl.int8), (w2 >= least).to(tl.int8))
    odd = tl.interleave((w1 >= least).to(tl.int8), (w3 >= least).to(tl.int8))
    return tl.interleave(even, odd) != 0


@triton.jit
def weights_and_slopes(score, slope, lse, delta, grad_entropy, HIDES: tl.constexpr):
    """(p, gradient of the score) of a tile, from score and lse in units of log2 and slope = grad v^T after dropout. lse, delta and
    grad_entropy (times ln 2, or None) are broadcast. HIDES: a bias may hide every key of a query, whose lse is then -inf."""
    surplus = score - lse
    if HIDES:
        surplus = tl.where(lse == float("-inf"), float("-inf"), surplus)
    p = tl.exp2(surplus)
    slope = slope - delta
    if grad_entropy is not None:
        slope -= grad_entropy * tl.where(p > 0, surplus, 0.0)
    slope = p * slope
    if HIDES:
        slope = tl.where(lse == float("-inf"), 0.0, slope)
    return p, slope


# ---------------------------------------------------------------- which tiles


@triton.jit
def _list_kernel(tiles_ptr, list_ptr, count_ptr, lines, length, s_line, s_step, heads_size, BLOCK: tl.constexpr):
    # One program owns a line of tiles (a row, or a column) of one head and writes list [line, length, 2] = (place in the line,
    # state) of those that are not empty, in order, and how many there are.
    line = tl.program_id(0).to(tl.int64)
    base = tiles_ptr + line // lines * heads_size + line % lines * s_line
    found = tl.zeros([], tl.int32)
    for i0 in range(0, length, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        state = tl.load(base + i.to(tl.int64) * s_step, mask=i < length, other=EMPTY)
        some = (state != EMPTY).to(tl.int32)
        at = list_ptr + (line * length + found + tl.cumsum(some, 0) - 1) * 2
        tl.store(at, i, mask=some != 0)
        tl.store(at + 1, state, mask=some != 0)
        found += tl.sum(some, 0)
    tl.store(count_ptr + line, found)


class Lists(NamedTuple):
    """Per line of tiles those that are not empty; None: every tile is full."""

    list: torch.Tensor | None  # [B or 1, H or 1, lines, length, 2]
    count: torch.Tensor | None  # [B or 1, H or 1, lines]
    s_b: int  # of count, as list is the same in other units
    s_h: int
    length: int


def lists_of(tiles, rows, columns, by_column):
    """Lists over the rows of tiles [B or 1, H or 1, rows, columns], or over its columns."""
    lines, length = (columns, rows) if by_column else (rows, columns)
    if tiles is None:
        return Lists(None, None, 0, 0, length)
    tiles = tiles.contiguous()
    B, H = tiles.shape[:2]
    found = tiles.new_empty((B, H, lines, length, 2))
    count = tiles.new_empty((B, H, lines))
    steps = (1, columns) if by_column else (columns, 1)
    launch(
        _list_kernel, B * H * lines, tiles, found, count, lines, length, *steps, rows * columns, BLOCK=256, num_warps=4
    )
    return Lists(found, count, H * lines if B > 1 else 0, lines if H > 1 else 0, length)


@triton.jit
def tiles_of_line(list_ptr, count_ptr, line, length):
    """(where the line's list begins, how many tiles it has)"""
    if list_ptr is not None:
        return list_ptr + line * length * 2, tl.load(count_ptr + line)
    else:
        return None, length


@triton.jit
def tile_at(list_ptr, i):
    """(place, state) of entry i of a list."""
    if list_ptr is not None:
        return tl.load(list_ptr + 2 * i), tl.load(list_ptr + 2 * i + 1)
    else:
        return i, FULL + i * 0


# ---------------------------------------------------------------- which tiles hold NaN or inf


@triton.jit
def _wrong_kernel(x_ptr, y_ptr, wrong_ptr, heads, rows, D, tiles, sx_b, sx_h, sx_r, sy_b, sy_h, sy_r, BLOCK_R: tl.constexpr,
                  BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns a tile of TILE rows of x [B, heads, rows, D], and of y where given: whether any value is NaN or infinite.
    head = (tl.program_id(0) // tiles).to(tl.int64)
    r0 = tl.program_id(0) % tiles * TILE
    found = tl.zeros([], tl.int32)
    for r1 in range(0, TILE, BLOCK_R):
        r = r0 + r1 + tl.arange(0, BLOCK_R)
        x = rows_from(x_ptr + head // heads * sx_b + head % heads * sx_h, r, sx_r, rows, D, 0, BLOCK_D)
        found = tl.maximum(found, tl.max(tl.max(is_wrong(x).to(tl.int32), 1), 0))
        if y_ptr is not None:
            y = rows_from(y_ptr + head // heads * sy_b + head % heads * sy_h, r, sy_r, rows, D, 0, BLOCK_D)
            found = tl.maximum(found, tl.max(tl.max(is_wrong(y).to(tl.int32), 1), 0))
    tl.store(wrong_ptr + tl.program_id(0), found)


def wrong_tiles(x, y=None):
    """int32 [B, heads, rows / TILE]: whether a tile of x, or of y, has NaN or inf; both as heads_of made them."""
    B, heads, rows, D = x.shape
    tiles = cdiv(rows, TILE.value)
    wrong = torch.empty((B, heads, tiles), dtype=torch.int32, device=x.device)
    block_d = max(16, triton.next_power_of_2(D))
    s_y = (0, 0, 0) if y is None else strides_of(y)
    launch(
        _wrong_kernel, B * heads * tiles, x, y, wrong, heads, rows, D, tiles, *strides_of(x), *s_y,
        BLOCK_R=min(64, 8192 // x.element_size() // block_d), BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return wrong


@triton.jit
def count_if_wrong(entries, count, wrong_ptr, BLOCK: tl.constexpr):
    """count, if among the tiles of a list there is one that is partial and holds NaN or inf, else 0: nothing to do over."""
    found = tl.zeros([], tl.int32)
    for i0 in range(0, count, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        place = tl.load(entries + 2 * i, mask=i < count, other=0)
        partial = tl.load(entries + 2 * i + 1, mask=i < count, other=FULL) != FULL
        found = tl.maximum(found, tl.max(tl.load(wrong_ptr + place, mask=partial, other=0), 0))
    return tl.where(found != 0, count, 0)


@triton.jit
def is_wrong(x):
    wide = x.to(tl.float64 if x.dtype == tl.float64 else tl.float32)
    return wide - wide != 0


# ---------------------------------------------------------------- parts of a tile


@triton.jit
def rows_from(ptr, row, stride, count, D, d0, BLOCK: tl.constexpr):
    """Rows x channels [d0, d0 + BLOCK) of a head, zeros past the last."""
    d = d0 + tl.arange(0, BLOCK)
    at = (row.to(tl.int64) * stride)[:, None] + d[None, :]
    return tl.load(ptr + at, mask=(row < count)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def columns_from(ptr, row, stride, count, D, d0, BLOCK: tl.constexpr):
    """rows_from, transposed."""
    return tl.trans(rows_from(ptr, row, stride, count, D, d0, BLOCK))


@triton.jit
def words_of_tile(words_ptr, state, within):
    """The words of queries `within` a mask tile, all bits set in a full one."""
    return tl.load(words_ptr + state.to(tl.int64) * TILE + within, mask=state + 0 * within != FULL, other=-1)


@triton.jit
def seen_by_rows(word, key, BLOCK: tl.constexpr):
    """bool [queries, BLOCK]: bits [key, key + BLOCK) of each word, in 32-bit arithmetic."""
    j = key + tl.arange(0, BLOCK)
    low = word.to(tl.int32)[:, None]
    high = (word >> 32).to(tl.int32)[:, None]
    return ((tl.where((j < 32)[None, :], low, high) >> (j & 31)[None, :]) & 1) != 0


@triton.jit
def seen_by_columns(word, bit):
    """bool [keys, queries]: bit `bit`, one per key, of each word."""
    low = word.to(tl.int32)[None, :]
    high = (word >> 32).to(tl.int32)[None, :]
    return ((tl.where((bit < 32)[:, None], low, high) >> (bit & 31)[:, None]) & 1) != 0


@triton.jit
def add_kept(weights, kept, x, total, PRECISION: tl.constexpr):
    """total + weights @ x, where x has NaN or inf: those of pairs that are not kept stay out, those of others make NaN."""
    wrong = is_wrong(x)
    # Flags are exact in 16 bits, where every chip has matrix units.
    spoilt = dot_add(kept.to(tl.float16), wrong.to(tl.float16), tl.zeros(total.shape, tl.float32), "ieee")
    total = dot_add(weights, tl.where(wrong, 0.0, x), total, PRECISION)
    return tl.where(spoilt > 0, float("nan"), total)


@triton.jit
def checked(total, dtype: tl.constexpr):
    """As dtype; what an infinite value in full tiles left infinite is NaN, as everywhere."""
    return rounded(tl.where(total - total == 0, total, float("nan")), dtype)
