"""DMJD: two masks of each image that share no visible patch, and a loss on the visible patches beside that on the masked ones.

Ma et al., "Disjoint Masking with Joint Distillation for Efficient Masked Image Modeling", 2022 (arXiv 2212.00433).
B images, N patches, K visible, D encoder width, V values per patch.

The network is the MAE of models/mae.py with pixels as targets. The published one has masked convolutions in front of the encoder
and histograms of gradients as targets, and draws one random order for all images of a batch; here every image has its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import maskops
from maskops import TokenSplit
from maskops.models.images import rows_of
from maskops.models.mae import MAE, MAEConfig
from maskops.nn.transformer import init_linear_and_norm

if TYPE_CHECKING:
    from maskops.train import Step


class DMJDOutput(NamedTuple):
    """What DMJD.forward returns.

    loss = masked_loss + theta visible_loss, scalars, each the mean of the two views; preds: the decoder's, [B, N, V] of each view;
    splits: which patches were visible in each view.
    """

    loss: Tensor
    masked_loss: Tensor
    visible_loss: Tensor
    preds: tuple[Tensor, Tensor]
    splits: tuple[TokenSplit, TokenSplit]


@dataclass(frozen=True)
class DMJDConfig(MAEConfig):
    """MAEConfig with the published mask ratio.

    cell: patches along the side of a cell, which is masked whole; theta: weight of the loss on visible patches.
    """

    system: ClassVar[str] = "dmjd"
    mask_ratio: float = 0.6
    cell: int = 2
    theta: float = 1.0

    def __post_init__(self) -> None:
        if self.cell < 1 or any(size % self.cell for size in self.grid):
            raise ValueError(f"DMJDConfig: cell must divide the grid {self.grid}, got {self.cell}")
        super().__post_init__()
        if self.mask_ratio < 0.5:
            raise ValueError(
                f"DMJDConfig: mask_ratio must be at least 0.5 for two disjoint views, got {self.mask_ratio}"
            )

    @property
    def cells(self) -> tuple[int, int]:
        """Cells along height and width."""
        return self.grid[0] // self.cell, self.grid[1] // self.cell

    @property
    def keep_cells(self) -> int:
        """How many cells of a view stay visible: rounded down, as published."""
        return int(self.cells[0] * self.cells[1] * (1 - self.mask_ratio))

    @property
    def num_keep(self) -> int:
        return self.keep_cells * self.cell**2


class VisibleHead(nn.Module):
    """Predict a visible patch from its own latent: an MLP of three layers plus a linear branch.  [B, K, D] -> [B, K, V]."""

    def __init__(self, dim: int, values: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, values))
        self.linear = nn.Linear(dim, values)
        self.apply(init_linear_and_norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + self.linear(x)


class DMJD(MAE):
    """Masked autoencoder on two disjoint views of each image.

        cells in a random order: view 1 sees the first k, view 2 the next k;  so each patch is masked in one view at least
        masked_loss  = squared error of the decoder at the masked patches
        visible_loss = smooth l1 (beta 2) of a head on the encoder's latents, at the visible patches
        loss = masked_loss + theta visible_loss

    Example:
        >>> model = DMJD(DMJDConfig.of_size("tiny", image_size=32, patch_size=4))
        >>> out = model(torch.rand(2, 3, 32, 32), seed=0)
        >>> [split.ids_keep.shape[1] for split in out.splits], bool((out.splits[0].mask | out.splits[1].mask).all())
        ([24, 24], True)
    """

    Config = DMJDConfig
    config: DMJDConfig

    def __init__(self, config: DMJDConfig) -> None:
        super().__init__(config)
        self.visible_head = VisibleHead(config.dim, config.patch_size**2 * config.channels)

    def draw_views(
        self, B: int, *, seed: int | Tensor | None = None, generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> tuple[TokenSplit, TokenSplit]:  # fmt: skip
        """Two splits of B images whose visible cells are disjoint, each with num_keep visible patches."""
        c, (h, w) = self.config, self.config.cells
        views = maskops.disjoint_masking(
            B, h * w, (c.keep_cells, c.keep_cells), seed=seed, generator=generator, device=device
        )
        first, second = (
            maskops.split_tokens(
                view.mask.view(B, h, 1, w, 1).expand(-1, -1, c.cell, -1, c.cell).reshape(B, c.num_patches),
                max_seqlen=c.num_keep,
                max_masked=c.num_patches - c.num_keep,
            )
            for view in views
        )
        return first, second

    def forward(  # type: ignore[override]
        self, images: Tensor, *, splits: tuple[TokenSplit, TokenSplit] | None = None, seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> DMJDOutput:  # fmt: skip
        """Encode two views, unless splits says which disjoint ones, and predict the masked and the visible patches of both.

        Args:
            images: [B, C, H, W], normalised.
            splits: two ready TokenSplits that keep the same number of patches in every image.
            seed, generator: where the views are drawn from otherwise, as in maskops.disjoint_masking.
        """
        c = self.config
        if splits is None:
            splits = self.draw_views(len(images), seed=seed, generator=generator, device=images.device)
        preds, losses = [], []
        for split in splits:
            latent = self.encode(images, split)
            seen = self.visible_head(latent[:, 1:])
            # In the place of their patches, so that the loss can read its targets from the image.
            seen = maskops.restore_tokens(seen, split, seen.new_zeros(seen.shape[2]))
            preds.append(self.decode(latent, split))
            options = {"patch_size": self.patch_size, "norm_pix": c.norm_pix}
            masked = maskops.masked_patch_loss(preds[-1], images, split, **options)
            visible = maskops.masked_patch_loss(
                seen, images, split, **options, kind="smooth_l1", beta=2.0, on="visible"
            )
            losses.append(torch.stack([masked, visible]))
        masked_loss, visible_loss = (losses[0] + losses[1]).div(2).unbind()
        return DMJDOutput(masked_loss + c.theta * visible_loss, masked_loss, visible_loss, tuple(preds), splits)

    def training_loss(self, images: Tensor, step: Step) -> Tensor:
        """The loss of this process's rows of a step of maskops.train."""
        views = self.draw_views(step.total, seed=step.seed, device=images.device)
        first, second = (rows_of(split, step.first, step.first + len(images)) for split in views)
        return self(images, splits=(first, second)).loss
