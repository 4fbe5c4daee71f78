"""What models of image patches share: their sizes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageConfig:
    """Images cut into square patches, of which mask_ratio are masked.  image_size: int or (height, width)."""

    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    channels: int = 3
    mask_ratio: float = 0.75

    def __post_init__(self) -> None:
        name = type(self).__name__
        if any(size % self.patch_size or size < self.patch_size for size in self.image_hw):
            raise ValueError(
                f"{name}: image_size must be a multiple of patch_size {self.patch_size}, got {self.image_size}"
            )
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"{name}: mask_ratio must be in [0, 1), got {self.mask_ratio}")

    @property
    def image_hw(self) -> tuple[int, int]:
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else tuple(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return self.image_hw[0] // self.patch_size, self.image_hw[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]
