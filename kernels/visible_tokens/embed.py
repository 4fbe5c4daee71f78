"""The patch projection of visible_tokens: a GEMM whose one operand is read as patches straight from the images.

M = B*K rows, E output channels, V values per patch in the weight's order (c, t, h, w). Products of 16-bit types run on
the matrix units with float32 sums. float32 follows torch.get_float32_matmul_precision(): "highest", the default, is
exact (input_precision "ieee": no matrix units on NVIDIA), anything else is TF32.
"""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import (
    accumulator,
    cdiv,
    dot_add,
    launch,
    patch_grid,
    patch_origin,
    patch_value,
    rounded,
    rows_of,
    sum_rows,
)
from maskops.kernels.visible_tokens.index import invert_ids, patch_of_row

# Per element size: (rows, columns, depth) of a tile, warps, stages; the first one that gives enough programs is taken.
# Patches whose rows are no multiple of 16 bytes are loaded value by value: one address per value, so less fits.
SCATTERED_TILE = (64, 64, 16, 8, 2)
TILES = {
    2: ((128, 128, 64, 8, 3), (64, 128, 64, 4, 3)),
    4: ((64, 64, 16, 8, 2), (32, 64, 16, 4, 2)),
    8: ((32, 32, 16, 8, 1), (32, 32, 16, 4, 1)),
}
ENOUGH_PROGRAMS = 264  # two per multiprocessor of an H100


def _tile(dtype, rows, columns, patch_width, depth_splits=1, largest=0):
    tiles = TILES[dtype.itemsize][largest:]
    if patch_width * dtype.itemsize % 16 and dtype.itemsize < 8:
        tiles = (SCATTERED_TILE,)
    fills = [t for t in tiles if cdiv(rows, t[0]) * cdiv(columns, t[1]) * depth_splits >= ENOUGH_PROGRAMS]
    tile = (fills or tiles[-1:])[0]
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return {
        "BLOCK_M": tile[0], "BLOCK_N": tile[1], "BLOCK_K": tile[2], "num_warps": tile[3], "num_stages": tile[4],
        "PRECISION": "ieee" if exact else "tf32",
    }  # fmt: skip


@triton.jit
def _embed_kernel(images_ptr, weight_ptr, bias_ptr, ids_ptr, pos_ptr, out_ptr, M, slots, E, grid_h, grid_w,
                  s_b, s_c, s_t, s_h, s_pos, C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
                  ACC: tl.constexpr, PRECISION: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M rows (b, k) x BLOCK_N channels of out [B*K, E] and walks over the V values of patches.
    # Patches are never written out: runs of PW pixels go from the image into the operand tile. Programs of the same
    # rows are neighbours, so their pixels stay in L2.
    V: tl.constexpr = C * PT * PH * PW
    tiles_e = tl.cdiv(E, BLOCK_N)
    m = (tl.program_id(0) // tiles_e).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = (tl.program_id(0) % tiles_e) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, _, n, used = patch_of_row(ids_ptr, m, M, slots)
    origin = b * s_b + patch_origin(n, s_t, s_h, grid_h, grid_w, PT, PH, PW)
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for v0 in range(0, V, BLOCK_K):
        v = v0 + tl.arange(0, BLOCK_K)
        offset = patch_value(v, s_c, s_t, s_h, C, PT, PH, PW, False)
        x = tl.load(images_ptr + origin[:, None] + offset[None, :], mask=used[:, None] & (v < V)[None, :], other=0.0)
        at = e.to(tl.int64)[None, :] * V + v[:, None]
        w = tl.load(weight_ptr + at, mask=(e < E)[None, :] & (v < V)[:, None], other=0.0)
        total = dot_add(x, w, total, PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(ACC)[None, :]
    if pos_ptr is not None:
        at = (n * s_pos)[:, None] + e[None, :]
        total += tl.load(pos_ptr + at, mask=used[:, None] & (e < E)[None, :], other=0.0).to(ACC)
    total = tl.where(used[:, None], total, 0.0)
    at = m[:, None] * E + e[None, :]
    tl.store(out_ptr + at, rounded(total, out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (e < E)[None, :])


def visible_tokens_embed(images, weight, bias=None, ids=None, pos=None):
    grid = patch_grid(images, weight.shape[2:])
    B, E = images.shape[0], weight.shape[0]
    slots = grid.tokens if ids is None else ids.shape[1]
    out = images.new_empty((B, slots, E))
    ids = None if ids is None else ids.contiguous()
    pos = None if pos is None else rows_of(pos)
    tile = _tile(images.dtype, B * slots, E, grid.patch["PW"])
    launch(
        _embed_kernel, cdiv(B * slots, tile["BLOCK_M"]) * cdiv(E, tile["BLOCK_N"]),
        grid.images, weight.contiguous(), None if bias is None else bias.contiguous(), ids, pos, out,
        B * slots, slots, E, *grid.grid[1:], *grid.strides, 0 if pos is None else pos.stride(0),
        **grid.patch, ACC=accumulator(images)[1], **tile,
    )  # fmt: skip
    return out


@triton.jit
def _grad_images_kernel(grad_ptr, weight_ptr, ids_ptr, out_ptr, M, slots, E, grid_h, grid_w, sg_b, sg_k,
                        s_b, s_c, s_t, s_h, C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
                        ACC: tl.constexpr, PRECISION: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M rows (b, k) x BLOCK_N of the V values of grad @ weight, and stores them as pixels of out.
    # Ids are unique in a row, so no pixel has two writers; pixels of other patches were zeroed before.
    V: tl.constexpr = C * PT * PH * PW
    tiles_v: tl.constexpr = (V + BLOCK_N - 1) // BLOCK_N
    m = (tl.program_id(0) // tiles_v).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    v = (tl.program_id(0) % tiles_v) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, k, n, used = patch_of_row(ids_ptr, m, M, slots)
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for e0 in range(0, E, BLOCK_K):
        e = e0 + tl.arange(0, BLOCK_K)
        g_at = (b * sg_b + k * sg_k)[:, None] + e[None, :]
        g = tl.load(grad_ptr + g_at, mask=used[:, None] & (e < E)[None, :], other=0.0)
        w_at = e.to(tl.int64)[:, None] * V + v[None, :]
        w = tl.load(weight_ptr + w_at, mask=(e < E)[:, None] & (v < V)[None, :], other=0.0)
        total = dot_add(g, w, total, PRECISION)
    origin = b * s_b + patch_origin(n, s_t, s_h, grid_h, grid_w, PT, PH, PW)
    at = origin[:, None] + patch_value(v, s_c, s_t, s_h, C, PT, PH, PW, False)[None, :]
    tl.store(out_ptr + at, rounded(total, out_ptr.dtype.element_ty), mask=used[:, None] & (v < V)[None, :])


def _grad_images(grad, images, weight, ids):
    allocate = torch.empty if ids is None else torch.zeros
    out = allocate(images.shape, dtype=grad.dtype, device=grad.device)
    grid = patch_grid(out, weight.shape[2:])
    (B, slots), E = grad.shape[:2], weight.shape[0]
    # Every pixel of the result has its own address until it is stored: the largest tile would spill them.
    tile = _tile(grad.dtype, B * slots, grid.values, grid.patch["PW"], largest=1)
    launch(
        _grad_images_kernel, cdiv(B * slots, tile["BLOCK_M"]) * cdiv(grid.values, tile["BLOCK_N"]),
        grad, weight.contiguous(), ids, out, B * slots, slots, E, *grid.grid[1:], grad.stride(0), grad.stride(1),
        *grid.strides, **grid.patch, ACC=accumulator(grad)[1], **tile,
    )  # fmt: skip
    return out


@triton.jit
def _grad_weight_kernel(grad_ptr, images_ptr, ids_ptr, out_ptr, M, slots, E, grid_h, grid_w, rows_per_split, sg_b, sg_k,
                        s_b, s_c, s_t, s_h, C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
                        ACC: tl.constexpr, PRECISION: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_M channels x BLOCK_N values of one partial weight gradient out [S, E, V]: grad^T @ patches
    # over rows_per_split of the M rows. The partials are added afterwards in a fixed order, so the result does not
    # depend on which program ran first.
    V: tl.constexpr = C * PT * PH * PW
    tiles_v: tl.constexpr = (V + BLOCK_N - 1) // BLOCK_N
    tiles_e = tl.cdiv(E, BLOCK_M)
    split = (tl.program_id(0) // (tiles_v * tiles_e)).to(tl.int64)
    e = (tl.program_id(0) // tiles_v % tiles_e) * BLOCK_M + tl.arange(0, BLOCK_M)
    v = (tl.program_id(0) % tiles_v) * BLOCK_N + tl.arange(0, BLOCK_N)
    offset = patch_value(v, s_c, s_t, s_h, C, PT, PH, PW, False)
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for m0 in range(0, rows_per_split, BLOCK_K):
        m = split * rows_per_split + m0 + tl.arange(0, BLOCK_K)
        b, k, n, used = patch_of_row(ids_ptr, m, M, slots)
        g_at = (b * sg_b + k * sg_k)[None, :] + e[:, None]
        g = tl.load(grad_ptr + g_at, mask=(e < E)[:, None] & used[None, :], other=0.0)
        origin = b * s_b + patch_origin(n, s_t, s_h, grid_h, grid_w, PT, PH, PW)
        x_at = origin[:, None] + offset[None, :]
        x = tl.load(images_ptr + x_at, mask=used[:, None] & (v < V)[None, :], other=0.0)
        total = dot_add(g, x, total, PRECISION)
    at = (split * E + e)[:, None] * V + v[None, :]
    tl.store(out_ptr + at, total, mask=(e < E)[:, None] & (v < V)[None, :])


def _grad_weight(grad, images, weight, ids):
    grid = patch_grid(images, weight.shape[2:])
    (B, slots), E = grad.shape[:2], weight.shape[0]
    rows, acc = B * slots, accumulator(grad)
    # Enough splits to fill the device, but none shorter than 256 rows; a function of the sizes alone.
    tile = _tile(grad.dtype, E, grid.values, grid.patch["PW"], depth_splits=max(1, rows // 256))
    tiles = cdiv(E, tile["BLOCK_M"]) * cdiv(grid.values, tile["BLOCK_N"])
    splits = max(1, min(cdiv(ENOUGH_PROGRAMS, max(tiles, 1)), rows // 256))
    per_split = cdiv(cdiv(rows, splits), tile["BLOCK_K"]) * tile["BLOCK_K"]
    partial = torch.empty((splits, E * grid.values), dtype=acc[0], device=grad.device)
    launch(
        _grad_weight_kernel, tiles * splits, grad, grid.images, ids, partial, rows, slots, E, *grid.grid[1:], per_split,
        grad.stride(0), grad.stride(1), *grid.strides, **grid.patch, ACC=acc[1], **tile,
    )  # fmt: skip
    return sum_rows(partial, grad.dtype).view(weight.shape)


@triton.jit
def _grad_pos_kernel(grad_ptr, slot_ptr, out_ptr, B, N, E, s_b, s_k, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    # One program owns token n and BLOCK_D channels of out [N, E] and adds the rows of grad that hold the token, over
    # the batch; slot [B, N] is the inverse of ids, None where every token is its own slot.
    tiles_e = tl.cdiv(E, BLOCK_D)
    n = (tl.program_id(0) // tiles_e).to(tl.int64)
    e = (tl.program_id(0) % tiles_e) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_B, BLOCK_D], out_ptr.dtype.element_ty)
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B).to(tl.int64)
        k = tl.where(b < B, n, -1)
        if slot_ptr is not None:
            k = tl.load(slot_ptr + b * N + n, mask=b < B, other=-1)
        at = (b * s_b + k * s_k)[:, None] + e[None, :]
        total += tl.load(grad_ptr + at, mask=(k >= 0)[:, None] & (e < E)[None, :], other=0.0).to(total.dtype)
    tl.store(out_ptr + n * E + e, tl.sum(total, 0), mask=e < E)


def _grad_pos_bias(grad, ids, tokens, need_bias, need_pos):
    """Both are sums of the same rows: over the batch for pos [N, E], and then over the tokens for bias [E]."""
    none = grad.new_empty(0)
    if not (need_bias or need_pos):
        return none, none
    B, E = grad.shape[0], grad.shape[2]
    slot = None if ids is None else invert_ids(ids, tokens)
    sums = torch.empty((tokens, E), dtype=accumulator(grad)[0], device=grad.device)
    block = min(256, max(16, triton.next_power_of_2(E)))
    launch(
        _grad_pos_kernel, tokens * cdiv(E, block), grad, slot, sums, B, tokens, E, grad.stride(0), grad.stride(1),
        BLOCK_B=16 if B > 4 else 4, BLOCK_D=block, num_warps=8,
    )  # fmt: skip
    return sum_rows(sums, grad.dtype) if need_bias else none, sums.to(grad.dtype) if need_pos else none


def _visible_tokens_embed_backward(grad, images, weight, ids, need_images, need_weight, need_bias, need_pos):
    grad = rows_of(grad)
    ids = None if ids is None else ids.contiguous()
    none = grad.new_empty(0)
    grad_images = _grad_images(grad, images, weight, ids) if need_images else none
    grad_weight = _grad_weight(grad, images, weight, ids) if need_weight else none
    tokens = patch_grid(images, weight.shape[2:]).tokens
    return grad_images, grad_weight, *_grad_pos_bias(grad, ids, tokens, need_bias, need_pos)
