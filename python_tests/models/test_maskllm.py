"""MaskLLM: masks learned for a frozen byte model keep more of its quality than one-shot masks (the Works check)."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import maskops
from maskops.models.byte_lm import ByteLM, ByteLMConfig, Text, perplexity, train
from maskops.models.maskllm import (
    MaskLLMConfig,
    harden_,
    kept_norm_share,
    learn_masks,
    set_schedule,
    soft_layers,
)
from maskops.nn import NMLinear, SoftNMLinear
from maskops.sparsify import add_prior_

sklearn = pytest.importorskip("sklearn")

SIZES = ByteLMConfig(context=64, dim=64, depth=3, heads=4, mlp_dim=256)
TRAIN_STEPS, LEARN_STEPS = 800, 100


class World(NamedTuple):
    """A trained byte model and its texts: a, the documentation of Python; b, descriptions of data sets."""

    model: ByteLM
    a: Text
    b: Text
    calibration: list[Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(one_thread: None) -> World:
    from pydoc_data.topics import topics

    pages = sorted((Path(sklearn.__file__).parent / "datasets" / "descr").glob("*.rst"))
    a = Text("\n".join(topics[key] for key in sorted(topics)).encode(), SIZES.context)
    b = Text.from_files(pages, SIZES.context)
    torch.manual_seed(0)
    model = ByteLM(SIZES)
    both = (torch.cat(pair) for pair in zip(a.batches(12, seed=1), b.batches(4, seed=2), strict=False))
    train(model, both, TRAIN_STEPS, lr=5e-3)
    calibration = [batch[:, :-1] for batch, _ in zip(a.batches(32, seed=3), range(4), strict=False)]
    return World(model.eval().requires_grad_(False), a, b, calibration)


def inner(name: str, layer: nn.Linear) -> bool:
    return name != "head"


def pruned(world: World, method: str, **options: object) -> ByteLM:
    model = copy.deepcopy(world.model)
    torch.manual_seed(4)
    maskops.sparsify_(model, 2, 4, method, inner, world.calibration, only_if_faster=False, **options)
    return model


def learn(model: ByteLM, text: Text, steps: int, **changes: object) -> ByteLM:
    config = MaskLLMConfig(steps=steps, **changes)
    learn_masks(model, text.batches(16, seed=5), lambda m, batch: m.loss(batch), config, seed=6)
    return model


@pytest.fixture(scope="module")
def learned(world: World) -> ByteLM:
    return learn(pruned(world, "learned", prior="wanda"), world.a, LEARN_STEPS)


@pytest.fixture(scope="module")
def wanda_perplexity(world: World) -> float:
    return perplexity(pruned(world, "wanda"), world.a.held_out_batches())


def sampled_mask(layer: SoftNMLinear, hard: bool, seed: int = 0) -> Tensor:
    """[N, K], what the layer multiplies its weight by in a training step."""
    K = layer.weight.shape[1]
    out = maskops.nm_soft_linear(
        torch.eye(K), torch.ones_like(layer.weight), layer.logits, 2, 4, tau=layer.tau, scale=layer.scale, hard=hard, seed=seed
    )  # fmt: skip
    return out.y.T.detach()


def share_of_prior(world: World, strength: float) -> float:
    """In the first step: the share of groups whose sampled pattern is that of the prior."""
    one_shot, model = pruned(world, "wanda"), pruned(world, "learned", prior="wanda", prior_strength=strength)
    set_schedule(model, MaskLLMConfig(), 0)
    same = []
    for name, layer in soft_layers(model).items():
        prior = one_shot.get_submodule(name).weight.to_dense() != 0
        same.append((sampled_mask(layer, hard=True) == prior).unflatten(1, (-1, 4)).all(-1).flatten())
    return torch.cat(same).float().mean().item()


# ---------------------------------------------------------------- the Works check


def test_every_group_keeps_exactly_two(learned: ByteLM) -> None:
    for layer in soft_layers(learned).values():
        assert (layer.mask().unflatten(1, (-1, 4)).sum(-1) == 2).all()
        for hard in (False, True):
            sums = sampled_mask(layer, hard).unflatten(1, (-1, 4)).sum(-1)
            torch.testing.assert_close(sums, torch.full_like(sums, 2), rtol=0, atol=1e-5)


def test_the_prior_shows_in_the_first_step(world: World) -> None:
    assert share_of_prior(world, 0.0) == pytest.approx(1 / 6, abs=0.01)
    assert share_of_prior(world, 3.0) == pytest.approx(0.73, abs=0.02)


def test_learned_beats_wanda_beats_magnitude(world: World, learned: ByteLM, wanda_perplexity: float) -> None:
    held_out = {"dense": world.model, "magnitude": pruned(world, "magnitude"), "sparsegpt": pruned(world, "sparsegpt")}
    found = {name: perplexity(model, world.a.held_out_batches()) for name, model in held_out.items()}
    found |= {"wanda": wanda_perplexity, "learned": perplexity(learned, world.a.held_out_batches())}
    start = pruned(world, "learned", prior="wanda")
    found["start of learned"] = perplexity(start, world.a.held_out_batches())
    print(found)
    assert found["learned"] < 0.97 * found["wanda"] < 0.97 * found["magnitude"]
    assert found["learned"] < 0.97 * found["start of learned"]
    assert found["sparsegpt"] < found["magnitude"]


@pytest.mark.parametrize("fault", ["no gradient reaches the logits", "the prior is the complement"])
def test_the_check_goes_red_when_broken(world: World, wanda_perplexity: float, fault: str) -> None:
    model = pruned(world, "learned", prior="wanda", prior_strength=-3.0 if "complement" in fault else 3.0)
    if "gradient" in fault:
        for layer in soft_layers(model).values():
            layer.logits.register_hook(torch.zeros_like)
    learn(model, world.a, 40)
    assert perplexity(model, world.a.held_out_batches()) > 0.97 * wanda_perplexity


def test_the_regulariser_keeps_the_norm_up(world: World) -> None:
    shares = {
        weight: kept_norm_share(learn(pruned(world, "learned", prior="wanda"), world.a, 25, norm_weight=weight))
        for weight in (0.0, 1e-2)
    }
    print(shares)
    assert shares[0.0] < shares[1e-2] - 0.005


def test_a_mask_tuned_to_another_domain_is_better_there(world: World, learned: ByteLM) -> None:
    general = perplexity(learned, world.b.held_out_batches())
    tuned = perplexity(learn(copy.deepcopy(learned), world.b, 40), world.b.held_out_batches())
    print({"general": general, "tuned": tuned})
    assert tuned < 0.99 * general


# ---------------------------------------------------------------- the parts


def test_hardened_layers_compute_the_same(world: World, learned: ByteLM) -> None:
    hard = harden_(copy.deepcopy(learned))
    assert sum(isinstance(layer, NMLinear) for layer in hard.modules()) == 4 * SIZES.depth and not soft_layers(hard)
    batch = world.calibration[0]
    torch.testing.assert_close(hard(batch), learned(batch), rtol=1e-4, atol=1e-5)


def test_same_seed_same_masks_and_nothing_else_moves(world: World) -> None:
    runs = [learn(pruned(world, "learned"), world.a, 3) for _ in range(2)]
    states = [run.state_dict() for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    before = world.model.state_dict()
    assert all(torch.equal(states[0][name], before[name]) for name in before)


@pytest.mark.parametrize(("n", "m", "per_pattern"), [(2, 4, True), (1, 4, True), (3, 5, True), (4, 8, False)])
def test_prior_prefers_the_patterns_that_overlap(n: int, m: int, per_pattern: bool) -> None:
    torch.manual_seed(0)
    layer = SoftNMLinear(4 * m, 6, n, m, per_pattern=per_pattern)
    before, std = layer.logits.detach().clone(), layer.logits.std().item()
    mask = maskops.nm_mask(torch.rand(6, 4 * m), n, m)
    add_prior_(layer, mask, 3.0)
    change = (layer.logits.detach() - before) / (3 * std)
    if not per_pattern:
        torch.testing.assert_close(change, mask.float() - n / m)
        return
    overlap = mask.float().unflatten(1, (-1, m)) @ maskops.nm_patterns(n, m).float().T
    torch.testing.assert_close(change, overlap - n * n / m)
    torch.testing.assert_close(change.mean(-1), torch.zeros(6, 4), rtol=0, atol=1e-5)
    if (n, m) == (2, 4):
        assert sorted(change[0, 0].round().tolist()) == [-1, 0, 0, 0, 0, 1]
    assert math.isclose(change.max().item(), n - n * n / m, rel_tol=1e-4)


def test_schedule_is_the_published_one() -> None:
    model = nn.Sequential(SoftNMLinear(8, 8, 2, 4))
    for step, tau, scale in ((0, 4.0, 100.0), (1000, 2.025, 300.0), (2000, 0.05, 500.0)):
        set_schedule(model, MaskLLMConfig(), step)
        assert (model[0].tau, model[0].scale) == (pytest.approx(tau), pytest.approx(scale))


def test_errors() -> None:
    with pytest.raises(ValueError, match="model must have SoftNMLinear layers, got none"):
        learn_masks(nn.Linear(4, 4), iter(()), lambda model, batch: batch, MaskLLMConfig())
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        MaskLLMConfig(steps=0)
    with pytest.raises(ValueError, match="data must have at least 650 bytes for a context of 64, got 3"):
        Text(b"abc", 64)
    with pytest.raises(ValueError, match="text must have at most 64 bytes a row, got 65"):
        ByteLM(SIZES)(torch.zeros(1, 65, dtype=torch.long))
