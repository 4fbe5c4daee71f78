"""MultiMAE: one encoder on the visible patches of several modalities, one decoder each: colour, depth and classes of pixels.

Bachmann et al., "MultiMAE: Multi-modal Multi-task Masked Autoencoders", 2022 (arXiv 2204.01678).
B images, N patches of each modality, K visible of all, D width, V values per patch.

Simpler than the published code: classes are at the pixels' resolution, and the extra head on normalised pixels is the only one for
colour (norm_pix).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskops
from maskops import TokenSplit
from maskops.models.images import ImageConfig, rows_of
from maskops.models.sizes import fields_of
from maskops.nn import PatchEmbed
from maskops.nn.transformer import CrossBlock, Transformer, init_linear_and_norm, sincos_positions

if TYPE_CHECKING:
    from maskops.train import Step

TASKS = ("rgb", "depth", "semseg")


class MultiMAEOutput(NamedTuple):
    """What MultiMAE.forward returns.

    loss: the sum of losses, one scalar per task; preds: [B, N, V] per task; split: of the 3 N tokens, in the order of TASKS.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    preds: dict[str, Tensor]
    split: TokenSplit


@dataclass(frozen=True)
class MultiMAEConfig(ImageConfig):
    """Sizes of a MultiMAE; the defaults are those of the published base model.

    num_keep: visible patches of all modalities together. alpha: of the Dirichlet law that shares them out. classes: of pixels.
    """

    system: ClassVar[str] = "multimae"
    samples: ClassVar[str] = "scenes"
    num_keep: int = 98
    alpha: int = 1
    classes: int = 133
    class_dim: int = 64
    dim: int = 768
    depth: int = 12
    heads: int = 12
    decoder_dim: int = 256
    decoder_depth: int = 2
    decoder_heads: int = 8
    norm_pix: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_keep <= 3 * self.num_patches:
            raise ValueError(f"MultiMAEConfig: num_keep must be in [1, {3 * self.num_patches}], got {self.num_keep}")

    @property
    def num_tokens(self) -> int:
        return len(TASKS) * self.num_patches

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> MultiMAEConfig:
        """The config of a size in SIZES, with single fields changed.  mask_ratio: of all patches, 5/6 as published."""
        fields = {"mask_ratio": 5 / 6, **fields_of(cls, SIZES, size, changes)}
        tokens = cls(**{**fields, "num_keep": 1}).num_tokens
        return cls(**{"num_keep": round(tokens * (1 - fields["mask_ratio"])), **fields})


# base is published; the others are the usual ViT sizes with a decoder to match.
SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(dim=192, depth=12, heads=3, decoder_dim=96, decoder_depth=1, decoder_heads=3),
    "small": dict(dim=384, depth=12, heads=6, decoder_dim=192, decoder_depth=2, decoder_heads=6),
    "base": dict(dim=768, depth=12, heads=12),
    "large": dict(dim=1024, depth=24, heads=16),
}


class TaskDecoder(nn.Module):
    """One modality's patches look at all visible latents, then at one another.

    latents [B, K + 1, D], task's slots of them -> [B, N, V].
    """

    def __init__(self, config: MultiMAEConfig, task: int, values: int) -> None:
        super().__init__()
        c = config
        self.task, self.patches = task, c.num_patches
        self.embed = nn.Linear(c.dim, c.decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(c.decoder_dim))
        self.modality = nn.Parameter(torch.empty(len(TASKS), c.decoder_dim))
        self.cross = CrossBlock(c.decoder_dim, c.decoder_heads, 4 * c.decoder_dim)
        self.decoder = Transformer(c.decoder_dim, c.decoder_depth, c.decoder_heads)
        self.head = nn.Linear(c.decoder_dim, values)
        self.register_buffer("pos", sincos_positions(c.grid, c.decoder_dim), persistent=False)
        self.apply(init_linear_and_norm)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.normal_(self.modality, std=0.02)

    def forward(self, latents: Tensor, split: TokenSplit) -> Tensor:
        x = self.embed(latents)
        visible, shared = x[:, :-1], x[:, -1:]
        pos = (self.modality[:, None] + self.pos).flatten(0, 1)
        tokens = maskops.restore_tokens(visible, split, self.mask_token, pos=pos)
        context = torch.cat([maskops.gather_tokens(tokens, split.ids_keep), shared], 1)
        own = tokens[:, self.task * self.patches : (self.task + 1) * self.patches]
        return self.head(self.decoder(self.cross(own, context)))


class MultiMAE(nn.Module):
    """Multi-modal multi-task masked autoencoder.

        visible = num_keep of 3 N patches, shared out by a Dirichlet law;  latents = encoder(visible, one global token)
        each task: its N patches, with mask tokens, cross-attend to the latents;  loss on its masked patches
            colour: squared error;  depth: absolute error;  classes: cross-entropy;  the mean of each image, then of the images

    Example:
        >>> sizes = dict(dim=32, depth=1, heads=2, decoder_dim=32, decoder_depth=1, decoder_heads=2)
        >>> model = MultiMAE(MultiMAEConfig(32, 8, num_keep=8, classes=5, class_dim=4, **sizes))
        >>> rgb, depth, classes = torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32), torch.randint(5, (2, 32, 32))
        >>> model(rgb, depth, classes, seed=0).preds["semseg"].shape
        torch.Size([2, 16, 320])
    """

    Config = MultiMAEConfig

    def __init__(self, config: MultiMAEConfig) -> None:
        super().__init__()
        c = self.config = config
        channels = {"rgb": c.channels, "depth": 1, "semseg": c.class_dim}
        self.class_embed = nn.Embedding(c.classes, c.class_dim)
        self.patch_embed = nn.ModuleDict({task: PatchEmbed(c.patch_size, channels[task], c.dim) for task in TASKS})
        self.modality = nn.Parameter(torch.empty(len(TASKS), c.dim))
        self.global_token = nn.Parameter(torch.empty(1, 1, c.dim))
        self.encoder = Transformer(c.dim, c.depth, c.heads)
        values = {"rgb": c.channels, "depth": 1, "semseg": c.classes}
        self.decoders = nn.ModuleDict(
            {task: TaskDecoder(c, i, values[task] * c.patch_size**2) for i, task in enumerate(TASKS)}
        )
        self.register_buffer("pos", sincos_positions(c.grid, c.dim), persistent=False)
        nn.init.normal_(self.modality, std=0.02)
        nn.init.normal_(self.global_token, std=0.02)

    def encode(self, inputs: dict[str, Tensor], split: TokenSplit) -> Tensor:
        """Encode the visible patches of all modalities.  images per task [B, C, H, W] -> [B, K + 1, D], the global token last."""
        maps = inputs | {"semseg": self.class_embed(inputs["semseg"]).permute(0, 3, 1, 2)}
        tokens = [
            self.patch_embed[task](maps[task], None, pos=self.pos + self.modality[i]) for i, task in enumerate(TASKS)
        ]
        visible = maskops.gather_tokens(torch.cat(tokens, 1), split.ids_keep)
        return self.encoder(torch.cat([visible, self.global_token.expand(len(visible), -1, -1)], 1))

    def forward(
        self, rgb: Tensor, depth: Tensor, semseg: Tensor, *, split: TokenSplit | None = None,
        seed: int | Tensor | None = None, generator: torch.Generator | None = None,
    ) -> MultiMAEOutput:  # fmt: skip
        """Share out the visible patches, unless split says how, and paint the masked ones of every modality.

        Args:
            rgb: [B, C, H, W];  depth: [B, 1, H, W], standardised;  semseg: int64 [B, H, W] in [0, classes).
            split: a ready TokenSplit of the 3 N tokens that keeps the same number in every image.
            seed, generator: where the mask is drawn from otherwise, as in maskops.modality_masking.
        """
        c = self.config
        if split is None:
            sizes = (c.num_patches,) * len(TASKS)
            split = maskops.modality_masking(
                len(rgb), sizes, c.num_keep, alpha=c.alpha, seed=seed, generator=generator, device=rgb.device
            )
        inputs = {"rgb": rgb, "depth": depth, "semseg": semseg}
        latents = self.encode(inputs, split)
        preds = {task: self.decoders[task](latents, split) for task in TASKS}
        masks = split.mask.view(len(rgb), len(TASKS), c.num_patches)
        losses = {task: self.loss_of(task, preds[task], inputs[task], masks[:, i]) for i, task in enumerate(TASKS)}
        return MultiMAEOutput(sum(losses.values()), losses, preds, split)

    def training_loss(self, scenes: Tensor, step: Step) -> Tensor:
        """The loss of this process's rows of a step of maskops.train.  scenes: [B, C + 2, H, W], colours, depth, classes.

        The depth of every crop is standardised by the mean and variance of its middle four fifths, as published.
        """
        c = self.config
        rgb, depth, classes = scenes.split((c.channels, 1, 1), 1)
        low, high = classes.amin().item(), classes.amax().item()
        if low < 0 or high >= c.classes:
            raise ValueError(
                f"MultiMAE: classes must be in [0, {c.classes}), got {int(low if low < 0 else high)} in an image of semseg"
            )
        sorted_depth = depth.flatten(1).sort(1).values
        cut = sorted_depth.shape[1] // 10
        variance, mean = torch.var_mean(sorted_depth[:, cut : sorted_depth.shape[1] - cut], 1)
        depth = (depth - mean.view(-1, 1, 1, 1)) / (variance.view(-1, 1, 1, 1) + 1e-6).sqrt()
        split = maskops.modality_masking(
            step.total, (c.num_patches,) * len(TASKS), c.num_keep, alpha=c.alpha, seed=step.seed, device=scenes.device
        )
        own = rows_of(split, step.first, step.first + len(scenes))
        return self(rgb, depth, classes[:, 0].long(), split=own).loss

    def loss_of(self, task: str, pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """The mean error of each image's masked patches, then the mean of the images that have any.  mask bool [B, N]."""
        c = self.config
        if task == "semseg":
            labels = maskops.patchify(target[:, None].to(pred.dtype), c.patch_size).long()
            # The values of a pixel are its classes' logits.
            logits = pred.float().unflatten(2, (-1, c.classes)).permute(0, 3, 1, 2)
            errors = torch.where(mask, F.cross_entropy(logits, labels, reduction="none").mean(2), 0.0)
        else:
            options = {"rgb": {"norm_pix": c.norm_pix}, "depth": {"norm_pix": False, "kind": "l1"}}[task]
            own = maskops.split_tokens(mask, max_seqlen=c.num_patches)
            errors = maskops.masked_patch_loss(pred, target, own, c.patch_size, reduction="none", **options)
        count = mask.sum(1)
        mean = errors.sum(1) / count.clamp(min=1)
        return mean.sum() / (count > 0).sum().clamp(min=1)
