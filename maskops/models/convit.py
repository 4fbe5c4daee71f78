"""ConViT: two stages of convolutions in front of a ViT, each under the mask of the patches, so that nothing hidden is computed.

Gao et al., "ConvMAE: Masked Convolution Meets Masked Autoencoders", 2022 (arXiv 2205.03892), with its names of parameters.
B images, N patches, K visible, D width; the maps of the stages have 4 x 4 and 2 x 2 positions a patch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

import maskops
from maskops import TokenSplit
from maskops._checks import check_is_tensor
from maskops.models.images import ImageConfig, check_whole
from maskops.nn import BlockMaskedConv2d, MaskedLayerNorm2d, block_mask
from maskops.nn.transformer import Block, init_linear_and_norm, sincos_positions


@dataclass(frozen=True)
class ConViTConfig(ImageConfig):
    """Sizes of a ConViT.

    patch_size: a multiple of 4, the positions of a patch along a side in the first stage; stage_dims, stage_depths: channels and
    blocks of the two stages, whose MLPs are 8 times as wide; dim, depth, heads, mlp_dim: of the transformer.
    """

    stage_dims: tuple[int, int] = (256, 384)
    stage_depths: tuple[int, int] = (2, 2)
    dim: int = 768
    depth: int = 11
    heads: int = 12
    mlp_dim: int = 3072
    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        check_whole(self, dim=4, heads=1, mlp_dim=1, depth=0)
        if self.dim % self.heads:
            raise ValueError(f"{name}: dim must be a multiple of heads {self.heads}, got {self.dim}")
        if self.patch_size % 4:
            raise ValueError(f"{name}: patch_size must be a multiple of 4, got {self.patch_size}")
        for field, low in (("stage_dims", 1), ("stage_depths", 0)):
            pair = getattr(self, field)
            if (
                not isinstance(pair, tuple | list)
                or len(pair) != 2
                or not all(isinstance(x, int) and x >= low for x in pair)
            ):
                raise ValueError(f"{name}: {field} must be two int of at least {low}, got {pair!r}")
            object.__setattr__(self, field, tuple(pair))  # a list, where it was read from a file


class ConvEmbed(nn.Module):
    """Cut a map into squares.  [B, C, H, W] -> [B, D, H / size, W / size]."""

    def __init__(self, channels: int, dim: int, size: int) -> None:
        super().__init__()
        self.proj = BlockMaskedConv2d(channels, dim, size, size)
        self.norm = MaskedLayerNorm2d(dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.proj(x)))


class ConvMlp(nn.Module):
    """Linear, GELU, linear over the channels of [B, C, H, W]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = BlockMaskedConv2d(dim, hidden, 1)
        self.act = nn.GELU()
        self.fc2 = BlockMaskedConv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ConvBlock(nn.Module):
    """A transformer's block with a depthwise 5 x 5 convolution in the place of attention.  [B, C, H, W] -> the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = MaskedLayerNorm2d(dim)
        self.conv1 = BlockMaskedConv2d(dim, dim, 1)
        self.conv2 = BlockMaskedConv2d(dim, dim, 1)
        self.attn = BlockMaskedConv2d(dim, dim, 5, padding=2, groups=dim)
        self.norm2 = MaskedLayerNorm2d(dim)
        self.mlp = ConvMlp(dim, 8 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv2(self.attn(self.conv1(self.norm1(x))))
        return x + self.mlp(self.norm2(x))


class ConViT(nn.Module):
    """The backbone of ConvMAE and DMJD, without a class token. The map of each stage is also added to the transformer's output.

    Example:
        >>> config = ConViTConfig(16, 4, stage_dims=(8, 8), stage_depths=(1, 1), dim=16, depth=1, heads=2, mlp_dim=32)
        >>> split = maskops.random_masking(2, 16, num_keep=4, seed=0)
        >>> ConViT(config).encode(torch.rand(2, 3, 16, 16), split).shape
        torch.Size([2, 4, 16])
    """

    def __init__(self, config: ConViTConfig) -> None:
        super().__init__()
        c = self.config = config
        fine, middle = c.stage_dims
        self.patch_embed1 = ConvEmbed(c.channels, fine, c.patch_size // 4)
        self.patch_embed2 = ConvEmbed(fine, middle, 2)
        self.patch_embed3 = ConvEmbed(middle, c.dim, 2)
        self.patch_embed4 = nn.Linear(c.dim, c.dim)
        self.stage1_output_decode = BlockMaskedConv2d(fine, c.dim, 4, 4)
        self.stage2_output_decode = BlockMaskedConv2d(middle, c.dim, 2, 2)
        self.pos_embed = nn.Parameter(sincos_positions(c.grid, c.dim)[None], requires_grad=False)
        self.blocks1 = nn.ModuleList(ConvBlock(fine) for _ in range(c.stage_depths[0]))
        self.blocks2 = nn.ModuleList(ConvBlock(middle) for _ in range(c.stage_depths[1]))
        self.blocks3 = nn.ModuleList(Block(c.dim, c.heads, c.mlp_dim, eps=c.eps) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim, eps=c.eps)
        self.init_weights()

    def init_weights(self) -> None:
        """As published: convolutions keep torch's own, but that of the last embedding."""
        self.apply(init_linear_and_norm)
        weight = self.patch_embed3.proj.weight
        nn.init.xavier_uniform_(weight.view(len(weight), -1))

    def check_images(self, images: Tensor) -> None:
        """ValueError unless images are [B, C, H, W] as the config says."""
        name, wanted = type(self).__name__, (self.config.channels, *self.config.image_hw)
        check_is_tensor(name, "images", images)
        if images.dim() != 4 or tuple(images.shape[1:]) != wanted:
            size = ", ".join(map(str, wanted))
            raise ValueError(f"{name}: images must be [B, {size}], got {list(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(f"{name}: images must be float, normalised, got {images.dtype}")

    def encode(self, images: Tensor, split: TokenSplit | None = None) -> Tensor:
        """Encode the visible patches, or all of them without a split.  [B, C, H, W] -> [B, K, D]; hidden pixels are never read."""
        self.check_images(images)
        with block_mask(None if split is None else (~split.mask).unflatten(1, self.config.grid)):
            x = self.patch_embed1(images)
            for block in self.blocks1:
                x = block(x)
            around = self.stage1_output_decode(x)
            x = self.patch_embed2(x)
            for block in self.blocks2:
                x = block(x)
            around = around + self.stage2_output_decode(x)
            x = self.patch_embed3(x)
        x, around, pos = x.flatten(2).mT, around.flatten(2).mT, self.pos_embed.expand(len(x), -1, -1)
        if split is not None:
            x, around, pos = (maskops.gather_tokens(t, split.ids_keep) for t in (x, around, pos.to(x.dtype)))
        x = self.patch_embed4(x) + pos
        for block in self.blocks3:
            x = block(x)
        return self.norm(x + around)
