"""Samples, error samples and traffic of the family feature_reuse."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from maskops.testing import ErrorSample, Sample, randn

G = torch.Generator
WRITE, EXCLUDE, ATTENTION = "feature_reuse_write_", "feature_reuse_exclude", "feature_reuse_attention"
SAMPLE, RANK, DRIFT = "feature_reuse_sample", "feature_reuse_rank", "feature_reuse_drift"
B, H, N, U = 3, 2, 70, 9


def ragged_ids(g: G, batch: int, tokens: int, slots: int) -> Tensor:
    """int64 [B, U]: a full first row, an empty last one (of several), holes anywhere between."""
    ids = (
        torch.stack([torch.randperm(tokens, generator=g)[:slots] for _ in range(batch)])
        if batch
        else torch.empty(0, slots).long()
    )
    holes = torch.rand(batch, slots, generator=g) < 0.3
    if batch:
        holes[0] = False
        holes[-1] = batch > 1
    return torch.where(holes, -1, ids)


def _tokens(g: G, dtype: torch.dtype, layout: str, batch: int, heads: int, tokens: int, channels: int) -> Tensor:
    if layout == "packed":  # [B, tokens, heads, channels] in memory, as a cache and a projection have it
        return randn(g, dtype, batch, tokens, heads, channels).transpose(1, 2)
    if layout == "strided":
        return randn(g, dtype, batch, heads, tokens, channels + 3)[..., 3:]
    return randn(g, dtype, batch, heads, tokens, channels)


def _write(batch: int = B, tokens: int = N, slots: int = U, channels: int = 5, layout: str = "packed") -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        caches = [_tokens(g, dtype, layout, batch, H, tokens, channels) for _ in range(2)]
        local = [
            _tokens(g, dtype, "plain" if layout == "packed" else layout, batch, H, slots, channels) for _ in range(2)
        ]
        valid = torch.rand(batch, tokens, generator=g) < 0.5
        local[0][:, :, :1] = math.nan  # is copied as anything else
        return *caches, valid, *local, ragged_ids(g, batch, tokens, slots)

    return make


def _exclude(layers: int, batch: int, tokens: int, slots: int) -> Callable:
    return lambda dtype, g: (
        torch.rand(layers, batch, tokens, generator=g) < 0.7, ragged_ids(g, batch, tokens, slots)
    )  # fmt: skip


def _attention(
    tokens: int = N, slots: int = U, channels: int = 16, layout: str = "packed", hidden_nan: bool = False, batch: int = B,
    visible: float = 0.7, holes: bool = True,
) -> Callable:  # fmt: skip
    def make(dtype: torch.dtype, g: G) -> tuple:
        local = [_tokens(g, dtype, layout, batch, H, slots, channels) for _ in range(3)]
        cached = [_tokens(g, dtype, layout, batch, H, tokens, channels) for _ in range(2)]
        seen = torch.rand(batch, tokens, generator=g) < visible
        ids = ragged_ids(g, batch, tokens, slots)
        if not holes:
            ids = torch.arange(slots).expand(batch, slots).contiguous()
        if hidden_nan:
            for x in local:
                x.transpose(1, 2)[ids < 0] = math.nan
            for x in cached:
                x.transpose(1, 2)[~seen] = math.nan
        return *local, *cached, seen, ids, 0.3

    return make


def _sample(
    batch: int = B, tokens: int = 5, values: int = 50, temperature: float = 1.0, noise: float = 4.5, probs: bool = False,
    first_row: int = 0, strided: bool = False, broken: bool = False, close: bool = False,
) -> Callable:  # fmt: skip
    def make(dtype: torch.dtype, g: G) -> tuple:
        logits = (
            randn(g, dtype, batch, tokens, values + 3)[..., 3:] * 3
            if strided
            else randn(g, dtype, batch, tokens, values) * 3
        )
        known = torch.rand(batch, tokens, generator=g) < 0.3
        if batch > 1:
            known[0], known[-1] = False, True
        if probs:
            logits = logits.double().softmax(2).to(dtype)
            if broken:
                logits[0, 0, 3] = -1.0
                return logits, known, torch.tensor([1, 2]), first_row, temperature, noise, probs
        if close:  # the likeliest is ahead by less than exp can tell
            logits = torch.arange(values).to(dtype).expand(batch, tokens, values) * 1e-12
        if broken:  # an impossible value, rows of nothing, NaN, inf; and NaN where it is known
            logits[:, :, ::7] = -math.inf
            logits[0, 0], logits[0, 1, 3], logits[0, 2, 4] = -math.inf, math.nan, math.inf
            logits[known] = math.nan
        return logits, known, torch.tensor([-(2**63) + 12345, 2**40 + 7]), first_row, temperature, noise, probs

    return make


def _rank(
    batch: int = B, tokens: int = 70, select: str = "counts", threshold: float = -math.inf, ties: bool = False
) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        score = torch.randn(batch, tokens, generator=g)
        if ties:
            score = score.round()
            score[:, ::9], score[:, 1::9], score[:, 2::9] = math.nan, math.inf, -math.inf
        known = torch.rand(batch, tokens, generator=g) < 0.4
        if batch > 1:
            known[0], known[-1] = False, True
        counts = torch.randint(0, tokens + 9, (batch,), generator=g) if select == "counts" else None
        return score, known, counts, threshold

    return make


def _drift(kind: int, batch: int = B, tokens: int = 4, channels: int = 37, layout: str = "plain") -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        wide = 3 if layout == "strided" else 0
        new, cached = (randn(g, dtype, batch, tokens, channels + wide)[..., wide:] for _ in range(2))
        if layout == "nan":
            new[1, 0, 3] = cached[1, 1, 3] = math.nan
        if batch and channels:
            new[0, 0] = cached[0, 0] = 0
            new[0, 1] = 0
            new[0, 2] = cached[0, 2]
        return new, cached, kind

    return make


SAMPLES = [
    Sample(WRITE, "ragged", _write()),
    Sample(WRITE, "strided", _write(layout="strided", channels=7)),
    Sample(WRITE, "no_slots", _write(slots=0)),
    Sample(WRITE, "no_rows", _write(batch=0)),
    Sample(WRITE, "no_channels", _write(channels=0)),
    Sample(EXCLUDE, "ragged", _exclude(2, B, N, U)),
    Sample(EXCLUDE, "no_slots", _exclude(2, B, N, 0)),
    Sample(EXCLUDE, "no_tokens", _exclude(2, B, 0, 0)),
    Sample(EXCLUDE, "long", _exclude(1, 1, 600, 300)),
    Sample(ATTENTION, "packed", _attention(holes=False)),
    # An empty slot's lse is -inf, of which finite differences know nothing.
    Sample(ATTENTION, "strided_odd_without_keys", _attention(layout="strided", channels=19, slots=17), ("triton",)),
    Sample(ATTENTION, "two_tiles_without_keys", _attention(slots=66, tokens=131, channels=8, batch=2), ("triton",)),
    Sample(ATTENTION, "hidden_nan_without_keys", _attention(hidden_nan=True, visible=0.4)),
    Sample(ATTENTION, "empty_cache_without_keys", _attention(tokens=12, visible=0.0)),
    Sample(ATTENTION, "wide", _attention(tokens=20, slots=4, channels=130, batch=2, holes=False), ("triton",)),
    Sample(ATTENTION, "no_slots", _attention(slots=0)),
    Sample(ATTENTION, "no_rows", _attention(batch=0)),
    Sample(SAMPLE, "gumbel", _sample()),
    Sample(SAMPLE, "cool", _sample(temperature=0.6, noise=0.0, strided=True)),
    Sample(SAMPLE, "greedy", _sample(temperature=0.0, noise=2.0)),
    Sample(SAMPLE, "probs", _sample(probs=True, values=33)),
    Sample(SAMPLE, "probs_greedy", _sample(probs=True, temperature=0.0)),
    Sample(SAMPLE, "broken", _sample(broken=True, first_row=5)),
    Sample(SAMPLE, "broken_greedy", _sample(broken=True, temperature=0.0)),
    Sample(SAMPLE, "close_greedy", _sample(temperature=0.0, close=True, values=33)),
    Sample(SAMPLE, "broken_probs", _sample(probs=True, broken=True)),
    Sample(SAMPLE, "last_row", _sample(first_row=2**31 - 1)),
    Sample(SAMPLE, "many", _sample(batch=1, tokens=2, values=2500)),
    Sample(SAMPLE, "one_value", _sample(values=1)),
    Sample(SAMPLE, "no_tokens", _sample(tokens=0)),
    Sample(RANK, "counts", _rank()),
    Sample(RANK, "ties", _rank(ties=True)),
    Sample(RANK, "threshold", _rank(select="threshold", threshold=0.5)),
    Sample(RANK, "threshold_ties", _rank(select="threshold", threshold=9.0, ties=True)),
    Sample(RANK, "no_tokens", _rank(tokens=0)),
    Sample(RANK, "one_row", _rank(batch=1, tokens=3)),
    Sample(DRIFT, "cosine", _drift(0)),
    Sample(DRIFT, "l2", _drift(1)),
    Sample(DRIFT, "nan_cosine", _drift(0, layout="nan")),
    Sample(DRIFT, "nan_l2", _drift(1, layout="nan")),
    Sample(DRIFT, "strided", _drift(0, layout="strided", channels=300)),
    Sample(DRIFT, "no_channels", _drift(0, channels=0)),
    Sample(DRIFT, "no_rows", _drift(1, batch=0)),
]


def _with(place: int, change: Callable[[Tensor], object]) -> Callable:
    def spoil(*args: object) -> tuple:
        new = [a.clone() if isinstance(a, Tensor) else a for a in args]
        new[place] = change(new[place])
        return tuple(new)

    return spoil


def _set(place: int, value: float) -> Callable:
    def change(x: Tensor) -> Tensor:
        x.view(-1)[place] = value
        return x

    return change


def _repeat(x: Tensor) -> Tensor:
    x[0, 1] = x[0, 0]
    return x


ERRORS = [
    ErrorSample(WRITE, "dtype", _with(3, lambda k: k.double()), ValueError, r"write_: k must be float32"),
    ErrorSample(WRITE, "heads", _with(4, lambda v: v[:, :1]), ValueError, r"write_: v must have shape \[B, H, U, D\]"),
    ErrorSample(WRITE, "valid", _with(2, lambda m: m.float()), ValueError, r"valid must be bool"),
    ErrorSample(WRITE, "range", _with(5, _set(0, N)), IndexError, rf"ids\[0, 0\] must be in \[-1, {N}\), got {N}"),
    ErrorSample(WRITE, "repeated", _with(5, _repeat), IndexError, r"ids\[0, 1\] must be unique in its row"),
    ErrorSample(WRITE, "expanded", _with(0, lambda k: k[:1].expand_as(k)), ValueError, r"k_cache must have no expanded axis"),
    ErrorSample(EXCLUDE, "rank", _with(0, lambda m: m[0]), ValueError, r"exclude: valid must have shape \[L, B, N\]"),
    ErrorSample(EXCLUDE, "range", _with(1, _set(1, -2)), IndexError, r"ids\[0, 1\] must be in \[-1, "),
    ErrorSample(EXCLUDE, "repeated", _with(1, _repeat), IndexError, r"ids\[0, 1\] must be unique in its row"),
    ErrorSample(ATTENTION, "dtype", _with(1, lambda k: k.double()), ValueError, r"cached_attention: k_local must be float32"),
    ErrorSample(ATTENTION, "cache", _with(3, lambda k: k[..., :4]), ValueError, r"cached keys must have shape"),
    ErrorSample(ATTENTION, "seen", _with(5, lambda m: m[:, :3]), ValueError, r"seen must have shape \[B, N\]"),
    ErrorSample(ATTENTION, "range", _with(6, _set(0, N)), IndexError, r"local_ids\[0, 0\] must be in \[-1, "),
    ErrorSample(ATTENTION, "repeated", _with(6, _repeat), IndexError, r"local_ids\[0, 1\] must be unique in its row"),
    ErrorSample(
        ATTENTION, "channels", lambda q, k, v, *rest: (*(x.repeat(1, 1, 1, 17) for x in (q, k, v)), *rest), ValueError,
        r"q_local must have 1 to 256 channels",
    ),
    ErrorSample(SAMPLE, "known", _with(1, lambda m: m.long()), ValueError, r"confidence_select: known must be bool \[B, N\]"),
    ErrorSample(SAMPLE, "values", _with(0, lambda x: x[..., :0]), ValueError, r"logits must have V of at least 1, got 0"),
    ErrorSample(SAMPLE, "row", _with(3, lambda r: -1), ValueError, r"first_row must be in \[0, 2\^31\), got -1"),
    ErrorSample(
        SAMPLE, "temperature", _with(4, lambda t: -0.5), ValueError,
        r"sample_temperature must be finite and at least 0, got -0.5",
    ),
    ErrorSample(SAMPLE, "noise", _with(5, lambda t: math.inf), ValueError, r"temperature must be finite and at least 0, got inf"),
    ErrorSample(RANK, "dtype", _with(0, lambda s: s.half()), ValueError, r"select_tokens: score must be float32 or float64"),
    ErrorSample(RANK, "counts", _with(2, _set(1, -3)), ValueError, r"num_select\[1\] must be at least 0, got -3"),
    ErrorSample(RANK, "threshold", _with(3, lambda t: math.nan), ValueError, r"threshold must be a number, got nan"),
    ErrorSample(DRIFT, "shape", _with(1, lambda x: x[:, :1]), ValueError, r"token_drift: cached must have shape"),
    ErrorSample(DRIFT, "kind", _with(2, lambda k: 7), ValueError, r"kind must be 0 or 1, got 7"),
]  # fmt: skip


# ---------------------------------------------------------------- traffic


def _bytes(*xs: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in xs)


def write_bytes(k_cache: Tensor, v_cache: Tensor, valid: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> int:
    return 2 * _bytes(k, v) + _bytes(ids) + ids.numel()


def exclude_bytes(valid: Tensor, ids: Tensor) -> int:
    return 2 * valid.numel() + _bytes(ids)


def attention_bytes(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, seen: Tensor, ids: Tensor, scale: float
) -> int:
    cached = int(seen.sum()) * k_cache.shape[1] * k_cache.shape[3] * k_cache.element_size()
    return 2 * cached + 4 * _bytes(q) + _bytes(seen, ids)


def sample_bytes(logits: Tensor, known: Tensor, *rest: object) -> int:
    return int((~known).sum()) * logits.shape[2] * logits.element_size() + known.numel() * (9 + 4)


def rank_bytes(score: Tensor, known: Tensor, num_select: Tensor | None, threshold: float) -> int:
    return _bytes(score, known) + 16 * score.numel()


def drift_bytes(new: Tensor, cached: Tensor, kind: int) -> int:
    return _bytes(new, cached) + 4 * new.shape[0] * new.shape[1]


TRAFFIC = {
    WRITE: write_bytes, EXCLUDE: exclude_bytes, ATTENTION: attention_bytes, SAMPLE: sample_bytes, RANK: rank_bytes,
    DRIFT: drift_bytes,
}  # fmt: skip
