"""CAE: an encoder that sees the visible patches only, a regressor that guesses the latents of the masked ones, a decoder that names
their codes.

Chen et al., "Context Autoencoder for Self-Supervised Representation Learning", 2022 (arXiv 2202.03026).
B images, N patches, K visible, M masked, D width.

Simpler than the published code: no class token, no drop-path, positions enter each part once, at its input, and the codes come from
outside (published: the 8192 of DALL-E's tokenizer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskops
from maskops import TokenSplit
from maskops.models.images import ImageConfig
from maskops.nn import PatchEmbed
from maskops.nn.transformer import CrossBlock, Transformer, init_linear_and_norm, sincos_positions


class CAEOutput(NamedTuple):
    """What CAE.forward returns, of the masked patches split.ids_mask.

    loss: scalar; logits [B, M, codes]; latents, target [B, M, D]: guessed, and encoded from the masked patches (no gradient).
    """

    loss: Tensor
    logits: Tensor
    latents: Tensor
    target: Tensor
    split: TokenSplit


@dataclass(frozen=True)
class CAEConfig(ImageConfig):
    """Sizes of a CAE; the defaults are those of the published base model.  align: the weight of the alignment loss."""

    mask_ratio: float = 0.5
    codes: int = 8192
    dim: int = 768
    depth: int = 12
    heads: int = 12
    regressor_depth: int = 4
    decoder_depth: int = 4
    align: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("codes", "regressor_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"CAEConfig: {name} must be at least 1, got {getattr(self, name)}")
        if not self.num_mask:
            raise ValueError(f"CAEConfig: mask_ratio must mask a patch of {self.num_patches}, got {self.mask_ratio}")

    @property
    def num_mask(self) -> int:
        """How many patches are masked: rounded down."""
        return int(self.mask_ratio * self.num_patches)


class CAE(nn.Module):
    """Context autoencoder.

        visible = encoder(visible patches);  target = encoder(masked patches), the same weights, no gradient
        latents = mask token + position;  in each layer of the regressor they attend to [visible, latents], and only they change
        loss = cross-entropy of head(decoder(latents)) and the codes + align * (latents - target)^2, at the masked patches

    Example:
        >>> model = CAE(CAEConfig(32, 8, codes=10, dim=32, depth=1, heads=2, regressor_depth=1, decoder_depth=1))
        >>> out = model(torch.rand(2, 3, 32, 32), torch.randint(10, (2, 16)))
        >>> out.logits.shape, out.latents.shape
        (torch.Size([2, 8, 10]), torch.Size([2, 8, 32]))
    """

    def __init__(self, config: CAEConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embed = PatchEmbed(c.patch_size, c.channels, c.dim)
        self.encoder = Transformer(c.dim, c.depth, c.heads)
        self.mask_token = nn.Parameter(torch.empty(c.dim))
        self.regressor = nn.ModuleList(CrossBlock(c.dim, c.heads, 4 * c.dim) for _ in range(c.regressor_depth))
        self.regressor_norm = nn.LayerNorm(c.dim, eps=1e-6)
        self.decoder = Transformer(c.dim, c.decoder_depth, c.heads)
        self.head = nn.Linear(c.dim, c.codes)
        self.register_buffer("pos", sincos_positions(c.grid, c.dim), persistent=False)
        self.apply(init_linear_and_norm)
        nn.init.normal_(self.mask_token, std=0.02)

    def encode(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Encode the patches of these ids, which see each other, or all of them.  [B, C, H, W], int64 [B, K] -> [B, K, D]."""
        return self.encoder(self.patch_embed(images, ids, pos=self.pos))

    def regress(self, visible: Tensor, split: TokenSplit) -> Tensor:
        """Guess the latents of the masked patches.  visible [B, K, D], of encode -> [B, M, D]."""
        x = self.mask_token + self.pos[split.ids_mask]
        for block in self.regressor:
            x = block(x, torch.cat([visible, x], 1))
        return self.regressor_norm(x)

    def decode(self, latents: Tensor, split: TokenSplit) -> Tensor:
        """Name the codes of the masked patches.  latents [B, M, D] -> [B, M, codes]."""
        return self.head(self.decoder(latents + self.pos[split.ids_mask]))

    def forward(
        self,
        images: Tensor,
        codes: Tensor,
        *,
        split: TokenSplit | None = None,
        generator: torch.Generator | None = None,
    ) -> CAEOutput:
        """Mask blocks, unless split says what, and predict the latents and the codes of the masked patches.

        Args:
            images: [B, C, H, W].
            codes: int64 [B, N], of every patch, in [0, config.codes).
            split: a ready TokenSplit that masks the same number of patches in every image.
            generator: where the mask is drawn from otherwise, as in maskops.block_masking.
        """
        c = self.config
        if tuple(codes.shape) != (len(images), c.num_patches):
            raise ValueError(f"CAE: codes must be [B, N] = [{len(images)}, {c.num_patches}], got {list(codes.shape)}")
        if split is None:
            split = maskops.block_masking(len(images), c.grid, c.num_mask, generator=generator, device=images.device)
        elif split.ids_keep.shape[1] + split.ids_mask.shape[1] != c.num_patches:
            widths = f"{split.ids_keep.shape[1]} and {split.ids_mask.shape[1]}"
            raise ValueError(f"CAE: split must mask as many patches in every image, got up to {widths} kept and masked")
        latents = self.regress(self.encode(images, split.ids_keep), split)
        with torch.no_grad():
            target = self.encode(images, split.ids_mask)
        logits = self.decode(latents, split)
        loss = F.cross_entropy(logits.float().mT, codes.gather(1, split.ids_mask))
        return CAEOutput(loss + c.align * F.mse_loss(latents.float(), target.float()), logits, latents, target, split)
