"""What is special to mask_sampling: the law itself, the stream of random words, options, DataLoader workers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

import maskops
from maskops.reference.mask_sampling import philox_words


def test_philox_known_answer() -> None:
    """Random123's test vector for an all-zero counter and key."""
    expected = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_words(torch.tensor([0, 0]), 4).tolist() == expected


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 2**70 + 3])
def test_native_draws_the_reference_words(seed: int) -> None:
    for order in ("random", "ascending"):
        native, plain = (
            maskops.random_masking(7, 53, 0.7, seed=seed, order=order, backend=b) for b in ("native", "reference")
        )
        assert all(torch.equal(a, b) for a, b in zip(native[:6], plain[:6], strict=True))


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(0, 6),
    tokens=st.integers(0, 200),
    ratio=st.floats(0, 1),
    rounding=st.sampled_from(["floor", "round"]),
)
def test_split_is_a_partition(batch: int, tokens: int, ratio: float, rounding: str) -> None:
    split = maskops.random_masking(batch, tokens, ratio, rounding=rounding, seed=batch * 1000 + tokens)
    keep = math.floor(tokens * (1 - ratio)) if rounding == "floor" else round(tokens * (1 - ratio))
    assert split.ids_keep.shape == (batch, keep) and split.ids_mask.shape == (batch, tokens - keep)
    everything = torch.cat([split.ids_keep, split.ids_mask], 1)
    assert torch.equal(everything.sort(1).values, torch.arange(tokens).expand(batch, tokens))
    assert torch.equal(everything.gather(1, split.ids_restore), torch.arange(tokens).expand(batch, tokens))


def chi_square(counts: torch.Tensor, expected: float) -> float:
    return float((counts - expected).square().sum() / expected)


def test_every_token_and_every_subset_is_equally_likely() -> None:
    draws = 60_000
    split = maskops.random_masking(draws, 5, num_keep=2, seed=11)
    subsets = (1 << split.ids_keep).sum(1)
    values, counts = subsets.unique(return_counts=True)
    # 10 subsets, 9 degrees of freedom: 27.9 is the 0.1% point.
    assert len(values) == 10 and chi_square(counts.double(), draws / 10) < 27.9
    first = split.ids_keep[:, 0].bincount(minlength=5).double()  # the order is uniform too; 4 degrees: 18.5
    assert chi_square(first, draws / 5) < 18.5


def test_rows_and_seeds_are_independent() -> None:
    masks = maskops.random_masking(4000, 16, 0.5, seed=5).mask.double() - 0.5
    other = maskops.random_masking(4000, 16, 0.5, seed=6).mask.double() - 0.5
    for a, b in ((masks[:-1], masks[1:]), (masks, other)):
        correlation = (a * b).mean() / 0.25
        assert abs(correlation) < 4 / math.sqrt(a.numel())


def test_lengths_leave_padding_alone() -> None:
    lengths = torch.tensor([10, 0, 7, 4])
    split = maskops.random_masking(4, 10, 0.75, lengths=lengths, rounding="round", seed=0, order="ascending")
    assert split.num_keep.tolist() == [round(n * 0.25) for n in lengths.tolist()]
    assert torch.equal(split.num_keep + split.num_mask, lengths)
    for b, n in enumerate(lengths.tolist()):
        ids = torch.cat([split.ids_keep[b], split.ids_mask[b]])
        assert ids[ids >= 0].sort().values.tolist() == list(range(n))
        assert split.ids_restore[b, n:].tolist() == list(range(n, 10))


def test_counts_per_row() -> None:
    split = maskops.random_masking(3, 8, num_keep=torch.tensor([0, 8, 3]), seed=0)
    assert (split.ids_keep >= 0).sum(1).tolist() == [0, 8, 3] and split.total == 11
    bounded = maskops.random_masking(3, 8, num_keep=torch.tensor([0, 8, 3]), seed=0, max_seqlen=8)
    assert bounded.total is None and torch.equal(bounded.ids_restore, split.ids_restore)


def test_generator_and_global_seed() -> None:
    draw = lambda **kw: maskops.random_masking(2, 64, 0.5, **kw).ids_keep  # noqa: E731
    g = torch.Generator().manual_seed(3)
    first, second = draw(generator=g), draw(generator=g)
    assert not torch.equal(first, second) and torch.equal(first, draw(generator=torch.Generator().manual_seed(3)))
    torch.manual_seed(9)
    one = draw()
    torch.manual_seed(9)
    assert torch.equal(one, draw())
    assert torch.equal(draw(seed=4), draw(seed=torch.tensor(4))) and not torch.equal(
        draw(seed=4), draw(seed=torch.tensor([4, 1]))
    )


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({}, "mask_ratio or num_keep must be given"), ({"mask_ratio": 1.5}, r"mask_ratio must be in \[0, 1\], got 1.5"),
        ({"num_keep": 9}, r"num_keep must be in \[0, 8\], got 9"), ({"mask_ratio": 0.5, "order": "up"}, "order must be"),
        ({"mask_ratio": 0.5, "rounding": "up"}, "rounding must be"), ({"mask_ratio": 0.5, "noise": torch.ones(2, 7)}, "noise must"),
        ({"mask_ratio": 0.5, "seed": torch.ones(3)}, "seed must be int"), ({"mask_ratio": math.nan}, "mask_ratio must be"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        maskops.random_masking(2, 8, **arguments)


class Masks(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        # More rows than one thread takes, so that the worker's own thread pool starts after the fork.
        return maskops.random_masking(64, 196, 0.75, seed=index).ids_keep


def test_forked_workers_draw_the_same_masks() -> None:
    """The parent has used its thread pool; a forked worker must neither hang nor draw other masks."""
    here = [Masks()[i] for i in range(8)]
    there = [batch[0] for batch in DataLoader(Masks(), num_workers=2, multiprocessing_context="fork", timeout=60)]
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_no_cells_take_no_memory() -> None:
    counts = torch.zeros(2, dtype=torch.int64)
    for backend in ("maskops", "maskops_reference"):
        op = getattr(torch.ops, backend).mask_sampling_uniform
        out = op(torch.tensor([1, 2]), counts, None, None, 0, 0, 0, True, 1, 2**29, 1)
        assert [tuple(x.shape) for x in out[:3]] == [(2, 0)] * 3 and out[3].tolist() == [0, 0]
