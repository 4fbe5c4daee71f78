"""MultiMAE (the Works check): depth and classes are read off the colours of a real stereo picture; counts and gradients are exact.

    claim, new crops, only colours visible                 measured        not trained
    depth error < 0.95 of that from wrong colours          0.85            1.00
    class error < 0.95 of that from wrong colours          0.88            1.00

Crops are 32 x 32 of the picture at half its size; depth is its disparity, classes are four steps of it. New crops are of the same
picture, at other places than those trained on, which they overlap. Not shown: on rows of the picture that no crop of the
training touched, colours did not help the depth (0.975 with the true, 0.968 with wrong colours, 400 steps).
"""

import pytest
import torch
from torch import Tensor

import maskops
from maskops.models.multimae import MultiMAE, MultiMAEConfig, MultiMAEOutput
from maskops.testing.works import train

data = pytest.importorskip("skimage.data")

STEREO = MultiMAEConfig(
    32,
    8,
    num_keep=16,
    classes=4,
    class_dim=8,
    dim=48,
    depth=1,
    heads=4,
    decoder_dim=32,
    decoder_depth=0,
    decoder_heads=4,
)
N = STEREO.num_patches
STEPS = 160


def crops(count: int, generator: torch.Generator) -> list[Tensor]:
    """Colours [count, 3, 32, 32], standardised disparity [count, 1, 32, 32], its step [count, 32, 32]."""
    left, _, disparity = (torch.tensor(x) for x in data.stereo_motorcycle())
    known = disparity.isfinite()
    depth = torch.where(known, disparity, disparity[known].median())[::2, ::2]
    depth = (depth - depth.mean()) / depth.std()
    rgb, steps = left.permute(2, 0, 1)[:, ::2, ::2] / 128 - 1, torch.bucketize(depth, torch.tensor([-0.6, 0.0, 0.7]))
    y, x = (torch.randint(size - 31, (count,), generator=generator) for size in depth.shape)
    at = y[:, None, None] + torch.arange(32)[:, None], x[:, None, None] + torch.arange(32)
    return [rgb[:, at[0], at[1]].transpose(0, 1), depth[at][:, None], steps[at]]


def only_colours(batch: int) -> maskops.TokenSplit:
    """All patches of colour are visible, no others."""
    mask = torch.arange(3 * N).expand(batch, -1) >= N
    return maskops.split_tokens(mask, max_seqlen=N, max_masked=2 * N)


@pytest.fixture(scope="module")
def told() -> tuple[MultiMAEOutput, MultiMAEOutput]:
    """Of new crops: from their own colours, and from those of other crops."""
    torch.manual_seed(0)
    model, known = MultiMAE(STEREO), crops(3000, torch.Generator().manual_seed(0))

    def loss(step: int) -> Tensor:
        rows = torch.randint(3000, (32,))
        return model(*(x[rows] for x in known), seed=step).loss

    train(model.parameters(), loss, STEPS, 6e-3)
    rgb, depth, classes = crops(300, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return tuple(model(x, depth, classes, split=only_colours(300)) for x in (rgb, rgb.roll(1, 0)))


def test_depth_comes_from_colours(told: tuple) -> None:
    true, wrong = (out.losses["depth"].item() for out in told)
    assert true < 0.95 * wrong, f"{true:.4f} against {wrong:.4f}"


def test_classes_come_from_colours(told: tuple) -> None:
    true, wrong = (out.losses["semseg"].item() for out in told)
    assert true < 0.95 * wrong, f"{true:.4f} against {wrong:.4f}"


# ---------------------------------------------------------------- exact


def sample() -> tuple[MultiMAE, list[Tensor]]:
    torch.manual_seed(0)
    config = MultiMAEConfig(
        32, 8, num_keep=16, classes=4, class_dim=8, dim=32, depth=1, heads=2, decoder_dim=32, decoder_heads=2
    )
    return MultiMAE(config), crops(3, torch.Generator().manual_seed(2))


def test_published_counts() -> None:
    c = MultiMAEConfig()
    assert (c.num_patches, c.num_keep) == (196, 98)


def test_the_drawn_split_keeps_the_number() -> None:
    model, inputs = sample()
    split = model(*inputs, seed=3).split
    want = maskops.modality_masking(3, (N, N, N), 16, seed=3)
    assert (split.num_keep == 16).all() and torch.equal(split.ids_keep, want.ids_keep)


def test_losses_by_hand() -> None:
    """Each image's masked patches, then the images that have any; a modality without masked patches has loss 0."""
    model, (rgb, depth, classes) = sample()
    out = model(rgb, depth, classes, seed=4)
    masks = out.split.mask.view(3, 3, N)
    errors = (out.preds["depth"] - maskops.patchify(depth, 8)).abs().mean(2)
    want = torch.stack([errors[b][masks[b, 1]].mean() for b in range(3)]).mean()
    torch.testing.assert_close(out.losses["depth"], want)
    logits = out.preds["semseg"].view(3, N, 64, 4).log_softmax(-1)
    labels = maskops.patchify(classes[:, None].float(), 8).long()
    nll = -logits.gather(-1, labels[..., None])[..., 0].mean(2)
    want = torch.stack([nll[b][masks[b, 2]].mean() for b in range(3)]).mean()
    torch.testing.assert_close(out.losses["semseg"], want)
    assert model(rgb, depth, classes, split=only_colours(3)).losses["rgb"].item() == 0
    torch.testing.assert_close(out.loss, sum(out.losses.values()))


def test_visible_predictions_get_no_gradient_and_masked_inputs_are_not_seen() -> None:
    model, (rgb, depth, classes) = sample()
    out = model(rgb, depth, classes, seed=5)
    grads = torch.autograd.grad(out.loss, list(out.preds.values()), retain_graph=True)
    masks = out.split.mask.view(3, 3, N)
    for i, grad in enumerate(grads):
        assert torch.equal((grad != 0).any(2), masks[:, i])
    out.loss.backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in model.parameters())
    hidden = masks[:, 1, :, None]
    patches = maskops.patchify(depth, 8)
    edited = maskops.unpatchify(torch.where(hidden, torch.randn_like(patches), patches), 8, (32, 32))
    other = model(rgb, edited, classes, split=out.split)
    assert all(torch.equal(out.preds[task], other.preds[task]) for task in out.preds)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"MultiMAEConfig: num_keep must be in \[1, 48\], got 49"):
        MultiMAEConfig(32, 8, num_keep=49)
