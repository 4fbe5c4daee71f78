"""What models of image patches share: sizes, rows of a split, and masks of rectangles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import maskops
from maskops import TokenSplit


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


def rows_of(split: TokenSplit, start: int, stop: int) -> TokenSplit:
    """Rows [start, stop) of a split that keeps the same number of tokens in every row."""
    rows = [t[start:stop] for t in (split.ids_keep, split.ids_mask, split.ids_restore, split.num_keep, split.num_mask)]
    cu_seqlens = split.cu_seqlens[start : stop + 1] - split.cu_seqlens[start]
    return TokenSplit(*rows, cu_seqlens, split.max_seqlen, (stop - start) * split.max_seqlen)


def block_masking(
    B: int, grid: tuple[int, int], num_mask: int, *, smallest: int = 4, aspect: float = 0.3, tries: int = 10,
    generator: torch.Generator | None = None, device: torch.device | str = "cpu",
) -> TokenSplit:  # fmt: skip
    """Mask rectangles of patches, of any overlap, until exactly num_mask of each image are masked.

        while some are left:  area ~ U(smallest, left);  h / w ~ exp U(log aspect, -log aspect), rounded, less than the grid's;
            a uniform place;  taken if it masks 1 to `left` patches more; the first that fits of `tries` draws
        if none of them fits: what is left is drawn from the unmasked patches one by one

    Written in PyTorch for all images at once, not a kernel: a dozen rounds of small tensors, each of which asks the device whether
    any image has patches left.

    Args:
        B, grid: images, patches along height and width.
        num_mask: of every image, in [0, h w].
        smallest, aspect, tries: of the law above; the defaults are CAE's. aspect in (0, 1].
        generator, device: where to draw; the generator is the device's.

    Returns:
        TokenSplit, ids ascending; nothing in it is differentiable.

    Raises:
        ValueError: num_mask, aspect or tries out of range.

    Source:
        Bao et al., BEiT, 2021 (arXiv 2106.08254); exact count: Chen et al., Context Autoencoder, 2022 (arXiv 2202.03026).

    Example:
        >>> split = block_masking(2, (14, 14), 98)
        >>> split.num_mask.tolist()
        [98, 98]
    """
    h, w = grid
    for name, found, low, high in (("num_mask", num_mask, 0, h * w), ("tries", tries, 1, 2**30)):
        if not low <= found <= high:
            raise ValueError(f"block_masking: {name} must be in [{low}, {high}], got {found}")
    if not 0 < aspect <= 1:
        raise ValueError(f"block_masking: aspect must be in (0, 1], got {aspect}")
    mask = torch.zeros(B, h, w, dtype=torch.bool, device=device)
    left = torch.full((B,), num_mask, device=device)
    more = left > 0
    while more.any():
        draws = torch.rand(4, B, tries, generator=generator, device=device)
        found, any_fits = _rectangle(mask, left, draws, smallest, aspect)
        more &= any_fits
        mask |= found & more[:, None, None]
        left = num_mask - mask.sum((1, 2))
        more &= left > 0
    noise = torch.rand(B, h * w, generator=generator, device=device) + 2 * mask.flatten(1)
    rest = noise.argsort(1).argsort(1) < left[:, None]
    return maskops.split_tokens(mask.flatten(1) | rest, max_seqlen=h * w - num_mask, max_masked=num_mask)


def _rectangle(mask: Tensor, left: Tensor, draws: Tensor, smallest: int, aspect: float) -> tuple[Tensor, Tensor]:
    """The first rectangle of each image that fits: bool [B, h, w]; and whether any does, [B].  draws [4, B, tries] in [0, 1)."""
    B, h, w = mask.shape
    area = smallest + draws[0] * (left[:, None] - smallest)
    ratio = torch.exp((2 * draws[1] - 1) * math.log(aspect))
    height, width = ((area * r).sqrt().round().long() for r in (ratio, 1 / ratio))
    inside = (height < h) & (width < w)
    top = (draws[2] * (h - height + 1)).long()
    start = (draws[3] * (w - width + 1)).long()
    # Sums over all rectangles from the corner: the masked patches of any rectangle are four of them.
    sums = F.pad(mask.long().cumsum(1).cumsum(2), (1, 0, 1, 0))
    row = torch.arange(B, device=mask.device)[:, None]
    # Those that are not inside are refused below; they only need places that exist.
    a, b = top.clamp(0, h), (top + height).clamp(0, h)
    c, d = start.clamp(0, w), (start + width).clamp(0, w)
    masked = sums[row, b, d] - sums[row, a, d] - sums[row, b, c] + sums[row, a, c]
    new = height * width - masked
    fits = inside & (new > 0) & (new <= left[:, None])
    first = fits.int().argmax(1, keepdim=True)
    a, b, c, d = (x.gather(1, first)[:, :, None] for x in (a, b, c, d))
    y, x = torch.arange(h, device=mask.device)[:, None], torch.arange(w, device=mask.device)
    return (y >= a) & (y < b) & (x >= c) & (x < d), fits.any(1)
