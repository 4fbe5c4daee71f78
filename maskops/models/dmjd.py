"""DMJD: two masks of each image that share no visible patch, and a loss on the visible patches beside that on the masked ones.

Ma et al., "Disjoint Masking with Joint Distillation for Efficient Masked Image Modeling", 2022 (arXiv 2212.00433).
Names of parameters are the published ones, so published checkpoints load with load_state_dict.
B images, N patches, K visible, D encoder width, V values per patch.

The published code draws one random order for all images of a batch; here every image has its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import maskops
from maskops import TokenSplit
from maskops._checks import finite
from maskops.models.convit import ConViT, ConViTConfig
from maskops.models.images import check_whole, rows_of, rows_together
from maskops.models.sizes import fields_of
from maskops.nn.transformer import Block, init_linear_and_norm, sincos_positions
from maskops.ops.visible_tokens.split import check_split

if TYPE_CHECKING:
    from maskops.train import Step

ORIENTATIONS = 9


class DMJDOutput(NamedTuple):
    """What DMJD.forward returns.

    loss = masked_loss + theta visible_loss, scalars, each the mean of the two views; preds: the decoder's, [B, N, V] of each view;
    splits: which patches were visible in each view.
    """

    loss: Tensor
    masked_loss: Tensor
    visible_loss: Tensor
    preds: tuple[Tensor, ...]
    splits: tuple[TokenSplit, TokenSplit]


@dataclass(frozen=True)
class DMJDConfig(ConViTConfig):
    """Sizes of a DMJD. DMJDConfig.of_size("base") gives the published ones.

    cell: patches along the side of a cell, which is masked whole; theta: weight of the loss on visible patches; targets: "hog" or
    "pixels"; norm_pix: pixels are normalised by the mean and deviation of their patch.
    """

    system: ClassVar[str] = "dmjd"
    mask_ratio: float = 0.6
    cell: int = 2
    theta: float = 1.0
    targets: str = "hog"
    norm_pix: bool = True
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    decoder_mlp_dim: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, cell=1, decoder_dim=4, decoder_heads=1, decoder_mlp_dim=1, decoder_depth=0)
        if self.decoder_dim % self.decoder_heads:
            raise ValueError(
                f"DMJDConfig: decoder_dim must be a multiple of decoder_heads {self.decoder_heads}, got {self.decoder_dim}"
            )
        if not finite("DMJDConfig", "theta", self.theta) >= 0:
            raise ValueError(f"DMJDConfig: theta must be at least 0, got {self.theta}")
        if any(size % self.cell for size in self.grid):
            raise ValueError(f"DMJDConfig: cell must divide the grid {self.grid}, got {self.cell}")
        if self.mask_ratio < 0.5:
            raise ValueError(
                f"DMJDConfig: mask_ratio must be at least 0.5 for two disjoint views, got {self.mask_ratio}"
            )
        if self.keep_cells == 0:
            raise ValueError(f"DMJDConfig: mask_ratio {self.mask_ratio} keeps none of {self.num_patches} patches")
        if self.targets not in ("hog", "pixels"):
            raise ValueError(f"DMJDConfig: targets must be 'hog' or 'pixels', got {self.targets!r}")

    @classmethod
    def of_size(cls, size: str, **changes: object) -> DMJDConfig:
        """The config of a size in SIZES, with single fields changed."""
        return cls(**fields_of(cls, SIZES, size, changes))

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

    @property
    def target_dim(self) -> int:
        """Values per patch: histograms of 2 x 2 cells, or pixels."""
        return self.channels * (4 * ORIENTATIONS if self.targets == "hog" else self.patch_size**2)


# base and large are published; small and tiny are narrower, with a decoder to match.
SIZES: dict[str, dict[str, object]] = {
    "tiny": dict(stage_dims=(64, 96), dim=192, heads=3, mlp_dim=768,
                 decoder_dim=128, decoder_depth=4, decoder_heads=4, decoder_mlp_dim=1024),
    "small": dict(stage_dims=(128, 192), dim=384, heads=6, mlp_dim=1536,
                  decoder_dim=256, decoder_depth=6, decoder_heads=8, decoder_mlp_dim=2048),
    "base": dict(),
    "large": dict(stage_dims=(384, 768), dim=1024, depth=23, heads=16, mlp_dim=4096),
}  # fmt: skip


def oriented_gradients(images: Tensor, cell: int) -> Tensor:
    """Histograms of oriented gradients, each normalised by its own mean and deviation.

        gradient: central differences, 0 at the border;  magnitude / cell^2 is added to the bin of its direction, 20 degrees wide

    images [B, C, H, W], normalised -> float32 [B, C, H / cell, W / cell, 9]. As skimage's hog, but for the normalisation, which is
    DMJD's; its 1e-5 is for images of 0 to 255, 57 times as wide.
    """
    x = images.detach().float()
    down, across = torch.zeros_like(x), torch.zeros_like(x)
    down[:, :, 1:-1] = x[:, :, 2:] - x[:, :, :-2]
    across[:, :, :, 1:-1] = x[:, :, :, 2:] - x[:, :, :, :-2]
    degrees = torch.atan2(down, across).rad2deg().remainder(180)
    bins = (degrees * (ORIENTATIONS / 180)).floor().clamp(max=ORIENTATIONS - 1)
    size = torch.hypot(down, across)
    found = [F.avg_pool2d(torch.where(bins == k, size, 0), cell) for k in range(ORIENTATIONS)]
    return F.layer_norm(torch.stack(found, -1), (ORIENTATIONS,), eps=3e-9)


class DMJD(ConViT):
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
        c, width = config, config.decoder_dim
        self.decoder_embed = nn.Linear(c.dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(c.grid, width)[None], requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(width, c.decoder_heads, c.decoder_mlp_dim, eps=c.eps) for _ in range(c.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=c.eps)
        self.decoder_pred = nn.Linear(width, c.target_dim)
        self.proj_embed = nn.Sequential(
            nn.Linear(c.dim, width), nn.LayerNorm(width, eps=c.eps), nn.GELU(),
            nn.Linear(width, width), nn.LayerNorm(width, eps=c.eps), nn.GELU(),
            nn.Linear(width, width), nn.LayerNorm(width, eps=c.eps, elementwise_affine=False),
        )  # fmt: skip
        self.predictor = nn.Sequential(nn.Linear(width, c.target_dim))
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred, self.proj_embed, self.predictor):
            module.apply(init_linear_and_norm)
        nn.init.normal_(self.mask_token, std=0.02)

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

    def check_views(self, images: Tensor, splits: object) -> None:
        """TypeError or ValueError unless splits are two of these images, with as many visible patches in every row."""
        if not isinstance(splits, tuple | list) or len(splits) != 2:
            raise TypeError(f"DMJD: splits must be two TokenSplit, got {type(splits).__name__}")
        for i, split in enumerate(splits):
            check_split("DMJD", split)
            have, want = tuple(split.ids_restore.shape), (len(images), self.config.num_patches)
            if have != want:
                raise ValueError(f"DMJD: splits[{i}] must be of [B, N] = {list(want)} patches, got {list(have)}")
            keep = splits[0].max_seqlen
            if split.max_seqlen != keep or split.total not in (None, len(images) * keep):
                got = f"at most {split.max_seqlen}, {split.total} in all"
                raise ValueError(f"DMJD: splits[{i}] must keep {keep} patches of each image, got {got}")

    def targets_of(self, images: Tensor) -> Tensor:
        """What is predicted of each patch.  images [B, C, H, W] -> [B, N, V]."""
        c = self.config
        self.check_images(images)
        if c.targets == "pixels":
            return maskops.patchify(images, (c.patch_size, c.patch_size))
        found = oriented_gradients(images, c.patch_size // 2).unflatten(3, (c.grid[1], 2)).unflatten(2, (c.grid[0], 2))
        return found.permute(0, 2, 4, 3, 5, 6, 1).flatten(3).flatten(1, 2).to(images.dtype)

    def decode(self, latent: Tensor, split: TokenSplit) -> Tensor:
        """Predict every patch.  latent [B, K, D] -> [B, N, V]."""
        x = self.decoder_embed(latent)
        x = maskops.restore_tokens(x, split, self.mask_token[0, 0], pos=self.decoder_pos_embed[0])
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))

    def forward(
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
        self.check_images(images)
        if splits is None:
            splits = self.draw_views(len(images), seed=seed, generator=generator, device=images.device)
        self.check_views(images, splits)
        split, target = rows_together(splits), self.targets_of(images).repeat(2, 1, 1)
        latent = self.encode(images.repeat(2, 1, 1, 1), split)
        pred, told = self.decode(latent, split), self.predictor(self.proj_embed(latent))
        normalise = c.targets == "pixels" and c.norm_pix
        masked = maskops.masked_regression(pred, target, split.mask, normalise=normalise)
        seen = maskops.gather_tokens(target, split.ids_keep)
        visible = maskops.masked_regression(told, seen, kind="smooth_l1", beta=2.0, normalise=normalise)
        return DMJDOutput(masked + c.theta * visible, masked, visible, pred.chunk(2), splits)

    def training_loss(self, images: Tensor, step: Step) -> Tensor:
        """The loss of this process's rows of a step of maskops.train."""
        views = self.draw_views(step.total, seed=step.seed, device=images.device)
        first, second = (rows_of(split, step.first, step.first + len(images)) for split in views)
        return self(images, splits=(first, second)).loss
