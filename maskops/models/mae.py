"""MAE: a ViT encoder on the visible patches only and a light decoder that paints the masked ones.

He et al., "Masked Autoencoders Are Scalable Vision Learners", 2022. Numbers, initialisation and parameter names are the
published ones, so published checkpoints load with load_state_dict.
B images, N patches, K visible, D encoder width, V values per patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import maskops
from maskops import TokenSplit
from maskops.models.images import ImageConfig, paint_masked, rows_of
from maskops.models.sizes import fields_of
from maskops.nn import PatchEmbed
from maskops.nn.transformer import Block, init_linear_and_norm, sincos_positions

if TYPE_CHECKING:
    from transformers import ViTMAEForPreTraining

    from maskops.train import Step


class MAEOutput(NamedTuple):
    """What MAE.forward returns.  loss: scalar; pred [B, N, V], of every patch; split: which patches were visible."""

    loss: Tensor
    pred: Tensor
    split: TokenSplit


@dataclass(frozen=True)
class MAEConfig(ImageConfig):
    """Sizes of an MAE. MAEConfig.of_size("base") gives the published ones.

    norm_pix trains on patches normalised by their own mean and deviation, the paper's better recipe.
    """

    system: ClassVar[str] = "mae"
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    decoder_mlp_dim: int = 2048
    norm_pix: bool = True
    qkv_bias: bool = True
    activation: str = "gelu"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_keep == 0:
            raise ValueError(f"MAEConfig: mask_ratio {self.mask_ratio} keeps none of {self.num_patches} patches")

    @classmethod
    def of_size(cls, size: str, **changes: object) -> MAEConfig:
        """The config of a size in SIZES, with single fields changed."""
        return cls(**fields_of(cls, SIZES, size, changes))

    @property
    def num_keep(self) -> int:
        """How many patches stay visible: rounded down, as published."""
        return int(self.num_patches * (1 - self.mask_ratio))


# base and large are published; small and tiny are the usual ViT sizes with a decoder to match.
SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(dim=192, depth=12, heads=3, mlp_dim=768,
                 decoder_dim=128, decoder_depth=4, decoder_heads=4, decoder_mlp_dim=512),
    "small": dict(dim=384, depth=12, heads=6, mlp_dim=1536,
                  decoder_dim=256, decoder_depth=6, decoder_heads=8, decoder_mlp_dim=1024),
    "base": dict(dim=768, depth=12, heads=12, mlp_dim=3072),
    "large": dict(dim=1024, depth=24, heads=16, mlp_dim=4096),
}  # fmt: skip


class MAE(nn.Module):
    """Masked autoencoder of images.

    Example:
        >>> model = MAE(MAEConfig.of_size("tiny", image_size=32, patch_size=8))
        >>> out = model(torch.rand(2, 3, 32, 32), seed=0)
        >>> out.pred.shape, out.split.ids_keep.shape
        (torch.Size([2, 16, 192]), torch.Size([2, 4]))
    """

    Config = MAEConfig

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_size = (c.patch_size, c.patch_size)
        self.patch_embed = PatchEmbed(self.patch_size, c.channels, c.dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, c.dim))
        self.pos_embed = nn.Parameter(sincos_positions(c.grid, c.dim, prefix=1)[None], requires_grad=False)
        options = {"qkv_bias": c.qkv_bias, "activation": c.activation, "eps": c.eps}
        self.blocks = nn.ModuleList(Block(c.dim, c.heads, c.mlp_dim, **options) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim, eps=c.eps)

        self.decoder_embed = nn.Linear(c.dim, c.decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, c.decoder_dim))
        self.decoder_pos_embed = nn.Parameter(
            sincos_positions(c.grid, c.decoder_dim, prefix=1)[None], requires_grad=False
        )
        self.decoder_blocks = nn.ModuleList(
            Block(c.decoder_dim, c.decoder_heads, c.decoder_mlp_dim, **options) for _ in range(c.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(c.decoder_dim, eps=c.eps)
        self.decoder_pred = nn.Linear(c.decoder_dim, c.patch_size**2 * c.channels)
        self.register_load_state_dict_pre_hook(_rename_published)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as published; the position tables are fixed and stay."""
        self.apply(init_linear_and_norm)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.config.dim, -1))
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        images: Tensor,
        noise: Tensor | None = None,
        *,
        split: TokenSplit | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> MAEOutput:
        """Mask, encode what is visible, decode everything, and compare with the masked patches.

        Args:
            images: [B, C, H, W], normalised.
            noise: [B, N]; the patches with the smallest noise stay visible. For tests and for comparison with other code.
            split: a ready TokenSplit that keeps the same number of patches in every row. Default: drawn here.
            seed, generator: where the mask is drawn from when neither noise nor split is given, as in maskops.random_masking.
        """
        if split is None:
            split = maskops.random_masking(
                images.shape[0], self.config.num_patches, num_keep=self.config.num_keep, noise=noise, seed=seed,
                generator=generator, device=images.device,
            )  # fmt: skip
        elif noise is not None:
            raise ValueError("MAE: noise must be None when split is given, got both")
        pred = self.decode(self.encode(images, split), split)
        loss = maskops.masked_patch_loss(pred, images, split, self.patch_size, norm_pix=self.config.norm_pix)
        return MAEOutput(loss, pred, split)

    def training_loss(self, images: Tensor, step: Step) -> Tensor:
        """The loss of this process's rows of a step of maskops.train."""
        split = maskops.random_masking(
            step.total, self.config.num_patches, num_keep=self.config.num_keep, seed=step.seed, device=images.device
        )
        return self(images, split=rows_of(split, step.first, step.first + len(images))).loss

    def encode(self, images: Tensor, split: TokenSplit | None = None) -> Tensor:
        """Encode the visible patches, or all of them without a split.  [B, C, H, W] -> [B, 1 + K, D], class token first."""
        if tuple(images.shape[1:]) != (self.config.channels, *self.config.image_hw):
            raise ValueError(
                f"MAE: images must be [B, {self.config.channels}, {', '.join(map(str, self.config.image_hw))}], "
                f"got {list(images.shape)}"
            )
        pos = self.pos_embed[0]
        x = self.patch_embed(images, None if split is None else split.ids_keep, pos=pos[1:])
        x = torch.cat([(self.cls_token + pos[:1]).expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, latent: Tensor, split: TokenSplit) -> Tensor:
        """Predict every patch.  latent [B, 1 + K, D] -> [B, N, V]."""
        x = self.decoder_embed(latent)
        x = maskops.restore_tokens(x, split, self.mask_token[0, 0], pos=self.decoder_pos_embed[0], prefix=1)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    @torch.no_grad()
    def reconstruct(self, images: Tensor, out: MAEOutput) -> tuple[Tensor, Tensor]:
        """Pictures of an output: (the visible patches alone, the visible patches with the prediction in the gaps), both as images.

        With norm_pix the prediction is of normalised patches; it is shown with the mean and deviation of the true patch, as usual.
        """
        return paint_masked(images, out.pred, out.split, self.patch_size, self.config.norm_pix)

    @classmethod
    def from_hf(cls, hf_model: ViTMAEForPreTraining) -> MAE:
        """The same model, weights copied, from a transformers ViTMAEForPreTraining. ValueError if it has dropout."""
        model = cls(config_from_hf(hf_model.config))
        reference = next(hf_model.parameters())
        model.to(device=reference.device, dtype=reference.dtype)
        model.load_state_dict(state_from_hf(hf_model.state_dict()))
        return model.train(hf_model.training)


def _rename_published(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """In place: the one name in which published checkpoints differ."""
    for part in ("weight", "bias"):
        if f"{prefix}patch_embed.proj.{part}" in state:
            state[f"{prefix}patch_embed.{part}"] = state.pop(f"{prefix}patch_embed.proj.{part}")


def config_from_hf(hf: object) -> MAEConfig:
    """MAEConfig of a transformers ViTMAEConfig."""
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if getattr(hf, name):
            raise ValueError(f"MAE.from_hf: config.{name} must be 0, got {getattr(hf, name)}")
    size = hf.image_size
    return MAEConfig(
        image_size=size if isinstance(size, int) else tuple(size), patch_size=hf.patch_size, channels=hf.num_channels,
        dim=hf.hidden_size, depth=hf.num_hidden_layers, heads=hf.num_attention_heads, mlp_dim=hf.intermediate_size,
        decoder_dim=hf.decoder_hidden_size, decoder_depth=hf.decoder_num_hidden_layers,
        decoder_heads=hf.decoder_num_attention_heads, decoder_mlp_dim=hf.decoder_intermediate_size,
        mask_ratio=hf.mask_ratio, norm_pix=hf.norm_pix_loss, qkv_bias=hf.qkv_bias, activation=hf.hidden_act,
        eps=hf.layer_norm_eps,
    )  # fmt: skip


# transformers' names -> ours, applied in this order.
_HF_NAMES = (
    ("vit.embeddings.patch_embeddings.projection.", "patch_embed."),
    ("vit.embeddings.position_embeddings", "pos_embed"),
    ("vit.embeddings.cls_token", "cls_token"),
    ("vit.layernorm.", "norm."),
    ("vit.layers.", "blocks."),
    ("decoder.decoder_layers.", "decoder_blocks."),
    ("decoder.", ""),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("attention.o_proj.", "attn.proj."),
    ("attention.", "attn."),
)


def state_from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of MAE from that of a ViTMAEForPreTraining: other names, and q, k, v in one matrix."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        for old, new in _HF_NAMES:
            name = name.replace(old, new)
        renamed[name] = value
    for name in [name for name in renamed if ".q_proj." in name]:
        parts = [renamed.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        renamed[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    return renamed
