"""CM3: moved spans come back exactly, gaps are filled from both sides (the Works check, in part).
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import maskops
from maskops.models.cm3 import CM3, CM3Config
from maskops.testing.works import train

SEEDS = (0, 1, 2)
LEVELS, SQUARES, STEPS, SPANS = 9, 16, 600, 2
N = SQUARES + 1


def documents() -> tuple[Tensor, Tensor]:
    """Digits as documents: the brightness of each of 4 x 4 squares, then the digit.  1400 and 397 rows, int64 [B, 17].

    A token tells its square as well, as a tag of a page tells what it is about: 9 brightnesses of each square.
    """
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images, classes = torch.tensor(digits.images).float(), torch.tensor(digits.target)
    squares = F.avg_pool2d(images[:, None], 2).flatten(1).div(2).round().long() + LEVELS * torch.arange(SQUARES)
    rows = torch.cat([squares, LEVELS * SQUARES + classes[:, None]], 1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return rows[:1400], rows[1400:]


def no_spans(count: int) -> Tensor:
    return torch.full((count, 1, 2), -1)


def pretrain(seed: int, moved: bool) -> CM3:
    torch.manual_seed(seed)
    config = CM3Config(LEVELS * SQUARES + 10, N + 2 * SPANS + 1, dim=64, depth=1, heads=4, max_spans=SPANS)
    model, (rows, _) = CM3(config), documents()

    def loss(step: int) -> Tensor:
        batch = rows[torch.randint(len(rows), (32,))]
        return model.loss(batch, spans=None if moved else no_spans(len(batch)), seed=step)

    train(model.parameters(), loss, STEPS, 6e-3)
    return model.requires_grad_(False)


def span_loss(model: CM3, text: Tensor, moved: bool, spans: Tensor) -> float:
    """Mean NLL of the tokens of spans: after all the rest of the document, or where they are, after what is left of them."""
    found = model.move(text, spans=spans if moved else no_spans(len(text)))
    inside = (found.source[:, :, None] >= spans[:, None, :, 0]) & (found.source[:, :, None] < spans[:, None, :, 1])
    return model.losses(found)[inside.any(2) & (found.source >= 0)].mean().item()


def plain_loss(model: CM3, text: Tensor) -> float:
    return model.loss(text, spans=no_spans(len(text))).item()


def other_right_sides(text: Tensor, spans: Tensor) -> Tensor:
    """What follows the first span is taken from the next document, spans excepted."""
    at = torch.arange(N)
    inside = ((at >= spans[:, :, :1]) & (at < spans[:, :, 1:])).any(1)
    return torch.where((at >= spans[:, 0, 1:]) & ~inside, text.roll(1, 0), text)


def test_gaps_are_filled_from_both_sides() -> None:
    _, new = documents()
    spans = maskops.draw_spans(torch.full((len(new),), N), max_spans=SPANS, seed=99)
    ratios = []
    for seed in SEEDS:
        both, left = pretrain(seed, True), pretrain(seed, False)
        before = span_loss(left, new, False, spans)
        ratios.append(
            [
                span_loss(both, new, True, spans) / before,
                span_loss(both, other_right_sides(new, spans), True, spans) / before,
                plain_loss(both, new) / plain_loss(left, new),
            ]
        )
    print(ratios)
    infill, misled, plain = torch.tensor(ratios).mean(0).tolist()
    assert infill < 0.97 and misled > 1.05 and plain < 1.06, ratios
