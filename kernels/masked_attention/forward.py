"""masked_attention, forward: softmax(scale q k^T) v over the tiles of the mask that are not empty."""

import triton
import triton.language as tl
from maskops.kernels._common import accumulator, cdiv, dot_add, launch, rounded
from maskops.kernels.masked_attention.tiles import (
    FULL,
    LN2,
    LOG2E,
    TILE,
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
    seen_by_rows,
    tile_at,
    tiles_of_line,
    with_bias,
    words_of_tile,
    wrong_tiles,
)


@triton.jit
def _forward_kernel(q_ptr, k_ptr, v_ptr, list_ptr, count_ptr, words_ptr, wrong_ptr, out_ptr, lse_ptr, entropy_ptr, bias_ptr,
                    se_b, se_h, se_l, seed_ptr, threshold, enlarge, scale, H, GROUP, L, S, D, D16, lines, length, sc_b, sc_h, sq_b,
                    sq_h, sq_l, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s, CAREFUL: tl.constexpr, ACC: tl.constexpr,
                    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                    CHUNK: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M queries of one head of out [B, H, L, D] and walks over the mask tiles of their row, BLOCK_N keys at
    # a time, with the running maximum and sum of the softmax, so no score is stored. The last queries, for which causal masks
    # leave most to do, start first.
    blocks = tl.cdiv(L, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    m0 = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    b = head // H
    h = head % H
    q_ptr += b * sq_b + h * sq_h
    k_ptr += b * sk_b + h // GROUP * sk_h
    v_ptr += b * sv_b + h // GROUP * sv_h
    line = b * sc_b + h * sc_h + m0 // TILE
    entries, count = tiles_of_line(list_ptr, count_ptr, line, length)
    if CAREFUL:
        wrong_ptr += (b * (H // GROUP) + h // GROUP) * length
        count = count_if_wrong(entries, count, wrong_ptr, 128)
    m = m0 + tl.arange(0, BLOCK_M)
    within = m % TILE
    scale2 = (float_of(scale) * LOG2E).to(ACC)
    if CHUNK == BLOCK_D:
        q = rows_from(q_ptr, m, sq_l, L, D16, 0, BLOCK_D)
    most = tl.full([BLOCK_M], float("-inf"), ACC)
    weight = tl.zeros([BLOCK_M], ACC)
    spread = tl.zeros([BLOCK_M], ACC)  # sum of p * (score - level), for the entropy
    total = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for i in range(0, count * PARTS):
        place, state = tile_at(entries, i // PARTS)
        part = i % PARTS * BLOCK_N
        n = place * TILE + part + tl.arange(0, BLOCK_N)
        score = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        if CHUNK == BLOCK_D:
            score = dot_add(q, columns_from(k_ptr, n, sk_s, S, D16, 0, BLOCK_D), score, PRECISION)
        else:
            for d0 in range(0, BLOCK_D, CHUNK):
                some = rows_from(q_ptr, m, sq_l, L, D16, d0, CHUNK)
                score = dot_add(some, columns_from(k_ptr, n, sk_s, S, D16, d0, CHUNK), score, PRECISION)
        v = rows_from(v_ptr, n, sv_s, S, D16, 0, BLOCK_D)
        score = score * scale2
        if bias_ptr is not None:
            score = with_bias(score, bias_ptr + b * se_b + h * se_h, m[:, None], n[None, :], se_l, L, S)
        score = tl.where((n < S)[None, :], score, float("-inf"))
        if words_ptr is not None:
            word = words_of_tile(words_ptr, state, within)
            if state != FULL:
                score = tl.where(seen_by_rows(word, part, BLOCK_N), score, float("-inf"))
        before = most
        most = tl.maximum(before, tl.max(score, 1))
        # Rows that have seen nothing yet, or something infinite, keep their sums as they are.
        level = tl.where(tl.abs(most) == float("inf"), 0.0, most)
        p = tl.exp2(score - level[:, None])
        shrink = tl.exp2(before - level)
        if entropy_ptr is not None:
            fall = tl.where(before == float("-inf"), 0.0, before - level)
            surplus = tl.where(p > 0, score - level[:, None], 0.0)
            spread = shrink * (spread + weight * fall) + tl.sum(p * surplus, 1)
        weight = weight * shrink + tl.sum(p, 1)
        total = total * shrink[:, None]
        if seed_ptr is not None:
            p = tl.where(left_by_dropout(seed_ptr, threshold, head * L + m, place * TILE + part, S, BLOCK_N), p, 0.0)
        p = rounded(p, v.dtype)
        if CAREFUL:
            if state != FULL:
                total = add_kept(p, seen_by_rows(word, part, BLOCK_N), v, total, PRECISION)
            else:
                total = dot_add(p, v, total, PRECISION)
        else:
            total = dot_add(p, v, total, PRECISION)
    level = tl.where(tl.abs(most) == float("inf"), 0.0, most)
    lse = level * LN2 + tl.log(weight)
    weight = tl.where(weight == 0, 1.0, weight)
    total = total / weight[:, None]
    if seed_ptr is not None:
        total = total * float_of(enlarge).to(ACC)
    row = (head * L + m)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = m < (tl.where(count > 0, L, 0) if CAREFUL else L)
    tl.store(lse_ptr + head * L + m, lse, mask=mask)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + head * L + m, tl.log(weight) - LN2 * (spread / weight), mask=mask)
    tl.store(out_ptr + row * D + d, checked(total, out_ptr.dtype.element_ty), mask=mask[:, None] & (d < D))


def masked_attention(q, k, v, tiles, words, bias, seed, scale, dropout_p, entropy):
    (B, H, L, D), (G, S) = q.shape, k.shape[1:3]
    out, lse = q.new_empty(q.shape), q.new_empty((B, H, L), dtype=accumulator(q)[0])
    spread = lse.new_empty((B, H, L if entropy else 0))
    extras = extras_of(q, S, bias, seed, dropout_p)
    (q, s_q), (k, s_k), (v, s_v) = heads_of(q), heads_of(k), heads_of(v)
    lines, columns = cdiv(L, TILE.value), cdiv(S, TILE.value)
    lists = lists_of(tiles, lines, columns, by_column=False)
    words = None if words is None else words.contiguous()

    def run(wrong, entropy):
        options = options_of("forward", q, wrong is not None, extras, entropy)
        launch(
            _forward_kernel, B * H * cdiv(L, options["BLOCK_M"]), q, k, v, lists.list, lists.count, words, wrong, out, lse,
            spread if entropy else None, *extras, bits_of(scale), H, H // max(G, 1), L, S, D, q.shape[3], lines, columns, lists.s_b,
            lists.s_h, *s_q, *s_k, *s_v, **options,
        )  # fmt: skip

    run(None, entropy)
    if tiles is not None:  # once more, with care, what meets NaN or inf in a tile with hidden pairs
        run(wrong_tiles(v), False)  # v has no part in the entropy
    return out, lse, spread
