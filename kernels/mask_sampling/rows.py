"""Triton kernels of the laws of mask_sampling that draw row by row: one program owns a row, whose draws follow one another.

Row b reads a stream of its own: word i is word i % 4 of counter b 2^32 + i / 4.
"""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import cdiv, launch, philox4x32

FILL_COUNTER = tl.constexpr(1 << 29)  # where in a row's stream the words of single cells begin, in counters
TRIES_PER_TARGET = tl.constexpr(20)


@triton.jit
def _below(word, n):
    return (word.to(tl.int64) * n) >> 32


@triton.jit
def _inside(cell, w, top, left, height, width):
    y, x = cell // w, cell % w
    return (y >= top) & (y < top + height) & (x >= left) & (x < left + width)


@triton.jit
def _word_of(seed_ptr, b, i):
    """Word i of the stream of row b, all of them scalars."""
    w0, w1, w2, w3 = philox4x32((b << 32) + (i >> 2), tl.load(seed_ptr + 1), tl.load(seed_ptr))
    part = i & 3
    return tl.where(part == 0, w0, tl.where(part == 1, w1, tl.where(part == 2, w2, w3)))


@triton.jit
def _blocks_kernel(seed_ptr, num_ptr, shapes_ptr, out_ptr, A, h, w, smallest, largest, tries,
                   FILL: tl.constexpr, CELLS: tl.constexpr):  # fmt: skip
    # The grid of the row, CELLS >= h w of them, is in registers.
    b = tl.program_id(0).to(tl.int64)
    cell = tl.arange(0, CELLS)
    free = (cell < h * w).to(tl.int32)
    wanted = tl.load(num_ptr + b)
    left = wanted
    drawn = tl.zeros([], tl.int64)
    going = left > 0
    while going:
        room = tl.minimum(left, largest)
        least = tl.minimum(room, smallest)
        spread = tl.maximum(room, smallest) - least
        found = tl.zeros([], tl.int32)
        t = tl.zeros([], tl.int32)
        while t < tries:
            w0, w1, w2, w3 = philox4x32((b << 32) + drawn + t, tl.load(seed_ptr + 1), tl.load(seed_ptr))
            area = (least << 32) + w0.to(tl.int64) * spread
            root = tl.sqrt(area.to(tl.float64)).to(tl.int64)
            root = tl.where(root * root > area, root - 1, root)
            root = tl.where((root + 1) * (root + 1) <= area, root + 1, root)
            shape = 2 * _below(w1, A)
            height = (root * tl.load(shapes_ptr + shape).to(tl.int64) + 536870912) >> 30
            width = (root * tl.load(shapes_ptr + shape + 1).to(tl.int64) + 536870912) >> 30
            fits = (height < h) & (width < w)
            height = tl.where(fits, height, 0)
            width = tl.where(fits, width, 0)
            place = _inside(cell, w, _below(w2, h - height + 1), _below(w3, w - width + 1), height, width)
            more = tl.sum(tl.where(place, free, 0), 0)
            fits = (more > 0) & (more <= room)
            free = tl.where(place & fits, 0, free)
            left = tl.where(fits, left - more, left)
            found = tl.where(fits, 1, found)
            t = tl.where(fits, tries, t + 1)
        drawn += tries
        going = (found == 1) & (left > 0)
    if FILL:
        i = tl.zeros([], tl.int64)
        while left > 0:
            j = _below(_word_of(seed_ptr, b, 4 * FILL_COUNTER + i), h * w - wanted + left)
            free = tl.where((free == 1) & (tl.cumsum(free, 0) - 1 == j), 0, free)
            left -= 1
            i += 1
    tl.store(out_ptr + b * h * w + cell, (1 - free).to(tl.uint8), mask=cell < h * w)


@triton.jit
def _multiblock_kernel(seed_ptr, target_ptr, context_ptr, targets_ptr, kept_ptr, A, A_context, h, w, targets, min_keep,
                       SHARED: tl.constexpr, CELLS: tl.constexpr):  # fmt: skip
    # Places of targets are drawn again wherever they are needed: a generator by counter remembers them.
    b = tl.program_id(0).to(tl.int64)
    cell = tl.arange(0, CELLS)
    size_counter = b << 32
    if SHARED:
        size_counter = tl.zeros([], tl.int64) - 1
    seed, offset = tl.load(seed_ptr), tl.load(seed_ptr + 1)
    w0, w1, _, _ = philox4x32(size_counter, offset, seed)
    t_size, c_size = 2 * _below(w0, A), 2 * _below(w1, A_context)
    height, width = tl.load(target_ptr + t_size), tl.load(target_ptr + t_size + 1)
    c_height, c_width = tl.load(context_ptr + c_size), tl.load(context_ptr + c_size + 1)
    for t in range(targets):
        w0, w1, _, _ = philox4x32((b << 32) + 1 + t, offset, seed)
        place = _inside(cell, w, _below(w0, h - height), _below(w1, w - width), height, width)
        tl.store(targets_ptr + (b * targets + t) * h * w + cell, place.to(tl.uint8), mask=cell < h * w)
    a = tl.zeros([], tl.int32)
    last = TRIES_PER_TARGET * targets
    while a <= last:
        w0, w1, _, _ = philox4x32((b << 32) + 1 + targets + a, offset, seed)
        rest = _inside(cell, w, _below(w0, h - c_height), _below(w1, w - c_width), c_height, c_width).to(tl.int32)
        for t in range(targets - a // TRIES_PER_TARGET):
            w0, w1, _, _ = philox4x32((b << 32) + 1 + t, offset, seed)
            place = _inside(cell, w, _below(w0, h - height), _below(w1, w - width), height, width)
            rest = tl.where(place, 0, rest)
        tl.store(kept_ptr + b * h * w + cell, rest.to(tl.uint8), mask=cell < h * w)
        a = tl.where(tl.sum(rest, 0) > min_keep, last + 1, a + 1)


@triton.jit
def _starts_kernel(seed_ptr, spans_ptr, starts_ptr, taken_ptr, N, REPLACEMENT: tl.constexpr):
    # taken [B, N], zero at first. Each draw may depend on the one before, so memory is waited for between them.
    b = tl.program_id(0).to(tl.int64)
    starts = tl.load(starts_ptr + b)
    count = tl.load(spans_ptr + b)
    if not REPLACEMENT:
        count = tl.minimum(count, starts)
    count = tl.where(starts == 0, 0, count)
    i = tl.zeros([], tl.int64)
    while i < count:
        word = _word_of(seed_ptr, b, i)
        if REPLACEMENT:
            start = _below(word, starts)
        else:
            newest = starts - count + i
            start = _below(word, newest + 1)
            start = tl.where(tl.load(taken_ptr + b * N + start) != 0, newest, start)
            tl.debug_barrier()
        tl.store(taken_ptr + b * N + start, 1)
        tl.debug_barrier()
        i += 1


@triton.jit
def _cover_kernel(taken_ptr, length_ptr, out_ptr, total, N, span, BLOCK: tl.constexpr):
    # One program owns BLOCK tokens of [B, N] and looks back over a span's length for a start.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b, n = i // N, i % N
    inside = (i < total) & (n < tl.load(length_ptr + b, mask=i < total, other=0))
    covered = tl.zeros([BLOCK], tl.int32)
    for back in range(span):
        covered |= tl.load(taken_ptr + i - back, mask=inside & (n >= back), other=0).to(tl.int32)
    tl.store(out_ptr + i, covered.to(tl.uint8), mask=i < total)


@triton.jit
def _sizes_kernel(groups_ptr, sizes_ptr, total, N, G, BLOCK: tl.constexpr):
    # One program owns BLOCK tokens and counts them into sizes [1 or B, G]; whole numbers, so the order does not matter.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(groups_ptr + i, mask=i < total, other=-1)
    tl.atomic_add(sizes_ptr + i // N * G + g, 1, mask=g >= 0)


@triton.jit
def _take_kernel(order_ptr, sizes_ptr, budgets_ptr, level_ptr, G, L, stride, BY_TOKENS: tl.constexpr):
    # level [B, G], L at first. A walk sees what an earlier one took, so memory is waited for after a store.
    b = tl.program_id(0).to(tl.int64)
    used = tl.zeros([], tl.int64)
    for walk in range(L):
        budget = tl.load(budgets_ptr + b * L + walk)
        i = tl.zeros([], tl.int32)
        while (i < G) & (used < budget):
            g = tl.load(order_ptr + b * G + i)
            known = tl.maximum(g, 0)
            size = tl.load(sizes_ptr + b * stride + known).to(tl.int64)
            taken = tl.load(level_ptr + b * G + known) < L
            cost = size
            if not BY_TOKENS:
                cost = tl.zeros_like(size) + 1
            if (g >= 0) & (size > 0) & (taken == 0) & (used + cost <= budget):
                tl.debug_barrier()
                tl.store(level_ptr + b * G + known, walk)
                used += cost
                tl.debug_barrier()
            i += 1


@triton.jit
def _levels_kernel(groups_ptr, level_ptr, out_ptr, total, N, G, L, stride, BLOCK: tl.constexpr):
    # One program owns BLOCK tokens of [B, N], each of which gets its group's level.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b, n = i // N, i % N
    g = tl.load(groups_ptr + b * stride + n, mask=i < total, other=-1)
    level = tl.load(level_ptr + b * G + g, mask=g >= 0, other=0)
    tl.store(out_ptr + i, tl.where(g >= 0, level, L).to(tl.uint8), mask=i < total)


@triton.jit
def _intervals_kernel(seed_ptr, spans_ptr, length_ptr, out_ptr, max_spans, SLOTS: tl.constexpr):
    # The spans that are taken are in registers, SLOTS >= max_spans of them.
    b = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    wanted, length = tl.load(spans_ptr + b), tl.load(length_ptr + b)
    begins = tl.full([SLOTS], -1, tl.int64)
    ends = tl.full([SLOTS], -1, tl.int64)
    count = tl.zeros([], tl.int32)
    c = tl.zeros([], tl.int64)
    while (c < wanted * wanted) & (count < wanted):
        w0, w1, _, _ = philox4x32((b << 32) + c, tl.load(seed_ptr + 1), tl.load(seed_ptr))
        first, second = w0.to(tl.int64), w1.to(tl.int64)
        begin = (tl.minimum(first, second) * length) >> 32
        end = (tl.maximum(first, second) * length + 2147483648) >> 32
        clash = (slot < count) & (end > begins) & (ends > begin)
        fits = (begin < end) & (tl.sum(clash.to(tl.int32), 0) == 0)
        here = (slot == count) & fits
        begins = tl.where(here, begin, begins)
        ends = tl.where(here, end, ends)
        count += fits.to(tl.int32)
        c += 1
    earlier = (slot[None, :] < count) & (begins[None, :] < begins[:, None])
    rank = tl.where(slot < count, tl.sum(earlier.to(tl.int32), 1), slot)
    at = out_ptr + (b * max_spans + rank) * 2
    tl.store(at, begins, mask=slot < max_spans)
    tl.store(at + 1, ends, mask=slot < max_spans)


def mask_sampling_blocks(seed, num_mask, shapes, h, w, smallest, largest, tries, fill):
    out = torch.empty((num_mask.shape[0], h * w), dtype=torch.bool, device=seed.device)
    args = (seed.contiguous(), num_mask.contiguous(), shapes.contiguous(), out.view(torch.uint8), shapes.shape[0])
    cells = max(16, triton.next_power_of_2(h * w))
    sizes = (h, w, smallest, largest, tries)
    launch(_blocks_kernel, out.shape[0], *args, *sizes, FILL=fill, CELLS=cells, num_warps=4)
    return out


def mask_sampling_multiblock(seed, target_sizes, context_sizes, B, h, w, targets, min_keep, shared):
    found = torch.empty((B, targets, h * w), dtype=torch.bool, device=seed.device)
    kept = torch.empty((B, h * w), dtype=torch.bool, device=seed.device)
    tensors = (seed.contiguous(), target_sizes.contiguous(), context_sizes.contiguous())
    sizes = (target_sizes.shape[0], context_sizes.shape[0], h, w, targets, min_keep)
    cells = max(16, triton.next_power_of_2(h * w))
    outputs = (found.view(torch.uint8), kept.view(torch.uint8))
    launch(_multiblock_kernel, B, *tensors, *outputs, *sizes, SHARED=shared, CELLS=cells, num_warps=4)
    return found, kept


def mask_sampling_spans(seed, num_spans, num_starts, lengths, N, span, replacement):
    B = num_spans.shape[0]
    out = torch.empty((B, N), dtype=torch.bool, device=seed.device)
    taken = torch.zeros((B, N), dtype=torch.uint8, device=seed.device)
    args = (seed.contiguous(), num_spans.contiguous(), num_starts.contiguous(), taken, N)
    launch(_starts_kernel, B, *args, REPLACEMENT=replacement, num_warps=1)
    args = (taken, lengths.contiguous(), out.view(torch.uint8), B * N, N, min(span, N))
    launch(_cover_kernel, cdiv(B * N, 256), *args, BLOCK=256, num_warps=4)
    return out


def mask_sampling_groups(order, groups, budgets, by_tokens):
    (B, G), N, L = order.shape, groups.shape[1], budgets.shape[1]
    groups, shared = groups.contiguous(), groups.shape[0] == 1
    out = torch.empty((B, N), dtype=torch.uint8, device=order.device)
    sizes = torch.zeros((groups.shape[0], G), dtype=torch.int32, device=order.device)
    level = torch.full((B, G), L, dtype=torch.int32, device=order.device)
    launch(_sizes_kernel, cdiv(groups.numel(), 256), groups, sizes, groups.numel(), N, G, BLOCK=256, num_warps=4)
    args = (order.contiguous(), sizes, budgets.contiguous(), level, G, L, 0 if shared else G)
    launch(_take_kernel, B, *args, BY_TOKENS=by_tokens, num_warps=1)
    args = (groups, level, out, B * N, N, G, L, 0 if shared else N)
    launch(_levels_kernel, cdiv(B * N, 256), *args, BLOCK=256, num_warps=4)
    return out


def mask_sampling_intervals(seed, num_spans, lengths, max_spans):
    out = torch.empty((num_spans.shape[0], max_spans, 2), dtype=torch.int64, device=seed.device)
    args = (seed.contiguous(), num_spans.contiguous(), lengths.contiguous(), out, max_spans)
    slots = max(16, triton.next_power_of_2(max_spans))
    launch(_intervals_kernel, num_spans.shape[0], *args, SLOTS=slots, num_warps=1)
    return out
