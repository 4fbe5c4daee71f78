"""SparK: masked pre-training of CNNs. The encoder computes visible cells only, a light U-Net paints the masked ones.

Tian et al., "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling", 2023 (arXiv 2301.03580).
B images, N cells, V values per cell, h x w cells; scales are counted from the coarsest, where a cell is one position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import maskops
from maskops import TokenSplit
from maskops.models.cnn import ConvNeXt, Permute, ResNet, maps_of
from maskops.models.images import ImageConfig, paint_masked, rows_of
from maskops.models.sizes import fields_of
from maskops.nn import MaskedLayerNorm2d, SyncedBatchNorm2d, block_mask, to_block_masked

if TYPE_CHECKING:
    from maskops.train import Step


class SparKOutput(NamedTuple):
    """What SparK.forward returns.  loss: scalar; pred [B, N, V], of every cell; split: which cells were visible."""

    loss: Tensor
    pred: Tensor
    split: TokenSplit


@dataclass(frozen=True)
class SparKConfig(ImageConfig):
    """Sizes of a SparK. SparKConfig.of_size("resnet50") gives published ones.

    patch_size: of a cell: the stride of the backbone, so that a cell is one position of its coarsest map.
    backbone: "resnet" or "convnext"; depths: blocks per stage; width: channels of the first stage (of a ResNet: before they are
    multiplied by four); stem: "published" or "small" (stride 1; a patch of 1 for a ConvNeXt).
    """

    system: ClassVar[str] = "spark"
    patch_size: int = 32
    mask_ratio: float = 0.6
    backbone: str = "resnet"
    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    stem: str = "published"
    decoder_dim: int = 768
    norm_pix: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "depths", tuple(self.depths))  # a list, where it was read from a file
        if self.backbone not in ("resnet", "convnext"):
            raise ValueError(f"SparKConfig: backbone must be 'resnet' or 'convnext', got {self.backbone!r}")
        if self.stem not in ("published", "small"):
            raise ValueError(f"SparKConfig: stem must be 'published' or 'small', got {self.stem!r}")
        stride = (4 if self.stem == "published" else 1) * 2 ** (len(self.depths) - 1)
        if stride != self.patch_size:
            raise ValueError(
                f"SparKConfig: patch_size must be {stride}, the stride of the backbone, got {self.patch_size}"
            )
        if self.decoder_dim % stride:
            raise ValueError(f"SparKConfig: decoder_dim must be a multiple of {stride}, got {self.decoder_dim}")
        if self.num_keep == 0:
            raise ValueError(f"SparKConfig: mask_ratio {self.mask_ratio} keeps none of {self.num_patches} patches")

    @classmethod
    def of_size(cls, size: str, **changes: object) -> SparKConfig:
        """The config of a size in SIZES, with single fields changed."""
        return cls(**fields_of(cls, SIZES, size, changes))

    @property
    def num_keep(self) -> int:
        """How many cells stay visible: rounded, as published."""
        return round(self.num_patches * (1 - self.mask_ratio))


_CONVNEXT = {"backbone": "convnext"}
# Published backbones; tiny is a narrow ResNet, small, base and large are the ResNet-50, ConvNeXt-B and ConvNeXt-L.
SIZES: dict[str, dict[str, object]] = {
    "tiny": dict(depths=(1, 1, 1, 1), width=16, decoder_dim=128),
    "resnet50": dict(depths=(3, 4, 6, 3)),
    "resnet101": dict(depths=(3, 4, 23, 3)),
    "resnet152": dict(depths=(3, 8, 36, 3)),
    "resnet200": dict(depths=(3, 24, 36, 3)),
    "convnext_small": dict(depths=(3, 3, 27, 3), width=96, **_CONVNEXT),
    "convnext_base": dict(depths=(3, 3, 27, 3), width=128, **_CONVNEXT),
    "convnext_large": dict(depths=(3, 3, 27, 3), width=192, **_CONVNEXT),
}  # fmt: skip
SIZES |= {"small": SIZES["resnet50"], "base": SIZES["convnext_base"], "large": SIZES["convnext_large"]}


def make_backbone(config: SparKConfig, num_classes: int = 0) -> ResNet | ConvNeXt:
    """The CNN that is pre-trained, as a user gets it: its state dict loads into SparK.encoder and back."""
    options = {"num_classes": num_classes, "channels": config.channels}
    if config.backbone == "resnet":
        return ResNet(config.depths, width=config.width, stem=config.stem, **options)
    dims = [config.width * 2**i for i in range(len(config.depths))]
    return ConvNeXt(config.depths, dims, patch=4 if config.stem == "published" else 1, **options)


class UNetBlock(nn.Module):
    """Twice the resolution at half the width."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(dim, dim, 4, 2, 1)
        self.conv = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, bias=False), SyncedBatchNorm2d(dim), nn.ReLU6(inplace=True),
            nn.Conv2d(dim, out, 3, padding=1, bias=False), SyncedBatchNorm2d(out),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.up(x))


class SparK(nn.Module):
    """Masked pre-training of a CNN: `encoder` is the CNN, which outside of a mask takes whole images as any other.

    Example:
        >>> config = SparKConfig.of_size("tiny", image_size=64, depths=(1, 1), patch_size=8, width=8, decoder_dim=16)
        >>> out = SparK(config)(torch.rand(2, 3, 64, 64), seed=0)
        >>> out.pred.shape, out.split.ids_keep.shape
        (torch.Size([2, 64, 192]), torch.Size([2, 26]))
    """

    Config = SparKConfig

    def __init__(self, config: SparKConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_size = (c.patch_size, c.patch_size)
        self.encoder = to_block_masked(make_backbone(c), keep=(Permute,))
        widths = self.encoder.widths[::-1]
        norm = SyncedBatchNorm2d if self.encoder.norm == "batch" else _layer_norm
        self.densify_norms = nn.ModuleList(norm(width) for width in widths)
        self.mask_tokens = nn.ParameterList(torch.empty(1, width, 1, 1) for width in widths)
        steps = c.patch_size.bit_length() - 1
        dims = [c.decoder_dim // 2**i for i in range(steps + 1)]
        self.densify_projs = nn.ModuleList(
            nn.Identity()
            if i == 0 and width == dims[0]
            else nn.Conv2d(width, dims[i], 3 if i else 1, padding=int(i > 0))
            for i, width in enumerate(widths)
        )
        self.decoder = nn.ModuleList(UNetBlock(dims[i], dims[i + 1]) for i in range(steps))
        self.decoder_pred = nn.Conv2d(dims[-1], c.channels, 1)
        self.init_weights()

    def init_weights(self) -> None:
        """Mask tokens and decoder as published; the backbone has its own."""
        for token in self.mask_tokens:
            nn.init.trunc_normal_(token, std=0.02)
        for part in (self.densify_projs, self.decoder, self.decoder_pred):
            for module in part.modules():
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def forward(
        self,
        images: Tensor,
        noise: Tensor | None = None,
        *,
        split: TokenSplit | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> SparKOutput:
        """Mask, encode the visible cells, paint everything, and compare with the masked cells.

        Args:
            images: [B, C, H, W], normalised.
            noise: [B, N]; the cells with the smallest noise stay visible.
            split: a ready TokenSplit. Default: drawn here.
            seed, generator: where the mask is drawn from when neither noise nor split is given, as in maskops.random_masking.
        """
        if split is None:
            split = maskops.random_masking(
                images.shape[0], self.config.num_patches, num_keep=self.config.num_keep, noise=noise, seed=seed,
                generator=generator, device=images.device,
            )  # fmt: skip
        elif noise is not None:
            raise ValueError("SparK: noise must be None when split is given, got both")
        pred = self.decode(self.encode(images, split), split)
        loss = maskops.masked_patch_loss(pred, images, split, self.patch_size, norm_pix=self.config.norm_pix)
        return SparKOutput(loss, pred, split)

    def training_loss(self, images: Tensor, step: Step) -> Tensor:
        """The loss of this process's rows of a step of maskops.train."""
        split = maskops.random_masking(
            step.total, self.config.num_patches, num_keep=self.config.num_keep, seed=step.seed, device=images.device
        )
        return self(images, split=rows_of(split, step.first, step.first + len(images))).loss

    def cells(self, split: TokenSplit) -> Tensor:
        """bool [B, h, w]: which cells are visible."""
        return (~split.mask).unflatten(1, self.config.grid)

    def encode(self, images: Tensor, split: TokenSplit) -> list[Tensor]:
        """The maps of the encoder, coarsest first, 0 in masked cells.  images [B, C, H, W]; masked pixels are never read."""
        if tuple(images.shape[1:]) != (self.config.channels, *self.config.image_hw):
            raise ValueError(
                f"SparK: images must be [B, {self.config.channels}, {', '.join(map(str, self.config.image_hw))}], "
                f"got {list(images.shape)}"
            )
        with block_mask(self.cells(split)):
            return maps_of(self.encoder, images)[::-1]

    def decode(self, maps: list[Tensor], split: TokenSplit) -> Tensor:
        """Fill the gaps of every map with its mask token and paint.  maps as of encode -> [B, N, V]."""
        cells, x = self.cells(split), 0
        with block_mask(cells):
            maps = [norm(m) for norm, m in zip(self.densify_norms, maps, strict=True)]
        for i in range(len(self.decoder) + 1):
            if i < len(maps):
                seen = cells.repeat_interleave(2**i, 1).repeat_interleave(2**i, 2)[:, None]
                x = x + self.densify_projs[i](torch.where(seen, maps[i], self.mask_tokens[i].to(maps[i].dtype)))
            if i < len(self.decoder):
                x = self.decoder[i](x)
        return maskops.patchify(self.decoder_pred(x), self.patch_size)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, out: SparKOutput) -> tuple[Tensor, Tensor]:
        """Pictures of an output: (the visible cells alone, the visible cells with the prediction in the gaps), both as images."""
        return paint_masked(images, out.pred, out.split, self.patch_size, self.config.norm_pix)


def _layer_norm(width: int) -> MaskedLayerNorm2d:
    return MaskedLayerNorm2d(width, eps=1e-6)
