"""The laws of mask_sampling against their definitions, and against figures that are published or measured of published code.

    figure                                                    expected            here
    MultiMAE: visible per modality, mean and deviation        32.7, 23            32.7, 23.2
    DMJD: overlap of two masks of 120 of 196                  44                  44
    I-JEPA at 14 x 14: share of a target and of the context   .17, .42            .17, .43
    colours, share of equal neighbours: red green blue purple .87 .66 .59 .58     .87 .66 .58 .60

CAE's neighbour share (.867) is in models/test_cae.py, with the law of its blocks; spans are in test_mask_sampling_sequences.py.
"""

import math
from functools import partial
from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import maskops
from maskops.reference.mask_sampling.draw import exponential56, gumbel2


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


# ---------------------------------------------------------------- numbers


def test_logarithms_are_right() -> None:
    words = maskops.random_words(20000, seed=1)
    words[:64] = 2 ** torch.arange(64).clamp(max=31)
    words[64:128] = 2**32 - words[:64]
    u = (words | 1).double() / 2**32
    exact = torch.where(u > 0.5, -torch.log1p(-(2**32 - (words | 1)).double() / 2**32), -u.log()) / math.log(2)
    assert ((exponential56(words).double() / 2**56 / exact - 1).abs() < 1e-7).all()
    assert ((gumbel2(words).double() / 2**26 + exact.log2()).abs() < 2e-7).all()


def test_words_are_those_of_random_masking() -> None:
    """random_masking keeps the tokens with the smallest words."""
    words = maskops.random_words((3, 50), seed=7)
    kept = maskops.random_masking(3, 50, num_keep=9, seed=7).ids_keep
    assert torch.equal(kept, words.argsort(1)[:, :9])


def test_weighted_order_is_that_of_draws_without_replacement() -> None:
    weight, draws = torch.tensor([1.0, 2.0, 0.5, 4.0]), 40000
    split = maskops.weighted_masking(weight.expand(draws, 4).contiguous(), num_keep=2, seed=3)
    found = torch.stack([((split.ids_keep == torch.tensor(pair)).all(1)).sum() for pair in permutations(range(4), 2)])
    p = weight / weight.sum()
    want = torch.stack([p[a] * p[b] / (1 - p[a]) for a, b in permutations(range(4), 2)])
    assert chi_square(found, draws * want) < 31.3  # 11 degrees of freedom, 0.1%


def test_weight_zero_comes_last_in_any_order() -> None:
    weight = torch.tensor([0.0, 3.0, 0.0, 1e-30, 0.0]).expand(3000, 5).contiguous()
    split = maskops.weighted_masking(weight, num_keep=3, seed=0)
    assert (split.ids_keep[:, :2].sort(1).values == torch.tensor([1, 3])).all()
    third = split.ids_keep[:, 2].bincount(minlength=5)[[0, 2, 4]]
    assert chi_square(third, torch.full((3,), 1000.0)) < 13.8


@pytest.mark.parametrize("noise", ["logistic", "gumbel"])
def test_gates_open_by_their_law(noise: str) -> None:
    logits = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0, 5.0], requires_grad=True)
    gates = maskops.sample_gates(logits.expand(50000, 6), noise=noise, seed=2)
    p = logits.sigmoid() if noise == "logistic" else 1 - (-logits.exp()).exp()
    assert ((gates.mean(0) - p).abs() <= 4 * (p * (1 - p) / 50000).sqrt()).all() and set(gates.unique().tolist()) == {
        0.0,
        1.0,
    }
    slope = torch.autograd.grad(gates.mean(0).sum(), logits)[0]
    assert torch.allclose(slope, torch.autograd.grad(p.sum(), logits)[0], rtol=1e-4)


def test_gates_keep_shape_and_dtype() -> None:
    gates = maskops.sample_gates(torch.zeros(2, 3, 4, dtype=torch.bfloat16), seed=0)
    assert gates.shape == (2, 3, 4) and gates.dtype == torch.bfloat16
    assert maskops.sample_gates(torch.tensor([math.nan, math.inf, -math.inf]), seed=0).tolist() == [0.0, 1.0, 0.0]


def test_gates_under_vmap_have_the_gradient_of_a_loop() -> None:
    """What vmap wraps says of itself that it requires no gradient."""
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    together = torch.vmap(lambda row: maskops.sample_gates(row, seed=0) * row)(logits).sum()
    apart = torch.stack([maskops.sample_gates(row, seed=0) * row for row in logits]).sum()
    assert torch.equal(torch.autograd.grad(together, logits)[0], torch.autograd.grad(apart, logits)[0])


@pytest.mark.parametrize("noise", ["logistic", "gumbel"])
def test_second_derivative_of_gates_is_finite(noise: str) -> None:
    logits = torch.tensor([100.0, -100.0, math.inf, -math.inf, math.nan, 1.0], requires_grad=True)
    first = torch.autograd.grad(maskops.sample_gates(logits, noise=noise, seed=0).sum(), logits, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), logits)[0]
    assert first.isfinite().all() and second.isfinite().all() and second[5] != 0


# ---------------------------------------------------------------- token by token


def test_bernoulli_rates() -> None:
    p = torch.tensor([[0.0], [0.15], [0.5], [1.0], [math.nan]])
    rates = maskops.bernoulli_masking(5, 100000, p, seed=0).double().mean(1)
    assert rates[[0, 3, 4]].tolist() == [0, 1, 0]
    assert abs(rates[1] - 0.15) < 0.005 and abs(rates[2] - 0.5) < 0.007


def test_corruption_is_80_10_10() -> None:
    ids, mask = torch.full((400, 500), 3), maskops.bernoulli_masking(400, 500, 0.5, seed=1)
    out = maskops.corrupt_tokens(ids, mask, 103, (10, 30), seed=2)
    assert torch.equal(out[~mask], ids[~mask])
    n, masked = int(mask.sum()), out[mask]
    assert abs((masked == 103).sum() / n - 0.8) < 0.005 and abs((masked == 3).sum() / n - 0.1) < 0.004
    others = masked[(masked != 103) & (masked != 3)].bincount(minlength=30)
    assert others[:10].sum() == 0 and chi_square(others[10:], others.sum() / 20 * torch.ones(20)) < 43.8


def test_prefixes_are_uniform() -> None:
    mask = maskops.prefix_masking(40000, 12, low=2, high=9, seed=0)
    assert not (mask[:, :-1] & ~mask[:, 1:]).any()
    lengths = (~mask).sum(1).bincount(minlength=13)
    assert lengths.sum() == lengths[2:10].sum() and chi_square(lengths[2:10], torch.full((8,), 5000.0)) < 24.3


def test_frequencies() -> None:
    mask = maskops.frequency_masking(4000, (28, 28), 4.0, low_share=0.3, seed=0)
    y, x = torch.meshgrid(torch.arange(28) - 14, torch.arange(28) - 14, indexing="ij")
    low = y**2 + x**2 < 16
    keeps_low = ~mask[:, 14, 14]
    assert torch.equal(mask, torch.where(keeps_low[:, None, None], ~low, low))
    assert abs(keeps_low.double().mean() - 0.3) < 0.03


# ---------------------------------------------------------------- scores and views


def test_guided_masks_take_the_hardest_and_fill_at_random() -> None:
    score = torch.rand(2000, 16, generator=torch.Generator().manual_seed(0))
    score[0, 3] = math.nan
    for hard in (0, 5, 12):
        split = maskops.guided_masking(score, 0.75, num_hard=hard, seed=1)
        assert split.ids_keep.shape == (2000, 4)
        top = score.nan_to_num(-1).argsort(1, descending=True)[:, :hard]
        assert split.mask.gather(1, top).all()
    split = maskops.guided_masking(torch.arange(8.0).expand(20000, 8), num_keep=2, num_hard=3, seed=1)
    kept = split.ids_keep.flatten().bincount(minlength=8)
    assert chi_square(kept[:5], torch.full((5,), 8000.0)) < 18.5 and kept[5:].sum() == 0


def agreement(mask: Tensor) -> float:
    """Share of neighbouring patches that are both masked or both visible.  bool [B, h, w]."""
    down, across = mask[:, 1:] == mask[:, :-1], mask[:, :, 1:] == mask[:, :, :-1]
    return float((down.double().mean() + across.double().mean()) / 2)


def test_colours_clump_in_order() -> None:
    found = {}
    for colour in ("red", "green", "blue", "purple"):
        split = maskops.colour_masking(600, (14, 14), 0.75, colour=colour, seed=0)
        assert split.ids_keep.shape == (600, 49)
        found[colour] = agreement(split.mask.view(-1, 14, 14))
        rate = split.mask.double().mean(0)
        assert (rate - 0.75).abs().max() < 0.09, "every place is as likely"
    white = agreement(maskops.random_masking(600, 196, 0.75, seed=0).mask.view(-1, 14, 14))
    assert abs(white - 0.623) < 0.005
    assert abs(found["red"] - 0.87) < 0.02 and abs(found["green"] - 0.66) < 0.02
    assert found["red"] > found["green"] > white > max(found["blue"], found["purple"]), found


def test_views() -> None:
    first, second = maskops.disjoint_masking(5000, 196, (49, 49), seed=0)
    assert not (~first.mask & ~second.mask).any() and first.ids_keep.shape == second.ids_keep.shape == (5000, 49)
    rate = (~second.mask).double().mean(0)
    assert (rate - 0.25).abs().max() < 0.03
    small, large = maskops.nested_masking(100, 30, (5, 20), seed=0)
    assert not (~small.mask & large.mask).any() and (large.num_keep == 20).all()


def test_disjoint_cells_of_dmjd() -> None:
    views = maskops.disjoint_masking(200, 49, (19, 19), seed=0)
    grids = [v.mask.view(-1, 7, 1, 7, 1).expand(-1, 7, 2, 7, 2).reshape(-1, 196) for v in views]
    assert all((g.sum(1) == 120).all() for g in grids)
    assert (grids[0] | grids[1]).all() and ((grids[0] & grids[1]).sum(1) == 44).all()


def test_modalities_share_98() -> None:
    split = maskops.modality_masking(20000, (196, 196, 196), 98, seed=0)
    visible = (~split.mask).view(-1, 3, 196).sum(2).double()
    assert (visible.sum(1) == 98).all()
    assert (visible.mean(0) - 98 / 3).abs().max() < 0.6 and (visible.std(0) - 23.2).abs().max() < 0.4
    some = maskops.modality_masking(3000, (8, 200, 2), 40, alpha=(1, 5, 2), seed=1)
    assert (some.num_keep == 40).all() and some.mask.shape == (3000, 210)
    concentrated = maskops.modality_masking(3000, (100, 100), 60, alpha=(30, 10), seed=2).mask.view(-1, 2, 100)
    assert abs((~concentrated[:, 0]).sum(1).double().mean() - 45) < 0.6


# ---------------------------------------------------------------- grids


def test_cells_of_simmim_and_tubes() -> None:
    split = maskops.cell_masking(1000, (48, 48), 8, 0.6, seed=0)
    cells = split.mask.view(-1, 6, 8, 6, 8)
    assert torch.equal(cells.all((2, 4)), cells.any((2, 4))) and (cells.all((2, 4)).sum((1, 2)) == 22).all()
    tube = maskops.tube_masking(50, 8, 196, 0.9, seed=0)
    frames = tube.mask.view(50, 8, 196)
    assert (frames == frames[:, :1]).all() and (frames[:, 0].sum(1) == 177).all()


def test_blocks_of_beit_stop_early() -> None:
    split = maskops.block_masking(500, (14, 14), 75, smallest=16, exact=False, seed=0)
    assert (split.num_mask <= 75).all() and 66 < split.num_mask.double().mean() < 75


def test_multiblock_of_jepa() -> None:
    masks = maskops.multiblock_masking(3000, (14, 14), shared_sizes=False, seed=0)
    assert not (masks.targets & masks.context[:, None]).any()
    assert (masks.context.sum(1) > 10).all() and torch.equal(masks.split.mask, ~masks.context)
    target, context = masks.targets.double().mean(), masks.context.double().mean()
    assert abs(target - 0.17) < 0.01 and abs(context - 0.42) < 0.02, (target, context)
    shared = maskops.multiblock_masking(50, (14, 14), seed=0)
    assert len(shared.targets.sum(2).unique()) == 1


def test_sectors_vanish_together() -> None:
    points = torch.randn(4, 2000, 3, generator=torch.Generator().manual_seed(0))
    groups = maskops.sector_groups(points, 36)
    assert torch.equal(
        groups, (torch.atan2(points[..., 1], points[..., 0]) % (2 * math.pi) / (2 * math.pi) * 36).long()
    )
    mask = maskops.group_masking(groups, 0.8, num_groups=36, unit="group", rounding="ceil", seed=0)
    for b in range(4):
        kept = groups[b][~mask[b]].unique()
        assert len(kept) == int(0.2 * 36) and not torch.isin(groups[b][mask[b]], kept).any()
    rings = maskops.sector_groups(points, 4, rings=3, max_radius=2.0, valid=points[..., 2] > 0)
    assert rings.min() == -1 and rings.max() == 11 and ((rings == -1) == (points[..., 2] <= 0)).all()


# ---------------------------------------------------------------- all laws

DRAWS = {
    "colour": lambda **kw: maskops.colour_masking(5, (7, 6), 0.7, **kw).ids_keep,
    "blocks": lambda **kw: maskops.block_masking(5, (7, 6), 20, **kw).ids_mask,
    "multiblock": lambda **kw: maskops.multiblock_masking(5, (7, 6), min_keep=3, **kw).context,
    "cells": lambda **kw: maskops.cell_masking(5, (8, 6), 2, 0.5, **kw).ids_keep,
    "tube": lambda **kw: maskops.tube_masking(5, 2, 9, 0.5, **kw).ids_keep,
    "spans": lambda **kw: maskops.span_masking(5, 60, 0.5, span=5, equalise=True, **kw),
    "disjoint": lambda **kw: maskops.disjoint_masking(5, 12, (3, 3), **kw)[1].ids_keep,
    "nested": lambda **kw: maskops.nested_masking(5, 12, (3, 5), **kw)[1].ids_keep,
    "modalities": lambda **kw: maskops.modality_masking(5, (9, 7), 6, **kw).ids_keep,
    "bernoulli": lambda **kw: maskops.bernoulli_masking(5, 30, 0.5, **kw),
    "prefix": lambda **kw: maskops.prefix_masking(5, 30, **kw),
    "frequency": lambda **kw: maskops.frequency_masking(30, (6, 6), 2.0, **kw),
    "weighted": lambda **kw: maskops.weighted_masking(torch.ones(5, 20), 0.5, **kw).ids_keep,
    "guided": lambda **kw: maskops.guided_masking(torch.ones(5, 20), 0.5, num_hard=2, **kw).ids_keep,
    "groups": lambda **kw: maskops.group_masking(torch.arange(30)[None] // 3 - 1, 0.3, **kw),
    "intervals": lambda **kw: maskops.draw_spans(torch.full((5,), 99), **kw),
    "corruption": lambda **kw: maskops.corrupt_tokens(torch.ones(5, 30).long(), torch.ones(5, 30) > 0, 9, 9, **kw),
    "gates": lambda **kw: maskops.sample_gates(torch.zeros(5, 30), **kw),
}  # fmt: skip


@pytest.mark.parametrize("law", DRAWS)
def test_same_seed_same_mask(law: str) -> None:
    """On every backend; and another seed, generator state or global state gives another one."""
    draw = DRAWS[law]
    native = draw(seed=5)
    assert torch.equal(native, draw(seed=5)) and torch.equal(native, draw(seed=torch.tensor(5)))
    assert torch.equal(native, draw(seed=5, backend="reference")) and torch.equal(
        native, draw(seed=5, backend="triton")
    )
    other = draw(seed=6)
    assert other.shape != native.shape or not torch.equal(native, other)
    generator = torch.Generator().manual_seed(1)
    first, second = draw(generator=generator), draw(generator=generator)
    assert first.shape != second.shape or not torch.equal(first, second)
    again = draw(generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, again)


def test_collator_in_workers() -> None:
    collate = maskops.MaskCollator(maskops.block_masking, grid=(6, 6), num_mask=12)
    runs = []
    for _ in range(2):
        g = torch.Generator().manual_seed(3)
        loader = DataLoader(torch.randn(8, 3), batch_size=4, num_workers=2, collate_fn=collate, generator=g, timeout=60)
        runs.append([split.ids_mask for _, split in loader])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)) and not torch.equal(*runs[0])


IDS = torch.zeros(1, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: maskops.weighted_masking(torch.ones(2, 3)), ValueError, "mask_ratio or num_keep must be given"),
        (lambda: maskops.weighted_masking(torch.ones(3), 0.5), ValueError, r"weight must be a float tensor \[B, N\]"),
        (lambda: maskops.guided_masking(torch.ones(2, 8), 0.5, num_hard=5), ValueError, r"num_hard must be in \[0, 4\], got 5"),
        (lambda: maskops.colour_masking(1, (4, 4), 0.5, colour="pink"), ValueError, "colour must be one of"),
        (lambda: maskops.colour_masking(1, (4, 4), 0.5, sigma=(2, 1)), ValueError, "sigma must be 2 ascending numbers"),
        (lambda: maskops.colour_masking(1, 4, 0.5), TypeError, "grid must be two int"),
        (lambda: maskops.block_masking(1, (65, 2), 3), ValueError, r"h must be in \[0, 64\], got 65"),
        (lambda: maskops.block_masking(1, (4, 4), 3, exact=1), TypeError, "exact must be bool"),
        (lambda: maskops.multiblock_masking(1, (8, 8), target_scale=(0.5, 0.2)), ValueError, "target_scale must be two asc"),
        (lambda: maskops.cell_masking(1, (6, 6), 4, 0.5), ValueError, "cell must divide the grid 6 x 6"),
        (lambda: maskops.span_masking(1, 8), ValueError, "mask_prob or num_spans must be given"),
        (lambda: maskops.span_masking(1, 8, 0.5, lengths=torch.tensor([9])), ValueError, r"lengths\[0\] must be in"),
        (lambda: maskops.group_masking(torch.tensor([[0, 5]]), 0.5), ValueError, r"groups\[0, 1\] must be in \[-1, 2\)"),
        (lambda: maskops.group_masking(torch.zeros(1, 2).long(), (0.5, 0.2)), ValueError, "mask_ratio must ascend"),
        (lambda: maskops.disjoint_masking(1, 8, (5, 4)), ValueError, "sum of num_keep must be at most 8, got 9"),
        (lambda: maskops.modality_masking(1, (4, 4), 9), ValueError, r"num_keep must be in \[0, 8\], got 9"),
        (lambda: maskops.modality_masking(1, (4, 4), 2, alpha=0.5), TypeError, r"alpha\[0\] must be int"),
        (lambda: maskops.bernoulli_masking(1, 4, 1.5), ValueError, r"p must be in \[0, 1\], got 1.5"),
        (lambda: maskops.prefix_masking(1, 4, low=3, high=2), ValueError, r"low must be in \[0, 2\], got 3"),
        (lambda: maskops.frequency_masking(1, (4, 4), math.nan), ValueError, "radius must be at least 0"),
        (lambda: maskops.corrupt_tokens(torch.zeros(1, 2).long(), torch.ones(1, 2) > 0, 1, 2, hide=0.95), ValueError, "at most 1"),
        (lambda: maskops.sample_gates(torch.zeros(2), noise="x"), ValueError, "noise must be one of"),
        (lambda: maskops.draw_spans(torch.tensor([3]), max_spans=65), ValueError, r"max_spans must be in \[1, 64\]"),
        (lambda: maskops.move_spans(*(torch.zeros(1, 2, 3).long(),) * 3), ValueError, r"ids must have shape \[B, N\]"),
        (lambda: maskops.sector_groups(torch.ones(2, 3), 4), ValueError, "points must be a float tensor"),
        (lambda: maskops.random_words(-1), ValueError, "size must be in"),
        (lambda: maskops.random_words((2**30, 2**30)), ValueError, r"size must be of at most 2\^40 numbers"),
        (lambda: maskops.block_masking(1, (4, 4), 3, largest=0), ValueError, r"largest must be in \[1, 4096\], got 0"),
        (lambda: maskops.colour_masking(1, (4, 4), 0.5, colour="red", sigma=1e-9), ValueError, r"sigma must be 1 .* \[0.001, 10\]"),
        (lambda: maskops.multiblock_masking(1, (8, 8), target_scale=(0, 0.2)), ValueError, "target_scale must be two asc"),
        (lambda: maskops.cell_masking(1, (6, 6), (2, 2, 2), 0.5), TypeError, "cell must be two int"),
        (lambda: maskops.tube_masking(1, 2**20, 2**20, 0.5), ValueError, r"frames N must be below 2\^30"),
        (lambda: maskops.frequency_masking(1, 4, 1.0), TypeError, "size must be two int, got 4"),
        (lambda: maskops.frequency_masking(1, (4, 4), 2**2000), ValueError, "radius must fit in a float"),
        (lambda: maskops.modality_masking(1, 4, 2), TypeError, "sizes must be a sequence of int, got 4"),
        (lambda: maskops.bernoulli_masking(2, 4, torch.rand(3)), ValueError, r"p must have shape \[N\], .* got \[3\]"),
        (lambda: maskops.corrupt_tokens(IDS, None, 1, 2), TypeError, "mask must be a tensor, got NoneType"),
        (lambda: maskops.corrupt_tokens(IDS, IDS > 0, 1, (1, 2, 3)), TypeError, "vocabulary must be an int or two"),
        (lambda: maskops.corrupt_tokens(IDS, IDS > 0, 1, (2**63 - 1, -(2**63))), ValueError, "vocabulary must have 1 to"),
        (lambda: maskops.span_masking(2, 4, num_spans=torch.ones(3).long()), ValueError, r"num_spans must have shape \[B\]"),
        (lambda: maskops.group_masking(IDS, 0.5, weight=-torch.ones(1, 2)), ValueError, r"weight\[0, 0\] must be finite"),
        (lambda: maskops.group_masking(IDS.repeat(2, 1), 0.5, B=3), ValueError, r"groups must have shape \[1 or B, N\] = \[1 or 3"),
        (lambda: maskops.sector_groups(torch.ones(1, 3, 2), 4, valid=torch.ones(3) > 0), ValueError, "valid must have shape"),
        (lambda: maskops.sector_groups(torch.ones(1, 3, 2), 4, rings=2, max_radius=math.inf), ValueError, "max_radius must be fin"),
        (lambda: maskops.random_masking(1, 4, num_keep=IDS[0, :1], max_seqlen=-1), ValueError, "max_seqlen must be in"),
        (lambda: maskops.nested_masking(1, 4, (2,), seed=IDS[0].to_sparse()), ValueError, "nested_masking: seed must be a dense"),
        (lambda: maskops.MaskCollator(maskops.random_masking, 3), TypeError, "collate must be a function or None, got 3"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_numbers_that_once_were_too_large_or_too_few() -> None:
    assert maskops.frequency_masking(1, (4, 4), 1e300, low_share=1.0).sum() == 0
    assert maskops.modality_masking(0, (4, 4), 2).ids_keep.shape == (0, 2)
    assert maskops.modality_masking(2, (5,), 3).ids_keep.shape == (2, 3)
    weight = torch.tensor([[0.0, 1.0]])
    for dtype in (torch.float64, torch.bfloat16):
        same = [
            maskops.group_masking(IDS.new_tensor([[0, 1]]), 0.5, weight=w, seed=0) for w in (weight, weight.to(dtype))
        ]
        assert torch.equal(*same)
        noise = torch.tensor([[0.5, 0.25, 1.0]], dtype=dtype)
        assert maskops.random_masking(1, 3, num_keep=1, noise=noise).ids_keep.tolist() == [[1]]
    # A circle of 5000 sectors in float16 would fill every other one.
    at = torch.linspace(0.1, 0.2, 500)
    points = torch.stack([at.cos(), at.sin()], 1)[None].half()
    assert torch.equal(maskops.sector_groups(points, 5000), maskops.sector_groups(points.float(), 5000))
    assert repr(maskops.MaskCollator(partial(maskops.random_masking, N=4))).startswith("MaskCollator(functools.partial")
