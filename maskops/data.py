"""Files of a folder as training samples: images, what scenes and sounds share with them, and which samples each process takes.

Everything is a function of (seed, position), never of a running generator: a resumed run, a run on several processes and any number
of DataLoader workers see the same crops in the same order.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Sampler

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as MAE

# What Pillow raises for a file that it cannot read: unknown format, truncated or damaged data, a decompression bomb.
_UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class EmptyFolderError(ValueError):
    """A folder without a readable image, or without text."""


class Key(NamedTuple):
    """One training sample: image `index` in the crop of `epoch`."""

    epoch: int
    index: int


@dataclass(frozen=True)
class Crop:
    """Random-resized-crop and flip. scale: share of the image's area; ratio: width / height."""

    size: tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        return self.cut(image, self.box(*image.size, rng), rng.random() < self.flip)

    def cut(
        self, image: Image.Image, box: tuple[float, ...], flip: bool, how: Image.Resampling = Image.Resampling.BICUBIC
    ) -> Image.Image:
        height, width = self.size
        out = image.resize((width, height), how, box=box)
        return out.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else out

    def box(self, width: int, height: int, rng: random.Random) -> tuple[float, float, float, float]:
        """Left, top, right, bottom. Ten tries as usual, then the largest centred crop of an allowed ratio."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = rng.randint(0, width - w), rng.randint(0, height - h)
                return left, top, left + w, top + h
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, height * ratio), min(height, width / ratio)
        return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


class FileFolder(Dataset):
    """Files below a folder, one sample each. Item of a Key: (sample, index of an unreadable file or -1).

    Files that cannot be opened are dropped here and listed in `unreadable`: {path: reason}. A file that opens but cannot be decoded
    is found only when it is its turn: the next readable file takes its place, and its index is returned, so that the caller can
    report it.

    unit, file: what samples and files are called; suffixes: of the files; errors: what reading an unreadable one raises.

    Raises:
        EmptyFolderError: no such folder, or no readable file in it.
    """

    unit, file = "images", "image"
    suffixes = SUFFIXES
    errors: tuple[type[Exception], ...] = _UNREADABLE

    def __init__(self, folder: str | Path, seed: int = 0) -> None:
        self.folder, self.seed = Path(folder), seed
        for folder in (self.folder, self.searched()):
            if not folder.is_dir():
                raise EmptyFolderError(f"{folder} is not a folder")
        found = sorted(p for p in self.searched().rglob("*") if p.suffix.lower() in self.suffixes and p.is_file())
        self.unreadable = {path: reason for path in found if (reason := self.why_unreadable(path))}
        self.paths = [path for path in found if path not in self.unreadable]
        if not self.paths:
            what = f"no {self.unit} (looked for {', '.join(sorted(self.suffixes))})"
            if found:
                what = f"none of {len(found)} {self.unit} can be read; {found[0].name}: {self.unreadable[found[0]]}"
            raise EmptyFolderError(f"{self.folder}: {what}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        unreadable = -1
        for offset in range(len(self.paths)):
            # A string seeds by its SHA-512, the same in every process.
            rng = random.Random(f"{self.seed}/{key.epoch}/{key.index}")
            try:
                return self.sample((key.index + offset) % len(self.paths), rng), unreadable
            except self.errors:
                unreadable = key.index if unreadable < 0 else unreadable
        raise EmptyFolderError(f"{self.folder}: none of {len(self.paths)} {self.unit} can be decoded")

    def identity(self) -> dict[str, Any]:
        """What tells these samples from others."""
        names = "\n".join(path.relative_to(self.folder).as_posix() for path in self.paths)
        return {self.unit: len(self), f"{self.file}_names": hashlib.sha256(names.encode()).hexdigest()}

    def searched(self) -> Path:
        """Where the files are looked for."""
        return self.folder

    def why_unreadable(self, path: Path) -> str:
        """The reason why a file cannot be opened, or an empty string.  Quick: it reads the header only."""
        raise NotImplementedError

    def sample(self, index: int, rng: random.Random) -> Tensor:
        """The sample that rng draws from file `index`; raises one of `errors` where it cannot be decoded."""
        raise NotImplementedError


class ImageFolder(FileFolder):
    """Images, cropped: float32 [3, H, W], normalised.  Decoded ones are kept in memory up to cache_mb in each process."""

    def __init__(self, folder: str | Path, crop: Crop, seed: int = 0, cache_mb: int = 256) -> None:
        super().__init__(folder, seed)
        self.crop = crop
        self._cache: dict[int, Image.Image] = {}
        self._cache_left = cache_mb * 2**20

    def identity(self) -> dict[str, Any]:
        return {"crop_scale": list(self.crop.scale)} | super().identity()

    def why_unreadable(self, path: Path) -> str:
        try:
            with Image.open(path) as image:
                return "" if image.width and image.height else "the image is empty"
        except _UNREADABLE as error:
            return str(error)

    def sample(self, index: int, rng: random.Random) -> Tensor:
        return to_tensor(self.crop(self._decoded(index), rng))

    def _decoded(self, index: int) -> Image.Image:
        if index in self._cache:
            return self._cache[index]
        image = load_rgb(self.paths[index])
        size = 3 * image.width * image.height
        if size <= self._cache_left:
            self._cache[index] = image
            self._cache_left -= size
        return image


def load_rgb(path: Path) -> Image.Image:
    """The decoded image in RGB; transparency is laid on white."""
    with Image.open(path) as image:
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image).convert("RGB")
        if image.mode.startswith("I"):
            # 16-bit grey: a plain convert clips at 255.
            image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to float32 [3, H, W], normalised."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    pixels = pixels.permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def to_pixels(images: Tensor) -> Tensor:
    """The inverse of the normalisation: [..., 3, H, W] to values in [0, 1]."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    return (images.float() * std + mean).clamp(0, 1)


class GlobalBatches(Sampler[list[Key]]):
    """For each step from `start` to `stop`: the keys of one process.

    All epochs form one stream of samples, each epoch shuffled anew. Step s takes positions [s * G, (s + 1) * G) of it,
    G = batch_size * processes, and process r takes the r-th part:
    two processes see exactly what one process sees with the doubled batch.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, start: int, stop: int, rank: int = 0, processes: int = 1
    ):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.stop, self.rank, self.processes = start, stop, rank, processes
        self._epoch, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start, self.stop):
            first = (step * self.processes + self.rank) * self.batch_size
            yield [self._key(position) for position in range(first, first + self.batch_size)]

    def _key(self, position: int) -> Key:
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._epoch, self._order = epoch, torch.randperm(self.length, generator=generator)
        return Key(epoch, int(self._order[place]))
