"""masked_attention, backward: one kernel for grad_q, one for grad_k and grad_v, both on the weights exp(score - lse) made anew."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from maskops.kernels._common import accumulator, cdiv, dot_add, launch, rounded
from maskops.kernels.masked_attention.tiles import (
    FULL,
    LN2,
    LOG2E,
    TILE,
    Extras,
    add_kept,
    bits_of,
    checked,
    columns_from,
    count_if_wrong,
    extras_of,
    float_of,
    heads_of,
    left_by_dropout,
    lists_of,
    options_of,
    rows_from,
    seen_by_columns,
    seen_by_rows,
    tile_at,
    tiles_of_line,
    weights_and_slopes,
    with_bias,
    words_of_tile,
    wrong_tiles,
)


@triton.jit
def _delta_kernel(grad_ptr, out_ptr, lse_ptr, grad_lse_ptr, entropy_ptr, grad_entropy_ptr, delta_ptr, H, L, D, rows, sg_b, sg_h,
                  sg_l, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_R rows of delta [B, H, L] = sum(grad * out) - grad_lse + grad_entropy * entropy, what is taken from
    # the slope of each weight of a row; 0 for rows that saw no key.
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    mask = (r < rows)[:, None] & (d < D)[None, :]
    at = r // (H * L) * sg_b + r // L % H * sg_h + r % L * sg_l
    grad = tl.load(grad_ptr + at[:, None] + d[None, :], mask=mask, other=0.0).to(ACC)
    out = tl.load(out_ptr + r[:, None] * D + d[None, :], mask=mask, other=0.0).to(ACC)
    lse = tl.load(lse_ptr + r, mask=r < rows, other=0.0)
    delta = tl.sum(grad * out, 1) - tl.load(grad_lse_ptr + r, mask=r < rows, other=0.0)
    if entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + r, mask=r < rows, other=0.0)
        delta += tl.load(grad_entropy_ptr + r, mask=r < rows, other=0.0) * entropy
    tl.store(delta_ptr + r, tl.where(lse == float("-inf"), 0.0, delta), mask=r < rows)


@triton.jit
def _grad_q_kernel(grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, grad_entropy_ptr, list_ptr, count_ptr, words_ptr, wrong_ptr,
                   out_ptr, bias_ptr, se_b, se_h, se_l, seed_ptr, threshold, enlarge, scale, H, GROUP, L, S, D, D16, lines, length,
                   sc_b, sc_h, sg_b, sg_h, sg_l, sq_b, sq_h, sq_l, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s,
                   CAREFUL: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M queries of one head of grad_q [B, H, L, D] and walks over the mask tiles of their row, BLOCK_N keys
    # at a time, the last queries first, as the forward pass does.
    blocks = tl.cdiv(L, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    m0 = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    b = head // H
    h = head % H
    grad_ptr += b * sg_b + h * sg_h
    q_ptr += b * sq_b + h * sq_h
    k_ptr += b * sk_b + h // GROUP * sk_h
    v_ptr += b * sv_b + h // GROUP * sv_h
    entries, count = tiles_of_line(list_ptr, count_ptr, b * sc_b + h * sc_h + m0 // TILE, length)
    if CAREFUL:
        wrong_ptr += (b * (H // GROUP) + h // GROUP) * length
        count = count_if_wrong(entries, count, wrong_ptr, 128)
    m = m0 + tl.arange(0, BLOCK_M)
    within = m % TILE
    scale1 = float_of(scale).to(ACC)
    scale2 = (float_of(scale) * LOG2E).to(ACC)
    lse = tl.load(lse_ptr + head * L + m, mask=m < L, other=float("inf")) * LOG2E
    delta = tl.load(delta_ptr + head * L + m, mask=m < L, other=0.0)
    grad_entropy = None
    if grad_entropy_ptr is not None:
        grad_entropy = (tl.load(grad_entropy_ptr + head * L + m, mask=m < L, other=0.0) * LN2)[:, None]
    if CHUNK == BLOCK_D:
        q = rows_from(q_ptr, m, sq_l, L, D16, 0, BLOCK_D)
        grad = rows_from(grad_ptr, m, sg_l, L, D16, 0, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for i in range(0, count * PARTS):
        place, state = tile_at(entries, i // PARTS)
        part = i % PARTS * BLOCK_N
        n = place * TILE + part + tl.arange(0, BLOCK_N)
        score = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        slope = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        if CHUNK == BLOCK_D:
            k = rows_from(k_ptr, n, sk_s, S, D16, 0, BLOCK_D)
            score = dot_add(q, tl.trans(k), score, PRECISION)
            slope = dot_add(grad, columns_from(v_ptr, n, sv_s, S, D16, 0, BLOCK_D), slope, PRECISION)
        else:
            for d0 in range(0, BLOCK_D, CHUNK):
                some = rows_from(q_ptr, m, sq_l, L, D16, d0, CHUNK)
                score = dot_add(some, columns_from(k_ptr, n, sk_s, S, D16, d0, CHUNK), score, PRECISION)
                some = rows_from(grad_ptr, m, sg_l, L, D16, d0, CHUNK)
                slope = dot_add(some, columns_from(v_ptr, n, sv_s, S, D16, d0, CHUNK), slope, PRECISION)
        score = score * scale2
        if bias_ptr is not None:
            score = with_bias(score, bias_ptr + b * se_b + h * se_h, m[:, None], n[None, :], se_l, L, S)
        if seed_ptr is not None:
            left = left_by_dropout(seed_ptr, threshold, head * L + m, place * TILE + part, S, BLOCK_N)
            slope = tl.where(left, slope * float_of(enlarge).to(ACC), 0.0)
        _, slope = weights_and_slopes(score, slope, lse[:, None], delta[:, None], grad_entropy, bias_ptr is not None)
        slope = tl.where((n < S)[None, :], slope * scale1, 0.0)
        if words_ptr is not None:
            word = words_of_tile(words_ptr, state, within)
            if state != FULL:
                slope = tl.where(seen_by_rows(word, part, BLOCK_N), slope, 0.0)
        if CHUNK != BLOCK_D:
            k = rows_from(k_ptr, n, sk_s, S, D16, 0, BLOCK_D)
        slope = rounded(slope, k.dtype)
        if CAREFUL:
            if state != FULL:
                total = add_kept(slope, seen_by_rows(word, part, BLOCK_N), k, total, PRECISION)
            else:
                total = dot_add(slope, k, total, PRECISION)
        else:
            total = dot_add(slope, k, total, PRECISION)
    mask = m < (tl.where(count > 0, L, 0) if CAREFUL else L)
    row = (head * L + m)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(out_ptr + row * D + d, checked(total, out_ptr.dtype.element_ty), mask=mask[:, None] & (d < D))


@triton.jit
def _grad_kv_kernel(grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, grad_entropy_ptr, list_ptr, count_ptr, words_ptr, wrong_ptr,
                    grad_k_ptr, grad_v_ptr, bias_ptr, se_b, se_h, se_l, seed_ptr, threshold, enlarge, scale, H, GROUP, L, S, D,
                    D16, lines, length, sc_b, sc_h, sg_b, sg_h, sg_l, sq_b, sq_h, sq_l, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s,
                    CAREFUL: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_N keys of one head of grad_k, grad_v [B, G, S, D]. For each query head of the group it walks over the
    # mask tiles of their column, BLOCK_M queries at a time; scores are transposed, [keys, queries]. The first keys, for which
    # causal masks leave most to do, come first.
    blocks = tl.cdiv(S, BLOCK_N)
    kv_head = (tl.program_id(0) // blocks).to(tl.int64)
    n0 = tl.program_id(0) % blocks * BLOCK_N
    b = kv_head // (H // GROUP)
    g = kv_head % (H // GROUP)
    k_ptr += b * sk_b + g * sk_h
    v_ptr += b * sv_b + g * sv_h
    n = n0 + tl.arange(0, BLOCK_N)
    bit = n % TILE
    scale1 = float_of(scale).to(ACC)
    scale2 = (float_of(scale) * LOG2E).to(ACC)
    if CHUNK == BLOCK_D:
        k = rows_from(k_ptr, n, sk_s, S, D16, 0, BLOCK_D)
        v = rows_from(v_ptr, n, sv_s, S, D16, 0, BLOCK_D)
    total_k = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    total_v = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    end = S
    if CAREFUL:  # if in any head
        bad = tl.zeros([], tl.int32)
        for h in range(g * GROUP, (g + 1) * GROUP):
            entries, count = tiles_of_line(list_ptr, count_ptr, b * sc_b + h * sc_h + n0 // TILE, length)
            bad += count_if_wrong(entries, count, wrong_ptr + (b * H + h) * length, 128)
        end = tl.where(bad > 0, S, 0)
    for h in range(g * GROUP, (g + 1) * GROUP):
        entries, count = tiles_of_line(list_ptr, count_ptr, b * sc_b + h * sc_h + n0 // TILE, length)
        if CAREFUL:
            count = tl.where(end > 0, count, 0)
        q_head = q_ptr + b * sq_b + h * sq_h
        grad_head = grad_ptr + b * sg_b + h * sg_h
        first = (b * H + h) * L
        for i in range(0, count * PARTS):
            place, state = tile_at(entries, i // PARTS)
            within = i % PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
            m = place * TILE + within
            lse = tl.load(lse_ptr + first + m, mask=m < L, other=float("inf")) * LOG2E
            delta = tl.load(delta_ptr + first + m, mask=m < L, other=0.0)
            grad_entropy = None
            if grad_entropy_ptr is not None:
                grad_entropy = (tl.load(grad_entropy_ptr + first + m, mask=m < L, other=0.0) * LN2)[None, :]
            score = tl.zeros([BLOCK_N, BLOCK_M], ACC)
            slope = tl.zeros([BLOCK_N, BLOCK_M], ACC)
            if CHUNK == BLOCK_D:
                q = rows_from(q_head, m, sq_l, L, D16, 0, BLOCK_D)
                grad = rows_from(grad_head, m, sg_l, L, D16, 0, BLOCK_D)
                score = dot_add(k, tl.trans(q), score, PRECISION)
                slope = dot_add(v, tl.trans(grad), slope, PRECISION)
            else:
                for d0 in range(0, BLOCK_D, CHUNK):
                    some = rows_from(k_ptr, n, sk_s, S, D16, d0, CHUNK)
                    score = dot_add(some, columns_from(q_head, m, sq_l, L, D16, d0, CHUNK), score, PRECISION)
                    some = rows_from(v_ptr, n, sv_s, S, D16, d0, CHUNK)
                    slope = dot_add(some, columns_from(grad_head, m, sg_l, L, D16, d0, CHUNK), slope, PRECISION)
            score = score * scale2
            if bias_ptr is not None:
                score = with_bias(score, bias_ptr + b * se_b + h * se_h, m[None, :], n[:, None], se_l, L, S)
            if seed_ptr is not None:
                left = tl.trans(left_by_dropout(seed_ptr, threshold, first + m, n0, S, BLOCK_N))
                slope = tl.where(left, slope * float_of(enlarge).to(ACC), 0.0)
            # Past the last query lse is inf, so that p is 0.
            p, slope = weights_and_slopes(
                score, slope, lse[None, :], delta[None, :], grad_entropy, bias_ptr is not None
            )
            slope = slope * scale1
            if seed_ptr is not None:
                p = tl.where(left, p, 0.0)
            if words_ptr is not None:
                word = words_of_tile(words_ptr, state, within)
                if state != FULL:
                    seen = seen_by_columns(word, bit)
                    p = tl.where(seen, p, 0.0)
                    slope = tl.where(seen, slope, 0.0)
            if CHUNK != BLOCK_D:
                grad = rows_from(grad_head, m, sg_l, L, D16, 0, BLOCK_D)
            p = rounded(p, grad.dtype)
            if CAREFUL:
                if state != FULL:
                    total_v = add_kept(p, seen_by_columns(word, bit), grad, total_v, PRECISION)
                else:
                    total_v = dot_add(p, grad, total_v, PRECISION)
            else:
                total_v = dot_add(p, grad, total_v, PRECISION)
            if CHUNK != BLOCK_D:
                q = rows_from(q_head, m, sq_l, L, D16, 0, BLOCK_D)
            slope = rounded(slope, q.dtype)
            if CAREFUL:
                if state != FULL:
                    total_k = add_kept(slope, seen_by_columns(word, bit), q, total_k, PRECISION)
                else:
                    total_k = dot_add(slope, q, total_k, PRECISION)
            else:
                total_k = dot_add(slope, q, total_k, PRECISION)
    if seed_ptr is not None:
        total_v = total_v * float_of(enlarge).to(ACC)
    d = tl.arange(0, BLOCK_D)[None, :]
    at = (kv_head * S + n)[:, None] * D + d
    mask = (n < end)[:, None] & (d < D)
    tl.store(grad_k_ptr + at, checked(total_k, grad_k_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_v_ptr + at, checked(total_v, grad_v_ptr.dtype.element_ty), mask=mask)


def delta_of(grad, s_g, grad_lse, grad_entropy, out, lse, entropy):
    """delta [B, H, L], see the kernel; grad_entropy, lse and entropy are contiguous."""
    B, H, L, D = out.shape
    delta = torch.empty((B, H, L), dtype=accumulator(out)[0], device=out.device)
    block_d = triton.next_power_of_2(D)
    block_r = max(1, 2048 // block_d)
    launch(
        _delta_kernel, cdiv(B * H * L, block_r), grad, out.contiguous(), lse, grad_lse.contiguous(), entropy, grad_entropy, delta,
        H, L, D, B * H * L, *s_g, ACC=accumulator(out)[1], BLOCK_R=block_r, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return delta


class Prepared(NamedTuple):
    """What the passes over gradients read: heads with contiguous rows and their strides, and terms of each query."""

    grad: tuple  # (tensor, strides), as are q, k and v
    q: tuple
    k: tuple
    v: tuple
    terms: tuple  # lse, delta, grad_entropy or None
    words: torch.Tensor | None
    extras: Extras


def prepare(grad, grad_lse, grad_entropy, q, k, v, out, lse, entropy, words, bias, seed, dropout_p):
    heads = grad, s_g = heads_of(grad)
    if entropy.shape[2]:
        grad_entropy, entropy = grad_entropy.contiguous(), entropy.contiguous()
    else:
        grad_entropy = entropy = None
    lse = lse.contiguous()
    delta = delta_of(grad, s_g, grad_lse, grad_entropy, out, lse, entropy)
    words = None if words is None else words.contiguous()
    extras = extras_of(q, k.shape[2], bias, seed, dropout_p)
    return Prepared(heads, *(heads_of(x) for x in (q, k, v)), (lse, delta, grad_entropy), words, extras)


def _masked_attention_backward(
    grad, grad_lse, grad_entropy, q, k, v, out, lse, entropy, tiles, words, bias, seed, scale, dropout_p
):
    (B, H, L, D), (G, S) = q.shape, k.shape[1:3]
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    made = prepare(grad, grad_lse, grad_entropy, q, k, v, out, lse, entropy, words, bias, seed, dropout_p)
    (grad, s_g), (q, s_q), (k, s_k), (v, s_v), terms, words, extras = made
    rows, columns = cdiv(L, TILE.value), cdiv(S, TILE.value)

    def run(kernel, kind, lists, lines, results, wrong):
        options = options_of(kind, q, wrong is not None, extras, terms[2] is not None)
        by_query = kind == "grad_q"
        programs = B * H * cdiv(L, options["BLOCK_M"]) if by_query else B * G * cdiv(S, options["BLOCK_N"])
        launch(
            kernel, programs, grad, q, k, v, *terms, lists.list, lists.count, words, wrong, *results, *extras,
            bits_of(scale), H, H // max(G, 1), L, S, D, q.shape[3], lines, lists.length, lists.s_b, lists.s_h, *s_g, *s_q, *s_k,
            *s_v, **options,
        )  # fmt: skip

    by_row, by_column = (lists_of(tiles, rows, columns, by_column=c) for c in (False, True))
    passes = (
        (_grad_q_kernel, "grad_q", by_row, rows, (grad_q,)), (_grad_kv_kernel, "grad_kv", by_column, columns, (grad_k, grad_v))
    )  # fmt: skip
    for one in passes:
        run(*one, None)
    if tiles is not None:  # once more, with care, what meets NaN or inf in a tile with hidden pairs
        for one, wrong in zip(passes, (wrong_tiles(k), wrong_tiles(q, grad)), strict=True):
            run(*one, wrong)
    return grad_q, grad_k, grad_v
