"""Reference of neighbour_fill: B images, C channels, H x W places of which some are known."""

import torch
import torch.nn.functional as F
from torch import Tensor

from maskops.reference.visible_tokens import accumulation_dtype


def around(x: Tensor) -> Tensor:
    """The sum over the 3 x 3 places around each place of [B, C, H, W], 0 outside."""
    padded = F.pad(x, (1, 1, 1, 1))
    H, W = x.shape[2:]
    return sum(padded[:, :, dy : dy + H, dx : dx + W] for dy in range(3) for dx in range(3))


def sparse_conv_fill(x: Tensor, mask: Tensor, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    filled = torch.where(mask, x, 0).to(accumulation_dtype(x.dtype))
    known = mask.clone()
    for _ in range(min(iterations, max(x.shape[2:]))):
        count = around(known.to(filled.dtype))
        filled = torch.where(known, filled, around(filled) / torch.where(count > 0, count + eps, 1))
        known = known | (count > 0)
    return filled.to(x.dtype), known
