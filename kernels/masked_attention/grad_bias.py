"""masked_attention, gradient of the bias: that of the scores, summed over the queries and heads that share a value."""

import triton
import triton.language as tl
from maskops.kernels._common import cdiv, dot_add, launch, rounded
from maskops.kernels.masked_attention.backward import prepare
from maskops.kernels.masked_attention.tiles import (
    EMPTY,
    FULL,
    LN2,
    LOG2E,
    TILE,
    bits_of,
    columns_from,
    float_of,
    left_by_dropout,
    options_of,
    rows_from,
    seen_by_rows,
    weights_and_slopes,
    with_bias,
    words_of_tile,
)


@triton.jit
def _grad_bias_kernel(grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, grad_entropy_ptr, tiles_ptr, words_ptr, out_ptr, bias_ptr,
                      se_b, se_h, se_l, seed_ptr, threshold, enlarge, scale, heads, rows, batches_each, heads_each, steps, H, GROUP,
                      L, S, D16, st_b, st_h, sg_b, sg_h, sg_l, sq_b, sq_h, sq_l, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s,
                      ONE_ROW: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
                      BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M queries (or the one row that all share) x BLOCK_N keys of out [B or 1, heads, rows, S], and walks
    # over the batches, heads and steps of BLOCK_M queries that share them, in this order, adding up a tile of sums: no atomics.
    # Scores of tiles that the mask leaves empty are not computed.
    blocks = tl.cdiv(S, BLOCK_N)
    n0 = tl.program_id(0) % blocks * BLOCK_N
    own = (tl.program_id(0) // blocks).to(tl.int64)
    own_m = own % tl.cdiv(rows, BLOCK_M)
    own_head = own // tl.cdiv(rows, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    scale2 = (float_of(scale) * LOG2E).to(ACC)
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for i in range(0, batches_each * heads_each * steps):
        b = own_head // heads + i // steps // heads_each
        h = own_head % heads + i // steps % heads_each
        m0 = (own_m + i % steps) * BLOCK_M
        m = m0 + tl.arange(0, BLOCK_M)
        state = FULL
        if tiles_ptr is not None:
            state = tl.load(tiles_ptr + b * st_b + h * st_h + m0 // TILE * tl.cdiv(S, TILE) + n0 // TILE)
        if state != EMPTY:
            q = q_ptr + b * sq_b + h * sq_h
            k = k_ptr + b * sk_b + h // GROUP * sk_h
            v = v_ptr + b * sv_b + h // GROUP * sv_h
            score = tl.zeros([BLOCK_M, BLOCK_N], ACC)
            slope = tl.zeros([BLOCK_M, BLOCK_N], ACC)
            for d0 in range(0, BLOCK_D, CHUNK):
                some = rows_from(q, m, sq_l, L, D16, d0, CHUNK)
                score = dot_add(some, columns_from(k, n, sk_s, S, D16, d0, CHUNK), score, PRECISION)
                some = rows_from(grad_ptr + b * sg_b + h * sg_h, m, sg_l, L, D16, d0, CHUNK)
                slope = dot_add(some, columns_from(v, n, sv_s, S, D16, d0, CHUNK), slope, PRECISION)
            score = with_bias(score * scale2, bias_ptr + b * se_b + h * se_h, m[:, None], n[None, :], se_l, L, S)
            row = (b * H + h) * L + m
            if seed_ptr is not None:
                left = left_by_dropout(seed_ptr, threshold, row, n0, S, BLOCK_N)
                slope = tl.where(left, slope * float_of(enlarge).to(ACC), 0.0)
            lse = tl.load(lse_ptr + row, mask=m < L, other=float("inf")) * LOG2E
            delta = tl.load(delta_ptr + row, mask=m < L, other=0.0)
            grad_entropy = None
            if grad_entropy_ptr is not None:
                grad_entropy = (tl.load(grad_entropy_ptr + row, mask=m < L, other=0.0) * LN2)[:, None]
            _, slope = weights_and_slopes(score, slope, lse[:, None], delta[:, None], grad_entropy, True)
            if tiles_ptr is not None:
                word = words_of_tile(words_ptr, state, m % TILE)
                slope = tl.where(seen_by_rows(word, n0 % TILE, BLOCK_N), slope, 0.0)
            total += tl.where((m < L)[:, None], slope, 0.0)
    if ONE_ROW:
        at = own_head * S + n
        tl.store(out_ptr + at, rounded(tl.sum(total, 0), out_ptr.dtype.element_ty), mask=n < S)
    else:
        m = own_m * BLOCK_M + tl.arange(0, BLOCK_M)
        at = (own_head * rows + m)[:, None] * S + n[None, :]
        mask = (m < rows)[:, None] & (n < S)[None, :]
        tl.store(out_ptr + at, rounded(total, out_ptr.dtype.element_ty), mask=mask)


def _masked_attention_grad_bias(
    grad, grad_lse, grad_entropy, q, k, v, out, lse, entropy, tiles, words, bias, seed, scale, dropout_p
):
    (B, H, L), (G, S) = q.shape[:3], k.shape[1:3]
    made = prepare(grad, grad_lse, grad_entropy, q, k, v, out, lse, entropy, words, bias, seed, dropout_p)
    (grad, s_g), (q, s_q), (k, s_k), (v, s_v), terms, words, extras = made
    batches, heads, rows = bias.shape[:3]
    one_row = rows == 1
    options = options_of("grad_bias", q, False, extras, terms[2] is not None)
    constants = {k: v for k, v in options.items() if k not in ("CAREFUL", "PARTS")} | {"ONE_ROW": one_row}
    block_m, block_n = options["BLOCK_M"], options["BLOCK_N"]
    s_t = (0, 0)
    if tiles is not None:
        tiles = tiles.contiguous()
        s_t = tiles.expand(B, H, *tiles.shape[2:]).stride()[:2]
    result = bias.new_empty(bias.shape)
    launch(
        _grad_bias_kernel, batches * heads * cdiv(rows, block_m) * cdiv(S, block_n), grad, q, k, v, *terms,
        tiles, words, result, *extras, bits_of(scale), heads, rows, B // max(batches, 1), H // max(heads, 1),
        cdiv(L, block_m) if one_row else 1, H, H // max(G, 1), L, S, q.shape[3], *s_t, *s_g, *s_q, *s_k, *s_v, **constants,
    )  # fmt: skip
    return result
