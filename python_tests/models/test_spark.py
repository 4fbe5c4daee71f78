"""SparK (the Works check): masked pixels change nothing, the mask keeps its pattern over depth, and it paints better for its work.

24 x 24 crops of photos, cells of 4 pixels, 14 of 36 visible, a ResNet of three stages, batches of 32; the held-out error of masked
cells in normalised pixels, where the mean patch has 1.

    claim                                                        measured (each)              broken
    error after 80 steps < 0.4, and < 0.98 of that after the     0.313; 0.953                 1: the mask is ignored, hidden
      mask is ignored                                                                         cells hold noise
    error < 0.97 of a dense encoder's on cells of the mean       0.929 (0.943, 0.916)         1.01: as many steps as the dense
      colour, trained with as many multiplications, mean of 2                                 one has
      seeds

Seed 2 had 0.970. A step of the dense encoder costs 1.46 times as much here (1.57 times as long, measured on a ResNet-50), so it
takes 103 steps for 150. With as many steps both paint alike, as the dense one computes in hidden cells, too: 0.256 and 0.263
against 0.252 and 0.259 after 300 steps, on faces 0.695 against 0.689; without the hierarchy, one map for the decoder, the dense
one had 0.268 and 0.258, on faces 0.704. With equal steps SparK
does not beat it at this size, as it does on ImageNet in the paper.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import maskops
from maskops.models.cnn import maps_of
from maskops.models.spark import SIZES, SparK, SparKConfig, make_backbone
from maskops.nn import block_mask
from maskops.testing.works import train

TINY = SparKConfig(image_size=24, patch_size=4, depths=(1, 1, 1), width=8, stem="small", decoder_dim=32)
WIDE = SparKConfig(image_size=24, patch_size=4, depths=(1, 1, 1), width=16, stem="small", decoder_dim=32)
CONVNEXT = SparKConfig(image_size=32, patch_size=8, depths=(1, 1), width=8, backbone="convnext", decoder_dim=16)


def poisoned(model: SparK, images: Tensor, mask: Tensor, value: float = math.nan) -> Tensor:
    patches = maskops.patchify(images, model.patch_size)
    return maskops.unpatchify(patches.masked_fill(mask[:, :, None], value), model.patch_size, model.config.image_hw)


@pytest.mark.parametrize("config", [TINY, CONVNEXT], ids=["resnet", "convnext"])
def test_masked_pixels_and_the_fill_colour_change_nothing(config: SparKConfig) -> None:
    torch.manual_seed(0)
    model, images = SparK(config), torch.randn(3, 3, *config.image_hw)
    split = model(images, seed=0).split
    model.eval()
    maps = model.encode(images, split)
    for value in (0.0, 5.0, math.nan):
        changed = model.encode(poisoned(model, images, split.mask, value), split)
        assert all(torch.equal(a, b) for a, b in zip(maps, changed, strict=True))
    assert torch.equal(model.decode(maps, split), model(images, split=split).pred)
    # A dense network sees the colour.
    dense = [maps_of(model.encoder, poisoned(model, images, split.mask, value))[-1] for value in (0.0, 5.0)]
    assert (dense[0] - dense[1]).abs().max() > 1e-3


def test_mask_pattern_does_not_vanish_over_depth() -> None:
    """24 x 24, 14 of 36 cells active: .389 at any depth; dense 3x3 layers reach .59 to .99 of the positions after one to six."""
    split = maskops.random_masking(64, 36, num_keep=14, seed=0)
    cells = (~split.mask).unflatten(1, (6, 6))
    own = x = cells.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].float()
    weight, expected = torch.ones(1, 1, 3, 3), (0.59, 0.79, 0.89, 0.97, 0.98, 0.99)
    for share in expected:
        own, x = maskops.block_masked_conv(own, weight, cells), F.conv2d(x, weight, padding=1)
        own = (own > 0).float()
        assert own.mean().item() == pytest.approx(14 / 36)
        assert (x > 0).float().mean().item() == pytest.approx(share, abs=0.06)


def test_sizes_and_names_are_the_published_ones() -> None:
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in make_backbone(SparKConfig.of_size(name), 1000).parameters()) for name in
                  ("resnet50", "resnet101", "resnet152", "convnext_small", "convnext_base", "convnext_large")}  # fmt: skip
        names = set(make_backbone(SparKConfig(), 1000).state_dict())
    assert counts == {
        "resnet50": 25_557_032, "resnet101": 44_549_160, "resnet152": 60_192_808, "convnext_small": 50_223_688,
        "convnext_base": 88_591_464, "convnext_large": 197_767_336,
    }  # fmt: skip
    assert {
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.downsample.1.weight",
        "layer4.2.conv3.weight",
        "fc.bias",
    } <= names
    config = SparKConfig.of_size("resnet50")
    assert (config.num_patches, config.num_keep) == (49, 20)
    assert {"tiny", "small", "base", "large"} <= set(SIZES)


@pytest.mark.parametrize("config", [TINY, CONVNEXT], ids=["resnet", "convnext"])
def test_the_encoder_is_the_backbone(config: SparKConfig) -> None:
    model, backbone = SparK(config).eval(), make_backbone(config, num_classes=5).eval()
    missing = backbone.load_state_dict(model.encoder.state_dict(), strict=False)
    assert missing.unexpected_keys == [] and all("fc" in n or "classifier" in n for n in missing.missing_keys)
    x = torch.randn(2, 3, *config.image_hw)
    torch.testing.assert_close(model.encoder(x), maps_of(backbone, x)[-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 8}, "patch_size must be 4, the stride of the backbone, got 8"),
        ({"backbone": "vit"}, "backbone must be 'resnet' or 'convnext', got 'vit'"),
        ({"decoder_dim": 30}, "decoder_dim must be a multiple of 4, got 30"),
        ({"mask_ratio": 0.999}, "keeps none of 36 patches"),
    ],
)
def test_config_errors(changes: dict, message: str) -> None:
    fields = {"image_size": 24, "patch_size": 4, "depths": (1, 1, 1), "width": 8, "stem": "small", "decoder_dim": 32}
    with pytest.raises(ValueError, match=message):
        SparKConfig(**{**fields, **changes})


def test_reconstruction_and_its_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from maskops.demo.report import draw_reconstruction

    model, images = SparK(TINY), torch.rand(2, 3, 24, 24)
    out = model(images, seed=0)
    visible, painted = model.reconstruct(images, out)
    seen = model.cells(out.split).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    assert torch.equal(visible, images * seen) and torch.equal(painted * seen, images * seen)
    draw_reconstruction(
        tmp_path / "spark.png", {"photo": images, "visible": visible, "SparK": painted.clamp(0, 1)}, "SparK"
    )
    assert (tmp_path / "spark.png").stat().st_size > 1000


# ---------------------------------------------------------------- the Works check


class HiddenRead(SparK):
    """SparK with a fault: the norms and convolutions of the encoder see the hidden cells, which hold noise."""

    def encode(self, images: Tensor, split: maskops.TokenSplit) -> list[Tensor]:
        noise = torch.randn_like(images)
        seen = self.cells(split).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
        with block_mask(torch.ones_like(self.cells(split))):
            return maps_of(self.encoder, torch.where(seen, images, noise))[::-1]


class Dense(SparK):
    """A dense encoder; masked cells have the mean colour."""

    def encode(self, images: Tensor, split: maskops.TokenSplit) -> list[Tensor]:
        seen = self.cells(split).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
        return maps_of(self.encoder, images * seen)[::-1]


def photos() -> tuple[Tensor, Tensor]:
    """Crops of 24 x 24 of two photos, the left and the right part apart: (for training, held out), normalised."""
    data = pytest.importorskip("sklearn.datasets").load_sample_images().images
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for photo in data:
        x = torch.tensor(photo).permute(2, 0, 1)[None].float() / 255
        x = F.interpolate(x, scale_factor=0.5, mode="area")
        crops = x.unfold(2, 24, 8).unfold(3, 24, 8)[0].permute(1, 2, 0, 3, 4)
        cut = crops.shape[1] * 3 // 4
        parts[0].append(crops[:, :cut].flatten(0, 1))
        parts[1].append(crops[:, cut + 3 :].flatten(0, 1))
    trained, held_out = (torch.cat(p) for p in parts)
    mean, std = trained.mean((0, 2, 3), keepdim=True), trained.std((0, 2, 3), keepdim=True)
    return (trained - mean) / std, (held_out - mean) / std


def held_out_error(kind: type[SparK], seed: int, steps: int = 80, config: SparKConfig = TINY) -> float:
    torch.manual_seed(seed)
    trained, held_out = photos()
    model, g = kind(config), torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        images = trained[torch.randint(len(trained), (32,), generator=g)]
        return model(images, seed=1000 * seed + step).loss

    train(model.parameters(), loss, steps, lr=4e-3)
    model.eval()
    with torch.no_grad():
        return model(held_out[::3], seed=7).loss.item()


def test_works() -> None:
    own, broken = held_out_error(SparK, 0), held_out_error(HiddenRead, 0)
    assert own < 0.4, own  # the mean patch: 1
    assert own < 0.98 * broken, (own, broken)


def cost_of_a_dense_step(config: SparKConfig) -> float:
    """Multiplications of a step with a dense encoder over those of SparK, which computes 14 of 36 cells of it."""
    model, images = SparK(config), torch.randn(1, 3, *config.image_hw)
    with FlopCounterMode(display=False) as encoder:
        maps = maps_of(make_backbone(config), images)[::-1]
    with FlopCounterMode(display=False) as decoder:
        model.decode(maps, maskops.random_masking(1, config.num_patches, num_keep=config.num_keep, seed=0))
    dense, rest = encoder.get_total_flops(), decoder.get_total_flops()
    return (dense + rest) / (dense * config.num_keep / config.num_patches + rest)


def test_paints_better_than_a_dense_encoder_for_the_same_multiplications() -> None:
    cost = cost_of_a_dense_step(WIDE)
    assert cost == pytest.approx(1.46, abs=0.01)
    steps = {SparK: 150, Dense: round(150 / cost)}
    errors = torch.tensor([[held_out_error(kind, seed, n, WIDE) for kind, n in steps.items()] for seed in (0, 1)])
    ratio = errors[:, 0] / errors[:, 1]
    assert ratio.mean() < 0.97, errors.tolist()
