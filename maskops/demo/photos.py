"""The demo's photos, from the wheels of scikit-image and scikit-learn, each cut into a training and a held-out part."""

from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from maskops.data import load_rgb, to_tensor

SHORT_SIDE = 256  # photos are shrunk to this, so that a small crop shows more than texture
HELD_OUT_WIDTH = 96  # the right edge of every shrunk photo, never trained on

# Files inside the wheels; nothing is downloaded. Left out: drawings, scans, texture samples, the other half of a stereo pair.
PHOTOS = {
    "skimage": (
        "data",
        ("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "hubble_deep_field.jpg",
         "moon.png", "motorcycle_left.png", "rocket.jpg"),
    ),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}  # fmt: skip


def find_photos() -> list[Path]:
    """Paths of the photos that are installed; ValueError if there are none."""
    paths = []
    for package, (folder, names) in PHOTOS.items():
        root = Path(find_spec(package).origin).parent / folder
        paths += [root / name for name in names if (root / name).exists()]
    if not paths:
        raise ValueError("scikit-image and scikit-learn are installed without their photos")
    return paths


def cut_photos(folder: Path, size: int) -> Tensor:
    """Write the training part of every photo to `folder`; return the held-out crops, [n, 3, size, size] normalised.

    The two parts of a photo share no pixel of the original: the photo is cut first and shrunk afterwards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    crops = []
    for path in find_photos():
        photo = load_rgb(path)
        scale = SHORT_SIDE / min(photo.size)
        cut = photo.width - round(HELD_OUT_WIDTH / scale)
        train = photo.crop((0, 0, cut, photo.height))
        train.resize((round(cut * scale), round(photo.height * scale)), Image.Resampling.LANCZOS).save(
            folder / f"{path.stem}.png"
        )
        crops += _squares(photo.crop((cut, 0, photo.width, photo.height)), size)
    return torch.stack(crops)


def _squares(strip: Image.Image, size: int) -> list[Tensor]:
    """Squares of the strip's width, one below the other without overlap, shrunk to size x size."""
    side = strip.width
    tops = range(0, strip.height - side + 1, side)
    boxes = [(0, top, side, top + side) for top in tops]
    return [to_tensor(strip.resize((size, size), Image.Resampling.LANCZOS, box=box)) for box in boxes]
