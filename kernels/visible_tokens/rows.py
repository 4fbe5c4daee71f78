"""Row movers of visible_tokens: gather, restore, pack, unpack and their backward passes.

All of them copy whole rows of D values, so all share one tiling: BLOCK_R rows x BLOCK_D columns a program.
"""

import triton
import triton.language as tl
from maskops.kernels._common import accumulator, cdiv, launch, rounded, row_tile, rows_of, sum_rows
from maskops.kernels.visible_tokens.index import invert_ids


@triton.jit
def _gather_kernel(x_ptr, ids_ptr, out_ptr, rows, K, D, s_b, s_n, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    # One program owns BLOCK_R rows x BLOCK_D columns of out [B*K, D]; row (b, k) is x[b, ids[b, k]], or zero for id -1.
    tiles_d = tl.cdiv(D, BLOCK_D)
    r = (tl.program_id(0) // tiles_d).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = (tl.program_id(0) % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.load(ids_ptr + r, mask=r < rows, other=-1)
    source = (r // K) * s_b + n * s_n
    value = tl.load(x_ptr + source[:, None] + d[None, :], mask=(n >= 0)[:, None] & (d < D)[None, :], other=0.0)
    tl.store(out_ptr + r[:, None] * D + d[None, :], value, mask=(r < rows)[:, None] & (d < D)[None, :])


def visible_tokens_gather(x, ids):
    x, ids = rows_of(x), ids.contiguous()
    (B, K), D = ids.shape, x.shape[2]
    out = x.new_empty((B, K, D))
    tile = row_tile(D)
    programs = cdiv(B * K, tile["BLOCK_R"]) * cdiv(D, tile["BLOCK_D"])
    launch(_gather_kernel, programs, x, ids, out, B * K, K, D, x.stride(0), x.stride(1), **tile)
    return out


def _visible_tokens_gather_backward(grad, ids, N):
    # A gather through the inverse map: every row of the result is written once, and nothing is added up.
    return visible_tokens_gather(grad, invert_ids(ids, N))


@triton.jit
def _restore_kernel(x_ptr, restore_ptr, counts_ptr, fill_ptr, pos_ptr, out_ptr, rows, N, D, prefix,
                    sx_b, sx_n, sf_b, sf_n, s_pos, PACKED: tl.constexpr, ACC: tl.constexpr,
                    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_R rows x BLOCK_D columns of out [B*(P+N), D]. A row is a prefix row, a kept row of x, or
    # fill; exactly one of x and fill is read for it. PACKED: x is [total, D], counts are cu_seqlens, not num_keep.
    tiles_d = tl.cdiv(D, BLOCK_D)
    r = (tl.program_id(0) // tiles_d).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = (tl.program_id(0) % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = r < rows
    in_d = (d < D)[None, :]
    b = r // (N + prefix)
    t = r % (N + prefix)
    n = t - prefix
    slot = tl.load(restore_ptr + b * N + n, mask=live & (n >= 0), other=0)
    count = tl.load(counts_ptr + b, mask=live, other=0).to(tl.int64)
    if PACKED:
        kept = live & (slot < tl.load(counts_ptr + b + 1, mask=live, other=0) - count)
        source = (count + slot) * sx_n
    else:
        kept = live & ((slot < count) | (n < 0))
        source = b * sx_b + tl.where(n < 0, t, prefix + slot) * sx_n
    x = tl.load(x_ptr + source[:, None] + d[None, :], mask=kept[:, None] & in_d, other=0.0)
    hidden = live & (kept == 0)
    fill_row = b * sf_b + n * sf_n
    fill = tl.load(fill_ptr + fill_row[:, None] + d[None, :], mask=hidden[:, None] & in_d, other=0.0)
    value = tl.where(kept[:, None], x, fill)
    if pos_ptr is not None:
        pos = tl.load(pos_ptr + (t * s_pos)[:, None] + d[None, :], mask=live[:, None] & in_d, other=0.0)
        value = rounded(value.to(ACC) + pos.to(ACC), out_ptr.dtype.element_ty)
    tl.store(out_ptr + r[:, None] * D + d[None, :], value, mask=live[:, None] & in_d)


def _fill_rows(x, x_strides, ids_restore, counts, fill, pos, prefix, packed):
    ids_restore, fill = ids_restore.contiguous(), rows_of(fill)
    (B, N), D = ids_restore.shape, x.shape[-1]
    out = x.new_empty((B, prefix + N, D))
    fill_strides = (0, 0, *fill.stride())[-3:-1]
    pos = None if pos is None else rows_of(pos)
    tile = row_tile(D)
    rows = B * (prefix + N)
    launch(
        _restore_kernel, cdiv(rows, tile["BLOCK_R"]) * cdiv(D, tile["BLOCK_D"]),
        x, ids_restore, counts.contiguous(), fill, pos, out, rows, N, D, prefix, *x_strides, *fill_strides,
        0 if pos is None else pos.stride(0), PACKED=packed, ACC=accumulator(x)[1], **tile,
    )  # fmt: skip
    return out


def visible_tokens_restore(x_keep, ids_restore, num_keep, fill, pos=None, prefix=0):
    x_keep = rows_of(x_keep)
    return _fill_rows(x_keep, x_keep.stride()[:2], ids_restore, num_keep, fill, pos, prefix, packed=False)


def visible_tokens_unpack(packed, ids_restore, cu_seqlens, fill):
    packed = rows_of(packed)
    return _fill_rows(packed, (0, packed.stride(0)), ids_restore, cu_seqlens, fill, None, 0, packed=True)


@triton.jit
def _collect_kernel(x_ptr, restore_ptr, counts_ptr, out_ptr, token_tiles, B, N, D, slots, prefix, s_b, s_n,
                    PACKED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # The programs of the first token_tiles own BLOCK_R tokens of x [B, P+N, D] and move the kept ones to their slots;
    # the others own BLOCK_R slots of out and zero the empty ones. Slots are unique: every row of out is written once.
    # PACKED: out is [total, D] and counts are cu_seqlens; else out is [B, P+slots, D] and counts are num_keep.
    tiles_d = tl.cdiv(D, BLOCK_D)
    tile = (tl.program_id(0) // tiles_d).to(tl.int64)
    d = (tl.program_id(0) % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    if tile < token_tiles:
        r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        b = r // (N + prefix)
        t = r % (N + prefix)
        live = b < B
        slot = tl.load(restore_ptr + b * N + t - prefix, mask=live & (t >= prefix), other=0)
        count = tl.load(counts_ptr + b, mask=live, other=0).to(tl.int64)
        if PACKED:
            kept = live & (slot < tl.load(counts_ptr + b + 1, mask=live, other=0) - count) & (count + slot < slots)
            target = count + slot
        else:
            kept = live & ((t < prefix) | ((slot < count) & (slot < slots)))
            target = b * (prefix + slots) + tl.where(t < prefix, t, prefix + slot)
        mask = kept[:, None] & (d < D)[None, :]
        value = tl.load(x_ptr + (b * s_b + t * s_n)[:, None] + d[None, :], mask=mask, other=0.0)
        tl.store(out_ptr + target[:, None] * D + d[None, :], value, mask=mask)
    else:
        r = (tile - token_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
        if PACKED:
            target = r
            empty = (r < slots) & (r >= tl.load(counts_ptr + B))
        else:
            b = r // slots
            target = b * (prefix + slots) + prefix + r % slots
            empty = (b < B) & (r % slots >= tl.load(counts_ptr + b, mask=b < B, other=0))
        zero = tl.zeros([BLOCK_R, BLOCK_D], out_ptr.dtype.element_ty)
        tl.store(out_ptr + target[:, None] * D + d[None, :], zero, mask=empty[:, None] & (d < D)[None, :])


def _collect_rows(x, ids_restore, counts, out, slots, prefix, packed):
    x, ids_restore = rows_of(x), ids_restore.contiguous()
    (B, N), D = ids_restore.shape, x.shape[2]
    tile = row_tile(D)
    all_slots = slots if packed else B * slots
    token_tiles, slot_tiles = cdiv(B * (prefix + N), tile["BLOCK_R"]), cdiv(all_slots, tile["BLOCK_R"])
    launch(
        _collect_kernel, (token_tiles + slot_tiles) * cdiv(D, tile["BLOCK_D"]),
        x, ids_restore, counts.contiguous(), out, token_tiles, B, N, D, slots, prefix,
        x.stride(0), x.stride(1), PACKED=packed, **tile,
    )  # fmt: skip
    return out


def visible_tokens_pack(x, ids_restore, cu_seqlens, total):
    return _collect_rows(x, ids_restore, cu_seqlens, x.new_empty((total, x.shape[2])), total, 0, packed=True)


@triton.jit
def _batch_sum_kernel(grad_ptr, restore_ptr, counts_ptr, fill_ptr, pos_ptr, B, N, D, prefix, s_b, s_n,
                      PACKED: tl.constexpr, PER_ROW: tl.constexpr, ACC: tl.constexpr,
                      BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns token t of the P+N and BLOCK_D columns, and walks over the batch BLOCK_B rows at a time, so that
    # the gradients of fill (hidden tokens only) and of pos (all tokens) come out of one read of grad [B, P+N, D].
    # fill [N, D] holds sums over the batch, or with PER_ROW [B, N, D] the hidden rows themselves. None: not needed.
    tiles_d = tl.cdiv(D, BLOCK_D)
    t = (tl.program_id(0) // tiles_d).to(tl.int64)
    n = t - prefix
    d = (tl.program_id(0) % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = (d < D)[None, :]
    rows_filled = tl.where(n >= 0, B, 0)  # prefix tokens have no fill
    fill_sum = tl.zeros([BLOCK_B, BLOCK_D], ACC)
    pos_sum = tl.zeros([BLOCK_B, BLOCK_D], ACC)
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B).to(tl.int64)
        slot = tl.load(restore_ptr + b * N + n, mask=b < rows_filled, other=-1)
        count = tl.load(counts_ptr + b, mask=b < B, other=0)
        if PACKED:
            count = tl.load(counts_ptr + b + 1, mask=b < B, other=0) - count
        hidden = (slot >= count) & (b < rows_filled)
        needed = hidden
        if pos_ptr is not None:
            needed = b < B
        row = tl.load(grad_ptr + (b * s_b + t * s_n)[:, None] + d[None, :], mask=needed[:, None] & in_d, other=0.0)
        if pos_ptr is not None:
            pos_sum += row.to(ACC)
        if fill_ptr is not None:
            hidden_row = tl.where(hidden[:, None], row, tl.zeros_like(row))
            if PER_ROW:
                target = (b * N + n)[:, None] * D + d[None, :]
                tl.store(fill_ptr + target, hidden_row, mask=(b < rows_filled)[:, None] & in_d)
            else:
                fill_sum += hidden_row.to(ACC)
    if pos_ptr is not None:
        tl.store(pos_ptr + t * D + d, rounded(tl.sum(pos_sum, 0), pos_ptr.dtype.element_ty), mask=d < D)
    if fill_ptr is not None and not PER_ROW:
        total = rounded(tl.sum(fill_sum, 0), fill_ptr.dtype.element_ty)
        tl.store(fill_ptr + n * D + d, total, mask=d < tl.where(n >= 0, D, 0))


def _batch_sums(grad, ids_restore, counts, prefix, fill_dim, need_fill, need_pos, packed):
    """Gradients of fill ([D], [N, D] or [B, N, D] by fill_dim) and of pos [P+N, D]; [0] where not needed."""
    grad, ids_restore = rows_of(grad), ids_restore.contiguous()
    (B, N), D = ids_restore.shape, grad.shape[2]
    acc, tl_acc = accumulator(grad)
    fill = pos = None
    if need_fill:
        # A fill of rank 1 is summed over the batch first, in accumulator precision, and over the tokens second.
        fill = grad.new_empty((B, N, D)[3 - max(fill_dim, 2) :], dtype=acc if fill_dim == 1 else grad.dtype)
    if need_pos:
        pos = grad.new_empty((prefix + N, D))
    if need_fill or need_pos:
        block_d = min(256, max(16, triton.next_power_of_2(D)))
        launch(
            _batch_sum_kernel, (prefix + N) * cdiv(D, block_d), grad, ids_restore, counts.contiguous(), fill, pos,
            B, N, D, prefix, grad.stride(0), grad.stride(1), PACKED=packed, PER_ROW=fill_dim == 3, ACC=tl_acc,
            BLOCK_B=16 if B > 4 else 4, BLOCK_D=block_d, num_warps=8,
        )  # fmt: skip
    if need_fill and fill_dim == 1:
        fill = sum_rows(fill, grad.dtype)
    return grad.new_empty(0) if fill is None else fill, grad.new_empty(0) if pos is None else pos


def _visible_tokens_restore_backward(
    grad, ids_restore, num_keep, num_slots, prefix, fill_dim, need_x, need_fill, need_pos
):
    grad_x = grad.new_empty((grad.shape[0], prefix + num_slots, grad.shape[2]) if need_x else 0)
    if need_x:
        _collect_rows(grad, ids_restore, num_keep, grad_x, num_slots, prefix, packed=False)
    sums = _batch_sums(grad, ids_restore, num_keep, prefix, fill_dim, need_fill, need_pos, packed=False)
    return grad_x, *sums


def _visible_tokens_unpack_backward(grad, ids_restore, cu_seqlens, total, fill_dim, need_packed, need_fill):
    grad_packed = grad.new_empty((total, grad.shape[2]) if need_packed else 0)
    if need_packed:
        _collect_rows(grad, ids_restore, cu_seqlens, grad_packed, total, 0, packed=True)
    grad_fill, _ = _batch_sums(grad, ids_restore, cu_seqlens, 0, fill_dim, need_fill, False, packed=True)
    return grad_packed, grad_fill
