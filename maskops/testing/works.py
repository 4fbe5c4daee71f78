"""What the Works checks of the models share: a short training, and crops of photos."""

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


def grey_crops(count: int, rows: tuple[float, float], seed: int, size: int = 32) -> Tensor:
    """Squares of grey photos that scikit-image ships, between two heights in [0, 1], in about [-1, 1].  [count, 1, size, size]."""
    from skimage import data

    generator, found = torch.Generator().manual_seed(seed), []
    photos = [torch.tensor(picture()) for picture in (data.astronaut, data.coffee, data.chelsea, data.rocket)]
    for photo in photos:
        grey = photo.float().mean(-1)[int(rows[0] * len(photo)) : int(rows[1] * len(photo))] / 128 - 1
        squares = grey.unfold(0, size, 1).unfold(1, size, 1)
        y, x = (torch.randint(n, (count // len(photos),), generator=generator) for n in squares.shape[:2])
        found.append(squares[y, x])
    return torch.cat(found)[:, None]
