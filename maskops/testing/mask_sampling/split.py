"""Samples, error samples and traffic of the family mask_sampling."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from maskops.testing import ErrorSample, Sample

G = torch.Generator
UNIFORM, RANK = "mask_sampling_uniform", "mask_sampling_rank"


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
    batch: int, tokens: int, ragged: bool, ascending: bool, with_mask: bool = False, frames: int = 1
) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        num_keep, lengths, max_keep, max_mask = _counts(g, batch, tokens, ragged)
        mask = torch.rand(batch, tokens, generator=g) < 0.5 if with_mask else None
        seed = torch.tensor([-(2**63) + 12345, 2**40 + 7])
        if frames != 1:  # rows of one length, which may still keep different counts
            max_mask, lengths = tokens, None
        return seed, num_keep, lengths, mask, tokens, max_keep, max_mask, ascending, frames

    return make


def _rank(batch: int, tokens: int, ragged: bool, ascending: bool, dtype_noise: torch.dtype) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        num_keep, lengths, max_keep, max_mask = _counts(g, batch, tokens, ragged)
        noise = torch.randn(batch, tokens, generator=g, dtype=torch.float64).mul(4).round().div(4).to(dtype_noise)
        if tokens > 4:  # ties, both zeros and NaN
            noise[0, :4] = torch.tensor([0.0, -0.0, math.nan, math.inf])
        return noise, num_keep, lengths, max_keep, max_mask, ascending

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
        Sample(UNIFORM, f"{t}_frames_{'ragged' if r else 'equal'}_{'ascending' if a else 'random'}", _uniform(3, 37, r, a, a, t))
        for r, a, t in ((False, True, 4), (True, True, 3), (True, False, 2), (False, False, 0))
    ),
    Sample(UNIFORM, "frames_no_tokens", _uniform(2, 0, False, True, frames=3)),
    Sample(UNIFORM, "frames_no_tokens_but_room", _uniform(2, 0, True, True, frames=3)),
    Sample(UNIFORM, "frames_no_rows", _uniform(0, 8, False, False, frames=3)),
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
    ErrorSample(UNIFORM, "frames", lambda *a: (*a[:8], -1), ValueError, r"frames must be in \[0, 2\^30\), got -1"),
    ErrorSample(
        UNIFORM, "tokens", lambda *a: (*a[:8], 2**25), ValueError, r"frames N must be in \[0, 2\^30\), got 1241513984"
    ),
    ErrorSample(
        UNIFORM,
        "frames_lengths",
        lambda s, k, n, *a: (s, k, k + 9, *a[:5], 2),
        ValueError,
        "frames must be 1 where lengths",
    ),
    ErrorSample(RANK, "noise_dtype", lambda x, *a: (x.half(), *a), ValueError, "noise must be float32 or float64"),
    ErrorSample(
        RANK, "room", lambda x, k, n, i, j, *a: (x, k, n, i, 0, *a), ValueError, "masked tokens.* must be at most 0"
    ),
]


def _bytes(inputs: int, batch: int, tokens: int, max_keep: int, max_mask: int) -> int:
    return inputs + 8 * batch * (max_keep + max_mask + tokens + 2) + 4 * (batch + 1)


TRAFFIC = {
    UNIFORM: lambda seed, keep, lengths, mask, n, k, m, asc, t: _bytes(
        16 if mask is None else 16 + mask.numel(), len(keep), t * n, t * k, t * m
    ),
    RANK: lambda noise, keep, lengths, k, m, asc: _bytes(
        noise.numel() * noise.element_size(), len(keep), noise.shape[1], k, m
    ),
}
