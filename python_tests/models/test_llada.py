"""LLaDA on bytes, decoded in blocks with a cache: exact while it is fresh, cheaper by the formula, as good by another model's word.

A model of two layers learns pydoc's topics for seconds; texts are 48 bytes, prompts 16 held-out ones, blocks 16.

| claim | measured, one thread | broken on purpose | then |
|---|---|---|---|
| local step on a cache refreshed each step = full recomputation, 1e-5; same tokens | 3.3e-6 | old features not excluded | 1.2 |
| refresh=1 is decoding without a cache, bit for bit | exact | | |
| token evaluations are those of the formula | exact | | |
| held-out NLL by local steps, half a block revealed: within 0.01 of full | 3.143 / 3.143, old logits 3.302 | next slot | 3.235 |
| the same | | cache not seen / places from 0 | 3.159 / 3.267 |
| samples: another model's NLL within 0.15 of full recomputation's | full 1.216, dual 1.241, prefix 1.251 | cache not seen | 0.988 |
| the same | | next slot / places from 0 | 1.994 / 2.464 |

A small model that decodes what is surest repeats itself, so its samples are likelier than real text (2.71): the check is that the
cache changes nothing in this. The threshold's samples are likelier still (it trades tokens a step for that), and are not compared.
"""

import functools
from pydoc_data.topics import topics

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import maskops
from maskops.generation import BlockCache, Generation, MaskedGenerator, _Run
from maskops.models import byte_lm
from maskops.models.byte_lm import ByteLM, ByteLMConfig, Text
from maskops.models.llada import LLaDA, LLaDAConfig, block_generator
from maskops.testing.works import train

N, PROMPT, BLOCK = 48, 16, 16


@functools.cache
def text() -> Text:
    return Text("\n".join(topics[name] for name in sorted(topics)).encode(), N - 1)


@functools.cache
@torch.enable_grad()
def trained() -> LLaDA:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, batches = LLaDA(LLaDAConfig(N, 256, 64, 2, 2)), text().batches(24)
        train(model.parameters(), lambda step: model.loss(next(batches), seed=step), 200, 6e-3)
    return model.eval()


@functools.cache
@torch.enable_grad()
def judge() -> ByteLM:
    """A model of its own, which reads from left to right."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = ByteLM(ByteLMConfig(N, 64, 1, 2, 256))
        byte_lm.train(model, text().batches(16, 1), 150, lr=6e-3)
    return model.eval()


@functools.cache
def held_out() -> Tensor:
    """int64 [200, N]."""
    return torch.cat(list(text().held_out_batches(50, 4)))


def prompts(rows: int) -> Tensor:
    tokens = held_out()[:rows].clone()
    tokens[:, PROMPT:] = -1
    return tokens


def complete(rows: int = 200, seed: int = 0, **options: object) -> Generation:
    return block_generator(trained(), BLOCK, **options).generate(tokens=prompts(rows), seed=seed)


# ---------------------------------------------------------------- a fresh cache is exact


def plain(tokens: Tensor, counts: list[int]) -> Tensor:
    """Blocks without a cache, by a loop that calls nothing of maskops.generation."""
    for start in range(PROMPT, N, BLOCK):
        for count in counts:
            with torch.no_grad():
                logits = trained()(tokens)[:, start : start + BLOCK]
            known = tokens[:, start : start + BLOCK] >= 0
            found = maskops.confidence_select(logits.contiguous(), known, count, sample_temperature=0)
            tokens = tokens.scatter(1, found.ids + start, found.tokens.gather(1, found.ids))
    return tokens


def test_a_full_step_each_time_is_decoding_without_a_cache_bit_for_bit() -> None:
    want = plain(prompts(20), [4] * 4)
    for mode in ("dual", "prefix"):
        made = complete(20, mode=mode, steps=4, refresh=1)
        assert torch.equal(made.tokens, want) and {step.kind for step in made.trace} == {"full"}


@pytest.mark.parametrize("mode", ["dual", "prefix"])
def test_local_steps_on_a_cache_refreshed_each_step_equal_full_recomputation(mode: str) -> None:
    """Every step of a block: fill the cache, forward the local tokens only, decode from their logits."""
    run, want = _Run(MaskedGenerator(trained(), [N]), prompts(20), None, 0, 0), plain(prompts(20), [4] * 4)
    worst, stale = 0.0, 0.0
    for start in range(PROMPT, N, BLOCK):
        ids = torch.arange(start, start + BLOCK if mode == "dual" else N).expand(20, -1).contiguous()
        for step in range(4):
            with torch.no_grad():
                old = run.forward(ids) if step else None
                full, local = run.forward(None, store=True), run.forward(ids)
            full = full[:, start : start + ids.shape[1]]
            worst = max(worst, float((local - full).abs().max()))
            stale = stale if old is None else max(stale, float((old - full).abs().max()))
            known = run.known[:, start : start + BLOCK]
            found = maskops.confidence_select(local[:, :BLOCK].contiguous(), known, 4, sample_temperature=0)
            run.decode(found.ids + start, found.tokens.gather(1, found.ids))
    print(f"{mode}: fresh {worst:.1e}, one step old {stale:.1e}")
    assert worst < 1e-5 and stale > 1e-3
    assert torch.equal(run.tokens, want)


# ---------------------------------------------------------------- reuse saves, and costs little


@pytest.mark.parametrize(
    "reuse",
    [
        BlockCache(16),
        BlockCache(16, "prefix"),
        BlockCache(16, steps=4, refresh=3),
        BlockCache(20, "prefix", steps=6, refresh=2),
    ],
    ids=str,
)
def test_token_evaluations_are_those_of_the_formula(reuse: BlockCache) -> None:
    for tokens, given in ((prompts(3), PROMPT), (torch.full((3, N), -1), 0)):
        generator = MaskedGenerator(trained(), None, reuse, sample_temperature=0)
        made = generator.generate(tokens=tokens)
        own, full = reuse.evaluations(N, given=given)
        assert made.positions == own and full == len(made.trace) * N and own < full
    assert f"{own} of {full} token evaluations" in generator.explain(made)


def test_published_savings() -> None:
    """256 new tokens behind a prompt of 256, blocks of 32, a token a step: the share of positions, by hand."""
    own, full = BlockCache(32).evaluations(512, given=256)
    assert (own, full) == (8 * (512 + 31 * 32), 256 * 512)
    own, full = BlockCache(32, "prefix").evaluations(512, given=256)
    assert (own, full) == (8 * 512 + 31 * sum(range(32, 257, 32)), 256 * 512)
    with pytest.raises(ValueError, match="threshold must be None"):
        BlockCache(32, threshold=0.9).evaluations(512)


def surprise(tokens: Tensor) -> float:
    """Nats per new byte, by the judge."""
    with torch.no_grad():
        losses = F.cross_entropy(judge()(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")
    return float(losses[:, PROMPT - 1 :].mean())


def test_samples_surprise_another_model_as_much_as_those_of_full_recomputation() -> None:
    def mean(**way: object) -> float:
        return sum(surprise(complete(100, seed, steps=8, temperature=1.0, **way).tokens) for seed in range(2)) / 2

    full, dual, prefix = mean(refresh=1), mean(), mean(mode="prefix")
    print(f"full {full:.3f}, dual {dual:.3f}, prefix {prefix:.3f}; held-out text {surprise(held_out()):.3f}")
    assert abs(dual - full) < 0.15 and abs(prefix - full) < 0.15


def test_masked_text_is_told_by_local_steps_nearly_as_well() -> None:
    """Half of a block is revealed after the full step: NLL of its other half by local, full, and the old logits."""
    tokens, order = held_out(), torch.rand(200, BLOCK, generator=torch.Generator().manual_seed(0)).argsort(1)
    given = tokens.clone()
    given[:, PROMPT:] = -1
    run = _Run(MaskedGenerator(trained(), [N]), given, None, 0, 0)
    first, rest = order[:, :8] + PROMPT, order[:, 8:]
    ids = torch.arange(PROMPT, PROMPT + BLOCK).expand(200, -1).contiguous()
    with torch.no_grad():
        old = run.forward(None, store=True)[:, PROMPT : PROMPT + BLOCK]
        run.decode(first, tokens.gather(1, first))
        local, full = run.forward(ids), run.forward(None)[:, PROMPT : PROMPT + BLOCK]
    target = tokens[:, PROMPT : PROMPT + BLOCK].gather(1, rest)
    at = rest[..., None].expand(-1, -1, 256)
    target = tokens[:, PROMPT : PROMPT + BLOCK].gather(1, rest)[..., None]
    old, local, full = (-float(x.log_softmax(-1).gather(1, at).gather(2, target).mean()) for x in (old, local, full))
    print(f"NLL by old logits {old:.3f}, local {local:.3f}, full {full:.3f}")
    assert local < full + 0.01 and local < old - 0.1


# ---------------------------------------------------------------- threshold, rows, training


@pytest.mark.parametrize("mode", ["dual", "prefix"])
def test_a_threshold_ends(mode: str) -> None:
    """0: a step per block; almost 1: a token a step; between: between, and less the lower it is."""
    steps = []
    for threshold in (0.0, 0.3, 0.9, 1 - 1e-7):
        made = complete(1, mode=mode, threshold=threshold)
        assert made.tokens.min() >= 0 and torch.equal(made.tokens[:, :PROMPT], prompts(1)[:, :PROMPT])
        steps.append(len(made.trace))
    print(f"{mode}: {steps} steps of {N - PROMPT} tokens")
    assert steps == sorted(steps) and steps[0] == 2 and steps[1] < 28 and steps[3] == N - PROMPT


def test_logits_that_are_not_finite_end_as_well() -> None:
    model = LLaDA(LLaDAConfig(8, 4, 8, 1, 1))
    model.head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits of tokens 0 to 3 must be finite"):
        block_generator(model, 4, threshold=0.5).generate(1)


@pytest.mark.parametrize(
    "options", [{"threshold": 0.5}, {"mode": "prefix", "threshold": 0.5, "refresh": 4}, {"steps": 4}], ids=str
)
def test_a_row_does_not_depend_on_its_batch(options: dict) -> None:
    """With a threshold rows need different numbers of steps; sampled, not greedy; prompts of different lengths."""
    generator = block_generator(trained(), BLOCK, temperature=1.0, **options)
    tokens = held_out()[:5].clone()
    for b, length in enumerate((5, 16, 0, 30, 20)):
        tokens[b, length:] = -1
    made = generator.generate(tokens=tokens, seed=3)
    for b in range(5):
        alone = generator.generate(tokens=tokens[b : b + 1], seed=3, first_row=b)
        assert torch.equal(alone.tokens[0], made.tokens[b])
        assert len(alone.trace) <= len(made.trace)


def test_loss_is_the_published_bound() -> None:
    """Against the sum written out; a prompt is never masked and does not count."""
    model, tokens = LLaDA(LLaDAConfig(32, 16, 32, 1, 2)), torch.randint(16, (64, 32))
    prompt = torch.arange(32).expand(64, -1) < torch.randint(1, 30, (64, 1))
    seen: list[Tensor] = []
    features = model.features
    model.features = lambda given, *rest: seen.append(given) or features(given, *rest)
    for hidden_never in (None, prompt):
        loss = model.loss(tokens, hidden_never, seed=7)
        masked = seen[-1] < 0
        rate = 0.999 * (maskops.random_words((64, 33), seed=7)[:, :1] / 2**32) + 0.001
        length = torch.full((64, 1), 32) if hidden_never is None else (~prompt).sum(1, keepdim=True)
        assert torch.equal(seen[-1][~masked], tokens[~masked])
        assert hidden_never is None or not (masked & prompt).any()
        nll = -model(seen[-1]).log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        torch.testing.assert_close(loss, (masked * nll / rate / length).sum(1).mean().float(), rtol=1e-4, atol=0)
        shares = masked.sum(1) / length[:, 0]
        assert shares.min() < 0.1 and shares.max() > 0.9, "rates from 0 to 1"


def test_errors() -> None:
    with pytest.raises(ValueError, match="refresh must be at least 1, got 0"):
        BlockCache(4, refresh=0)
    with pytest.raises(ValueError, match="twice heads must divide dim 6, got heads 2"):
        LLaDAConfig(dim=6, heads=2)
