"""A small diffusion model of one token, given features of it: the head of MAR.  B.. any axes, C numbers of a token, D features."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DiffusionHead(nn.Module):
    """An MLP whose norms are shifted and scaled by the noise level and by features (AdaLN); it finds the noise in a token.

        x_t = sqrt(a_t) x + sqrt(1 - a_t) noise;   a_t falls with t as cos^2

    Args:
        token_dim, condition_dim: C, D.
        dim, depth: of the MLP.
        noise_levels: T.
        clip: samples are kept in [-clip, clip]; None does not.

    Source:
        Li et al., MAR, 2024 (arXiv 2406.11838), which learns the variances as well; here they are those of the posterior.

    Example:
        >>> head = DiffusionHead(4, 32, 32, 1)
        >>> head.loss(torch.randn(8, 4), torch.randn(8, 32)).shape
        torch.Size([])
        >>> z = torch.randn(2, 8, 32)
        >>> head.sample(torch.randn(2, 8, 6, 4), lambda x, level: head(x, level, z)).shape
        torch.Size([2, 8, 4])
    """

    def __init__(
        self, token_dim: int, condition_dim: int, dim: int, depth: int, noise_levels: int = 1000, clip: float | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        self.noise_levels, self.clip, self.dim = noise_levels, clip, dim
        self.embed, self.condition = nn.Linear(token_dim, dim), nn.Linear(condition_dim, dim)
        self.level = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.modulation = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(depth))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim)) for _ in range(depth)
        )
        self.last_modulation, self.out = nn.Linear(dim, 2 * dim), nn.Linear(dim, token_dim)
        # As published: every block is the identity at first, and the noise found is 0.
        for layer in (*self.modulation, self.last_modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        t = torch.arange(noise_levels + 1, dtype=torch.float64) / noise_levels
        alpha = ((t + 0.008) / 1.008 * math.pi / 2).cos().square()
        steps = (alpha[1:] / alpha[:-1]).clamp(min=1e-3)
        self.register_buffer("alpha", steps.cumprod(0).float(), persistent=False)

    def forward(self, x: Tensor, level: Tensor, z: Tensor) -> Tensor:
        """x [..., C] at the noise level int64 [] or [...], features z [..., D] -> the noise, [..., C]."""
        half = self.dim // 2
        speed = torch.exp(torch.arange(half, device=x.device) * (-math.log(10000.0) / half))
        angle = level[..., None] * speed
        c = self.level(F.pad(torch.cat([angle.cos(), angle.sin()], -1), (0, self.dim % 2))) + self.condition(z)
        x, c = self.embed(x), F.silu(c)
        for modulation, layer in zip(self.modulation, self.layers, strict=True):
            shift, scale, gate = modulation(c).chunk(3, -1)
            x = x + gate * layer(F.layer_norm(x, (self.dim,)) * (1 + scale) + shift)
        shift, scale = self.last_modulation(c).chunk(2, -1)
        return self.out(F.layer_norm(x, (self.dim,)) * (1 + scale) + shift)

    def loss(self, x: Tensor, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the noise at random levels.  x [M, C], z [M, D]."""
        level = torch.randint(self.noise_levels, x.shape[:1], generator=generator).to(x.device)
        noise = torch.randn(x.shape, generator=generator).to(x)
        a = self.alpha[level][:, None]
        return F.mse_loss(self(a.sqrt() * x + (1 - a).sqrt() * noise, level, z), noise)

    def sample(self, noise: Tensor, find: Callable[[Tensor, Tensor], Tensor], temperature: float = 1.0) -> Tensor:
        """Draw tokens in as many steps as noise has, less one.

        Args:
            noise: float [..., S + 1, C]: the start, then what each of the S steps adds.
            find: x [..., C], level -> the noise in x; this head with its features, guided or not.
            temperature: a factor of the added noise.

        Returns:
            [..., C].
        """
        x, S = noise[..., 0, :], noise.shape[-2] - 1
        levels = torch.linspace(self.noise_levels - 1, 0, S, device=noise.device).round().long()
        for i in range(S):
            a = self.alpha[levels[i]]
            before = self.alpha[levels[i + 1]] if i + 1 < S else torch.ones_like(a)
            clean = (x - (1 - a).sqrt() * find(x, levels[i])) / a.sqrt()
            clean = clean if self.clip is None else clean.clamp(-self.clip, self.clip)
            step = a / before
            mean = (before.sqrt() * (1 - step) * clean + step.sqrt() * (1 - before) * x) / (1 - a)
            spread = ((1 - before) / (1 - a) * (1 - step)).sqrt()  # 0 at the last step
            x = mean + temperature * spread * noise[..., i + 1, :]
        return x
