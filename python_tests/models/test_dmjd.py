"""DMJD: two views that cover each image, a steadier gradient, and better paintings (the Works check, in part).

Crops of grey photos, 64 patches in 16 cells; 200 steps. The variance is of the gradient of all weights over draws of the views, at
the start, the mean of 2 batches.

    claim                                                   measured (seeds 0, 1), one thread     broken: twice the same view
    gradient's variance < 0.6 of independent views'         0.45                                  2.12
    held-out error of masked patches < 0.99 of that after   0.958 (0.977, 0.938)                  1.015, seed 0
      independent views
    the same < 0.95 of the error of the visible mean        0.904                                 17.1, seed 0: visible loss only

In trials seeds 2 to 6 had 0.982, 0.966, 0.992, 0.982 and 0.974. With targets normalised by patch no difference was seen (seeds
0 to 2: 0.8720, 0.8736, 0.8795 against 0.8724, 0.8736, 0.8796), nor did the network learn much then: each patch's own mean has
0.882.
Not shown: better features. Linear probes of the class token on digits (24 x 24, 9 cells, 200 steps, seeds 0 to 2), with the latents
of a trained classifier as targets in place of pixels: 0.858, 0.853, 0.781 after disjoint and 0.848, 0.841, 0.769 after independent
views, 0.822, 0.829, 0.816 without the visible branch; an untrained network has 0.848. With pixels or histograms of gradients as
targets the probes of both kinds of views are within 0.01, and without the visible branch they are as good or better.
"""

import pytest
import torch
from torch import Tensor

import maskops
from maskops import TokenSplit
from maskops.models.dmjd import DMJD, DMJDConfig
from maskops.testing.works import grey_crops, train

pytest.importorskip("skimage.data")

TINY = dict(
    image_size=32, patch_size=4, channels=1, dim=48, depth=1, heads=4, mlp_dim=96, decoder_dim=48, decoder_depth=1,
    decoder_heads=4, decoder_mlp_dim=96, norm_pix=False,
)  # fmt: skip
SEEDS = (0, 1)
STEPS, DRAWS = 200, 16


def draw(model: DMJD, count: int, kind: str, seed: int) -> tuple[TokenSplit, TokenSplit]:
    """Two views: disjoint, independent of one another, or equal."""
    first, second = model.draw_views(count, seed=2 * seed)
    if kind == "independent":
        second = model.draw_views(count, seed=2 * seed + 1)[0]
    return first, first if kind == "equal" else second


def gradient_variance(model: DMJD, images: Tensor, kind: str) -> float:
    """Variance of the loss's gradient over draws of the views, summed over all weights; the images stay the same."""
    weights, found = [p for p in model.parameters() if p.requires_grad], []
    for seed in range(DRAWS):
        grads = torch.autograd.grad(model(images, splits=draw(model, len(images), kind, seed)).loss, weights)
        found.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(found).var(0).sum().item()


def test_disjoint_views_have_a_steadier_gradient() -> None:
    torch.manual_seed(0)
    model, ratios = DMJD(DMJDConfig(**TINY)), []
    for seed in range(2):
        images = grey_crops(32, (0.7, 1), seed)
        found = [gradient_variance(model, images, kind) for kind in ("disjoint", "equal", "independent")]
        ratios.append([v / found[2] for v in found[:2]])
    disjoint, equal = torch.tensor(ratios).mean(0).tolist()
    assert disjoint < 0.6 and equal > 1.4, ratios


def held_out_error(kind: str, seed: int) -> float:
    """Of masked patches of new photos, after training on such views; the same masks for every model."""
    torch.manual_seed(seed)
    model, images = DMJD(DMJDConfig(**TINY)), grey_crops(2000, (0, 0.7), 0)

    def loss(step: int) -> Tensor:
        batch = images[torch.randint(2000, (32,))]
        return model(batch, splits=draw(model, 32, kind, step)).loss

    train(model.parameters(), loss, STEPS, 4e-3)
    with torch.no_grad():
        return model(grey_crops(400, (0.7, 1), 1), seed=7).masked_loss.item()


def error_of_the_visible_mean() -> float:
    new, errors = grey_crops(400, (0.7, 1), 1), []
    patches = maskops.patchify(new, 4)
    for split in DMJD(DMJDConfig(**TINY)).draw_views(len(new), seed=7):
        seen = maskops.gather_tokens(patches, split.ids_keep).mean((1, 2), keepdim=True)
        errors.append((patches - seen).square().mean(2)[split.mask].mean().item())
    return sum(errors) / 2


def test_new_photos_are_painted_better_than_after_independent_views() -> None:
    errors = torch.tensor([[held_out_error(kind, seed) for kind in ("disjoint", "independent")] for seed in SEEDS])
    ratio = (errors[:, 0] / errors[:, 1]).mean().item()
    assert ratio < 0.99 and errors[:, 0].mean() < 0.95 * error_of_the_visible_mean(), errors


# ---------------------------------------------------------------- exact


def test_published_counts() -> None:
    """Each view masks 120 of 196 patches, both cover all 196, and 44 are masked in both; in whole cells of 2 x 2."""
    model = DMJD(DMJDConfig(dim=12, depth=1, heads=1, mlp_dim=8, decoder_dim=8, decoder_depth=1, decoder_heads=1))
    first, second = (split.mask for split in model.draw_views(300, seed=0))
    for mask in (first, second):
        assert (mask.sum(1) == 120).all()
        cells = mask.view(-1, 7, 2, 7, 2)
        assert (cells == cells[:, :, :1, :, :1]).all()
    assert (first | second).all() and ((first & second).sum(1) == 44).all()
    apart = model.draw_views(300, seed=1)[0].mask
    assert abs((first | apart).double().mean() - 0.85) < 0.01, "two independent views cover 85 %"
    assert not torch.equal(first[0], first[1]), "every image has its own views"


def test_loss_is_that_of_both_views_and_both_branches() -> None:
    torch.manual_seed(0)
    model, images = (
        DMJD(DMJDConfig(**TINY | {"norm_pix": True}, theta=0.5)).double(),
        torch.rand(3, 1, 32, 32, dtype=torch.float64),
    )
    out, patches, masked, visible = model(images, seed=0), maskops.patchify(images, 4), 0.0, 0.0
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    target = (patches - mean) / (variance + 1e-6).sqrt()
    for split, pred in zip(out.splits, out.preds, strict=True):
        masked += (pred - target)[split.mask].square().mean() / 2
        told = model.visible_head(model.encode(images, split)[:, 1:])
        error = (told - target[~split.mask].view_as(told)).abs()
        visible += torch.where(error < 2, error.square() / 4, error - 1).mean() / 2
    torch.testing.assert_close(out.masked_loss, masked)
    torch.testing.assert_close(out.visible_loss, visible)
    torch.testing.assert_close(out.loss, masked + 0.5 * visible)


def test_the_visible_branch_does_not_reach_the_decoder() -> None:
    torch.manual_seed(0)
    model = DMJD(DMJDConfig(**TINY))
    out = model(torch.rand(2, 1, 32, 32), seed=0)
    out.visible_loss.backward()
    assert not model.mask_token.grad.any() and not model.decoder_pred.weight.grad.any()
    assert model.patch_embed.weight.grad.any() and model.visible_head.linear.weight.grad.any()


def test_hidden_pixels_reach_no_prediction_of_their_view() -> None:
    torch.manual_seed(0)
    model, images = DMJD(DMJDConfig(**TINY)), torch.rand(2, 1, 32, 32)
    splits = model.draw_views(2, seed=0)
    hidden = maskops.unpatchify(splits[0].mask[:, :, None].expand(-1, -1, 16).float(), 4, (32, 32)).bool()
    preds = [model(x, splits=splits).preds for x in (images, images.masked_fill(hidden, 9.0))]
    assert torch.equal(preds[0][0], preds[1][0]) and not torch.equal(preds[0][1], preds[1][1])


def test_errors() -> None:
    with pytest.raises(ValueError, match="cell must divide the grid"):
        DMJDConfig(**TINY | {"image_size": 36})
    with pytest.raises(ValueError, match="mask_ratio must be at least"):
        DMJDConfig(**TINY, mask_ratio=0.4)
