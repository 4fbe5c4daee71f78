"""What the Works checks of the models share: a short training, crops of photos, a text of many like phrases."""

import math
import random
import re
import sys
import unicodedata
from collections import Counter
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


def character_names() -> list[list[str]]:
    """The words of Unicode's names of characters that Python ships, as LATIN SMALL LETTER A, shuffled; without the names that only
    count, of ideographs and syllables. A text whose words depend on their neighbours, and short enough to learn in seconds."""
    counted = re.compile("CJK|HANGUL SYLL|TANGUT|NUSHU|KHITAN")
    names = [unicodedata.name(chr(code), "") for code in range(sys.maxunicode + 1)]
    words = [re.findall(r"[A-Z]+|[0-9]+|-", name) for name in names if name and not counted.search(name)]
    random.Random(0).shuffle(words)
    return words


def word_ids(words: list[str], known: int) -> list[int]:
    """The most frequent words as 0 .. known - 1, the others as known."""
    ids = {word: i for i, (word, _) in enumerate(Counter(words).most_common(known))}
    return [ids.get(word, known) for word in words]
