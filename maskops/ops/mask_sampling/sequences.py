"""Laws on sequences: spans of frames or tokens, and groups of tokens such as words, n-grams and sectors."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import FLOATS, boolean, check_is_dense, check_tensor, check_values, describe, fail
from maskops.ops.mask_sampling import arguments as given
from maskops.ops.mask_sampling.scores import NATIVE, TRITON
from maskops.ops.mask_sampling.uniform import Seed


@public("mask_sampling_spans", native=NATIVE, triton=TRITON)
def span_masking(
    B: int, N: int, mask_prob: float | None = None, *, span: int = 10, num_spans: int | Tensor | None = None,
    min_spans: int = 2, replacement: bool = False, equalise: bool = False, lengths: Tensor | None = None,
    seed: Seed = None, generator: torch.Generator | None = None, device: torch.device | str | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Mask spans of tokens at random starts; spans may overlap and then merge.

        n = max(min_spans, int(mask_prob * length / span + U(0, 1)));  n starts;  mask[start : start + span] = True

    Args:
        B, N: rows, tokens per row, N at most 2^18.
        mask_prob: share of tokens that spans would mask if none overlapped.
        span: tokens of a span.
        num_spans: instead of mask_prob: the number, an int or int64 [B].
        min_spans: the least number, where mask_prob is given.
        replacement: False draws different starts among the first length - span (fairseq); True draws each among the
            length - span + 1 at which a span fits (fairseq2; with span=1 ELECTRA's positions, of which some coincide).
        equalise: unmask random tokens of each row until all rows mask as many as the one that masks fewest.
        lengths: int64 [B], real tokens of each row. Without them the number of spans is drawn once for all rows, as published.
        seed, generator, device: as in random_masking.
        backend: "auto", "native", "triton", "reference".

    Returns:
        bool [B, N], True = masked; False in padding. split_tokens makes a TokenSplit of it.

    Notes:
        A row too short for n spans gets as many as it has room for. mask_prob / span is rounded to a multiple of 2^-32.

    Raises:
        ValueError: neither or both of mask_prob and num_spans, an argument out of range, wrong lengths.

    Source:
        wav2vec 2.0 (Baevski et al., 2020, arXiv 2006.11477), HuBERT (Hsu et al., 2021, arXiv 2106.07447) as in fairseq.

    Example:
        >>> mask = maskops.span_masking(2, 100, 0.65, span=10, seed=0)
        >>> mask.shape, bool(mask.any(1).all())
        (torch.Size([2, 100]), True)
    """
    name = "span_masking"
    B, N = given.size(name, "B", B), given.size(name, "N", N, 0, 2**18)
    span, least = given.size(name, "span", span, 1, 2**18), given.size(name, "min_spans", min_spans, 0, 2**20)
    replacement, equalise = boolean(name, "replacement", replacement), boolean(name, "equalise", equalise)
    if (mask_prob is None) == (num_spans is None):
        fail(name, "mask_prob or num_spans", "be given, one of them", f"{mask_prob} and {num_spans}")
    where = given.where(name, device, lengths, num_spans, seed, generator)
    seed = given.seed_of(name, seed, generator, where)
    real = torch.full((B,), N, dtype=torch.int64, device=where) if lengths is None else lengths
    check_tensor(name, "lengths", real, "[B]", (torch.int64,), (B,), seed)
    if num_spans is None:
        rate = round(given.share(name, "mask_prob", mask_prob) / span * 2**32)
        words = find_op("mask_sampling_words", where.type, backend, name)(
            given.later(seed, 1), B if lengths is not None else 1
        )
        counts = ((rate * real + words) >> 32).clamp(min=least)
    elif isinstance(num_spans, Tensor):
        check_tensor(name, "num_spans", num_spans, "[B]", (torch.int64,), (B,), seed)
        counts = num_spans
    else:
        counts = torch.full_like(real, given.size(name, "num_spans", num_spans, 0, 2**20))
    room = (
        (real - span + 1).clamp(min=0) if replacement else torch.maximum(real - span, torch.minimum(counts + 1, real))
    )
    op = find_op("mask_sampling_spans", where.type, backend, name)
    mask = op(seed, counts, room.clamp(min=0), real, N, span, replacement)
    return _equal_rows(given.later(seed, 2), mask, backend, name) if equalise and B else mask


def _equal_rows(seed: Tensor, mask: Tensor, backend: str, name: str) -> Tensor:
    """As many masked tokens in every row as in the row that has fewest: a random subset of each row's."""
    B, N = mask.shape
    fewest = mask.sum(1).amin().expand(B).contiguous()
    op = find_op("mask_sampling_uniform", mask.device.type, backend, name)
    slot = op(seed, fewest, None, ~mask, N, N, N, False)[2]
    return slot < fewest[:, None]


@public("mask_sampling_groups", native=NATIVE, triton=TRITON)
def group_masking(
    groups: Tensor, mask_ratio: float | Sequence[float], *, num_groups: int | None = None, B: int | None = None,
    unit: str = "token", rounding: str = "round", at_least: int = 1, at_most: int | None = None,
    weight: Tensor | None = None, seed: Seed = None, generator: torch.Generator | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Mask whole groups of tokens: words, n-grams, cells, polylines, sectors of a scan.

        budget = rounded mask_ratio of the row's tokens (or groups);  in random order, each group that still fits is masked

    Args:
        groups: int64 [B, N] or, the same for all rows, [1, N]: the group of each token, in [-1, num_groups); -1 is never masked and
            does not count, as for special tokens and padding. Tokens of a group need not be neighbours.
        mask_ratio: share in [0, 1]; or an ascending sequence of them, for nested masks.
        num_groups: groups at most, up to 4096. Default: N.
        B: rows, where groups is [1, N]. Default: as many as groups, or weight, has.
        unit: "token": the budget counts tokens (whole-word masking); "group": it counts groups that have tokens (n-grams, sectors).
        rounding: "round" (half to even), "floor" or "ceil" of the budget.
        at_least, at_most: bounds of the budget, in its unit; at_least only where the row has anything.
        weight: float [B, num_groups], finite, at least 0, for an order that prefers groups by weight. Default: uniform.
        seed, generator: as in random_masking.
        backend: "auto", "native", "triton", "reference".

    Returns:
        bool [B, N], True = masked; for a sequence of L ratios bool [L, B, N], each a subset of the next.

    Notes:
        A group that does not fit is passed over, the next may fit: a row masks its budget or less, by less than its longest group.
        Nested: the next mask goes on from the one before, through the same order.

    Raises:
        ValueError: wrong shapes, a ratio out of range or not ascending, a group out of range.

    Source:
        Whole-word masking of BERT; DupMAE (Xiao et al., 2022, arXiv 2211.08769); nested: Starbucks (Zhuang et al., 2024, arXiv
        2410.13230); sectors: R-MAE (Tayebati et al., 2024, arXiv 2406.07833).

    Example:
        >>> words = torch.tensor([[-1, 0, 0, 1, 2, 2, 2, -1]])
        >>> maskops.group_masking(words, 0.5, seed=3).int().tolist()
        [[0, 1, 1, 1, 0, 0, 0, 0]]
    """
    name = "group_masking"
    check_tensor(name, "groups", groups, "[1 or B, N]", (torch.int64,), (None, None), groups)
    given.choice(name, "unit", unit, ("token", "group"))
    given.choice(name, "rounding", rounding, ("round", "floor", "ceil"))
    ratios = _ascending(name, mask_ratio if isinstance(mask_ratio, Sequence) else (mask_ratio,))
    count = given.size(name, "num_groups", groups.shape[1] if num_groups is None else num_groups, 0, 4096)
    device = groups.device
    seed = given.seed_of(name, seed, generator, device)
    if weight is not None:
        _check_weight(name, weight, count, groups)
    rows = groups.shape[0] if weight is None or groups.shape[0] != 1 else weight.shape[0]
    rows = rows if B is None else given.size(name, "B", B)
    if groups.shape[0] not in (1, rows):
        fail(name, "groups", f"have shape [1 or B, N] = [1 or {int(rows)}, *]", describe(groups))
    if weight is None:
        order = given.shuffled(seed, rows, count, count, "random", backend, name).ids_keep
    else:
        check_tensor(name, "weight", weight, "[B, num_groups]", FLOATS, (rows, count), groups)
        key = find_op("mask_sampling_race", device.type, backend, name)(seed, weight.detach().float())
        order = given.ranked(key, count, "random", backend, name).ids_keep
    most = (groups >= 0).sum(1) if unit == "token" else _present(groups, count)
    bounds = given.size(name, "at_least", at_least), 2**62 if at_most is None else given.size(name, "at_most", at_most)
    budgets = _budgets(most, ratios, rounding, *bounds).expand(rows, -1)
    op = find_op("mask_sampling_groups", device.type, backend, name)
    level = op(order, groups, budgets, unit == "token")
    if not isinstance(mask_ratio, Sequence):
        return (level ^ 1).view(torch.bool)  # of 0 and 1: a sixth of the time of a comparison
    return level <= torch.arange(len(ratios), device=device)[:, None, None]


def _ascending(name: str, mask_ratio: Sequence) -> list[float]:
    ratios = [given.share(name, "mask_ratio", ratio) for ratio in mask_ratio]
    # Not by sorted(), which a compiled program refuses where the ratios vary.
    if not 0 < len(ratios) <= 254 or any(a > b for a, b in pairwise(ratios)):
        fail(name, "mask_ratio", "ascend, 1 to 254 of them", mask_ratio)
    return ratios


def _check_weight(name: str, weight: Tensor, count: int, groups: Tensor) -> None:
    """The words are those of group_masking, not of the op that weighted_masking shares with it."""
    check_is_dense(name, "weight", weight)
    check_tensor(name, "weight", weight, "[B, num_groups]", FLOATS, (None, count), groups)
    check_values(name, "weight", (weight >= 0) & weight.isfinite(), "be finite and at least 0", weight)


def _budgets(most: Tensor, ratios: list[float], rounding: str, at_least: int, at_most: int) -> Tensor:
    """int64 [B, L]: the rounded ratios of most [B], within bounds and most itself."""
    exact = most.double()[:, None] * torch.tensor(ratios, dtype=torch.float64, device=most.device)
    # 0.2 of 35 is a little above 7.
    whole = {"round": exact.round, "floor": (exact + 1e-9).floor, "ceil": (exact - 1e-9).ceil}[rounding]().long()
    return torch.minimum(whole.clamp(at_least, at_most), most[:, None])


def _present(groups: Tensor, count: int) -> Tensor:
    """How many groups of each row have tokens."""
    seen = torch.zeros(groups.shape[0], count + 2, dtype=torch.bool, device=groups.device)
    return seen.scatter_(1, groups.clamp(-1, count) + 1, True)[:, 1 : count + 1].sum(1)


@public("mask_sampling_intervals", native=NATIVE, triton=TRITON)
def draw_spans(
    lengths: Tensor, *, max_spans: int = 16, mean: float = 1.0, seed: Seed = None,
    generator: torch.Generator | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Draw a few spans of each row that do not touch one another's tokens: CM3's.

        n ~ Poisson(mean), clamped to [1, max_spans];  n^2 candidates with two uniform ends, of which the first n that fit are taken

    Args:
        lengths: int64 [B], tokens of each row, below 2^31.
        max_spans: S, 1 to 64.
        mean: of the Poisson law, in [0, 64].
        seed, generator: as in random_masking.
        backend: "auto", "native", "triton", "reference".

    Returns:
        int64 [B, S, 2], begin and end of each span, ascending; -1 past the last. move_spans takes them.

    Notes:
        A candidate's lower end is rounded down, its upper one to the nearest; an empty candidate does not fit. A row may get fewer
        than n spans, and one of length 0 gets none.

    Raises:
        ValueError: wrong lengths, an argument out of range.

    Source:
        CM3 (Aghajanyan et al., 2022, arXiv 2201.07520), n^2 candidates as in metaseq.

    Example:
        >>> spans = maskops.draw_spans(torch.tensor([100, 0]), max_spans=2, seed=0)
        >>> spans.shape, spans[1].tolist()
        (torch.Size([2, 2, 2]), [[-1, -1], [-1, -1]])
    """
    name = "draw_spans"
    check_tensor(name, "lengths", lengths, "[B]", (torch.int64,), (None,), lengths)
    S = given.size(name, "max_spans", max_spans, 1, 64)
    mean = given.number(name, "mean", mean)
    if not 0 <= mean <= 64:
        fail(name, "mean", "be in [0, 64]", mean)
    # The number of spans is how many steps of the law's distribution function the word is above.
    steps, term, total = [], math.exp(-mean), 0.0
    for k in range(S):
        total += term
        term *= mean / (k + 1)
        steps.append(min(round(total * 2**32), 2**32))
    seed = given.seed_of(name, seed, generator, lengths.device)
    words = find_op("mask_sampling_words", lengths.device.type, backend, name)(given.later(seed, 1), lengths.shape[0])
    above = words[:, None] >= torch.tensor(steps, device=lengths.device)
    op = find_op("mask_sampling_intervals", lengths.device.type, backend, name)
    return op(seed, above.sum(1).clamp(min=1), lengths, S)
