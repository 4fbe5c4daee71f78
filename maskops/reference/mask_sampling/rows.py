"""Reference of the laws of mask_sampling that draw row by row, in plain Python.

Row b has a stream of its own: word i is word i % 4 of counter b 2^32 + i / 4.
"""

import math

import torch
from torch import Tensor

from maskops.reference.mask_sampling.split import philox

FILL_WORDS = 2**31  # where in a row's stream the words of single cells begin
TRIES_PER_TARGET = 20
SHARED_COUNTER = -1


def words_of(seed: Tensor, b: int, counter: int, count: int) -> list[list[int]]:
    """The words of counters [counter, counter + count) of row b, four each."""
    return philox(seed, (b << 32) + counter + torch.arange(count, device=seed.device)).tolist()


def below(word: int, n: int) -> int:
    return word * n >> 32


def mask_sampling_blocks(
    seed: Tensor, num_mask: Tensor, shapes: Tensor, h: int, w: int, smallest: int, largest: int, tries: int, fill: bool
) -> Tensor:
    out = torch.zeros(len(num_mask), h, w, dtype=torch.bool, device=seed.device)
    shapes = shapes.tolist()
    for b, left in enumerate(num_mask.tolist()):
        drawn, found = 0, True
        while found and left > 0:
            found, room = False, min(left, largest)
            for words in words_of(seed, b, drawn, tries):
                top, start, height, width = _rectangle(words, shapes, h, w, smallest, room)
                inside = out[b, top : top + height, start : start + width]
                more = height * width - int(inside.sum())
                if 0 < more <= room:
                    inside[:] = True
                    left, found = left - more, True
                    break
            drawn += tries
        if fill:
            for i in range(left):
                free = (~out[b].flatten()).nonzero().flatten()
                word = words_of(seed, b, (FILL_WORDS + i) // 4, 1)[0][i % 4]
                out[b].view(-1)[free[below(word, len(free))]] = True
    return out.flatten(1)


def _rectangle(words: list[int], shapes: list, h: int, w: int, smallest: int, room: int) -> tuple[int, int, int, int]:
    """Top, left, height, width; 0 x 0 if the sides are not less than the grid's."""
    area = (min(smallest, room) << 32) + words[0] * abs(room - smallest)
    tall, wide = shapes[below(words[1], len(shapes))]
    root = math.isqrt(area)
    height, width = (root * tall + (1 << 29)) >> 30, (root * wide + (1 << 29)) >> 30
    if height >= h or width >= w:
        return 0, 0, 0, 0
    return below(words[2], h - height + 1), below(words[3], w - width + 1), height, width


def mask_sampling_multiblock(
    seed: Tensor, target_sizes: Tensor, context_sizes: Tensor, B: int, h: int, w: int, targets: int, min_keep: int,
    shared: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found = torch.zeros(B, targets, h, w, dtype=torch.bool, device=seed.device)
    kept = torch.zeros(B, h, w, dtype=torch.bool, device=seed.device)
    for b in range(B):
        size = words_of(seed, 0, SHARED_COUNTER, 1)[0] if shared else words_of(seed, b, 0, 1)[0]
        height, width = target_sizes[below(size[0], len(target_sizes))].tolist()
        for t, words in enumerate(words_of(seed, b, 1, targets)):
            top, left = below(words[0], h - height), below(words[1], w - width)
            found[b, t, top : top + height, left : left + width] = True
        height, width = context_sizes[below(size[1], len(context_sizes))].tolist()
        for a in range(TRIES_PER_TARGET * targets + 1):
            words = words_of(seed, b, 1 + targets + a, 1)[0]
            top, left = below(words[0], h - height), below(words[1], w - width)
            kept[b] = False
            kept[b, top : top + height, left : left + width] = True
            kept[b] &= ~found[b, : targets - a // TRIES_PER_TARGET].any(0)
            if int(kept[b].sum()) > min_keep:
                break
    return found.flatten(2), kept.flatten(1)


def mask_sampling_spans(
    seed: Tensor, num_spans: Tensor, num_starts: Tensor, lengths: Tensor, N: int, span: int, replacement: bool
) -> Tensor:
    out = torch.zeros(len(num_spans), N, dtype=torch.bool, device=seed.device)
    rows = zip(num_spans.tolist(), num_starts.tolist(), lengths.tolist(), strict=True)
    for b, (count, starts, length) in enumerate(rows):
        count = 0 if starts == 0 else count if replacement else min(count, starts)
        words = [word for four in words_of(seed, b, 0, (count + 3) // 4) for word in four]
        taken: set[int] = set()
        for i in range(count):
            # Floyd: the i-th draw is from one start more than the one before; a start that is taken stands for the new one.
            newest = starts - count + i
            start = below(words[i], starts if replacement else newest + 1)
            taken.add(newest if not replacement and start in taken else start)
        for start in taken:
            out[b, start : min(start + span, length)] = True
    return out


def mask_sampling_groups(order: Tensor, groups: Tensor, budgets: Tensor, by_tokens: bool) -> Tensor:
    (B, G), N, L = order.shape, groups.shape[1], budgets.shape[1]
    out = torch.full((B, N), L, dtype=torch.uint8, device=order.device)
    for b, group in enumerate(groups.expand(B, N)):
        sizes = group[group >= 0].bincount(minlength=G).tolist()
        taken: set[int] = set()
        used = 0
        for level, budget in enumerate(budgets[b].tolist()):
            for g in order[b].tolist():
                if g < 0 or sizes[g] == 0 or g in taken:
                    continue
                cost = sizes[g] if by_tokens else 1
                if used < budget and used + cost <= budget:
                    used += cost
                    taken.add(g)
                    out[b, group == g] = level
    return out


def mask_sampling_intervals(seed: Tensor, num_spans: Tensor, lengths: Tensor, max_spans: int) -> Tensor:
    out = torch.full((len(num_spans), max_spans, 2), -1, dtype=torch.int64, device=seed.device)
    for b, (wanted, length) in enumerate(zip(num_spans.tolist(), lengths.tolist(), strict=True)):
        found: list[tuple[int, int]] = []
        for words in words_of(seed, b, 0, wanted**2):
            low, high = sorted(words[:2])
            begin, end = low * length >> 32, (high * length + (1 << 31)) >> 32
            if len(found) < wanted and begin < end and all(end <= x or y <= begin for x, y in found):
                found.append((begin, end))
        for i, (begin, end) in enumerate(sorted(found)):
            out[b, i, 0], out[b, i, 1] = begin, end
    return out
