"""MaskUNet: a frozen diffusion network whose weights are masked anew for every sample and timestep.

Wang et al., "Not All Parameters Matter: Masking Diffusion Models for Enhancing Generation Ability", 2025 (MaskUNet).
Here on a small U-Net of MLPs over patches.  S samples, T tokens, C channels, [N, K] a masked weight, E width of the time embedding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import maskops


class GumbelMask(NamedTuple):
    """A mask and what it was drawn from.  keep bool, soft float in (0, 1), both [S, N, K]; the gradient goes to soft."""

    keep: Tensor
    soft: Tensor


def gumbel_sigmoid(logits: Tensor, *, tau: float = 1.0, generator: torch.Generator | None = None) -> GumbelMask:
    """Draw a mask from logits, with one Gumbel number per entry.

        soft = sigmoid((l + g) / tau),  g = -log(-log(u));   keep = soft > 0.5

    P(keep | l) = 1 - exp(-e^l): not the sigmoid of l, which the difference of two Gumbel numbers would give.
    """
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=torch.float32)
    tiny = torch.finfo(torch.float32).tiny
    gumbel = -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()
    noisy = logits + gumbel.to(logits.dtype)
    return GumbelMask(noisy > 0, (noisy / tau).sigmoid())


def masked_linear(x: Tensor, linear: nn.Linear, mask: GumbelMask | None) -> Tensor:
    """The layer under each sample's own mask, x [S, T, K] -> [S, T, N]; the gradient passes straight through to mask.soft."""
    if mask is None:
        return linear(x)
    return maskops.bitmask_linear(x, linear.weight, maskops.pack_bitmask(mask.keep), linear.bias, scores=mask.soft)


class MaskGenerator(nn.Module):
    """Logits of the masks of one block's layers, from the mean of its features over tokens and the time embedding.

        h = mean over tokens of x + Linear(temb);   z = ReLU(Linear(ReLU(Linear(h)))), [N0 / 4, K0 / 4]
        logits of a layer = expand K (expand N (z)), two linear maps along the axes

    The last map starts with weight 0 and bias 5: P(keep) = 1 up to rounding, so training starts from the frozen network.
    The other one starts random (published: 0 too, which lets only the last map learn at first).
    """

    def __init__(
        self, channels: int, time_dim: int, sizes: list[tuple[int, int]], hidden: int = 64, logit: float = 5.0
    ):
        super().__init__()
        self.coarse = tuple(max(1, size // 4) for size in sizes[0])
        self.time = nn.Linear(time_dim, channels)
        self.body = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, math.prod(self.coarse)), nn.ReLU()
        )
        rows, columns = self.coarse
        self.expand_rows = nn.ModuleList(nn.Linear(rows, n) for n, _ in sizes)
        self.expand_columns = nn.ModuleList(nn.Linear(columns, k) for _, k in sizes)
        for last in self.expand_columns:
            nn.init.zeros_(last.weight)
            nn.init.constant_(last.bias, logit)

    def forward(self, x: Tensor, temb: Tensor) -> list[Tensor]:
        """x [S, T, C], temb [S, E] -> one [S, N, K] per layer."""
        z = self.body(x.mean(1) + self.time(temb)).unflatten(1, self.coarse)
        pairs = zip(self.expand_rows, self.expand_columns, strict=True)
        return [columns(rows(z.mT).mT) for rows, columns in pairs]


class MLPBlock(nn.Module):
    """Mix tokens, then channels, both residual; the time embedding scales and shifts.  x [S, T, C] -> [S, T, D].

    The layers named in MASKED take a mask per sample.
    """

    MASKED = ("inward", "outward")

    def __init__(self, tokens: int, channels: int, dim: int, time_dim: int) -> None:
        super().__init__()
        self.enter = nn.Linear(channels, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.tokens = nn.Linear(tokens, tokens)
        self.time = nn.Linear(time_dim, 2 * dim)
        self.inward, self.outward = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, temb: Tensor, masks: list[GumbelMask] | None = None) -> Tensor:
        first, second = masks or (None, None)
        x = self.enter(x)
        scale, shift = self.time(temb)[:, None].chunk(2, -1)
        h = self.norm1(x) * (1 + scale) + shift
        x = x + self.tokens(h.mT).mT
        h = F.silu(masked_linear(self.norm2(x), self.inward, first))
        return x + masked_linear(h, self.outward, second)


class MLPUNet(nn.Module):
    """Predicts the noise of 8 x 8 images: 16 patches, down to 4 tokens and up again.  x [S, 64], t int64 [S] -> [S, 64]."""

    def __init__(self, dim: int = 24, time_dim: int = 32) -> None:
        super().__init__()
        self.time_dim = time_dim
        self.time = nn.Sequential(nn.Linear(time_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.down = MLPBlock(16, 4, dim, time_dim)
        self.mid = MLPBlock(4, 4 * dim, 2 * dim, time_dim)
        self.up = nn.ModuleList([MLPBlock(4, 6 * dim, 2 * dim, time_dim), MLPBlock(16, dim // 2 + dim, dim, time_dim)])
        self.out = nn.Linear(dim, 4)

    def embed_time(self, t: Tensor) -> Tensor:
        half = self.time_dim // 2
        angle = t[:, None] * torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device) / half)
        return self.time(torch.cat([angle.sin(), angle.cos()], 1))

    def forward(self, x: Tensor, t: Tensor, make_masks: MaskMaker | None = None) -> Tensor:
        temb = self.embed_time(t)
        patches = rearrange(x, "s (h p w q) -> s (h w) (p q)", h=4, p=2, w=4)
        skip1 = self.down(patches, temb)
        skip2 = rearrange(skip1, "s (h p w q) c -> s (h w) (p q c)", h=2, p=2, w=2)
        h = self.mid(skip2, temb)
        for index, (block, skip) in enumerate(zip(self.up, (skip2, skip1), strict=True)):
            h = torch.cat([h, skip], -1)
            masks = None if make_masks is None else make_masks(index, h, temb)
            h = block(h, temb, masks)
            if index == 0:
                h = rearrange(h, "s (h w) (p q c) -> s (h p w q) c", h=2, p=2, q=2)
        return rearrange(self.out(h), "s (h w) (p q) -> s (h p w q)", h=4, p=2)


class MaskMaker:
    """Draws the masks of an up block when the U-Net reaches it, and keeps them for inspection."""

    def __init__(self, generators: nn.ModuleList, tau: float, generator: torch.Generator | None) -> None:
        self.generators, self.tau, self.generator = generators, tau, generator
        self.drawn: list[GumbelMask] = []

    def __call__(self, index: int, x: Tensor, temb: Tensor) -> list[GumbelMask]:
        logits = self.generators[index](x, temb)
        masks = [gumbel_sigmoid(l, tau=self.tau, generator=self.generator) for l in logits]
        self.drawn += masks
        return masks


class MaskUNet(nn.Module):
    """A frozen U-Net with mask generators for the linear layers of its up blocks.

        y_s = x_s (W * M_s)^T + b,   M_s = 1[logits(features of s, t_s) + Gumbel > 0]
        loss = mean of (eps - network(sqrt(a_t) x_0 + sqrt(1 - a_t) eps, t))^2, in the generators only

    Example:
        >>> model = MaskUNet(MLPUNet())
        >>> loss = model.loss(torch.rand(3, 64))
        >>> loss.backward()
        >>> [p.grad is None for p in model.unet.parameters()].count(False)
        0
    """

    def __init__(self, unet: MLPUNet, *, tau: float = 1.0, steps: int = 100) -> None:
        super().__init__()
        self.unet, self.tau, self.steps = unet.requires_grad_(False), tau, steps
        self.generators = nn.ModuleList()
        for block in unet.up:
            sizes = [tuple(getattr(block, name).weight.shape) for name in block.MASKED]
            self.generators.append(MaskGenerator(block.enter.in_features, unet.time_dim, sizes))

    def forward(
        self, x: Tensor, t: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, list[GumbelMask]]:
        """x [S, 64], t int64 [S] -> (noise [S, 64], the masks drawn for it)."""
        maker = MaskMaker(self.generators, self.tau, generator)
        return self.unet(x, t, maker), maker.drawn

    def loss(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """images [S, 64], about unit variance."""
        noisy, t, noise = diffuse(images, self.steps, generator)
        return F.mse_loss(self(noisy, t, generator)[0], noise)


def diffuse(images: Tensor, steps: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images at random timesteps under the cosine schedule, the timesteps, and the noise."""
    options = {"generator": generator, "device": images.device}
    t = torch.randint(steps, images.shape[:1], **options)
    noise = torch.randn(images.shape, dtype=images.dtype, **options)
    angle = (t[:, None] + 0.5) / steps * (math.pi / 2)
    return angle.cos() * images + angle.sin() * noise, t, noise
