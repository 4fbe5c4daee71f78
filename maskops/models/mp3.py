"""MP3: tell where each patch of an image was, from what it shows and from some of the others.

Zhai et al., "Position Prediction as an Effective Pretraining Strategy", 2022 (arXiv 2207.07611).
B images, N patches, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskops
from maskops import AttentionMask, TokenSplit
from maskops.models.images import ImageConfig
from maskops.nn import PatchEmbed
from maskops.nn.transformer import Transformer


class MP3Output(NamedTuple):
    """What MP3.forward returns.  loss: scalar; logits [B, N, N], place by place; split: which patches are context (kept)."""

    loss: Tensor
    logits: Tensor
    split: TokenSplit


@dataclass(frozen=True)
class MP3Config(ImageConfig):
    """Sizes of an MP3; the defaults are those of ViT-B.  mask_ratio: eta, the share of patches that are no context."""

    dim: int = 768
    depth: int = 12
    heads: int = 12


class MP3(nn.Module):
    """Position prediction.

        x = patches without positions;  in every layer queries are all patches, keys and values the context patches only
        loss = cross-entropy of each patch's place, one of N, over all patches

    Example:
        >>> model = MP3(MP3Config(image_size=16, patch_size=4, channels=1, dim=32, depth=2, heads=4))
        >>> model(torch.rand(2, 1, 16, 16), seed=0).logits.shape
        torch.Size([2, 16, 16])
    """

    def __init__(self, config: MP3Config) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embed = PatchEmbed(c.patch_size, c.channels, c.dim)
        self.encoder = Transformer(c.dim, c.depth, c.heads)
        self.head = nn.Linear(c.dim, c.num_patches)

    def encode(self, images: Tensor, split: TokenSplit | None = None, pos: Tensor | None = None) -> Tensor:
        """Encode all patches, attending to the kept ones only, or to all without a split.

        Args:
            images: [B, C, H, W].
            split: the context.
            pos: [N, D], for fine-tuning with positions; pre-training has none.

        Returns:
            [B, N, D].
        """
        context = None if split is None else AttentionMask.keys(~split.mask)
        return self.encoder(self.patch_embed(images, pos=pos), context)

    def forward(
        self, images: Tensor, *, split: TokenSplit | None = None, seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> MP3Output:  # fmt: skip
        """Draw a context, unless split names one, and predict the place of every patch.  images [B, C, H, W]."""
        c = self.config
        if split is None:
            split = maskops.random_masking(
                len(images), c.num_patches, c.mask_ratio, seed=seed, generator=generator, device=images.device
            )
        logits = self.head(self.encode(images, split))
        places = torch.arange(c.num_patches, device=images.device).expand(len(images), -1)
        return MP3Output(F.cross_entropy(logits.float().mT, places), logits, split)
