"""R-AMT (the Works check): masks alone carry a digit classifier to rotated digits, and leave every weight as it was."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskops.models import r_amt
from maskops.models.r_amt import RegularizedMaskTuning, ThresholdLinear, drop, keep_probability

datasets = pytest.importorskip("sklearn.datasets")
from scipy.ndimage import rotate  # noqa: E402  scikit-learn brings scipy

SEEDS = (0, 1, 2)
SHOTS = 16
GAIN = 40  # points; the claim is 15, a gradient without the sign of the weight still reaches 28


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Digits, the same turned by 40 degrees, labels."""
    data = datasets.load_digits()
    images = data.images / 16
    turned = np.stack([rotate(image, 40, reshape=False, order=1) for image in images])
    return *(torch.from_numpy(x).float().flatten(1) for x in (images, turned)), torch.from_numpy(data.target)


def base_net(seed: int, x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(300):
        rows = torch.randint(len(x), (64,))
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


class Run:
    """One adaptation: accuracy on turned digits before and after, in points."""

    def __init__(self, seed: int, kind: type[RegularizedMaskTuning] = RegularizedMaskTuning) -> None:
        x, turned, y = digits()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(y), generator=generator)
        train, held_out = order[:1000], order[1000:]
        self.base = base_net(seed, x[train], y[train])
        self.before = {name: value.clone() for name, value in self.base.state_dict().items()}
        self.model = kind(self.base)
        self.x, self.y = turned[held_out], y[held_out]
        self.accuracy_before = self.accuracy(self.base)
        shots = torch.cat([train[y[train] == label][:SHOTS] for label in range(10)])
        # SGD: a step as large as the gradient. Adam's steps of one size push every score over the threshold at this scale.
        optimizer = torch.optim.SGD(self.model.scores(), lr=0.1)
        for _ in range(150):
            rows = shots[torch.randint(len(shots), (32,), generator=generator)]
            self.model.backward(turned[rows], y[rows], generator)
            optimizer.step()
        self.gain = self.accuracy(self.model) - self.accuracy_before

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        return 100 * (model(self.x).argmax(1) == self.y).float().mean().item()

    def works(self) -> bool:
        return self.gain >= GAIN and self.model.zeros() < 0.05


@pytest.fixture(scope="module", params=SEEDS)
def run(request: pytest.FixtureRequest) -> Run:
    return Run(request.param)


def test_masks_alone_adapt_the_network(run: Run) -> None:
    assert run.gain >= GAIN, f"{run.accuracy_before:.1f} {run.gain:+.1f} points"
    assert 0 < run.model.zeros() < 0.05


def test_frozen_weights_are_bitwise_the_same(run: Run) -> None:
    for name, value in run.before.items():
        assert torch.equal(value, run.model.frozen.state_dict()[name])
        assert torch.equal(value, run.model.masked.state_dict()[name])


def test_saved_masks_take_one_bit_a_weight(run: Run, tmp_path: Path) -> None:
    run.model.save_masks(tmp_path / "masks.safetensors")
    weights = sum(layer.weight.numel() for layer in run.model.layers().values())
    assert (tmp_path / "masks.safetensors").stat().st_size < weights / 8 + 1000
    other = RegularizedMaskTuning(run.base)
    other.load_masks(tmp_path / "masks.safetensors")
    assert torch.equal(other(run.x), run.model(run.x)) and other.zeros() == run.model.zeros()


def test_starts_as_the_dense_network() -> None:
    # Small whole numbers: every order of summation gives the same bits, so equality is exact on every backend.
    net = nn.Sequential(nn.Linear(19, 33), nn.ReLU(), nn.Linear(33, 5))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randint(-3, 4, p.shape))
    model, x = RegularizedMaskTuning(net), torch.randint(-3, 4, (7, 19)).float()
    assert torch.equal(model(x), net(x)) and model.zeros() == 0
    for layer in model.layers().values():
        assert torch.equal(layer.weight.where(layer.mask(), 0), layer.weight)


def test_straight_through_gradient() -> None:
    torch.manual_seed(0)
    model = RegularizedMaskTuning(nn.Linear(6, 4).double(), regularization=0.5, gradient_dropout=False)
    x, y = torch.randn(9, 6).double(), torch.randint(4, (9,))
    model.masked.scores.data[0, 0] = 0.0
    model.backward(x, y)
    layer = model.masked
    weight = layer.weight.clone()
    weight[0, 0] = 0
    weight.requires_grad_()
    F.cross_entropy(F.linear(x, weight, layer.bias), y).backward()
    want = weight.grad * layer.weight + 0.5 * layer.scores / layer.scores.norm()
    torch.testing.assert_close(layer.scores.grad, want.detach(), rtol=1e-10, atol=1e-12)


def test_select_leaves_other_layers() -> None:
    model = RegularizedMaskTuning(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), lambda name: name == "1")
    assert list(model.layers()) == ["1"] and not model.masked[0].weight.requires_grad
    with pytest.raises(ValueError, match="select must choose at least one"):
        RegularizedMaskTuning(nn.Linear(2, 2), lambda name: False)


def test_gradient_dropout_keeps_what_agrees() -> None:
    a, b = torch.randn(2, 100_000)
    p = keep_probability(a, b)
    assert (p[a.sign() == b.sign()] == 1).all()
    against = a.sign() == -b.sign()
    torch.testing.assert_close(p[against], (a.abs() / (a.abs() + b.abs()))[against], rtol=1e-5, atol=1e-6)
    assert torch.equal(drop(a, a), a)
    assert keep_probability(torch.zeros(1), torch.zeros(1)).item() == 1


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_gradient_dropout_keeps_at_its_rate(share: float) -> None:
    count = 100_000
    a, b = torch.full((count,), share), torch.full((count,), share - 1)
    kept = (drop(a, b, torch.Generator().manual_seed(1)) != 0).float().mean().item()
    assert abs(kept - share) < 3 * (share * (1 - share) / count) ** 0.5


# ---------------------------------------------------------------- planted faults


class NoWeightInGradient(RegularizedMaskTuning):
    """A planted fault: dL/dm has |W| instead of W."""

    def backward(self, *args: object) -> Tensor:
        loss = super().backward(*args)
        for layer in self.layers().values():
            layer.scores.grad *= layer.weight.sign()
        return loss


class WrongSign(RegularizedMaskTuning):
    """A planted fault: the scores climb the loss."""

    def backward(self, *args: object) -> Tensor:
        loss = super().backward(*args)
        for m in self.scores():
            m.grad.neg_()
        return loss


class Detached(RegularizedMaskTuning):
    """A planted fault: the mask hands no gradient to the scores, so that the norm alone moves them."""

    def backward(self, x: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        loss = super().backward(x, labels, generator)
        for m in self.scores():
            m.grad = self.regularization * (m / m.norm()).detach()
        return loss


@pytest.mark.parametrize("broken", [NoWeightInGradient, WrongSign, Detached])
def test_the_works_check_goes_red_when_broken(broken: type[RegularizedMaskTuning]) -> None:
    assert not Run(0, broken).works()


def test_the_works_check_goes_red_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ThresholdLinear, "forward", lambda self, x: F.linear(x, self.weight, self.bias) + 0 * self.scores.sum()
    )
    assert not Run(0).works()


def test_the_rate_check_goes_red_when_probability_is_flipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(r_amt, "keep_probability", lambda a, b: 1 - keep_probability(a, b))
    with pytest.raises(AssertionError):
        test_gradient_dropout_keeps_at_its_rate(0.1)
