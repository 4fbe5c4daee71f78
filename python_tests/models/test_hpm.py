"""HPM (the Works check): the order of losses is told of new photos, and masks of hard patches are harder to paint.

    claim                                            measured   not trained   loss of the ranks turned   whole=False
    rank correlation of told and true losses > 0.5   0.56       0.04          -0.64                      -0.07
    error under hard masks > 1.05 of random masks    1.11       1.01          0.88                       0.89

Other than published the predictor is trained on whole images, as the teacher uses it. Trained on visible patches only (whole=False)
the teacher's order was -0.21 after 250 steps on crops of 64 x 64, too: its predictor never saw a visible patch.
"""

import pytest
import torch
from torch import Tensor

import maskops
from maskops.models.hpm import HPM, HPMConfig, rank_loss
from maskops.testing.works import grey_crops, train
from maskops.train import Step

pytest.importorskip("skimage.data")

TINY = HPMConfig(
    36, 6, 1, dim=48, depth=1, heads=4, mlp_dim=96, decoder_dim=32, decoder_depth=1, decoder_heads=4, decoder_mlp_dim=64,
    decay=0.9,
)  # fmt: skip
STEPS = 160


@pytest.fixture(scope="module")
def model() -> HPM:
    torch.manual_seed(0)
    model, images = HPM(TINY), grey_crops(2000, (0, 0.7), 0, size=36)

    def loss(step: int) -> Tensor:
        if step:
            model.update_teacher()
        return model(images[torch.randint(len(images), (32,))], progress=step / STEPS, seed=step).loss

    train([*model.mae.parameters(), *model.predictor.parameters()], loss, STEPS, 4e-3)
    model.update_teacher()
    return model.requires_grad_(False)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of each row, the mean over rows."""
    ranks = torch.stack([x.argsort(1).argsort(1).double() for x in (a, b)])
    centred = ranks - ranks.mean(2, keepdim=True)
    return float(((centred[0] * centred[1]).sum(1) / (centred[0].norm(dim=1) * centred[1].norm(dim=1))).mean())


def test_the_order_of_losses_is_told(model: HPM) -> None:
    images = grey_crops(400, (0.7, 1), 1, size=36)
    out = model(images, progress=0.0, seed=5)
    told = spearman(model.hardness(images).gather(1, out.split.ids_mask), out.errors)
    assert told > 0.5, f"{told:.3f}"


def test_masks_of_hard_patches_are_harder(model: HPM) -> None:
    images = grey_crops(400, (0.7, 1), 1, size=36)
    hard, random = (model(images, progress=p, seed=5).reconstruction.item() for p in (1.0, 0.0))
    assert hard > 1.05 * random, f"{hard:.4f} against {random:.4f}"


# ---------------------------------------------------------------- exact


def test_counts_are_published() -> None:
    config = HPMConfig()
    assert config.num_keep == 49 and [config.num_hard(p) for p in (0, 0.5, 1)] == [0, 36, 73]


def sample(**change: object) -> tuple[HPM, Tensor]:
    torch.manual_seed(0)
    config = HPMConfig(24, 4, 1, 0.75, 32, 1, 2, 64, 32, 1, 2, 64, **change)
    return HPM(config), torch.randn(3, 1, 24, 24)


def test_the_hardest_are_masked_and_the_count_never_changes() -> None:
    model, images = sample()
    top = model.hardness(images).argsort(1, descending=True)
    for progress in (0.0, 0.3, 1.0):
        split = model(images, progress=progress, seed=1).split
        assert split.ids_keep.shape == (3, 9) and split.mask.gather(1, top[:, : model.config.num_hard(progress)]).all()
    assert model.config.num_hard(1.0) == 13


@pytest.mark.parametrize("whole", [True, False])
def test_losses_and_gradients(whole: bool) -> None:
    model, images = sample(whole=whole)
    out = model(images, progress=0.5, seed=2)
    true = (maskops.patchify(images, 4) - out.pred).square().mean(2).gather(1, out.split.ids_mask)
    torch.testing.assert_close(out.errors, true)
    torch.testing.assert_close(out.loss, out.errors.mean() + out.ranking)
    out.loss.backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in model.mae.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.teacher.parameters())


def test_rank_loss_by_hand() -> None:
    hardness, errors = torch.tensor([[1.0, -1.0, 0.5]], requires_grad=True), torch.tensor([[3.0, 2.0, 2.0]])
    pairs = torch.tensor([2.0, 0.5])  # (0, 1) and (0, 2): equal errors are no pair
    loss = rank_loss(hardness, errors)
    torch.testing.assert_close(loss, -pairs.sigmoid().log().mean())
    loss.backward()
    assert hardness.grad[0, 0] < 0 < hardness.grad[0, 1]
    assert rank_loss(hardness, torch.ones(1, 3)).item() == 0


def test_the_teacher_follows() -> None:
    model, _ = sample(decay=0.75)
    before = model.teacher[1].head.weight.clone()
    with torch.no_grad():
        model.predictor.head.weight.add_(1)
    model.update_teacher()
    torch.testing.assert_close(model.teacher[1].head.weight, before + 0.25)


def test_training_masks_do_not_depend_on_the_number_of_processes() -> None:
    model, images = sample()
    images = torch.randn(4, 1, 24, 24)
    step = Step(torch.tensor([3, 7]), 0, 4, 0.8)
    whole = model.training_loss(images, step)
    halves = [model.training_loss(images[i : i + 2], step._replace(first=i)) for i in (0, 2)]
    torch.testing.assert_close(whole, sum(halves) / 2)
    seen: list[maskops.TokenSplit] = []
    model.mae.encode = lambda images, split=None, encode=model.mae.encode: (seen.append(split), encode(images, split))[
        1
    ]
    model.training_loss(images, step)
    top = model.hardness(images).argsort(1, descending=True)[:, : model.config.num_hard(0.8)]
    assert seen[0].ids_keep.shape == (4, 9) and seen[0].mask.gather(1, top).all()


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"HPMConfig: hard_share must be in \[0, 1\], got 2"):
        HPMConfig(hard_share=2)
