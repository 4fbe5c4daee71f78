"""Pictures with depth and classes as training samples: the same crop of three aligned images."""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskops.data import Crop, ImageFolder, load_rgb, to_tensor

PARTS = ("rgb", "depth", "semseg")


class SceneFolder(ImageFolder):
    """A folder with the folders rgb, depth and semseg, in which the images of a scene have the same name but for its suffix.

    Item of a Key: (float32 [5, H, W]: colours normalised, depth as it stands, classes; index of an undecodable scene or -1).
    Depth is a grey image of 8, 16 or 32 bits, whole numbers or floats; classes are a grey image or the places of a palette.
    """

    unit, file = "scenes", "scene"

    def __init__(self, folder: str | Path, crop: Crop, seed: int = 0, cache_mb: int = 256) -> None:
        self._parts = {part: self._images(Path(folder) / part) for part in PARTS[1:]}
        super().__init__(folder, crop, seed, cache_mb)

    def searched(self) -> Path:
        return self.folder / PARTS[0]

    def why_unreadable(self, path: Path) -> str:
        sizes = []
        for part in PARTS:
            found = self._image(path, part)
            if found is None:
                return f"no {part}/{path.relative_to(self.searched()).with_suffix('')}.*"
            reason = super().why_unreadable(found)
            if reason:
                return f"{part}: {reason}"
            with Image.open(found) as image:
                sizes.append(image.size)
                if part != PARTS[0] and len(image.getbands()) > 1:
                    return f"{part} has {len(image.getbands())} channels, not one"
        return "" if len(set(sizes)) == 1 else f"sizes differ: {', '.join(f'{w} x {h}' for w, h in sizes)}"

    def sample(self, index: int, rng: random.Random) -> Tensor:
        rgb, depth, classes = self._scene(index)
        box, flip = self.crop.box(*rgb.size, rng), rng.random() < self.crop.flip
        other = (self.crop.cut(depth, box, flip, Image.Resampling.BILINEAR),
                 self.crop.cut(classes, box, flip, Image.Resampling.NEAREST))  # fmt: skip
        grey = torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in other]))
        return torch.cat([to_tensor(self.crop.cut(rgb, box, flip)), grey])

    def _scene(self, index: int) -> tuple[Image.Image, Image.Image, Image.Image]:
        path = self.paths[index]
        depth, classes = (self._image(path, part) for part in PARTS[1:])
        with Image.open(depth) as image:
            # By way of numpy: Pillow clips 16 bits when it converts them.
            values = np.asarray(image, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError(f"{depth} is not finite")
        with Image.open(classes) as image:
            ids = np.asarray(image)
        if not (np.isfinite(ids) & (ids == np.floor(ids)) & (np.abs(ids) < 2**24)).all():
            raise ValueError(f"{classes} holds no whole numbers below 2^24")
        return load_rgb(path), Image.fromarray(values), Image.fromarray(ids.astype(np.int32))

    def _image(self, path: Path, part: str) -> Path | None:
        """The image of this name in a part's folder."""
        return path if part == PARTS[0] else self._parts[part].get(path.relative_to(self.searched()).with_suffix(""))

    @classmethod
    def _images(cls, folder: Path) -> dict[Path, Path]:
        """The images below a folder by their names without the suffix; of two, the last one."""
        found = (p for p in sorted(folder.rglob("*")) if p.suffix.lower() in cls.suffixes and p.is_file())
        return {p.relative_to(folder).with_suffix(""): p for p in found}
