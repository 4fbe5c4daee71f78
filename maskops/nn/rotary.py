"""Rotary positions: queries and keys turned by their place, so that their product depends on the distance between them."""

import torch
from torch import Tensor


def rotary(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Turn the pair of channels (d, d + D / 2) of each token by the angle positions * base^(-2 d / D).

    Args:
        x: float [B, H, N, D], D even.
        positions: int64 [N] or [B, N].
        base: of the wavelengths.

    Returns:
        As x. Products of such queries and keys depend on differences of positions only.

    Raises:
        ValueError: D is odd.

    Source:
        Su et al., "RoFormer", 2021 (arXiv 2104.09864), with the halves as in LLaMA.

    Example:
        >>> rotary(torch.ones(1, 1, 2, 2), torch.tensor([0, 1]))
        tensor([[[[ 1.0000,  1.0000],
                  [-0.3012,  1.3818]]]])
    """
    half = x.shape[-1] // 2
    if x.shape[-1] % 2:
        raise ValueError(f"rotary: x must have an even number of channels, got {x.shape[-1]}")
    speed = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = positions[..., None] * speed  # [(B,) N, D / 2]; float64, as far positions lose digits in float32
    angle = angle[:, None] if positions.dim() == 2 else angle
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
