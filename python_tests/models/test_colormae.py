"""ColorMAE (the Works check): exact counts, clumps by colour, and a network that learns from them.

    claim, new crops, trained on green masks                    measured                     not trained
    masked patches < 0.9 of the error of the visible mean       0.81 (0.0647 of 0.0800)      18.9
    error under red masks > 1.1 of that under green ones        1.41                         1.00

Not shown: that green masks make better features than random ones, which is the paper's claim.
"""

import pytest
import torch
from torch import Tensor

import maskops
from maskops.models.colormae import ColorMAE, ColorMAEConfig
from maskops.testing.works import grey_crops, train

pytest.importorskip("skimage.data")

TINY = dict(
    image_size=32, patch_size=4, channels=1, dim=48, depth=1, heads=4, mlp_dim=96, decoder_dim=48, decoder_depth=1,
    decoder_heads=4, decoder_mlp_dim=96, norm_pix=False,
)  # fmt: skip
COLOURS = ("red", "green", "blue", "purple")
STEPS = 300


@pytest.fixture(scope="module")
def errors() -> dict[str, tuple[float, float]]:
    """Of new crops under masks of each colour: the error of a network trained on green ones, and of the mean of what is visible."""
    torch.manual_seed(0)
    model, images, new = ColorMAE(ColorMAEConfig(**TINY)), grey_crops(2000, (0, 0.7), 0), grey_crops(400, (0.7, 1), 1)
    train(model.parameters(), lambda step: model(images[torch.randint(2000, (32,))], seed=step).loss, STEPS, 4e-3)
    patches, found = maskops.patchify(new, 4), {}
    for colour in COLOURS:
        split = maskops.colour_masking(len(new), (8, 8), num_keep=16, colour=colour, seed=3)
        seen = maskops.gather_tokens(patches, split.ids_keep).mean((1, 2), keepdim=True)
        with torch.no_grad():
            ours = model(new, split=split).loss.item()
        found[colour] = ours, (patches - seen).square().mean(2).gather(1, split.ids_mask).mean().item()
    return found


def test_masked_patches_are_painted(errors: dict[str, tuple[float, float]]) -> None:
    ours, mean = errors["green"]
    assert ours < 0.9 * mean, f"{ours:.4f}, of the mean {mean:.4f}"


def test_large_clumps_are_harder(errors: dict[str, tuple[float, float]]) -> None:
    assert errors["red"][0] > 1.1 * errors["green"][0], errors


# ---------------------------------------------------------------- exact


def test_published_counts_and_clumps() -> None:
    """49 of 196 visible, and the mean of neighbours that agree falls from red to green to blue."""
    agree = {}
    for colour in COLOURS:
        c = ColorMAEConfig(colour=colour)
        mask = maskops.colour_masking(400, c.grid, num_keep=c.num_keep, colour=colour, seed=1).mask
        assert (mask.sum(1) == 147).all()
        grid = mask.view(-1, 14, 14)
        agree[colour] = (grid[:, 1:] == grid[:, :-1]).double().mean().item()
    assert agree["red"] > 0.85 > 0.68 > agree["green"] > 0.64 > max(agree["blue"], agree["purple"]), agree


def spectrum(colour: str) -> Tensor:
    """Mean power of masks at the radii 1 to 7, the mean of each mask removed."""
    mask = (
        maskops.colour_masking(800, (14, 14), num_keep=49, colour=colour, seed=2).mask.view(-1, 14, 14).double() - 0.75
    )
    power = torch.fft.fft2(mask).abs().square().mean(0)
    at = torch.fft.fftfreq(14) * 14
    radius = torch.hypot(at[:, None], at).round().long()
    return torch.stack([power[radius == r].mean() for r in range(1, 8)])


def test_spectra_have_their_colour() -> None:
    red, green, blue, purple = (spectrum(c) for c in COLOURS)
    assert red.argmax() == 0 and 0 < green.argmax() < 6 and blue.argmax() > 3, (red, green, blue)
    assert blue[0] < 0.5 * blue[-1] and purple.argmin() in range(1, 6)


def test_forward_draws_its_colour() -> None:
    model, images = ColorMAE(ColorMAEConfig(**TINY, colour="red", sigma=(1.2,))), torch.randn(3, 1, 32, 32)
    want = maskops.colour_masking(3, (8, 8), num_keep=16, colour="red", sigma=1.2, seed=4)
    out = model(images, seed=4)
    assert torch.equal(out.split.ids_keep, want.ids_keep)
    assert torch.equal(model(images, split=want).loss, out.loss)
