"""Modules of the family visible_tokens: B batch, N patches, K kept slots, P prefix tokens, D channels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maskops.ops.visible_tokens import TokenSplit, embed_patches, restore_tokens
from maskops.ops.visible_tokens.patches import patch_sizes


class PatchEmbed(nn.Module):
    """Project the visible patches of images or videos; weight and bias are those of Conv2d / Conv3d.  See embed_patches."""

    def __init__(
        self, patch_size: int | Sequence[int], in_channels: int, dim: int, *, bias: bool = True, axes: int = 2
    ):
        super().__init__()
        self.patch_size = patch_sizes("PatchEmbed", patch_size, axes)
        self.weight = nn.Parameter(torch.empty(dim, in_channels, *self.patch_size))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch.nn.Conv2d does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, images: Tensor, ids: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        """images [B, C, H, W] or [B, C, T, H, W], ids [B, K] or None, pos [N, D] or None -> [B, K, D]."""
        return embed_patches(images, self.weight, self.bias, self.patch_size, ids, pos)

    def extra_repr(self) -> str:
        dim, channels = self.weight.shape[:2]
        return f"patch_size={self.patch_size}, in_channels={channels}, dim={dim}, bias={self.bias is not None}"


class TokenRestore(nn.Module):
    """Put kept tokens back in place and fill the rest with a learned mask token.  See restore_tokens."""

    def __init__(self, dim: int, *, prefix: int = 0, std: float = 0.02):
        super().__init__()
        self.prefix = prefix
        self.mask_token = nn.Parameter(torch.empty(dim))
        nn.init.normal_(self.mask_token, std=std)

    def forward(self, x_keep: Tensor, split: TokenSplit, pos: Tensor | None = None) -> Tensor:
        """x_keep [B, P + K, D], pos [P + N, D] or None -> [B, P + N, D]."""
        return restore_tokens(x_keep, split, self.mask_token, pos=pos, prefix=self.prefix)

    def extra_repr(self) -> str:
        return f"dim={self.mask_token.shape[0]}, prefix={self.prefix}"
