"""HPM (the Works check): the predicted order of losses is the true one on new photos, and masks of hard patches are harder.

TABLE
"""

import pytest
import torch
from torch import Tensor

import maskops
from maskops.models.hpm import HPM, HPMConfig, rank_loss
from maskops.testing.works import train

data = pytest.importorskip("skimage.data")

TINY = HPMConfig(
    32, 4, 1, dim=64, depth=2, heads=4, mlp_dim=128, decoder_dim=48, decoder_depth=1, decoder_heads=4, decoder_mlp_dim=96,
    decay=0.95,
)  # fmt: skip
STEPS = 300


def crops(count: int, rows: tuple[float, float], seed: int) -> Tensor:
    """Squares of grey photos, between two heights.  [count, 1, 32, 32]."""
    generator, found = torch.Generator().manual_seed(seed), []
    photos = [torch.tensor(picture()) for picture in (data.astronaut, data.coffee, data.chelsea, data.rocket)]
    for photo in photos:
        grey = photo.float().mean(-1)[int(rows[0] * len(photo)) : int(rows[1] * len(photo))] / 128 - 1
        squares = grey.unfold(0, 32, 1).unfold(1, 32, 1)
        y, x = (torch.randint(size, (count // len(photos),), generator=generator) for size in squares.shape[:2])
        found.append(squares[y, x])
    return torch.cat(found)[:, None]


def trained(seed: int) -> HPM:
    torch.manual_seed(seed)
    model, images = HPM(TINY), crops(2000, (0, 0.7), 0)

    def loss(step: int) -> Tensor:
        if step:
            model.update_teacher()
        return model(images[torch.randint(len(images), (32,))], progress=step / STEPS, seed=1000 * seed + step).loss

    train([*model.mae.parameters(), *model.predictor.parameters()], loss, STEPS, 2e-3)
    model.update_teacher()
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=[0, 1])
def model(request: pytest.FixtureRequest) -> HPM:
    return trained(request.param)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of each row, the mean over rows."""
    ranks = torch.stack([x.argsort(1).argsort(1).double() for x in (a, b)])
    centred = ranks - ranks.mean(2, keepdim=True)
    return float(((centred[0] * centred[1]).sum(1) / (centred[0].norm(dim=1) * centred[1].norm(dim=1))).mean())


def test_the_order_of_losses_is_told(model: HPM) -> None:
    images = crops(400, (0.7, 1), 1)
    out = model(images, progress=0.0, seed=5)
    student = spearman(out.hardness, out.errors)
    teacher = spearman(model.hardness(images).gather(1, out.split.ids_mask), out.errors)
    print("spearman", student, teacher)
    assert student > 0.5 and teacher > 0.5, f"student {student:.3f}, teacher {teacher:.3f}"


def test_masks_of_hard_patches_are_harder(model: HPM) -> None:
    images = crops(400, (0.7, 1), 1)
    hard, random = (model(images, progress=p, seed=5).reconstruction.item() for p in (1.0, 0.0))
    print("ratio", hard / random)
    assert hard > 1.05 * random, f"{hard:.4f} against {random:.4f}"
