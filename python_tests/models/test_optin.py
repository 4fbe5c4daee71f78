"""OPTIN (the Works check): without retraining, what one batch says is worth more than chance and than the size of the weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskops.models.optin import Optin, PruneMask, Scores, ViT, gram_difference

datasets = pytest.importorskip("sklearn.datasets")

BUDGET = 0.6
MARGIN = 20  # points above chance; the claim is 10
SIZES = {0: dict(heads=4, mlp_dim=64), 1: dict(heads=8, mlp_dim=32)}  # seed -> sizes: many neurons, many heads


def trained_vit(seed: int) -> tuple[ViT, Tensor, Tensor, Tensor]:
    """A 4-layer ViT on digits, one batch of its training images, held-out images and their labels."""
    data = datasets.load_digits()
    x, y = torch.from_numpy(data.images / 16).float()[:, None], torch.from_numpy(data.target)
    torch.manual_seed(seed)
    order = torch.randperm(len(y))
    train, held_out = order[:1200], order[1200:]
    model = ViT(8, 2, 1, dim=32, depth=4, classes=10, **SIZES[seed])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=400)
    for _ in range(400):
        rows = train[torch.randint(len(train), (64,))]
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.requires_grad_(False), x[train[:64]], x[held_out], y[held_out]


class Pruning:
    """A trained model and its scores."""

    def __init__(self, seed: int) -> None:
        self.model, self.batch, self.x, self.y = trained_vit(seed)
        self.optin = Optin(self.model, self.batch)
        self.scores = self.optin.scores()

    def accuracy(self, scores: Scores) -> float:
        """In percent, of what is kept by these scores within the budget."""
        return self.accuracy_of(self.optin.masked(self.optin.search(scores, BUDGET)))

    @torch.no_grad()
    def accuracy_of(self, model: nn.Module) -> float:
        return 100 * (model(self.x).argmax(1) == self.y).float().mean().item()

    def random(self, seed: int) -> Scores:
        generator = torch.Generator().manual_seed(seed)
        return Scores(*(torch.rand(s.shape, generator=generator) for s in self.scores))

    def magnitude(self) -> Scores:
        """Product of the norms of what goes in and what goes out of a part."""
        heads, neurons = [], []
        for block in self.model.blocks:
            count = block.attn.heads
            into = block.attn.qkv.weight.norm(dim=1).view(3, count, -1).norm(dim=(0, 2))
            heads.append(into * block.attn.proj.weight.norm(dim=0).view(count, -1).norm(dim=1))
            neurons.append(block.mlp.fc1.weight.norm(dim=1) * block.mlp.fc2.weight.norm(dim=0))
        return Scores(torch.stack(heads), torch.stack(neurons))

    def works(self, scores: Scores) -> bool:
        ours = self.accuracy(scores)
        chance = sum(self.accuracy(self.random(seed)) for seed in range(10)) / 10
        return ours > chance + MARGIN and ours >= self.accuracy(self.magnitude())


@pytest.fixture(scope="module", params=SIZES)
def pruning(request: pytest.FixtureRequest) -> Pruning:
    return Pruning(request.param)


def test_beats_random_and_magnitude_without_retraining(pruning: Pruning) -> None:
    assert pruning.accuracy_of(pruning.model) > 90
    assert pruning.works(pruning.scores)


def upside_down(scores: Scores) -> Scores:
    """A planted fault: keeps what matters least."""
    return Scores(*(s.max() - s for s in scores))


def constant(scores: Scores) -> Scores:
    """A planted fault: no score differs from another, so that the first layers stay and the last ones go."""
    return Scores(*(torch.ones_like(s) for s in scores))


def backwards(scores: Scores) -> Scores:
    """A planted fault: every layer gets the scores of its counterpart from the end."""
    return Scores(*(s.flip(0) for s in scores))


@pytest.mark.parametrize("fault", [upside_down, constant, backwards])
def test_the_works_check_goes_red_when_broken(pruning: Pruning, fault: object) -> None:
    assert not pruning.works(fault(pruning.scores))


def test_reused_prefix_gives_the_same_scores(pruning: Pruning) -> None:
    full = Optin(pruning.model, pruning.batch, reuse_prefix=False)
    for ours, theirs in zip(pruning.scores, full.scores(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.max().item())
    assert pruning.optin.blocks_run / full.blocks_run == (4 + 1) / (2 * 4)  # layers l..L instead of all


def test_the_prefix_check_goes_red_when_the_cache_is_one_layer_late(pruning: Pruning) -> None:
    late = Optin(pruning.model, pruning.batch)
    late.states = [late.states[0], *late.states[:-1]]
    scores = late.scores()
    assert not torch.allclose(scores.neurons, pruning.scores.neurons, rtol=1e-3)


@pytest.mark.parametrize("budget", [0.0, 0.2, 0.6, 1.0])
def test_budget_holds_and_is_used(pruning: Pruning, budget: float) -> None:
    mask = pruning.optin.search(pruning.scores, budget)
    macs, whole = pruning.optin.macs(mask), pruning.optin.macs()
    per_neuron = 2 * 17 * 32
    assert macs <= budget * whole
    assert macs > budget * whole - per_neuron or mask.neurons.all()


def test_macs_are_those_of_the_matrices(pruning: Pruning) -> None:
    """Counted from the shapes of the compacted model, not from the formula."""
    mask = pruning.optin.search(pruning.scores, BUDGET)
    n, macs = 17, 0
    for block in pruning.optin.compact(mask).blocks:
        linears = [block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2]
        macs += sum(n * linear.weight.numel() for linear in linears) + 2 * n * n * block.attn.proj.weight.shape[1]
    assert macs == pruning.optin.macs(mask)


@pytest.mark.parametrize("which", ["found", "a layer without heads", "a layer without neurons", "nothing"])
def test_compacted_equals_masked(pruning: Pruning, which: str) -> None:
    mask = pruning.optin.search(pruning.scores, BUDGET)
    if which == "a layer without heads":
        mask.heads[1] = False
    elif which == "a layer without neurons":
        mask.neurons[2] = False
    elif which == "nothing":
        mask = PruneMask(*(torch.zeros_like(m) for m in mask))
    compact = pruning.optin.compact(mask)
    torch.testing.assert_close(compact(pruning.x), pruning.optin.masked(mask)(pruning.x), rtol=1e-5, atol=1e-5)
    assert compact.blocks[0].mlp.fc1.out_features == int(mask.neurons[0].sum())


def test_everything_kept_is_the_model(pruning: Pruning) -> None:
    mask = pruning.optin.search(pruning.scores, 1.0)
    assert mask.heads.all() and mask.neurons.all()
    torch.testing.assert_close(pruning.optin.masked(mask)(pruning.x), pruning.model(pruning.x), rtol=1e-5, atol=1e-5)


def test_gram_difference() -> None:
    s, t = torch.randn(3, 20, 6).double(), torch.randn(20, 6).double()
    grams = [F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).mT for x in (s, t)]
    torch.testing.assert_close(gram_difference(s, t), (grams[0] - grams[1]).square().sum((1, 2)))
    # A difference that subtracting large sums would lose in float32.
    near = (t + 1e-5 * s).float()
    want = gram_difference(near.double(), t.float().double())
    torch.testing.assert_close(gram_difference(near, t.float()).double(), want, rtol=0.02, atol=0)
