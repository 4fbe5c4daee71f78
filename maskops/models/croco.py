"""CroCo: paint the masked patches of one view of a scene with the help of another view.

Weinzaepfel et al., "CroCo: Self-Supervised Pre-training for 3D Vision Tasks by Cross-View Completion", 2022 (arXiv 2210.10716).
Positions are the fixed table of v1. B image pairs, N patches, K visible, D encoder width, V values per patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import maskops
from maskops import TokenSplit
from maskops.models.images import ImageConfig
from maskops.nn import PatchEmbed, TokenRestore
from maskops.nn.transformer import Attention, CrossBlock, Transformer, init_linear_and_norm, sincos_positions


class CroCoOutput(NamedTuple):
    """What CroCo.forward returns.  loss: scalar; pred [B, N, V], of every patch; split: which patches were visible."""

    loss: Tensor
    pred: Tensor
    split: TokenSplit


@dataclass(frozen=True)
class CroCoConfig(ImageConfig):
    """Sizes of a CroCo; the defaults are the published ones.  norm_pix: paint patches normalised by their mean and deviation."""

    mask_ratio: float = 0.9
    dim: int = 768
    depth: int = 12
    heads: int = 12
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    norm_pix: bool = True

    @property
    def num_keep(self) -> int:
        """How many patches stay visible: the number of masked ones is rounded down, as published."""
        return self.num_patches - int(self.mask_ratio * self.num_patches)


class CroCoBlock(nn.Module):
    """Self-attention, then attention to the other view, then an MLP.  x [B, N, D], other [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.cross = CrossBlock(dim, heads, 4 * dim)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.cross(x + self.attn(self.norm(x)), other)


class CroCo(nn.Module):
    """Cross-view completion.

        first = encoder(visible patches of view 1);  second = encoder(all patches of view 2), the same weights
        loss = squared error of the masked patches of view 1, painted from first and, by cross-attention, second

    Example:
        >>> model = CroCo(CroCoConfig(32, 8, dim=32, depth=1, heads=2, decoder_dim=32, decoder_depth=1, decoder_heads=2))
        >>> out = model(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32), seed=0)
        >>> out.pred.shape, int(out.split.mask.sum(1)[0])
        (torch.Size([2, 16, 192]), 14)
    """

    def __init__(self, config: CroCoConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embed = PatchEmbed(c.patch_size, c.channels, c.dim)
        self.encoder = Transformer(c.dim, c.depth, c.heads)
        self.decoder_embed = nn.Linear(c.dim, c.decoder_dim)
        self.restore = TokenRestore(c.decoder_dim)
        self.decoder = nn.ModuleList(CroCoBlock(c.decoder_dim, c.decoder_heads) for _ in range(c.decoder_depth))
        self.decoder_norm = nn.LayerNorm(c.decoder_dim, eps=1e-6)
        self.head = nn.Linear(c.decoder_dim, c.patch_size**2 * c.channels)
        self.register_buffer("pos", sincos_positions(c.grid, c.dim), persistent=False)
        self.register_buffer("decoder_pos", sincos_positions(c.grid, c.decoder_dim), persistent=False)
        self.apply(init_linear_and_norm)

    def encode(self, images: Tensor, split: TokenSplit | None = None) -> Tensor:
        """Encode the visible patches, or all of them without a split.  [B, C, H, W] -> [B, K, D]."""
        return self.encoder(self.patch_embed(images, None if split is None else split.ids_keep, pos=self.pos))

    def decode(self, first: Tensor, split: TokenSplit, second: Tensor) -> Tensor:
        """Paint view 1.  first [B, K, D] and second [B, N, D], of encode -> [B, N, V]."""
        x = self.restore(self.decoder_embed(first), split, self.decoder_pos)
        other = self.decoder_embed(second) + self.decoder_pos
        for block in self.decoder:
            x = block(x, other)
        return self.head(self.decoder_norm(x))

    def forward(
        self, first: Tensor, second: Tensor, *, split: TokenSplit | None = None, seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> CroCoOutput:  # fmt: skip
        """Mask view 1, unless split says how, and paint it.

        Args:
            first, second: the views, [B, C, H, W].
            split: a ready TokenSplit of view 1.
            seed, generator: where the mask is drawn from otherwise, as in maskops.random_masking.
        """
        c = self.config
        if split is None:
            split = maskops.random_masking(
                len(first), c.num_patches, num_keep=c.num_keep, seed=seed, generator=generator, device=first.device
            )
        pred = self.decode(self.encode(first, split), split, self.encode(second))
        loss = maskops.masked_patch_loss(pred, first, split, c.patch_size, norm_pix=c.norm_pix)
        return CroCoOutput(loss, pred, split)
