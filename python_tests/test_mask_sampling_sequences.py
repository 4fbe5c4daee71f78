"""Spans, groups and moved spans of mask_sampling against their definitions and figures.

figure                                                    expected            here
HuBERT coverage, T 1000, p .8 and .65, fairseq            .567, .491          .566, .491
the same with replacement (fairseq2 draws one span less   .546, .474          .552, .479
  and trims rows to the shortest; closed form .552, .479)
ELECTRA: distinct of 19 draws from 126                    17.70               17.70
CM3: masked fraction, spans, share of one span            .37, 1.23, .82      .37, 1.23, .82
"""

import pytest
import torch
from torch import Tensor

import maskops


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("p, once, again", [(0.8, 0.567, 0.552), (0.65, 0.491, 0.479)])
def test_span_coverage(p: float, once: float, again: float) -> None:
    covering = torch.minimum(torch.arange(1000), 999 - torch.arange(1000)).add(1).clamp(max=10)
    closed_form = 1 - (1 - covering / 991.0).pow(p * 100).mean()
    assert abs(closed_form - again) < 0.001
    for replacement, want in ((False, once), (True, again)):
        mask = maskops.span_masking(600, 1000, p, span=10, replacement=replacement, seed=0)
        assert abs(mask.double().mean() - want) < 0.003
        runs = (mask.int().diff(dim=1) == 1).sum() + mask[:, 0].sum()
        assert not replacement or mask.sum() / runs > 10
        # No span is shorter than 10: a masked token has 9 masked neighbours in a row.
        windows = mask.unfold(1, 10, 1).all(2)
        covered = torch.nn.functional.max_pool1d(torch.nn.functional.pad(windows.float(), (9, 9)), 10, 1) > 0
        assert torch.equal(covered, mask)


def test_spans_of_rows() -> None:
    lengths = torch.tensor([0, 1, 5, 12, 40, 100])
    for replacement in (False, True):
        mask = maskops.span_masking(6, 100, 0.5, span=4, lengths=lengths, replacement=replacement, seed=1)
        assert not (mask & (torch.arange(100) >= lengths[:, None])).any() and mask[4:].any(1).all()
    equal = maskops.span_masking(50, 200, 0.65, span=10, equalise=True, seed=2)
    plain = maskops.span_masking(50, 200, 0.65, span=10, seed=2)
    assert len(equal.sum(1).unique()) == 1 and equal.sum(1)[0] == plain.sum(1).min() and not (equal & ~plain).any()
    # One number of spans for all rows, rounded up as often as its fraction says: 0.5 * 30 / 4 = 3.75.
    counts = [int(maskops.span_masking(1, 30, 0.5, span=4, seed=s, min_spans=0)[0].sum() > 12) for s in range(300)]
    assert 0 < sum(counts) < 300


def test_starts_without_replacement_are_uniform_subsets() -> None:
    mask = maskops.span_masking(30000, 6, num_spans=2, span=1, seed=4)  # starts in [0, 5)
    found = (mask[:, :5] * 2 ** torch.arange(5)).sum(1).bincount(minlength=32)
    pairs = found[[2**i + 2**j for i in range(5) for j in range(i)]]
    assert pairs.sum() == 30000 and chi_square(pairs, torch.full((10,), 3000.0)) < 27.9


def test_electra_draws_with_replacement() -> None:
    mask = maskops.span_masking(4000, 126, num_spans=19, span=1, replacement=True, seed=0)
    assert abs(mask.sum(1).double().mean() - 17.70) < 0.05


def words_of(seed: int, B: int, N: int) -> Tensor:
    """Words of 1 to 4 tokens, special tokens at both ends."""
    starts = torch.rand(B, N, generator=torch.Generator().manual_seed(seed)) < 0.5
    groups = starts.int().cumsum(1)
    groups[:, 0] = groups[:, -1] = -1
    return groups.long()


def test_whole_words() -> None:
    groups = words_of(0, 200, 60)
    mask = maskops.group_masking(groups, 0.15, num_groups=61, seed=0)
    for b in range(200):
        masked = groups[b][mask[b]].unique()
        assert (masked >= 0).all() and torch.equal(torch.isin(groups[b], masked), mask[b])
    assert (mask.sum(1) <= 9).all() and mask.sum(1).double().mean() > 8.5
    few = maskops.group_masking(groups, 0.5, num_groups=61, at_most=5, seed=0)
    assert (few.sum(1) <= 5).all()


def test_nested_words_of_starbucks() -> None:
    groups = words_of(1, 300, 80)
    encoder, decoder = maskops.group_masking(groups, (0.2, 0.4), num_groups=81, seed=0)
    assert not (encoder & ~decoder).any()
    assert abs(encoder.double().mean() * 80 / 78 - 0.2) < 0.01 and abs(decoder.double().mean() * 80 / 78 - 0.4) < 0.01


def test_groups_by_weight() -> None:
    groups = torch.arange(4)[None]
    weight = torch.tensor([1.0, 1.0, 6.0, 0.0]).expand(6000, 4).contiguous()
    mask = maskops.group_masking(groups, 0.25, unit="group", weight=weight, seed=0)
    rate = mask.double().mean(0)
    assert abs(rate[2] - 0.75) < 0.02 and rate[3] == 0


def test_cm3_spans() -> None:
    lengths = torch.full((20000,), 2048)
    spans = maskops.draw_spans(lengths, seed=0)
    count, size = (spans[:, :, 0] >= 0).sum(1), (spans[:, :, 1] - spans[:, :, 0]).sum(1)
    assert abs(size.double().mean() / 2048 - 0.37) < 0.01
    assert abs(count.double().mean() - 1.23) < 0.03 and abs((count == 1).double().mean() - 0.82) < 0.02
    there = spans[:, 1:, 0] >= 0
    assert (spans[:, 1:, 0] >= spans[:, :-1, 1])[there].all(), "ascending, apart"


def test_moved_spans_come_back() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (1000, 60), generator=generator)
    lengths = torch.randint(0, 61, (1000,), generator=generator)
    spans, sentinels = maskops.draw_spans(lengths, max_spans=6, mean=3.0, seed=1), torch.arange(1000, 1006)
    moved = maskops.move_spans(ids, spans, sentinels, lengths=lengths, end_id=999, pad_id=-5)
    count = (spans[:, :, 0] >= 0).sum(1)
    assert torch.equal(moved.lengths, lengths + 2 * count + 1) and (count > 1).any()
    back, sizes = maskops.restore_spans(moved.ids, sentinels, lengths=moved.lengths, end_id=999)
    inside = torch.arange(60) < lengths[:, None]
    assert torch.equal(sizes, lengths) and torch.equal(back[:, :60][inside], ids[inside])
    # Each original token is a target exactly once, a sentinel never.
    source = torch.where(moved.source >= 0, moved.source, 60)
    seen = torch.zeros(1000, 61, dtype=torch.int64).scatter_add_(1, source, torch.ones_like(source))[:, :60]
    assert torch.equal(seen == 1, inside) and (seen <= 1).all()
    assert torch.equal(moved.predicted.sum(1), lengths + 1) and not moved.predicted[moved.ids >= 1000].any()


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"spans": torch.tensor([[[1, 2], [1, 5]]])}, ValueError, r"move_spans: spans\[0, 1, 0\] must ascend without overlap"),
        ({"spans": torch.tensor([[[1, 2], [3, 6]]])}, ValueError, r"spans\[0, 1, 0\] must ascend without overlap"),
        ({"spans": torch.tensor([[[-1, -1], [3, 4]]])}, ValueError, r"spans\[0, 1, 0\] must ascend without overlap"),
        ({"spans": torch.tensor([[[1, 2], [-2, -2]]])}, ValueError, r"spans\[0, 1, 0\] must ascend without overlap"),
        ({"lengths": torch.tensor([6])}, ValueError, r"lengths\[0\] must be in \[0, 5\], got 6"),
        ({"sentinels": torch.tensor([9, 9])}, ValueError, r"sentinels\[0\] must differ from one another, got 9"),
        ({"end_id": 1.5}, TypeError, "end_id must be int, got 1.5"),
        ({"end_id": 2**63}, ValueError, "end_id must fit in 64 bits"),
        ({"pad_id": True}, TypeError, "pad_id must be int, got True"),
    ],
)  # fmt: skip
def test_spans_that_are_none(change: dict, error: type[Exception], match: str) -> None:
    good = {"ids": torch.arange(5)[None], "spans": torch.tensor([[[1, 2], [3, 5]]]), "sentinels": torch.tensor([8, 9])}
    maskops.move_spans(**good)
    with pytest.raises(error, match=match):
        maskops.move_spans(**(good | change))
    if "spans" not in change:
        moved = good["ids"], good["sentinels"]
        with pytest.raises(error, match=match):
            maskops.restore_spans(*moved, **change) if "sentinels" not in change else maskops.restore_spans(
                moved[0], **change
            )


def test_wrong_spans_in_a_compiled_program_and_under_vmap() -> None:
    ids, spans, sentinels = torch.arange(5)[None], torch.tensor([[[1, 2], [3, 5]]]), torch.tensor([8, 9])

    def move(spans: torch.Tensor) -> torch.Tensor:
        return maskops.move_spans(ids, spans, sentinels).ids

    for call, error in (
        (torch.compile(move, fullgraph=True, backend="aot_eager"), RuntimeError),
        (torch.vmap(move), ValueError),
    ):
        good = spans[None].repeat(2, 1, 1, 1) if error is ValueError else spans
        assert torch.equal(call(good).view(-1, 9)[:1], move(spans))
        with pytest.raises(error, match="move_spans: spans must ascend without overlap"):
            call(good + 1)


def test_moves_of_odd_sizes() -> None:
    for B, N in ((0, 5), (2, 0)):
        spans, sentinels = torch.full((B, 3, 2), -1), torch.arange(3) + 50
        moved = maskops.move_spans(torch.zeros(B, N, dtype=torch.int64), spans, sentinels)
        back, lengths = maskops.restore_spans(moved.ids, sentinels, lengths=moved.lengths)
        assert moved.ids.shape == (B, N + 6) and (lengths == N).all() and back.shape == (B, N + 6)
    ids, lengths = maskops.restore_spans(torch.tensor([[7, 90, 8, 9]]), torch.tensor([90]))
    assert ids[0, : lengths[0]].tolist() == [7, 90, 8, 9], "a sentinel that stands once is a token"
