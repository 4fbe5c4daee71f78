"""CroCo (the Works check): the other view of a stereo pair helps to paint the masked patches; masked pixels never leak.

Of a true pair the right view is the same rows, moved by the median disparity of the left crop, so that both show the same things.
The left half of the picture is trained on, the right half is new.

    claim                                    measured   broken: no attention to the other view
    true view's error < 0.9 of a wrong one's   0.83       1.00
    true view's error < 0.9 of a black one's   0.74       1.00
"""

import pytest
import torch
from torch import Tensor

import maskops
from maskops.models.croco import CroCo, CroCoConfig
from maskops.testing.works import train

data = pytest.importorskip("skimage.data")

STEREO = CroCoConfig(32, 4, dim=64, depth=2, heads=4, decoder_dim=64, decoder_depth=2, decoder_heads=4)
MIDDLE, STEPS = 370, 250


def stereo_crops(count: int, columns: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Squares of the left picture, all inside the columns, and what the right picture shows of them.  Each [count, 3, 32, 32]."""
    *pictures, disparity = (torch.tensor(x) for x in data.stereo_motorcycle())
    left, right = (x.permute(2, 0, 1) / 128 - 1 for x in pictures)
    found: list[tuple[Tensor, Tensor]] = []
    while len(found) < count:
        y = int(torch.randint(left.shape[1] - 31, (), generator=generator))
        x = int(torch.randint(columns[0], columns[1] - 31, (), generator=generator))
        known = disparity[y : y + 32, x : x + 32]
        known = known[known.isfinite()]
        x_right = x - int(known.median().round()) if len(known) > 512 else -1
        if x_right >= 0:
            found.append((left[:, y : y + 32, x : x + 32], right[:, y : y + 32, x_right : x_right + 32]))
    first, second = zip(*found, strict=True)
    return torch.stack(first), torch.stack(second)


def pretrain(model: CroCo) -> CroCo:
    torch.manual_seed(1)
    first, second = stereo_crops(2000, (0, MIDDLE), torch.Generator().manual_seed(0))

    def loss(step: int) -> Tensor:
        rows = torch.randint(2000, (32,))
        return model(first[rows], second[rows], seed=step).loss

    train(model.parameters(), loss, STEPS, 2e-3)
    return model


def test_the_other_view_helps() -> None:
    torch.manual_seed(0)
    model = pretrain(CroCo(STEREO)).requires_grad_(False)
    first, second = stereo_crops(400, (MIDDLE, 741), torch.Generator().manual_seed(1))
    split = maskops.random_masking(400, STEREO.num_patches, num_keep=STEREO.num_keep, seed=0)
    true, wrong, black = (
        model(first, view, split=split).loss for view in (second, second.roll(1, 0), torch.zeros_like(second))
    )
    assert true < 0.9 * wrong and true < 0.9 * black, f"true {true:.4f}, wrong {wrong:.4f}, black {black:.4f}"


# ---------------------------------------------------------------- exact


def sample() -> tuple[CroCo, Tensor, Tensor, maskops.TokenSplit]:
    """An untrained network, two views of 64 patches, 7 of the first visible."""
    torch.manual_seed(0)
    model, views = CroCo(STEREO).double(), torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)
    return model, views[0], views[1], maskops.random_masking(3, 64, num_keep=STEREO.num_keep, seed=0)


def edited(images: Tensor, patch: Tensor | int) -> Tensor:
    """The images with one patch of the first one changed."""
    patches = maskops.patchify(images, 4).clone()
    patches[0, patch] += torch.randn(48, dtype=torch.float64)
    return maskops.unpatchify(patches, 4, (32, 32))


def test_published_sizes() -> None:
    config = CroCoConfig()
    assert (config.num_patches, config.num_keep) == (196, 20)


def test_masked_pixels_reach_no_prediction() -> None:
    model, first, second, split = sample()
    want = model(first, second, split=split).pred
    assert torch.equal(model(edited(first, split.ids_mask[0, 0]), second, split=split).pred, want)
    changed = (model(edited(first, split.ids_keep[0, 0]), second, split=split).pred != want).flatten(1).any(1)
    assert changed.tolist() == [True, False, False]


def test_every_patch_of_the_other_view_reaches_its_own_pair_only() -> None:
    model, first, second, split = sample()
    want = model(first, second, split=split).pred
    for patch in (0, 31, 63):
        changed = (model(first, edited(second, patch), split=split).pred != want).any(-1)
        assert changed[0].all() and not changed[1:].any()


def test_both_views_share_the_encoder() -> None:
    model, first, second, split = sample()
    everything = maskops.split_tokens(torch.zeros(3, 64, dtype=torch.bool))
    torch.testing.assert_close(model.encode(first, everything), model.encode(first), rtol=0, atol=1e-12)
    pred = model.decode(model.encode(first, split), split, model.encode(second))
    assert torch.equal(pred, model(first, second, split=split).pred)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_is_over_masked_patches_only(norm_pix: bool) -> None:
    _, first, second, split = sample()
    model = CroCo(CroCoConfig(**{**vars(STEREO), "norm_pix": norm_pix})).double()
    out = model(first, second, split=split)
    target = maskops.patchify(first, 4)
    if norm_pix:
        target = (target - target.mean(-1, True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    want = (out.pred - target).square().mean(-1)[split.mask].mean()
    torch.testing.assert_close(out.loss.double(), want, rtol=1e-5, atol=0)
    out.pred.retain_grad()
    out.loss.backward()
    assert ((out.pred.grad != 0).any(-1) == split.mask).all()


def test_masks_repeat_with_the_seed() -> None:
    model, first, second, _ = sample()
    masks = [model(first, second, seed=seed).split.mask for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert all((mask.sum(1) == 57).all() for mask in masks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 225}, "image_size must be a multiple of patch_size 16, got 225"),
        ({"mask_ratio": 1.1}, "mask_ratio must be in"),
    ],
)
def test_config_errors(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CroCoConfig(**change)
