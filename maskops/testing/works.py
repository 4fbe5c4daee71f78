"""What the Works checks of the models share: a short training."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def train(parameters: Iterable[nn.Parameter], loss: Callable[[int], Tensor], steps: int, lr: float) -> list[float]:
    """AdamW with a tenth of the steps to warm up, then a cosine to 0.  loss(step) is a scalar; all of them are returned."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95))
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 10 * (step + 1) / steps) * math.cos(math.pi / 2 * step / steps) ** 2
        found = loss(step)
        found.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(found.item())
    return losses
