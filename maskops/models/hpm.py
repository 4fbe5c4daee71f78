"""HPM: a masked autoencoder that learns which patches are hard to paint, and masks those.

Wang et al., "Hard Patches Mining for Masked Image Modeling", 2023 (arXiv 2304.05919).
B images, N patches, K visible, M masked, D width.

A second decoder tells how large the loss of each patch will be, by order only. A slow copy of encoder and predictor looks at the
whole image and chooses the patches that are masked: more of them as training goes on, the rest at random. Other than published, the
predictor is trained on whole images too (HPMConfig.whole).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskops
from maskops import TokenSplit
from maskops.models.mae import MAE, MAEConfig
from maskops.nn import TokenRestore
from maskops.nn.transformer import Transformer, init_linear_and_norm, sincos_positions

if TYPE_CHECKING:
    from maskops.train import Step


class HPMOutput(NamedTuple):
    """What HPM.forward returns: loss = reconstruction + ranking, scalars; of the masked patches split.ids_mask:

    errors, hardness [B, M]: the true error of each, and the predicted one, of which only the order counts. pred [B, N, V].
    """

    loss: Tensor
    reconstruction: Tensor
    ranking: Tensor
    errors: Tensor
    hardness: Tensor
    pred: Tensor
    split: TokenSplit


@dataclass(frozen=True)
class HPMConfig(MAEConfig):
    """MAEConfig with the share of masked patches that are chosen as hard at the end of training, and the teacher's decay.

    whole: the predictor is trained on what the teacher will show it, the latents of the whole image; False, as published, on those
    of the visible patches, which does not tell much about whole images after a short training.
    """

    system: ClassVar[str] = "hpm"
    hard_share: float = 0.5
    whole: bool = True
    decay: float = 0.999
    norm_pix: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hard_share", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"HPMConfig: {name} must be in [0, 1], got {getattr(self, name)}")

    def num_hard(self, progress: float) -> int:
        """How many patches are masked as hard when `progress`, in [0, 1], of the training is done: rounded down, as published."""
        return int((self.num_patches - self.num_keep) * self.hard_share * progress)


class Predictor(nn.Module):
    """A decoder that gives one number per patch.  latent [B, 1 + K, D], class token first -> [B, N]."""

    def __init__(self, config: HPMConfig) -> None:
        super().__init__()
        c = config
        self.embed = nn.Linear(c.dim, c.decoder_dim)
        self.restore = TokenRestore(c.decoder_dim, prefix=1)
        self.decoder = Transformer(c.decoder_dim, c.decoder_depth, c.decoder_heads, c.decoder_mlp_dim)
        self.head = nn.Linear(c.decoder_dim, 1)
        self.register_buffer("pos", sincos_positions(c.grid, c.decoder_dim, prefix=1), persistent=False)
        self.apply(init_linear_and_norm)

    def forward(self, latent: Tensor, split: TokenSplit | None) -> Tensor:
        x = self.embed(latent)
        x = x + self.pos if split is None else self.restore(x, split, self.pos)
        return self.head(self.decoder(x))[:, 1:, 0]


class HPM(nn.Module):
    """Hard patches mining.

        hardness = teacher(whole image);  masked = the num_hard(progress) hardest, and others at random
        loss = error of the masked patches + mean over their pairs with e_i > e_j of -log sigmoid(h_i - h_j)

    After each step of the optimiser call update_teacher().

    Example:
        >>> model = HPM(HPMConfig.of_size("tiny", image_size=32, patch_size=8))
        >>> out = model(torch.rand(2, 3, 32, 32), progress=1.0, seed=0)
        >>> out.hardness.shape, model.config.num_hard(1.0)
        (torch.Size([2, 12]), 6)
    """

    Config = HPMConfig

    def __init__(self, config: HPMConfig) -> None:
        super().__init__()
        self.config = config
        self.mae, self.predictor = MAE(config), Predictor(config)
        self.teacher = nn.ModuleList(copy.deepcopy(part) for part in (self.mae, self.predictor)).requires_grad_(False)

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Move the teacher towards the student by 1 - decay."""
        for slow, fast in zip(self.teacher, (self.mae, self.predictor), strict=True):
            for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
                old.lerp_(new, 1 - self.config.decay)

    @torch.no_grad()
    def hardness(self, images: Tensor) -> Tensor:
        """The teacher's opinion of every patch, from the whole image.  [B, C, H, W] -> [B, N]."""
        mae, predictor = self.teacher
        return predictor(mae.encode(images), None)

    def forward(
        self, images: Tensor, *, progress: float = 1.0, split: TokenSplit | None = None, seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> HPMOutput:  # fmt: skip
        """Mask hard patches, unless split says what, paint them, and predict how hard they are.

        Args:
            images: [B, C, H, W], normalised.
            progress: how much of the training is done, in [0, 1].
            split: a ready TokenSplit that masks the same number of patches in every image.
            seed, generator: where the random rest of the mask is drawn from otherwise, as in maskops.guided_masking.
        """
        c = self.config
        if split is None:
            hard = c.num_hard(progress)
            split = maskops.guided_masking(
                self.hardness(images), num_keep=c.num_keep, num_hard=hard, seed=seed, generator=generator
            )
        latent = self.mae.encode(images, split)
        pred = self.mae.decode(latent, split)
        hardness = self.predictor(self.mae.encode(images), None) if c.whole else self.predictor(latent, split)
        errors = maskops.masked_patch_loss(pred, images, split, c.patch_size, norm_pix=c.norm_pix, reduction="none")
        errors, hardness = errors.gather(1, split.ids_mask), hardness.gather(1, split.ids_mask)
        reconstruction, ranking = errors.mean(), rank_loss(hardness, errors.detach())
        return HPMOutput(reconstruction + ranking, reconstruction, ranking, errors, hardness, pred, split)

    def training_loss(self, images: Tensor, step: Step) -> Tensor:
        """The loss of this process's rows of a step of maskops.train: guided masks, whose random part is drawn for all rows."""
        c, rows = self.config, slice(step.first, step.first + len(images))
        words = maskops.random_words((step.total, c.num_patches), seed=step.seed, device=images.device)[rows].double()
        order = self.hardness(images).argsort(dim=1, descending=True, stable=True)
        noise = words.scatter_add(1, order[:, : c.num_hard(step.progress)], torch.full_like(words, 2.0**32))
        split = maskops.random_masking(
            *words.shape, num_keep=c.num_keep, noise=noise, device=images.device, order="ascending"
        )
        return self(images, split=split).loss

    def after_step(self, step: Step) -> None:
        self.update_teacher()


def rank_loss(hardness: Tensor, errors: Tensor) -> Tensor:
    """Mean of -log sigmoid(h_i - h_j) over all pairs of a row with e_i > e_j; 0 if there are none.  Both [B, M]."""
    harder = errors[:, :, None] > errors[:, None, :]
    wrong = F.softplus(hardness.float()[:, None, :] - hardness.float()[:, :, None])
    return (wrong * harder).sum() / harder.sum().clamp(min=1)
