"""ReCAP over MaskGIT on digits (the Works check): local steps are exact until a token changes, then better than old features.

| claim | measured | broken on purpose | then |
|---|---|---|---|
| local logits = full logits before any token of U changes, 1e-5 | 2.9e-6 | old features of U not excluded | 1.6 |
| KL(local, full) < half of KL(old, full) once half of U is decoded | 0.00007 / 0.00102 | old features of U not excluded | 0.00251 |
| the same | | local tokens not updated | 0.00102 |
| Frechet distance of 8 + 8 steps at most 1.1 of 16 full ones' | 0.1088 / 0.1103 | local logits go to the next slot | 0.786 |
| and below 0.95 of 8 full ones' | 0.1088 / 0.1225 | old logits in place of local ones | 1.02 (2 seeds) |

The distances are of 1000 images each, mean of 3 seeds, of a model without classes: then more of an image hangs on what is decoded
already. With classes the published order shows as well, at smaller distances: 0.0463, 0.0480, 0.0498 (16, 8 + 8, 8) and 0.0498,
0.0524, 0.0594 (8, 4 + 4, 4) with three layers after 1500 steps, mean of 3 seeds, one thread.
"""

import time

import pytest
import torch
from torch import Tensor

import maskops
from maskops.generation import BlockCache, FullOnly, MaskedGenerator, ReCAP, _Run, token_evaluations
from maskops.models.maskgit import MaskGIT, MaskGITConfig, PatchCodebook
from maskops.models.recap import SETTINGS, recap, saving
from maskops.testing.generation import HELD_OUT, FrechetDistance, trained_digits


def held_out() -> tuple[Tensor, Tensor, Tensor]:
    """tokens of 200 images, their classes, and which 30% of them are known."""
    _, tokens, classes, _ = trained_digits()
    known = torch.rand(HELD_OUT, 64, generator=torch.Generator().manual_seed(1)) < 0.3
    return tokens[-HELD_OUT:], classes[-HELD_OUT:], known


def run_of(tokens: Tensor, classes: Tensor | None, model: MaskGIT) -> _Run:
    return _Run(MaskedGenerator(model, [64]), tokens, classes, 0, 0)


def unknown_of(known: Tensor, count: int) -> Tensor:
    """int64 [B, count]: some unknown tokens of each row."""
    return (
        torch.rand(known.shape, generator=torch.Generator().manual_seed(2)).masked_fill(known, 2).argsort(1)[:, :count]
    )


def test_a_local_step_is_exact_until_a_token_changes() -> None:
    model = trained_digits()[0]
    tokens, classes, known = held_out()
    run = run_of(torch.where(known, tokens, -1), classes, model)
    with torch.no_grad():
        full, ids = run.forward(None, store=True), unknown_of(known, 12)
        local = run.forward(ids)
        everything = torch.arange(64).expand(HELD_OUT, -1).contiguous()
        assert (local - full.gather(1, ids[..., None].expand(-1, -1, 8))).abs().max() < 1e-5
        assert (run.forward(everything) - full).abs().max() < 1e-5


def divergence(logits: Tensor, full: Tensor) -> float:
    """Mean KL(logits, full)."""
    p, q = logits.log_softmax(-1), full.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_local_logits_are_nearer_to_full_ones_than_old_logits() -> None:
    model = trained_digits()[0]
    tokens, classes, known = held_out()
    run = run_of(torch.where(known, tokens, -1), classes, model)
    ids = unknown_of(known, 24)
    first, rest = ids[:, :12], ids[:, 12:, None].expand(-1, -1, 8)
    with torch.no_grad():
        old = run.forward(None, store=True).gather(1, rest)
        run.decode(first, tokens.gather(1, first))
        local = run.forward(ids)[:, 12:]
        full = run.forward(None).gather(1, rest)
    near, far = divergence(local, full), divergence(old, full)
    print(f"KL of local logits {near:.5f}, of old logits {far:.5f}")
    assert near < 0.5 * far


def distance(generator: MaskedGenerator, book: PatchCodebook, real: FrechetDistance) -> float:
    made = [generator.generate(1000, seed=seed).tokens for seed in range(3)]
    assert all(tokens.min() >= 0 for tokens in made)
    return sum(real(book.decode(tokens, (8, 8))) for tokens in made) / 3


def test_quality_lies_between_all_full_steps_and_half_of_them() -> None:
    model, tokens, _, book = trained_digits(steps=1000, classes=0, heads=4)
    real = FrechetDistance(book.decode(tokens, (8, 8)))
    # A random order: what the steps are worth, not what the most confident digit is.
    full, reused, half = (
        distance(
            MaskedGenerator(model, maskops.mask_schedule("linear", steps, 64), reuse, temperature=100.0), book, real
        )
        for steps, reuse in ((16, FullOnly()), (16, ReCAP(0, 1)), (8, FullOnly()))
    )
    print(f"Frechet distance: 16 full {full:.4f}, 8 + 8 {reused:.4f}, 8 full {half:.4f}")
    assert reused <= 1.1 * full and reused < 0.95 * half


@pytest.mark.parametrize("local_steps", [0, 3])
def test_without_local_steps_it_is_maskgit_bit_for_bit(local_steps: int) -> None:
    """Against a loop that calls nothing of maskops.generation; pre_full = all steps leaves no group for local steps."""
    model, labels = trained_digits()[0], torch.arange(6)
    counts = maskops.mask_schedule("cosine", 8, 64)
    tokens = torch.full((6, 64), -1)
    for t, count in enumerate(counts):
        with torch.no_grad():
            logits = model(tokens, labels)
        seed = torch.tensor([5, t])
        noise = 4.5 * (1 - (t + 1) / len(counts))
        found = maskops.confidence_select(logits, tokens >= 0, count, temperature=noise, seed=seed)
        tokens = tokens.scatter(1, found.ids, found.tokens.gather(1, found.ids))
    reuse = ReCAP(pre_full=8 if local_steps else 0, local_steps=local_steps)
    assert torch.equal(MaskedGenerator(model, counts, reuse).generate(6, labels, seed=5).tokens, tokens)
    assert torch.equal(MaskedGenerator(model, counts, FullOnly()).generate(6, labels, seed=5).tokens, tokens)


def test_token_evaluations_are_those_of_the_formula() -> None:
    """The five published settings, 257 positions: 0.72, 0.75, 0.79, 0.80, 0.56 of all full steps."""
    assert [round(saving(name, 256), 2) for name in SETTINGS] == [0.72, 0.75, 0.79, 0.80, 0.56]
    model = trained_digits()[0]
    for name, setting in SETTINGS.items():
        generator = recap(model, name)
        made = generator.generate(2, torch.tensor([1, 2]))
        own, full = token_evaluations(ReCAP(setting.pre_full, setting.local_steps), generator.counts, 1)
        assert made.positions == own and full == setting.steps * 65
        kinds = [step.kind for step in made.trace]
        assert f"{kinds.count('full')}+{kinds.count('local')}" == name
        assert f"{own} of {full} token evaluations" in generator.explain(made)


def test_a_local_step_is_faster_than_a_full_one() -> None:
    """An eighth of the tokens; the least of several, so that a busy machine does not decide."""
    model = MaskGIT(MaskGITConfig((16, 16), 64, dim=128, depth=2, heads=2)).eval()
    run = _Run(MaskedGenerator(model, [256]), torch.full((2, 256), -1), None, 0, 0)
    ids, times = torch.arange(32).expand(2, -1).contiguous(), {}
    with torch.no_grad():
        run.forward(None, store=True)
        for name, local in (("full", None), ("local", ids)) * 5:
            began = time.perf_counter()
            run.forward(local, store=True)
            times[name] = min(times.get(name, 9.0), time.perf_counter() - began)
    assert times["local"] < times["full"]


def test_guidance_caches_both_branches_and_rows_stand_alone() -> None:
    model, labels = trained_digits()[0], torch.tensor([3, 8, 1])
    counts = maskops.mask_schedule("cosine", 6, 64)
    generator = MaskedGenerator(model, counts, ReCAP(0, 1), guidance=1.5, temperature=2.0)
    made = generator.generate(3, labels, seed=9).tokens
    assert not torch.equal(
        made, MaskedGenerator(model, counts, ReCAP(0, 1), temperature=2.0).generate(3, labels, seed=9).tokens
    )
    for b in range(3):
        alone = generator.generate(1, labels[b : b + 1], seed=9, first_row=b).tokens
        assert torch.equal(alone[0], made[b])


@pytest.mark.parametrize(
    "reuse", [BlockCache(16), BlockCache(16, "prefix", steps=4), BlockCache(20, threshold=0.9)], ids=str
)
def test_blocks_are_decoded_from_left_to_right(reuse: BlockCache) -> None:
    model, tokens = trained_digits()[0], trained_digits()[1][:3].clone()
    given = tokens.clone()
    tokens[:, 10:] = -1
    made = MaskedGenerator(model, None, reuse, sample_temperature=0).generate(tokens=tokens)
    assert made.tokens.min() >= 0 and torch.equal(made.tokens[:, :10], given[:, :10])
    fulls = [step for step in made.trace if step.kind == "full"]
    assert len(fulls) == -(-64 // reuse.block_size) and all(step.positions == 65 for step in fulls)
    if reuse.threshold is not None:
        assert len(made.trace) < 54, "a threshold decodes several tokens a step"


def test_wrong_calls_are_refused() -> None:
    model = trained_digits()[0]
    with pytest.raises(ValueError, match="local_steps must be at least 0, got -1"):
        ReCAP(0, -1)
    with pytest.raises(ValueError, match="must decode the 64 masked tokens of row 0, got 10"):
        MaskedGenerator(model, [10]).generate(1)
    with pytest.raises(ValueError, match="schedule must be given, except with BlockCache"):
        MaskedGenerator(model, None)
    with pytest.raises(ValueError, match="batch or tokens must be given"):
        MaskedGenerator(model, [64]).generate()
    with pytest.raises(ValueError, match="setting must be one of"):
        recap(model, "9+9")
