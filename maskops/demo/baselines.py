"""What a reconstruction must beat: two guesses that need no learning.

Patches [B, N, V] on a grid of h x w; mask bool [B, N], True = masked.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def mean_patch(patches: Tensor, mask: Tensor) -> Tensor:
    """Every masked patch is the mean of the image's visible patches."""
    visible = (~mask)[:, :, None].to(patches.dtype)
    mean = (patches * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True)
    return torch.where(mask[:, :, None], mean, patches)


def neighbour_average(patches: Tensor, mask: Tensor, grid: tuple[int, int], channels: int = 3) -> Tensor:
    """Every masked patch has the mean colour of the visible patches around it: in the smallest square that holds any."""
    colour = rearrange(patches, "b (h w) (p c) -> b c p h w", h=grid[0], c=channels).mean(2)
    visible = rearrange(~mask, "b (h w) -> b 1 h w", h=grid[0]).to(patches.dtype)
    guess, found = torch.zeros_like(colour), torch.zeros_like(visible)
    for radius in range(1, max(grid)):
        count, total = _box_sum(visible, radius), _box_sum(colour * visible, radius)
        here = (found == 0) & (count > 0.5)
        guess = torch.where(here, total / count.clamp(min=1), guess)
        found = torch.where(here, 1.0, found)
    guess = rearrange(guess, "b c h w -> b (h w) 1 c").expand(-1, -1, patches.shape[2] // channels, -1).flatten(2)
    return torch.where(mask[:, :, None], guess, patches)


def masked_error(pred: Tensor, patches: Tensor, mask: Tensor) -> float:
    """Mean squared error on the masked patches."""
    return (pred - patches).square()[mask].mean().item()


def _box_sum(x: Tensor, radius: int) -> Tensor:
    side = 2 * radius + 1
    return F.avg_pool2d(x, side, stride=1, padding=radius, count_include_pad=True) * side**2
