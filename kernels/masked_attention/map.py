"""masked_attention_map: the rules of a mask, evaluated tile by tile, as bits."""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import cdiv, launch
from maskops.kernels.masked_attention.tiles import EMPTY, FULL, TILE

WIDTH = tl.constexpr(8)
AND, OR, NOT, ROW_RANGE, KEY_RANGE, LENGTH, BAND, BLOCK_CAUSAL, SAME, GROUPS = (
    tl.constexpr(code) for code in range(10)
)


@triton.jit
def _pairs_of_rule(rule_ptr, code, ints_ptr, bytes_ptr, b, h, q, k, L, S):
    """Which key each query sees under one rule, as bool [TILE, TILE]; anything outside the lengths."""
    o0 = tl.load(rule_ptr + 1)
    o1 = tl.load(rule_ptr + 2)
    o2 = tl.load(rule_ptr + 3)
    o3 = tl.load(rule_ptr + 4)
    o4 = tl.load(rule_ptr + 5)
    o5 = tl.load(rule_ptr + 6)
    q1 = q[:, None]
    k1 = k[None, :]
    if code == ROW_RANGE:
        at = b * o2 + h * o3 + q
        seen = (k1 >= tl.load(ints_ptr + o0 + at, mask=q < L, other=0)[:, None]) & (
            k1 < tl.load(ints_ptr + o1 + at, mask=q < L, other=0)[:, None]
        )
    elif code == KEY_RANGE:
        at = b * o2 + h * o3 + k
        seen = (q1 >= tl.load(ints_ptr + o0 + at, mask=k < S, other=0)[None, :]) & (
            q1 < tl.load(ints_ptr + o1 + at, mask=k < S, other=0)[None, :]
        )
    elif code == LENGTH:
        seen = (k1 < tl.load(ints_ptr + o0 + b * o1 + h * o2)) & (q1 >= 0)
    elif code == BAND:
        seen = (k1 - q1 >= o0) & (k1 - q1 <= o1)
    elif code == BLOCK_CAUSAL:
        seen = k1 // o0 <= q1 // o0
    elif code == SAME or code == GROUPS:  # noqa: SIM109
        of_q = tl.load(ints_ptr + o0 + b * o2 + q, mask=q < L, other=-1).to(tl.int64)[:, None]
        of_k = tl.load(ints_ptr + o1 + b * o3 + k, mask=k < S, other=-1).to(tl.int64)[None, :]
        if code == SAME:
            seen = of_q == of_k
        else:
            inside = (of_q >= 0) & (of_q < o5) & (of_k >= 0) & (of_k < o5)
            seen = tl.load(bytes_ptr + o4 + of_q * o5 + of_k, mask=inside, other=0) != 0
    else:
        bit = k1 // o5
        at = b * o1 + h * o2 + (q1 // o4) * o3 + bit // 8
        seen = (tl.load(bytes_ptr + o0 + at, mask=(q1 < L) & (k1 < S), other=0) >> (bit % 8).to(tl.uint8)) & 1 != 0
    return seen


@triton.jit
def _words_of_tile(program_ptr, rules, ints_ptr, bytes_ptr, b, h, q, k, L, S):
    """int64 [TILE], bit j of a word for key j; zero past the lengths. The program works on a stack of four words per query."""
    w0 = tl.zeros([TILE], tl.int64)  # the top
    w1 = tl.zeros([TILE], tl.int64)
    w2 = tl.zeros([TILE], tl.int64)
    w3 = tl.zeros([TILE], tl.int64)
    bit = tl.full([TILE], 1, tl.int64) << tl.arange(0, TILE).to(tl.int64)
    for r in range(0, rules):
        rule_ptr = program_ptr + r * WIDTH
        code = tl.load(rule_ptr)
        if code == NOT:
            w0 = ~w0
        elif code == AND or code == OR:  # noqa: SIM109
            w0 = tl.where(code == AND, w0 & w1, w0 | w1)
            w1 = w2
            w2 = w3
        else:
            seen = _pairs_of_rule(rule_ptr, code, ints_ptr, bytes_ptr, b, h, q, k, L, S)
            w3 = w2
            w2 = w1
            w1 = w0
            w0 = tl.sum(tl.where(seen, bit[None, :], 0), 1)
    return w0 & _inside(q, k, L, S)


@triton.jit
def _inside(q, k, L, S):
    """The bits of keys that exist, for queries that do."""
    bit = tl.full([TILE], 1, tl.int64) << tl.arange(0, TILE).to(tl.int64)
    return tl.where(q < L, tl.sum(tl.where(k < S, bit, 0), 0), 0)


@triton.jit
def _map_kernel(ints_ptr, bytes_ptr, program_ptr, tiles_ptr, words_ptr, rules, H, L, S, WRITE: tl.constexpr):
    # One program owns a tile of tiles [B, H, L / TILE, S / TILE]: a thread row holds the words of its queries. It says whether the
    # tile is empty, full or neither (0); with WRITE, when tiles hold the places, it makes the words of one that is neither again.
    columns = tl.cdiv(S, TILE)
    rows = tl.cdiv(L, TILE)
    tile = tl.program_id(0).to(tl.int64)
    head = tile // (rows * columns)
    q = tile // columns % rows * TILE + tl.arange(0, TILE)
    k = tile % columns * TILE + tl.arange(0, TILE)
    if WRITE:
        place = tl.load(tiles_ptr + tile).to(tl.int64)
        if place >= 0:
            words = _words_of_tile(program_ptr, rules, ints_ptr, bytes_ptr, head // H, head % H, q, k, L, S)
            tl.store(words_ptr + place * TILE + tl.arange(0, TILE), words)
    else:
        words = _words_of_tile(program_ptr, rules, ints_ptr, bytes_ptr, head // H, head % H, q, k, L, S)
        some = tl.max((words != 0).to(tl.int32), 0)
        missing = tl.max((words != _inside(q, k, L, S)).to(tl.int32), 0)
        tl.store(tiles_ptr + tile, tl.where(some == 0, EMPTY, tl.where(missing == 0, FULL, 0)))


def masked_attention_map(ints, bytes, program, B, H, Lq, Lk):
    ints, bytes = ints.contiguous(), bytes.contiguous()
    steps = torch.tensor(list(program), dtype=torch.int64, device=ints.device)
    tiles = torch.empty((B, H, cdiv(Lq, TILE.value), cdiv(Lk, TILE.value)), dtype=torch.int32, device=ints.device)

    def run(tiles, words, write):
        sizes = (len(steps) // WIDTH.value, H, Lq, Lk)
        launch(_map_kernel, tiles.numel(), ints, bytes, steps, tiles, words, *sizes, WRITE=write, num_warps=8)

    run(tiles, None, False)
    neither = tiles == 0
    places = neither.flatten().cumsum(0)
    if tiles.numel() == 0 or tiles.is_meta:  # meta: the launches are recorded only
        partial = tiles.numel()
    else:
        partial = int(places[-1])  # the one time that the GPU is waited for
    tiles = torch.where(neither, (places - 1).view(tiles.shape), tiles).int()
    words = torch.empty((partial, TILE.value), dtype=torch.int64, device=ints.device)
    run(tiles, words, True)
    return tiles, words
