"""What models of image patches share: sizes, and rows of a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import maskops
from maskops import TokenSplit
from maskops._checks import number


@dataclass(frozen=True)
class ImageConfig:
    """Images cut into square patches, of which mask_ratio are masked.  image_size: int or (height, width)."""

    samples: ClassVar[str] = "images"
    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    channels: int = 3
    mask_ratio: float = 0.75

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_whole(self, patch_size=1, channels=1)
        sides = self.image_size if isinstance(self.image_size, tuple | list) else (self.image_size,) * 2
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"{name}: image_size must be an int or two, above 0, got {self.image_size!r}")
        if any(size % self.patch_size or size < self.patch_size for size in self.image_hw):
            raise ValueError(
                f"{name}: image_size must be a multiple of patch_size {self.patch_size}, got {self.image_size}"
            )
        if not 0 <= number(name, "mask_ratio", self.mask_ratio) < 1:
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

    @property
    def num_tokens(self) -> int:
        """Of which some are masked: the patches."""
        return self.num_patches


def check_whole(config: ImageConfig, **least: int) -> None:
    """ValueError unless these fields are whole numbers, of at least so much."""
    for field, low in least.items():
        value = getattr(config, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{type(config).__name__}: {field} must be int, at least {low}, got {value!r}")


def paint_masked(
    images: Tensor, pred: Tensor, split: TokenSplit, patch_size: tuple[int, int], norm_pix: bool
) -> tuple[Tensor, Tensor]:
    """(the visible patches alone, the visible patches with the prediction in the gaps), both as images.  pred [B, N, V].

    With norm_pix the prediction is of normalised patches; it is shown with the mean and deviation of the true patch, as usual.
    """
    patches = maskops.patchify(images, patch_size)
    pred = pred.to(patches.dtype)
    if norm_pix:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        pred = pred * (variance + 1e-6).sqrt() + mean
    masked, size = split.mask[:, :, None], tuple(images.shape[2:])
    visible = maskops.unpatchify(patches.masked_fill(masked, 0), patch_size, size)
    return visible, maskops.unpatchify(torch.where(masked, pred, patches), patch_size, size)


def rows_of(split: TokenSplit, start: int, stop: int) -> TokenSplit:
    """Rows [start, stop) of a split that keeps the same number of tokens in every row."""
    rows = [t[start:stop] for t in (split.ids_keep, split.ids_mask, split.ids_restore, split.num_keep, split.num_mask)]
    cu_seqlens = split.cu_seqlens[start : stop + 1] - split.cu_seqlens[start]
    return TokenSplit(*rows, cu_seqlens, split.max_seqlen, (stop - start) * split.max_seqlen)


def rows_together(splits: Sequence[TokenSplit]) -> TokenSplit:
    """The rows of several splits behind one another; all of them keep the same number of tokens in every row."""
    rows = [torch.cat(parts) for parts in list(zip(*splits, strict=True))[:5]]
    keep, B = splits[0].max_seqlen, len(rows[0])
    cu_seqlens = torch.arange(B + 1, dtype=torch.int32, device=rows[0].device) * keep
    return TokenSplit(*rows, cu_seqlens, keep, B * keep)
