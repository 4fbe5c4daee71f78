"""ColorMAE (the Works check)."""

import pytest
import torch
from torch import Tensor

import maskops
from maskops.models.colormae import ColorMAE, ColorMAEConfig
from maskops.testing.works import train

data = pytest.importorskip("skimage.data")

TINY = dict(
    image_size=56, patch_size=4, channels=1, dim=64, depth=2, heads=4, mlp_dim=128, decoder_dim=48, decoder_depth=1,
    decoder_heads=4, decoder_mlp_dim=96, norm_pix=False,
)  # fmt: skip
STEPS = 200


def crops(count: int, rows: tuple[float, float], seed: int) -> Tensor:
    """Squares of grey photos, between two heights.  [count, 1, 56, 56]."""
    generator, found = torch.Generator().manual_seed(seed), []
    photos = [torch.tensor(picture()) for picture in (data.astronaut, data.coffee, data.chelsea, data.rocket)]
    for photo in photos:
        grey = photo.float().mean(-1)[int(rows[0] * len(photo)) : int(rows[1] * len(photo))] / 128 - 1
        squares = grey.unfold(0, 56, 1).unfold(1, 56, 1)
        y, x = (torch.randint(size, (count // len(photos),), generator=generator) for size in squares.shape[:2])
        found.append(squares[y, x])
    return torch.cat(found)[:, None]


def trained(colour: str, seed: int = 0) -> ColorMAE:
    torch.manual_seed(seed)
    model, images = ColorMAE(ColorMAEConfig(**TINY, colour=colour)), crops(2000, (0, 0.7), 0)

    def loss(step: int) -> Tensor:
        return model(images[torch.randint(len(images), (32,))], seed=1000 * seed + step).loss

    train(model.parameters(), loss, STEPS, 3e-3)
    return model.requires_grad_(False)


def test_x():
    images = crops(200, (0.7, 1), 1)
    patches = maskops.patchify(images, 4)
    for colour in ("green", "red", "blue"):
        model = trained(colour)
        for c in ("red", "green", "blue", "purple"):
            split = maskops.colour_masking(200, (14, 14), num_keep=49, colour=c, seed=3)
            seen = maskops.gather_tokens(patches, split.ids_keep).mean((1, 2), keepdim=True)
            mean = ((patches - seen) ** 2).mean(2).gather(1, split.ids_mask).mean()
            print(colour, c, model(images, split=split).loss.item(), mean.item())
