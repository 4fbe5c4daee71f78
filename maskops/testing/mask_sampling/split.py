"""Samples, error samples and traffic of the family mask_sampling."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from maskops.testing import ErrorSample, Sample

G = torch.Generator
UNIFORM, RANK, TOP = "mask_sampling_uniform", "mask_sampling_rank", "mask_sampling_top"


def _counts(g: G, batch: int, tokens: int, ragged: bool) -> tuple[Tensor, Tensor | None, int, int]:
    """num_keep, lengths, max_keep, max_mask."""
    if not ragged:
        keep = tokens // 4
        return torch.full((batch,), keep), None, keep, tokens - keep
    lengths = torch.randint(0, tokens + 1, (batch,), generator=g)
    lengths[0] = tokens
    num_keep = (lengths * torch.rand(batch, generator=g)).long()
    return num_keep, lengths, int(num_keep.max()) + 1, int((lengths - num_keep).max())


def _uniform(
    batch: int, tokens: int, ragged: bool, ascending: bool, with_mask: bool = False, cells: tuple = (1, 1, 1)
) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        num_keep, lengths, max_keep, max_mask = _counts(g, batch, tokens, ragged)
        mask = torch.rand(batch, tokens, generator=g) < 0.5 if with_mask else None
        seed = torch.tensor([-(2**63) + 12345, 2**40 + 7])
        if cells[1:] != (1, 1):  # rows of one length, which may still keep different counts
            max_mask, lengths = tokens, None
        return seed, num_keep, lengths, mask, tokens, max_keep, max_mask, ascending, *cells

    return make


def _rank(batch: int, tokens: int, ragged: bool, ascending: bool, dtype_noise: torch.dtype) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        num_keep, lengths, max_keep, max_mask = _counts(g, batch, tokens, ragged)
        noise = torch.randn(batch, tokens, generator=g, dtype=torch.float64).mul(4).round().div(4).to(dtype_noise)
        if batch and tokens > 4:  # ties, both zeros and NaN
            noise[0, :4] = torch.tensor([0.0, -0.0, math.nan, math.inf])
        return noise, num_keep, lengths, max_keep, max_mask, ascending

    return make


def _top(batch: int, tokens: int, count: int, dtype_score: torch.dtype) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        return _rank(batch, tokens, False, True, dtype_score)(dtype, g)[0], count

    return make


SAMPLES = [
    *(
        Sample(UNIFORM, f"{'ragged' if r else 'equal'}_{'ascending' if a else 'random'}{'_mask' * m}", _uniform(3, 37, r, a, m))
        for r in (False, True)
        for a in (False, True)
        for m in (False, True)
    ),
    Sample(UNIFORM, "no_rows", _uniform(0, 8, False, False)),
    Sample(UNIFORM, "no_tokens", _uniform(2, 0, False, True)),
    *(
        Sample(UNIFORM, f"cells_{x}_{h}x{w}_{'ragged' if r else 'equal'}{'_mask' * m}", _uniform(3, 42, r, True, m, (x, h, w)))
        for x, h, w, r, m in (
            (42, 4, 1, False, True), (7, 2, 2, True, False), (6, 1, 3, True, True), (1, 3, 2, False, False),
            (14, 20, 1, True, False), (7, 0, 2, False, False),
        )
    ),
    Sample(UNIFORM, "cells_one_row_of_long", _uniform(1, 300, True, True, cells=(20, 3, 2))),
    Sample(UNIFORM, "cells_no_tokens", _uniform(2, 0, False, True, cells=(3, 3, 2))),
    Sample(UNIFORM, "cells_no_tokens_but_room", _uniform(2, 0, True, True, cells=(1, 3, 1))),
    Sample(UNIFORM, "cells_no_rows", _uniform(0, 8, False, True, cells=(4, 3, 1))),
    *(
        Sample(TOP, f"{count}_of_{tokens}_{str(d)[6:]}", _top(batch, tokens, count, d))
        for batch, tokens, count in ((3, 37, 9), (2, 37, 0), (2, 37, 37), (1, 300, 90), (0, 8, 2), (2, 0, 0))
        for d in (torch.float32, torch.float64)
    ),
    Sample(UNIFORM, "long_row", _uniform(1, 300, False, False)),
    *(
        Sample(RANK, f"{'ragged' if r else 'equal'}_{'ascending' if a else 'random'}_{str(d)[6:]}", _rank(3, 37, r, a, d))
        for r, a, d in (
            (False, False, torch.float32), (True, False, torch.float32), (True, True, torch.float64), (False, True, torch.float64),
        )
    ),
]  # fmt: skip

ERRORS = [
    ErrorSample(UNIFORM, "seed_dtype", lambda s, *a: (s.float(), *a), ValueError, r"seed must be int64 \[2\]"),
    ErrorSample(UNIFORM, "count", lambda s, k, *a: (s, k + 99, *a), ValueError, r"num_keep.* must be in \[0, length\]"),
    ErrorSample(
        UNIFORM, "lengths", lambda s, k, n, *a: (s, k, k + 99, *a), ValueError, r"lengths.* must be in \[0, 37\]"
    ),
    ErrorSample(
        UNIFORM,
        "mask",
        lambda s, k, n, m, *a: (s, k, n, torch.zeros(3, 9, dtype=torch.bool), *a),
        ValueError,
        "mask must have",
    ),
    *(
        ErrorSample(UNIFORM, name, lambda *a, cells=cells: (*a[:7], True, *cells), ValueError, text)
        for name, cells, text in (
            ("high", (1, -1, 1), r"high must be in \[0, 2\^30\), got -1"),
            ("area", (1, 2**20, 2**20), r"high wide must be in \[0, 2\^30\), got 1099511627776"),
            ("tokens", (1, 2**25, 1), r"high wide N must be in \[0, 2\^30\), got 1241513984"),
            ("across", (0, 2, 1), "across must divide N = 37, got 0"),
            ("across_rest", (5, 1, 2), "across must divide N = 37, got 5"),
        )
    ),
    ErrorSample(
        UNIFORM,
        "cells_lengths",
        lambda s, k, n, *a: (s, k, k + 9, *a[:4], True, 1, 2, 1),
        ValueError,
        "high and wide must be 1 where lengths are given, got 2 and 1",
    ),
    ErrorSample(
        UNIFORM,
        "cells_order",
        lambda *a: (*a[:7], False, 1, 1, 3),
        ValueError,
        "high and wide must be 1 in random order, got 1 and 3",
    ),
    ErrorSample(TOP, "dtype", lambda x, c: (x.half(), c), ValueError, "score must be float32 or float64"),
    ErrorSample(TOP, "count", lambda x, c: (x, 38), ValueError, r"num_hard must be in \[0, 37\], got 38"),
    ErrorSample(RANK, "noise_dtype", lambda x, *a: (x.half(), *a), ValueError, "noise must be float32 or float64"),
    ErrorSample(
        RANK, "room", lambda x, k, n, i, j, *a: (x, k, n, i, 0, *a), ValueError, "masked tokens.* must be at most 0"
    ),
]


def _bytes(inputs: int, batch: int, tokens: int, max_keep: int, max_mask: int) -> int:
    return inputs + 8 * batch * (max_keep + max_mask + tokens + 2) + 4 * (batch + 1)


TRAFFIC = {
    UNIFORM: lambda seed, keep, lengths, mask, n, k, m, asc, x, h, w: _bytes(
        16 if mask is None else 16 + mask.numel(), len(keep), h * w * n, h * w * k, h * w * m
    ),
    TOP: lambda score, count: score.numel() * (score.element_size() + 1),
    RANK: lambda noise, keep, lengths, k, m, asc: _bytes(
        noise.numel() * noise.element_size(), len(keep), noise.shape[1], k, m
    ),
}
