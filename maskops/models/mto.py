"""MTO: mask-token optimisation, a plug-in for masked image models whose encoder sees mask tokens; the host here is a SimMIM.

Choi et al., "Emerging Property of Masked Token for Effective Pre-training", 2024 (arXiv 2404.08330).
Host: Xie et al., "SimMIM", 2022 (arXiv 2111.09886). B images, N patches, K visible, H heads, D width, V values per patch.

The paper's code is not public and its losses are known to us from summaries only. Its ideas: mask tokens shall be unlike any
visible token, masked and visible tokens shall differ in the entropy of their attention in every layer, and visible tokens shall
not aggregate mask tokens (recalibration). Ours are the two formulas of the losses, their directions and weights, the soft
recalibration as a constant, and that patches are masked one by one. How far the paper's faster pre-training is reproduced is told
in the test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import maskops
from maskops import AttentionMask, TokenSplit
from maskops.models.images import ImageConfig
from maskops.nn import PatchEmbed, TokenRestore
from maskops.nn.transformer import Block, Mask, init_linear_and_norm, sincos_positions
from maskops.ops.masked_attention import masked_attention

RECALIBRATIONS = ("none", "soft", "hard")


class MTOOutput(NamedTuple):
    """What MTO.forward returns: loss = reconstruction + singularity * similarity + entropy * entropy_gap, all scalars.

    similarity: mean cosine of the mask token and the visible patches where they enter the encoder.
    entropy_gap: entropy of attention of masked less that of visible queries, in nats, the mean over layers.
    pred [B, N, V], of every patch; split: which patches were visible.
    """

    loss: Tensor
    reconstruction: Tensor
    similarity: Tensor
    entropy_gap: Tensor
    pred: Tensor
    split: TokenSplit


@dataclass(frozen=True)
class MTOConfig(ImageConfig):
    """Sizes of the host, and what is added to it; recalibration "none" and weights 0 leave the SimMIM.

    recalibration: visible queries see masked keys as all others ("none"), with `penalty` off the scores ("soft"), or not ("hard").
    singularity, entropy: weights of the two losses.  norm_pix: paint patches normalised by their mean and deviation.
    """

    mask_ratio: float = 0.6
    dim: int = 768
    depth: int = 12
    heads: int = 12
    recalibration: str = "hard"
    penalty: float = 2.0
    singularity: float = 1.0
    entropy: float = 0.001
    norm_pix: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recalibration not in RECALIBRATIONS:
            raise ValueError(f"MTOConfig: recalibration must be one of {RECALIBRATIONS}, got {self.recalibration!r}")
        if self.depth < 1:
            raise ValueError(f"MTOConfig: depth must be at least 1, got {self.depth}")


class EntropyBlock(Block):
    """A Block that takes a bias and tells the entropy of its attention.  x [B, N, D] -> [B, N, D], [B, H, N]."""

    def forward(self, x: Tensor, mask: Mask = None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, entropy = masked_attention(*self.attn.split_heads(self.norm1(x)), mask, bias=bias, return_entropy=True)
        x = x + self.attn.proj(rearrange(out, "b h n d -> b n (h d)"))
        return x + self.mlp(self.norm2(x)), entropy


class MTO(nn.Module):
    """A SimMIM with optimised mask tokens.

        x = visible patches, and the mask token elsewhere, + positions;  encoder(x), visible queries recalibrated
        loss = |head(x) - pixels| at masked patches + singularity * cos(mask token, visible patches)
               + entropy * (entropy of attention of masked - of visible queries)

    Example:
        >>> model = MTO(MTOConfig(image_size=16, patch_size=4, channels=1, dim=32, depth=2, heads=4))
        >>> out = model(torch.rand(2, 1, 16, 16), seed=0)
        >>> out.pred.shape, out.similarity.shape
        (torch.Size([2, 16, 16]), torch.Size([]))
    """

    def __init__(self, config: MTOConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embed = PatchEmbed(c.patch_size, c.channels, c.dim)
        self.restore = TokenRestore(c.dim)
        self.blocks = nn.ModuleList(EntropyBlock(c.dim, c.heads, 4 * c.dim) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim, eps=1e-6)
        self.head = nn.Linear(c.dim, c.patch_size**2 * c.channels)
        self.register_buffer("pos", sincos_positions(c.grid, c.dim), persistent=False)
        self.apply(init_linear_and_norm)

    def recalibrate(self, masked: Tensor) -> tuple[AttentionMask | None, Tensor | None]:
        """What visible queries see of masked keys, as a mask and a bias of attention.  masked bool [B, N]."""
        c = self.config
        if c.recalibration == "hard":
            sees = torch.tensor([[True, False], [True, True]], device=masked.device)
            return AttentionMask.groups(sees, masked.long()), None
        if c.recalibration == "soft":
            pairs = ~masked[:, None, :, None] & masked[:, None, None, :]
            return None, -c.penalty * pairs.to(self.pos.dtype)
        return None, None

    def encode(self, visible: Tensor, split: TokenSplit) -> tuple[Tensor, Tensor]:
        """Encode visible patches and mask tokens.

        Args:
            visible: [B, K, D], embedded patches without positions.
            split: where they belong.

        Returns:
            latents [B, N, D]; entropy of the attention of every layer, in nats, [layers, B, H, N].
        """
        x = self.restore(visible, split, self.pos)
        mask, bias = self.recalibrate(split.mask)
        found = []
        for block in self.blocks:
            x, entropy = block(x, mask, bias)
            found.append(entropy)
        return self.norm(x), torch.stack(found)

    def forward(
        self, images: Tensor, *, split: TokenSplit | None = None, seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> MTOOutput:  # fmt: skip
        """Mask patches, unless split says which, and paint them.

        Args:
            images: [B, C, H, W].
            split: a ready TokenSplit.
            seed, generator: where the mask is drawn from otherwise, as in maskops.random_masking.
        """
        c = self.config
        if split is None:
            split = maskops.random_masking(
                len(images), c.num_patches, c.mask_ratio, seed=seed, generator=generator, device=images.device
            )
        visible = self.patch_embed(images, split.ids_keep)
        latents, entropy = self.encode(visible, split)
        pred = self.head(latents)
        reconstruction = maskops.masked_patch_loss(pred, images, split, c.patch_size, norm_pix=c.norm_pix, kind="l1")
        # The mask token moves away from the patches, not they from it.
        cosine = F.cosine_similarity(self.restore.mask_token, visible.detach(), dim=-1)
        similarity = _mean(cosine, split.ids_keep >= 0)
        masked = split.mask[:, None].expand_as(entropy)
        gap = _mean(entropy, masked) - _mean(entropy, ~masked)
        loss = reconstruction + c.singularity * similarity + c.entropy * gap
        return MTOOutput(loss, reconstruction, similarity, gap, pred, split)


def _mean(x: Tensor, where: Tensor) -> Tensor:
    """The mean of what is chosen, 0 if nothing is."""
    return (x * where).sum() / where.sum().clamp_min(1)
