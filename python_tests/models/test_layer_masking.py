"""Layer masking (the Works check): what stands at masked pixels never matters, and the shape of a mask tells little.

    claim, digits enlarged to 16 x 16                          measured            broken
    logits of half-masked digits, masked pixels black, grey,   equal, bit by bit   differ: no fill, and pixels not masked first
      noise or NaN (the plain net's, black or grey: 10 apart)
    accuracy on them > that of black + 0.15, of grey + 0.1     0.49 > 0.22, 0.31   0.23: no fill
    a mask of ones: largest difference to the plain net        0.0
    a white image, known in the shape of a digit: accuracy     0.08 (chance 0.1)   0.38: no fill; 0.40: masks forgotten
      < 0.2, of black outside > 0.3                              0.40

The net was trained on whole digits, 150 steps; the last 297 digits are new to it.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskops.models.layer_masking import LayerMasked
from maskops.testing.works import train

datasets = pytest.importorskip("sklearn.datasets")


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), Residual(16), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.SiLU(), Residual(32),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    found = datasets.load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    return F.interpolate(images, scale_factor=2, mode="bilinear"), torch.tensor(found.target)


@pytest.fixture(scope="module")
def trained(digits: tuple[Tensor, Tensor]) -> nn.Module:
    images, labels = digits
    net = network().train()

    def loss(step: int) -> Tensor:
        rows = torch.randint(1500, (64,), generator=torch.Generator().manual_seed(step))
        return F.cross_entropy(net(images[rows]), labels[rows])

    train(net.parameters(), loss, 150, 3e-3)
    net.eval()
    with torch.no_grad():
        assert (net(images[1500:]).argmax(1) == labels[1500:]).float().mean() > 0.9
    return net


def half_masked(images: Tensor) -> Tensor:
    """Blocks of 4 x 4 pixels, half of them known."""
    blocks = torch.rand(len(images), 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    return F.interpolate(blocks.float(), scale_factor=4) > 0


@torch.no_grad()
def test_masked_pixels_never_matter(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    images = digits[0][1500:1600]
    mask, masked = half_masked(images), LayerMasked(trained)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    colours = [
        torch.where(mask, images, fill)
        for fill in (torch.tensor(0.0), torch.tensor(0.5), noise, torch.tensor(torch.nan))
    ]
    own = [masked(image, mask) for image in colours]
    assert all(torch.equal(logits, own[0]) for logits in own[1:])
    plain = [trained(image) for image in colours[:2]]
    assert (plain[0] - plain[1]).abs().max() > 1
    labels = digits[1][1500:1600]
    accuracy, black, grey = ((logits.argmax(1) == labels).float().mean() for logits in (own[0], *plain))
    assert accuracy > max(black + 0.15, grey + 0.1), f"{accuracy:.2f}, black {black:.2f}, grey {grey:.2f}"


@torch.no_grad()
def test_a_mask_of_ones_is_the_plain_net(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    images = digits[0][:50]
    difference = LayerMasked(trained)(images, torch.ones_like(images, dtype=torch.bool)) - trained(images)
    assert difference.abs().max() < 1e-5, f"{difference.abs().max():.2g}"


@torch.no_grad()
def test_the_shape_of_the_mask_tells_little(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """A white image, known where a digit has ink: black outside, it is that digit."""
    images, labels = digits[0][1500:], digits[1][1500:]
    mask, white = images > 0.4, torch.ones_like(images)
    blackout = (trained(torch.where(mask, white, 0)).argmax(1) == labels).float().mean()
    own = (LayerMasked(trained)(white, mask).argmax(1) == labels).float().mean()
    assert blackout > 0.3 and own < 0.2, f"layer masking {own:.2f}, blackout {blackout:.2f}"


@torch.no_grad()
def test_nothing_known_and_small_parts() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images = torch.full((2, 2, 8, 8), torch.nan)
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    images[1, :, 3, 3], mask[1, :, 3, 3] = 1.0, True
    out = LayerMasked(net)(images, mask)
    assert torch.isfinite(out).all() and (out[0] == 0).all() and (out[1] != 0).any()
    whole = torch.randn(2, 2, 8, 8)
    torch.testing.assert_close(LayerMasked(net)(whole, torch.ones_like(mask)), net(whole))


def test_a_layer_without_a_rule_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.PixelShuffle(1))
    with pytest.raises(NotImplementedError, match="LayerMasked: no rule for PixelShuffle"):
        LayerMasked(net)(torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8, dtype=torch.bool))
