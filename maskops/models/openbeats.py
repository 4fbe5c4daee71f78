"""OpenBEATs: an audio encoder on the visible patches of a spectrogram, trained to tell the discrete tokens of the masked ones.

Bharadwaj et al., "OpenBEATs: A Fully Open-Source General-Purpose Audio Encoder", 2025 (arXiv 2507.14129), after BEATs (Chen et al.,
2022, arXiv 2212.09058).
B recordings, N patches, K kept ones of the longest row, D width, H heads, V codes; a spectrogram has T frames of F bins.

The relative bias here goes by the places of patches in the recording, where the published code counts kept patches only. Later
iterations, whose tokenizer is learned, are left out: any tokenizer that gives ids can be passed to `forward`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import maskops
from maskops import AttentionMask, TokenSplit
from maskops.models.sizes import fields_of
from maskops.nn import PatchEmbed
from maskops.nn.transformer import Attention, Mlp, init_linear_and_norm

if TYPE_CHECKING:
    from maskops.train import Step

# base and large are published; small and tiny are the usual ViT sizes.
SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(dim=192, depth=4, heads=3, predictor_depth=1),
    "small": dict(dim=384, depth=12, heads=6),
    "base": dict(dim=768, depth=12, heads=12),
    "large": dict(dim=1024, depth=24, heads=16),
}


@dataclass(frozen=True)
class OpenBEATsConfig:
    """Sizes of an OpenBEATs.

    patch: frames and bins of a patch; taps: of the position convolution over kept patches; frames: of a clip that it is trained on,
    10 ms each.
    """

    system: ClassVar[str] = "openbeats"
    samples: ClassVar[str] = "sounds"
    bins: int = 128
    patch: tuple[int, int] = (16, 16)
    codes: int = 1024
    code_dim: int = 256
    dim: int = 768
    depth: int = 12
    heads: int = 12
    predictor_depth: int = 3
    mask_ratio: float = 0.75
    label_smoothing: float = 0.1
    buckets: int = 320
    max_distance: int = 800
    taps: int = 128
    frames: int = 1000

    def __post_init__(self) -> None:
        if self.frames < self.patch[0]:
            raise ValueError(f"OpenBEATsConfig: frames must be at least {self.patch[0]}, a patch, got {self.frames}")
        if self.bins % self.patch[1]:
            raise ValueError(f"OpenBEATsConfig: bins must be a multiple of {self.patch[1]}, got {self.bins}")
        if not 0 <= self.mask_ratio <= 1:
            raise ValueError(f"OpenBEATsConfig: mask_ratio must be in [0, 1], got {self.mask_ratio}")

    @property
    def num_tokens(self) -> int:
        """Patches of a whole clip."""
        return self.frames // self.patch[0] * (self.bins // self.patch[1])

    @property
    def num_keep(self) -> int:
        """How many of them stay visible: rounded, as published."""
        return round((1 - self.mask_ratio) * self.num_tokens)

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> OpenBEATsConfig:
        """The config of a size in SIZES, with single fields changed."""
        return cls(**fields_of(cls, SIZES, size, changes))


class OpenBEATsOutput(NamedTuple):
    """What OpenBEATs.forward returns.  hidden [B, N, D]: what the head reads; target int64 [B, N]; asked bool [B, N]."""

    loss: Tensor
    hidden: Tensor
    target: Tensor
    asked: Tensor
    split: TokenSplit


class OpenBEATs(nn.Module):
    """Masked audio model with discrete targets.

        keep      = round((1 - mask_ratio) patches of the recording) of them at random, in the order of time
        x         = encoder(kept patches);  full = predictor(x in its places, the mask token everywhere else)
        loss      = cross-entropy of head(full) against tokenizer(patch), label smoothing 0.1, at the masked patches

    Example:
        >>> model = OpenBEATs(OpenBEATsConfig(bins=8, patch=(2, 4), codes=10, dim=32, depth=1, heads=4, predictor_depth=1, taps=4))
        >>> out = model(torch.randn(2, 20, 8), torch.tensor([20, 11]), seed=0)
        >>> out.loss.shape, out.split.num_keep.tolist(), model.encode(torch.randn(2, 20, 8)).shape
        (torch.Size([]), [5, 2], torch.Size([2, 20, 32]))
    """

    Config = OpenBEATsConfig

    def __init__(self, config: OpenBEATsConfig) -> None:
        super().__init__()
        c = self.config = config
        self.tokenizer = RandomTokenizer(math.prod(c.patch), c.code_dim, c.codes)
        self.embed = PatchEmbed(c.patch, 1, c.dim)
        self.encoder = Encoder(c, c.depth)
        self.to_predictor = nn.Linear(c.dim, c.dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(c.dim))
        self.predictor = Encoder(c, c.predictor_depth)
        self.head = nn.Linear(c.dim, c.codes)
        for layer in (self.to_predictor, self.head):
            layer.apply(init_linear_and_norm)
        nn.init.xavier_uniform_(self.embed.weight.view(c.dim, -1))

    def patches(self, lengths: Tensor) -> Tensor:
        """How many whole patches a recording of so many frames has.  int64 [B] -> [B]."""
        return lengths // self.config.patch[0] * (self.config.bins // self.config.patch[1])

    def encode(self, spectrogram: Tensor, lengths: Tensor | None = None) -> Tensor:
        """What is left after pre-training: all patches.  float [B, T, F], frames int64 [B] -> [B, N, D]."""
        images = self._images(spectrogram)
        if lengths is not None and (lengths.dtype != torch.int64 or lengths.shape != images.shape[:1]):
            got = f"{lengths.dtype} {list(lengths.shape)}"
            raise ValueError(f"OpenBEATs: lengths must be int64 [B] = [{len(images)}], got {got}")
        real = self.patches(
            torch.full((len(images),), images.shape[2], device=images.device) if lengths is None else lengths
        )
        at = torch.arange(self._count(images), device=images.device).expand(len(images), -1)
        at = at.where(at < real[:, None], -1)
        return self.encoder(self.embed(images, at), at)

    def forward(
        self, spectrogram: Tensor, lengths: Tensor | None = None, *, target: Tensor | None = None, split: TokenSplit | None = None,
        seed: int | Tensor | None = None, generator: torch.Generator | None = None,
    ) -> OpenBEATsOutput:  # fmt: skip
        """Mask, encode what is kept, predict the tokens of the rest.

        Args:
            spectrogram: float [B, T, F]; frames past a recording's length are never used.
            lengths: int64 [B], its frames; a last patch that is not whole is left out. Default: T.
            target: int64 [B, N], the token of each patch. Default: those of the random tokenizer.
            split: which patches are kept. Default: drawn, from `seed` or `generator`.
        """
        c, images = self.config, self._images(spectrogram)
        rows, count = len(images), self._count(images)
        real = self.patches(torch.full((rows,), images.shape[2], device=images.device) if lengths is None else lengths)
        if split is None:
            split = maskops.random_masking(
                rows, count, c.mask_ratio, rounding="round", lengths=real, max_seqlen=count, order="ascending", seed=seed,
                generator=generator,
            )  # fmt: skip
        at = torch.arange(count, device=images.device).expand(rows, -1)
        at = at.where(at < real[:, None], -1)
        if target is None:
            target = self.tokenizer(maskops.patchify(images, c.patch))
        x = self.encoder(self.embed(images, split.ids_keep), split.ids_keep)
        # Slots past a row's num_keep are not read: every patch that is not kept is the mask token.
        full = maskops.restore_tokens(self.to_predictor(x), split, self.mask_token.to(x.dtype))
        hidden = self.predictor(full, at)
        asked = split.mask & (at >= 0)
        loss = maskops.linear_cross_entropy(
            hidden, self.head.weight, target, mask=asked, bias=self.head.bias, label_smoothing=c.label_smoothing
        )
        return OpenBEATsOutput(loss, hidden, target, asked, split)

    def training_loss(self, clips: Tensor, step: Step) -> Tensor:
        """The loss of this process's rows of a step of maskops.train.  clips: [B, T, F], NaN after the end of a recording."""
        lengths = clips[:, :, 0].isfinite().sum(1)
        return self(clips, lengths, generator=step.generator()).loss

    def _images(self, spectrogram: Tensor) -> Tensor:
        """[B, T, F] -> [B, 1, T', F] with whole patches only."""
        if spectrogram.dim() != 3 or spectrogram.shape[2] != self.config.bins:
            raise ValueError(
                f"OpenBEATs: spectrogram must have shape [B, T, {self.config.bins}], got {list(spectrogram.shape)}"
            )
        frames = self.config.patch[0]
        return spectrogram[:, None, : spectrogram.shape[1] // frames * frames].contiguous()

    def _count(self, images: Tensor) -> int:
        return images.shape[2] // self.config.patch[0] * (self.config.bins // self.config.patch[1])


class RandomTokenizer(nn.Module):
    """The tokenizer of the first iteration, fixed: the code nearest to a random projection.  [B, N, values] -> int64 [B, N]."""

    def __init__(self, values: int, code_dim: int, codes: int) -> None:
        super().__init__()
        projection = nn.init.xavier_uniform_(torch.empty(code_dim, values))
        self.register_buffer("projection", projection)
        self.register_buffer("codes", F.normalize(torch.randn(codes, code_dim), dim=1))

    @torch.no_grad()
    def forward(self, patches: Tensor) -> Tensor:
        # The codes have length 1, so that the nearest one has the highest product.
        return (patches @ self.projection.T @ self.codes.T).argmax(-1)


class Encoder(nn.Module):
    """Layers with a relative position bias that they share.  x [B, N, D], at int64 [B, N] (place, -1 = empty) -> [B, N, D].

    A bucket tells the distance j - i up to buckets / 4 exactly and up to max_distance in logarithmic steps, as T5.
    """

    def __init__(self, config: OpenBEATsConfig, depth: int) -> None:
        super().__init__()
        c = self.config = config
        self.conv = nn.Conv1d(c.dim, c.dim, c.taps, padding=c.taps // 2, groups=c.heads)
        self.norm = nn.LayerNorm(c.dim)
        self.bias = nn.Embedding(c.buckets, c.heads)
        nn.init.normal_(self.bias.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(c.dim, c.heads, depth) for _ in range(depth))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        if x.shape[1] == 0:  # nothing is kept of a recording of a patch or two; a convolution would refuse
            return x
        real = at >= 0
        # Empty slots are 0, as what lies outside of a recording.
        x = x.masked_fill(~real[:, :, None], 0)
        x = self.norm(x + F.gelu(self.conv(x.mT)[:, :, : x.shape[1]].mT))
        bias = self.bias(self.bucket(at[:, None] - at[:, :, None])).permute(0, 3, 1, 2)
        mask = AttentionMask.keys(real)
        for layer in self.layers:
            x = layer(x, mask, bias)
        return x

    def bucket(self, distance: Tensor) -> Tensor:
        """int64, any shape -> in [0, buckets)."""
        half, exact = self.config.buckets // 2, self.config.buckets // 4
        far = distance.abs()
        steps = (far.clamp_min(1) / exact).log() / math.log(self.config.max_distance / exact) * (half - exact)
        return torch.where(far < exact, far, (exact + steps.long()).clamp(max=half - 1)) + half * (distance > 0)


class Layer(nn.Module):
    """Post-norm attention and MLP, residuals scaled as DeepNorm; the position bias is gated by each query, as WavLM."""

    def __init__(self, dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim, 4 * dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.gate, self.gate_scale = nn.Linear(dim // heads, 2), nn.Parameter(torch.ones(heads, 1, 1))
        self.alpha = (2 * max(depth, 1)) ** 0.25
        self.apply(init_linear_and_norm)
        with torch.no_grad():
            for layer in (self.attn.proj, self.mlp.fc1, self.mlp.fc2):
                layer.weight.mul_((8 * max(depth, 1)) ** -0.25)

    def forward(self, x: Tensor, mask: AttentionMask, bias: Tensor) -> Tensor:
        q, k, v = self.attn.split_heads(x)
        update, reset = self.gate(q).sigmoid().split(1, -1)
        gated = (update * (reset * self.gate_scale - 1) + 2) * bias
        out = maskops.masked_attention(q, k, v, mask, bias=gated.to(q.dtype))
        x = self.norm1(self.alpha * x + self.attn.proj(rearrange(out, "b h n d -> b n (h d)")))
        return self.norm2(self.alpha * x + self.mlp(x))
