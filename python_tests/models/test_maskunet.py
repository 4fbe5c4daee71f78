"""MaskUNet (the Works check): on a frozen diffusion network, masks chosen for each sample and timestep predict noise better."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskops.models import maskunet
from maskops.models.maskunet import GumbelMask, MaskUNet, MLPBlock, MLPUNet, diffuse, gumbel_sigmoid

datasets = pytest.importorskip("sklearn.datasets")

STEPS = 100
GAIN = 0.005  # the least share of the base network's error that trained masks must remove


def digits() -> tuple[Tensor, Tensor]:
    """Training and held-out digits, [S, 64] in [-1, 1]."""
    x = torch.from_numpy(datasets.load_digits().images / 8 - 1).float().flatten(1)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return x[:1400], x[1400:]


def train(parameters: list[nn.Parameter], loss: object, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(parameters, lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@torch.no_grad()
def error(predict: object, images: Tensor) -> float:
    """Mean squared error of the noise, over the same draws of timesteps and noise for every network."""
    found = []
    for seed in range(4):
        noisy, t, noise = diffuse(images, STEPS, torch.Generator().manual_seed(seed))
        found.append(F.mse_loss(predict(noisy, t), noise))
    return torch.stack(found).mean().item()


def base_unet(seed: int) -> MLPUNet:
    torch.manual_seed(seed)
    x, _ = digits()
    unet = MLPUNet(dim=16)

    def loss() -> Tensor:
        noisy, t, noise = diffuse(x[torch.randint(len(x), (128,))], STEPS)
        return F.mse_loss(unet(noisy, t), noise)

    train(list(unet.parameters()), loss, 400, 3e-3)
    return unet


def trained_masks(unet: MLPUNet, kind: type[MaskUNet] = MaskUNet) -> MaskUNet:
    torch.manual_seed(1)
    x, _ = digits()
    model = kind(unet, steps=STEPS)
    train(list(model.generators.parameters()), lambda: model.loss(x[torch.randint(len(x), (64,))]), 250, 1e-2)
    return model


def random_masks(unet: MLPUNet, like: list[GumbelMask]) -> object:
    """Masks for every sample that keep as many weights as `like` does, layer by layer, but any."""
    shares = iter(2 * like)

    def draw(index: int, x: Tensor, temb: Tensor) -> list[GumbelMask]:
        masks = []
        for name in MLPBlock.MASKED:
            noise = torch.rand(len(x), *getattr(unet.up[index], name).weight.shape)
            masks.append(GumbelMask(noise < next(shares).keep.float().mean(), noise))
        return masks

    return draw


class Run:
    """A frozen base network and its trained masks."""

    def __init__(self, seed: int) -> None:
        _, self.x = digits()
        self.base = base_unet(seed)
        self.before = {name: value.clone() for name, value in self.base.state_dict().items()}
        self.base_error = error(self.base, self.x)
        self.model = trained_masks(self.base)

    def gain(self, model: MaskUNet) -> float:
        """Share of the base network's held-out error that is gone."""
        return 1 - error(lambda x, t: model(x, t)[0], self.x) / self.base_error


made = functools.cache(Run)


@pytest.fixture(params=[0, 1])
def run(request: pytest.FixtureRequest) -> Run:
    return made(request.param)


def test_trained_masks_beat_the_base_and_random_masks_do_not(run: Run) -> None:
    assert run.gain(run.model) > GAIN
    noisy, t, _ = diffuse(run.x, STEPS)
    drawn = run.model(noisy, t)[1]
    assert all(0.5 < mask.keep.float().mean() < 0.999 for mask in drawn)
    assert error(lambda x, t: run.base(x, t, random_masks(run.base, drawn)), run.x) > run.base_error


def test_the_base_is_frozen(run: Run) -> None:
    assert all(torch.equal(value, run.before[name]) for name, value in run.model.unet.state_dict().items())


def masks_differ(model: MaskUNet) -> bool:
    """Whether the probabilities of keeping a weight depend on the timestep and on the sample."""
    _, x = digits()
    early, late = torch.full((16,), 5), torch.full((16,), 90)
    same_sample = x[:1].expand(16, -1)

    def soft(images: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([m.soft.flatten(1) for m in model(images, t, torch.Generator().manual_seed(0))[1]], 1)

    over_time = (soft(same_sample, early) - soft(same_sample, late)).abs().max() > 0.05
    # The noise is the same in both calls, so what differs comes from the samples.
    over_samples = (soft(x[:16], early) - soft(same_sample, early)).abs().max() > 0.05
    return bool(over_time and over_samples)


def test_masks_follow_timestep_and_sample(run: Run) -> None:
    assert masks_differ(run.model)


def test_untrained_masks_reproduce_the_base() -> None:
    torch.manual_seed(0)
    unet, (_, x) = MLPUNet(dim=16), digits()
    model = MaskUNet(unet, steps=STEPS)
    noisy, t, _ = diffuse(x, STEPS)
    out, drawn = model(noisy, t)
    assert min(mask.keep.float().mean() for mask in drawn) > 0.999
    torch.testing.assert_close(out, unet(noisy, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("logit", [-3.0, -1.0, 0.0, 0.5])
def test_keep_probability_is_that_of_one_gumbel(logit: float) -> None:
    count = 200_000
    mask = maskunet.gumbel_sigmoid(torch.full((count,), logit), generator=torch.Generator().manual_seed(0))
    want = 1 - torch.tensor(logit).exp().neg().exp().item()
    assert abs(mask.keep.float().mean().item() - want) < 4 * (want * (1 - want) / count) ** 0.5
    assert torch.equal(mask.keep, mask.soft > 0.5)


def test_gradient_reaches_the_logits_of_each_sample() -> None:
    torch.manual_seed(0)
    x, linear = torch.randn(3, 5, 8).double(), nn.Linear(8, 6).double()
    logits = torch.randn(3, 6, 8, dtype=torch.float64, requires_grad=True)
    mask = gumbel_sigmoid(logits, tau=0.7, generator=torch.Generator().manual_seed(0))
    y = maskunet.masked_linear(x, linear, mask)
    hard = mask.keep.double().requires_grad_()
    want = torch.einsum("stk,snk->stn", x, linear.weight * hard) + linear.bias
    torch.testing.assert_close(y, want)
    grad = torch.randn_like(y)
    (through,) = torch.autograd.grad(want, hard, grad)
    (ours,) = torch.autograd.grad(y, logits, grad)
    torch.testing.assert_close(ours, through * (mask.soft * (1 - mask.soft) / 0.7).detach())


# ---------------------------------------------------------------- planted faults


def with_masks(monkeypatch: pytest.MonkeyPatch, change: object) -> None:
    monkeypatch.setattr(maskunet, "gumbel_sigmoid", lambda logits, **options: change(gumbel_sigmoid(logits, **options)))


FAULTS = {
    "no gradient": lambda mask: mask._replace(soft=mask.soft.detach() + 0 * mask.soft),
    "gradient of the wrong sign": lambda mask: mask._replace(soft=2 * mask.soft.detach() - mask.soft),
    "the mask inverted": lambda mask: mask._replace(keep=~mask.keep),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_works_check_goes_red_when_broken(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(0)
    with_masks(monkeypatch, FAULTS[fault])
    assert run.gain(trained_masks(run.base)) < GAIN


def test_one_mask_for_all_samples_goes_red(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with_masks(monkeypatch, lambda mask: GumbelMask(*(part[:1].expand_as(part) for part in mask)))
    assert not masks_differ(run.model)


def test_two_gumbel_numbers_go_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: logistic noise, which keeps with probability sigmoid(l)."""

    def logistic(logits: Tensor, **options: object) -> GumbelMask:
        uniform = torch.rand(logits.shape, **options)
        soft = (logits + uniform.logit()).sigmoid()
        return GumbelMask(soft > 0.5, soft)

    monkeypatch.setattr(maskunet, "gumbel_sigmoid", logistic)
    with pytest.raises(AssertionError):
        test_keep_probability_is_that_of_one_gumbel(-1.0)
