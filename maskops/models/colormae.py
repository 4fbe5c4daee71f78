"""ColorMAE: a masked autoencoder whose masks are coloured noise, so that visible patches come in clumps of a chosen size.

Hinojosa et al., "ColorMAE: Exploring data-independent masking strategies in Masked AutoEncoders", 2024 (arXiv 2407.13036).
B images, N patches, K visible, V values per patch.

The network is the MAE of models/mae.py. Published masks are crops of one stored field of noise, shared by the batch; here every
image draws noise of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

import maskops
from maskops import TokenSplit
from maskops.models.images import rows_of
from maskops.models.mae import MAE, MAEConfig, MAEOutput

if TYPE_CHECKING:
    from maskops.train import Step


@dataclass(frozen=True)
class ColorMAEConfig(MAEConfig):
    """MAEConfig with the colour of the masks ("red", "green", "blue", "purple") and the widths of its filters, in patches."""

    system: ClassVar[str] = "colormae"
    colour: str = "green"
    sigma: tuple[float, ...] | None = None


class ColorMAE(MAE):
    """Masked autoencoder with masks of coloured noise.

        visible = the K patches where filtered noise is highest;  the rest as MAE

    Example:
        >>> model = ColorMAE(ColorMAEConfig.of_size("tiny", image_size=32, patch_size=8))
        >>> model(torch.rand(2, 3, 32, 32), seed=0).split.ids_keep.shape
        torch.Size([2, 4])
    """

    Config = ColorMAEConfig
    config: ColorMAEConfig

    def forward(  # type: ignore[override]
        self, images: Tensor, *, split: TokenSplit | None = None, seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> MAEOutput:  # fmt: skip
        """Mask by coloured noise, unless split says how, encode what is visible, and paint the rest.

        Args:
            images: [B, C, H, W], normalised.
            split: a ready TokenSplit that keeps the same number of patches in every image.
            seed, generator: where the noise is drawn from otherwise, as in maskops.colour_masking.
        """
        c = self.config
        if split is None:
            split = maskops.colour_masking(
                len(images), c.grid, num_keep=c.num_keep, colour=c.colour, sigma=c.sigma, seed=seed, generator=generator,
                device=images.device,
            )  # fmt: skip
        return super().forward(images, split=split)

    def training_loss(self, images: Tensor, step: Step) -> Tensor:
        """The loss of this process's rows of a step of maskops.train."""
        c = self.config
        split = maskops.colour_masking(
            step.total,
            c.grid,
            num_keep=c.num_keep,
            colour=c.colour,
            sigma=c.sigma,
            seed=step.seed,
            device=images.device,
        )
        return self(images, split=rows_of(split, step.first, step.first + len(images))).loss
