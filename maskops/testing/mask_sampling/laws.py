"""Samples, error samples and traffic of the laws of mask_sampling."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from maskops.testing import ErrorSample, Sample

G = torch.Generator
SEED = (-(2**63) + 12345, 2**40 + 7)


def _seeded(make: Callable[[G], tuple]) -> Callable:
    return lambda dtype, g: (torch.tensor(SEED), *make(g))


def _weights(g: G, batch: int, tokens: int) -> tuple:
    weight = torch.randn(batch, tokens, generator=g).mul(20).exp2()
    if tokens > 5:
        weight[0, :5] = torch.tensor([0.0, -0.0, 1e-40, 3e38, 1.2e-38])
    return (weight,)


def _tokens(g: G, batch: int, tokens: int, hide: float, random: float) -> tuple:
    ids, mask = torch.randint(0, 50, (batch, tokens), generator=g), torch.rand(batch, tokens, generator=g) < 0.5
    return ids, mask, -7, 5, 47, int(hide * 2**32), int((hide + random) * 2**32)


def _logits(g: G, count: int) -> Tensor:
    logits = torch.randn(count, generator=g) * 3
    logits[:5] = torch.tensor([math.nan, math.inf, -math.inf, 100.0, 0.0])[:count]
    return logits


def _taps(filters: int, width: int) -> Tensor:
    taps = torch.arange(filters * width).view(filters, width).sin().mul(1024 // width).int()
    taps[0, width // 2] += 3
    return taps


def _shapes(count: int, steepest: float) -> Tensor:
    ratio = torch.linspace(-math.log(steepest), math.log(steepest), count).div(2).exp()
    return torch.stack([ratio, 1 / ratio], 1).mul(2**14).round().int()


def _blocks(
    counts: list[int], h: int, w: int, smallest: int = 4, largest: int = 4096, tries: int = 10, fill: bool = True
) -> Callable:
    return _seeded(
        lambda g: (torch.tensor(counts, dtype=torch.int64), _shapes(9, 3.3), h, w, smallest, largest, tries, fill)
    )


def _multiblock(batch: int, h: int, w: int, targets: int, min_keep: int, shared: bool) -> Callable:
    small = torch.tensor([[h // 3, w // 4], [h // 4, w // 3], [h // 2, w // 3]]).clamp(min=1).int()
    large = torch.tensor([[h - 1, w - 1], [h - 2, w - 1]]).int()
    return _seeded(lambda g: (small, large, batch, h, w, targets, min_keep, shared))


def _spans(tokens: int, span: int, replacement: bool, batch: int = 4) -> Callable:
    def make(g: G) -> tuple:
        lengths = torch.randint(0, tokens + 1, (batch,), generator=g)
        lengths[:1] = tokens
        starts = (lengths - span).clamp(min=0)
        return torch.randint(0, tokens // span + 2, (batch,), generator=g), starts, lengths, tokens, span, replacement

    return _seeded(make)


def _groups(batch: int, tokens: int, count: int, by_tokens: bool, shared: bool, levels: int = 2) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        order = torch.rand(batch, count, generator=g).argsort(1)
        groups = torch.randint(-1, count - 1, (1 if shared else batch, tokens), generator=g)
        most = tokens if by_tokens else count
        budgets = torch.randint(-1, most + 1, (batch, levels), generator=g).sort(1).values
        return order, groups, budgets, by_tokens

    return make


SAMPLES = [
    *(Sample("mask_sampling_words", str(n), _seeded(lambda g, n=n: (n,))) for n in (37, 0, 1, 2048, 5003)),
    *(
        Sample("mask_sampling_bernoulli", name, _seeded(lambda g, s=s: (torch.randint(-9, 2**32 + 9, s, generator=g), 3, 37)))
        for name, s in (("full", (3, 37)), ("rows", (3, 1)), ("columns", (1, 37)), ("one", (1, 1)))
    ),
    Sample("mask_sampling_bernoulli", "empty", _seeded(lambda g: (torch.full((1, 1), 9), 0, 8))),
    Sample("mask_sampling_bernoulli", "no_tokens", _seeded(lambda g: (torch.full((1, 1), 9), 4, 0))),
    *(
        Sample("mask_sampling_race", f"{b}x{n}", _seeded(lambda g, b=b, n=n: _weights(g, b, n)))
        for b, n in ((3, 37), (0, 4), (2, 0), (1, 1031))
    ),
    *(
        Sample("mask_sampling_corrupt", name, _seeded(lambda g, a=a: _tokens(g, *a)))
        for name, a in (
            ("bert", (3, 37, 0.8, 0.1)), ("all_masks", (2, 5, 1.0, 0.0)), ("all_random", (1, 9, 0.0, 1.0)),
            ("empty", (0, 3, 0.8, 0.1)),
        )
    ),
    *(
        Sample("mask_sampling_gate", f"straight_through_{kind}_{n}", _seeded(lambda g, n=n, k=kind: (_logits(g, n), k == "gumbel")))
        for kind in ("logistic", "gumbel")
        for n in (101, 0)
    ),
    *(
        Sample("mask_sampling_colour", f"{s}x{t}_{b}x{h}x{w}", _seeded(lambda g, s=s, t=t, b=b, h=h, w=w: (_taps(s, t), b, h, w)))
        for s, t, b, h, w in ((2, 5, 3, 6, 7), (3, 1, 2, 1, 4), (1, 13, 1, 14, 18), (1, 3, 0, 2, 2), (1, 3, 2, 0, 5))
    ),
    Sample("mask_sampling_blocks", "cae", _blocks([12, 0, 25, 1], 5, 5)),
    Sample("mask_sampling_blocks", "beit", _blocks([18, 3], 5, 7, 2, 9, 3, False)),
    Sample("mask_sampling_blocks", "nothing_fits", _blocks([3, 5], 1, 5)),
    Sample("mask_sampling_blocks", "wide", _blocks([70], 3, 64, 16, tries=40)),
    Sample("mask_sampling_blocks", "no_images", _blocks([], 4, 4)),
    *(
        Sample("mask_sampling_multiblock", f"{b}x{h}x{w}_{'shared' if s else 'own'}_{k}", _multiblock(b, h, w, t, k, s))
        for b, h, w, t, k, s in ((3, 6, 7, 4, 2, True), (2, 6, 7, 4, 2, False), (1, 5, 4, 2, 16, True), (0, 6, 6, 1, 0, True))
    ),
    *(
        Sample("mask_sampling_spans", f"{n}_{s}_{'again' if r else 'once'}", _spans(n, s, r))
        for n, s in ((37, 4), (70, 1), (1, 1))
        for r in (False, True)
    ),
    Sample("mask_sampling_spans", "no_rows", _spans(8, 2, False, 0)),
    Sample("mask_sampling_spans", "no_tokens", _spans(0, 2, True)),
    *(
        Sample("mask_sampling_groups", f"{'tokens' if t else 'groups'}_{'shared' if s else 'own'}", _groups(3, 37, 11, t, s))
        for t in (True, False)
        for s in (True, False)
    ),
    Sample("mask_sampling_groups", "one_level", _groups(2, 50, 50, False, False, 1)),
    Sample("mask_sampling_groups", "no_rows", _groups(0, 5, 3, True, True)),
    Sample("mask_sampling_groups", "no_tokens", _groups(2, 0, 3, True, False)),
    Sample("mask_sampling_intervals", "some", _seeded(lambda g: (torch.tensor([0, 1, 3, 6]), torch.tensor([50, 40, 0, 300]), 6))),
    Sample("mask_sampling_intervals", "many", _seeded(lambda g: (torch.tensor([9]), torch.tensor([10**6]), 12))),
    Sample("mask_sampling_intervals", "no_rows", _seeded(lambda g: (torch.arange(0), torch.arange(0), 3))),
]  # fmt: skip


def _error(op: str, name: str, spoil: Callable, match: str) -> ErrorSample:
    return ErrorSample(f"mask_sampling_{op}", name, spoil, ValueError, match)


def _with(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.view(-1)[1] = value
    return x


ERRORS = [
    *(
        _error(op, "seed", lambda s, *a: (s.int(), *a), r"seed must be int64 \[2\], got int32 \[2\]")
        for op in ("words", "bernoulli", "race", "corrupt", "gate", "colour", "blocks", "multiblock", "spans", "intervals")
    ),
    _error("words", "count", lambda s, n: (s, -1), r"count must be in \[0, 1099511627776\], got -1"),
    _error("bernoulli", "threshold", lambda s, t, b, n: (s, t[:2], b, n), r"threshold must have shape \[1 or B, 1 or N\]"),
    _error("race", "negative", lambda s, w: (s, _with(w, -1)), r"weight\[0, 1\] must be finite and at least 0, got -1"),
    _error("race", "nan", lambda s, w: (s, _with(w, math.nan)), r"weight\[0, 1\] must be finite and at least 0, got nan"),
    _error("race", "dtype", lambda s, w: (s, w.double()), r"weight must be float32 \[B, N\], got float64"),
    _error("corrupt", "mask", lambda s, i, m, *a: (s, i, m[:, :5], *a), r"mask must have shape \[B, N\] = \[3, 37\]"),
    _error("corrupt", "swap", lambda s, i, m, x, lo, hi, a, b: (s, i, m, x, lo, hi, b, a), "swap must be in"),
    _error("corrupt", "vocabulary", lambda s, i, m, x, lo, hi, *a: (s, i, m, x, hi, lo, *a), "high - low must be in"),
    _error("gate", "logits", lambda s, x, g: (s, x[None], g), r"logits must have shape \[M\]"),
    _error("colour", "taps", lambda s, t, *a: (s, t[:, :4], *a), "T must be odd and at most 63, got 4"),
    _error("colour", "gain", lambda s, t, *a: (s, t * 9, *a), r"sum of \|taps\|.* must be at most 1024"),
    _error("colour", "size", lambda s, t, b, h, w: (s, t, b, 100, 100), r"must be at most 12288, got 21216"),
    _error("blocks", "num_mask", lambda s, n, *a: (s, _with(n, 26), *a), r"num_mask.* must be in \[0, 25\]"),
    _error("blocks", "tries", lambda s, n, x, h, w, a, b, t, f: (s, n, x, h, w, a, b, 0, f), r"tries must be in \[1, 1000\]"),
    _error("blocks", "side", lambda s, n, x, h, w, *a: (s, n, x, h, 65, *a), r"w must be in \[0, 64\], got 65"),
    _error("multiblock", "sizes", lambda s, t, c, *a: (s, t + 9, c, *a), "must be at least 1 and less than the grid's side"),
    _error("multiblock", "targets", lambda s, t, c, b, h, w, n, *a: (s, t, c, b, h, w, 65, *a), r"targets must be in \[1, 64\]"),
    _error("spans", "lengths", lambda s, n, st, le, *a: (s, n, st, _with(le, 99), *a), r"lengths.* must be in \[0, 37\]"),
    _error("spans", "num_starts", lambda s, n, st, le, *a: (s, n, le + 1, le, *a), r"num_starts.* must be in \[0, length\]"),
    _error("spans", "span", lambda s, n, st, le, t, x, r: (s, n, st, le, t, 0, r), r"span must be in \[1, 262144\]"),
    _error("groups", "groups", lambda o, g, *a: (o, _with(g, 11), *a), r"groups.* must be in \[-1, 11\)"),
    _error("groups", "budgets", lambda o, g, b, t: (o, g, b[:1], t), r"budgets must have shape \[B, L\] = \[3, \*\]"),
    _error("groups", "rows", lambda o, g, b, t: (o, g.expand(2, -1), b, t), r"groups must have shape \[1 or B, N\]"),
    _error("intervals", "num_spans", lambda s, n, le, m: (s, n, le, 5), r"num_spans.* must be in \[0, 5\]"),
]  # fmt: skip

TRAFFIC = {
    "mask_sampling_words": lambda seed, count: 16 + 8 * count,
    "mask_sampling_bernoulli": lambda seed, threshold, b, n: 16 + 8 * threshold.numel() + b * n,
    "mask_sampling_race": lambda seed, weight: 16 + 8 * weight.numel(),
    "mask_sampling_corrupt": lambda seed, ids, *a: 16 + 17 * ids.numel(),
    "mask_sampling_gate": lambda seed, logits, gumbel: 16 + 8 * logits.numel(),
    "mask_sampling_colour": lambda seed, taps, b, h, w: 16 + 4 * taps.numel() + 4 * b * h * w,
    "mask_sampling_blocks": lambda seed, counts, shapes, h, w, *a: 16 + len(counts) * (8 + h * w),
    "mask_sampling_multiblock": lambda seed, t, c, b, h, w, targets, *a: 16 + b * h * w * (targets + 1),
    "mask_sampling_spans": lambda seed, counts, starts, lengths, n, *a: 16 + len(counts) * (24 + n),
    "mask_sampling_groups": lambda order, groups, budgets, t: (
        8 * (order.numel() + groups.numel() + budgets.numel()) + len(order) * groups.shape[1]
    ),
    "mask_sampling_intervals": lambda seed, counts, lengths, spans: 16 + 16 * len(counts) * (1 + spans),
}
