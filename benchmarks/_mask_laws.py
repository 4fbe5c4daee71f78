"""The laws of mask_sampling against the way they are published: numpy or Python row by row, or sorts of whole batches.

Each rival does what the published code does, rewritten; it draws from its own generator, so what the gate compares are counts.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _harness import Case, Inputs
from torch import Tensor

import maskops

BATCH, GRID, TOKENS = 256, (14, 14), 196


def beit_rectangles(**_: Any) -> tuple[Tensor]:
    """MaskingGenerator of BEiT with CAE's exact count: a Python loop per image."""
    masks = np.zeros((BATCH, *GRID), dtype=bool)
    for mask in masks:
        left = 98
        while left > 0:
            for _ in range(10):
                area = np.random.uniform(4, left) if left > 4 else np.random.uniform(left, 4)
                ratio = math.exp(np.random.uniform(math.log(0.3), -math.log(0.3)))
                h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
                if h < 14 and w < 14:
                    y, x = np.random.randint(0, 14 - h + 1), np.random.randint(0, 14 - w + 1)
                    new = h * w - mask[y : y + h, x : x + w].sum()
                    if 0 < new <= left:
                        mask[y : y + h, x : x + w] = True
                        left -= new
                        break
            else:
                free = np.flatnonzero(~mask.ravel())
                mask.ravel()[np.random.choice(free, left, replace=False)] = True
                left = 0
    return (torch.from_numpy(masks.reshape(BATCH, -1)),)


def jepa_loop(**_: Any) -> tuple[Tensor]:
    """The collator of I-JEPA: per image masks of ones, multiplied, nonzero."""
    h = w = 6
    context = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    for b in range(BATCH):
        free = torch.ones(GRID, dtype=torch.int32)
        for _ in range(4):
            y, x = int(torch.randint(0, 14 - h, (1,))), int(torch.randint(0, 14 - w, (1,)))
            free[y : y + h, x : x + w] = 0
        own = torch.zeros(GRID, dtype=torch.int32)
        own[:13, :13] = 1
        context[b, torch.nonzero((own * free).flatten()).squeeze(1)] = True
    return (context,)


def fairseq_spans(**_: Any) -> tuple[Tensor]:
    """compute_mask_indices of fairseq: a numpy loop per row."""
    mask = np.zeros((BATCH, TOKENS), dtype=bool)
    count = max(2, int(0.65 * TOKENS / 10 + np.random.rand()))
    for row in mask:
        starts = np.random.choice(TOKENS - 10, count, replace=False)
        at = np.asarray([start + offset for start in starts for offset in range(10)])
        row[np.unique(at[at < TOKENS])] = True
    return (torch.from_numpy(mask),)


def whole_words_loop(groups: Tensor, **_: Any) -> tuple[Tensor]:
    """Whole-word masking of transformers: lists of words, shuffled, in Python."""
    out = torch.zeros(groups.shape, dtype=torch.bool)
    for b, row in enumerate(groups.tolist()):
        words: dict[int, list[int]] = {}
        for i, g in enumerate(row):
            if g >= 0:
                words.setdefault(g, []).append(i)
        order, budget, taken = list(words.values()), round(0.15 * sum(map(len, words.values()))), []
        np.random.shuffle(order)  # type: ignore[arg-type]
        for word in order:
            if len(taken) >= budget:
                break
            if len(taken) + len(word) <= budget:
                taken += word
        out[b, taken] = True
    return (out,)


def hpm_loop(score: Tensor, **_: Any) -> tuple[Tensor]:
    """The mask of HPM: per image, numpy permutations of what is left after the top-k."""
    order = score.argsort(1, descending=True).numpy()
    out = np.ones((BATCH, TOKENS), dtype=bool)
    for b in range(BATCH):
        rest = np.random.permutation(order[b, 73:])
        out[b, rest[:49]] = False
    return (torch.from_numpy(out),)


def cells_loop(**_: Any) -> tuple[Tensor]:
    """MaskGenerator of SimMIM: numpy, per image."""
    masks = []
    for _ in range(BATCH):
        mask = np.zeros(49, dtype=int)
        mask[np.random.permutation(49)[:30]] = 1
        masks.append(mask.reshape(7, 7).repeat(2, 0).repeat(2, 1))
    return (torch.from_numpy(np.stack(masks).reshape(BATCH, -1)).bool(),)


def multimae_sorts(**_: Any) -> tuple[Tensor]:
    """generate_random_masks of MultiMAE: Dirichlet, one sort per modality, two of all tokens."""
    counts = (torch.distributions.Dirichlet(torch.ones(3)).sample((BATCH,)) * 98).round().long()
    parts = []
    for m in range(3):
        ids = torch.argsort(torch.rand(BATCH, TOKENS), dim=1)
        mask = torch.arange(TOKENS).expand(BATCH, -1).gather(1, ids)
        parts.append(torch.where(mask < counts[:, m : m + 1], 0, 1))
    mask = torch.cat(parts, 1)
    shuffle = torch.argsort(mask + torch.rand(mask.shape), dim=1)
    restore = torch.argsort(shuffle, dim=1)
    keep = torch.ones_like(mask)
    keep[:, :98] = 0
    return (keep.gather(1, restore).bool(),)


def two_sorts(noise: Tensor, keep: int) -> tuple[Tensor]:
    restore = noise.argsort(1).argsort(1)
    mask = torch.ones(noise.shape)
    mask[:, :keep] = 0
    return (mask.gather(1, restore).bool(),)


def stored_colour(noise: Tensor, **_: Any) -> tuple[Tensor]:
    """ColorMasking of ColorMAE: a crop of stored noise at one place for all images, flipped, over its maximum; two sorts.

    One stored pattern an image: the published code crops all that are stored and leaves what is too many.
    """
    y, x = (int(torch.randint(0, noise.shape[1] - 13, (1,))) for _ in range(2))
    window = noise[:, y : y + 14, x : x + 14]
    for axis in (1, 2):
        window = window.flip(axis) if torch.rand(1) < 0.5 else window
    window = window / window.max(-1).values.max(-1).values[:, None, None]
    restore = window.reshape(BATCH, -1).argsort(1, descending=True).argsort(1)
    mask = torch.ones(BATCH, TOKENS)
    mask[:, :49] = 0
    return (mask.gather(1, restore).bool(),)


def prefix_loop(**_: Any) -> tuple[Tensor]:
    mask = np.ones((BATCH, TOKENS), dtype=bool)
    for row in mask:
        row[: np.random.randint(1, TOKENS)] = False
    return (torch.from_numpy(mask),)


def frequency_loop(**_: Any) -> tuple[Tensor]:
    """FreqMaskGenerator of MFM: the circle is made once, here outside of the timing; a draw and a copy per image, collated."""
    drawn = (torch.bernoulli(torch.tensor(0.5, dtype=torch.float)).item() for _ in range(BATCH))
    masks = [LOW if low else 1 - LOW for low in drawn]
    return (torch.stack([torch.as_tensor(mask) for mask in masks]).bool().logical_not().view(BATCH, -1),)


LOW = (((np.arange(14) - 7) ** 2)[:, None] + (np.arange(14) - 7) ** 2 < 16).astype(int)


def ngram_loop(ngrams: Tensor, **_: Any) -> tuple[Tensor]:
    """Lists of n-grams, of which 15 of a hundred are taken, in Python."""
    out = np.zeros(ngrams.shape, dtype=bool)
    for b, row in enumerate(ngrams.tolist()):
        grams: dict[int, list[int]] = {}
        for i, g in enumerate(row):
            grams.setdefault(g, []).append(i)
        order = list(grams.values())
        np.random.shuffle(order)  # type: ignore[arg-type]
        for gram in order[: max(1, round(0.15 * len(order)))]:
            out[b, gram] = True
    return (torch.from_numpy(out),)


def sector_loop(points: Tensor, **_: Any) -> tuple[Tensor]:
    """R-MAE's angular mask: per scan the angles of its points, of whose sectors some are drawn and hidden."""
    out = np.zeros(points.shape[:2], dtype=bool)
    for b, scan in enumerate(points.numpy()):
        angle = np.degrees(np.arctan2(scan[:, 1], scan[:, 0])) % 360
        sector = np.minimum((angle / 10).astype(int), 35)
        seen = np.unique(sector)
        hidden = np.random.choice(seen, round(0.8 * len(seen)), replace=False)
        out[b] = np.isin(sector, hidden)
    return (torch.from_numpy(out),)


def bert_corruption(ids: Tensor, masked: Tensor, **_: Any) -> tuple[Tensor]:
    """torch_mask_tokens of transformers."""
    out = ids.clone()
    hidden = torch.bernoulli(torch.full(ids.shape, 0.8)).bool() & masked
    out[hidden] = 103
    swapped = torch.bernoulli(torch.full(ids.shape, 0.5)).bool() & masked & ~hidden
    words = torch.randint(30000, ids.shape)
    out[swapped] = words[swapped]
    return (out,)


def gumbel_sigmoid(logits: Tensor, **_: Any) -> tuple[Tensor]:
    noise = -torch.log(-torch.log(torch.rand_like(logits))) + torch.log(-torch.log(torch.rand_like(logits)))
    soft = torch.sigmoid(logits + noise)
    return ((soft > 0.5).to(soft.dtype) - soft.detach() + soft,)


def cm3_loop(**_: Any) -> tuple[Tensor]:
    out = np.full((BATCH, 16, 2), -1, dtype=np.int64)
    for b in range(BATCH):
        n, found = min(max(np.random.poisson(1), 1), 16), []
        for _ in range(n * n):
            u, v = sorted(np.random.uniform(size=2))
            begin, end = math.floor(u * TOKENS), round(v * TOKENS)
            if len(found) < n and begin < end and all(end <= x or y <= begin for x, y in found):
                found.append((begin, end))
        out[b, : len(found)] = np.reshape(sorted(found), (-1, 2))
    return (torch.from_numpy(out),)


def ours(draw: Callable) -> Callable:
    def forward(seed: Tensor, backend: str = "auto", **inputs: Any) -> tuple[Tensor, ...]:
        found = draw(seed=seed, backend=backend, **inputs)
        return tuple(found[:3]) if isinstance(found, tuple) else (found,)

    return forward


def masked_of(found: tuple[Tensor, ...]) -> float:
    """The mean over rows of what is masked, of a mask or a split."""
    return found[1].shape[1] if len(found) > 1 else float(found[0].double().sum() / BATCH)


LAWS: dict[str, tuple[Callable, str, Callable, float]] = {
    # name: ours, the rival's name, the rival, by how much the number of masked tokens may differ
    "weighted": (lambda weight, **kw: maskops.weighted_masking(weight, num_keep=58, **_only(kw)), "multinomial + argsort",
                 lambda weight, **_: (torch.multinomial(weight, TOKENS).argsort(1) >= 58,), 0),
    "guided (HPM)": (lambda score, **kw: maskops.guided_masking(score, num_keep=49, num_hard=73, **_only(kw)),
                     "numpy loop", hpm_loop, 0),
    "green noise": (lambda **kw: maskops.colour_masking(BATCH, GRID, num_keep=49, **_only(kw)),
                    "crop of stored noise, argsort x2 (no noise drawn)", stored_colour, 0),
    "blocks (CAE)": (lambda **kw: maskops.block_masking(BATCH, GRID, 98, **_only(kw)), "Python loop", beit_rectangles, 0),
    "multi-block (I-JEPA)": (lambda **kw: ~maskops.multiblock_masking(BATCH, GRID, **_only(kw)).split.mask, "loop over images",
                             jepa_loop, 60),
    "cells (SimMIM)": (lambda **kw: maskops.cell_masking(BATCH, GRID, 2, 0.6, **_only(kw)), "numpy loop", cells_loop, 0),
    "tube": (lambda **kw: maskops.tube_masking(BATCH, 4, 49, 0.75, **_only(kw)), "rand + argsort x2 + repeat",
             lambda **_: (two_sorts(torch.rand(BATCH, 49), 12)[0].repeat(1, 4),), 0),
    "spans (fairseq)": (lambda **kw: maskops.span_masking(BATCH, TOKENS, 0.65, **_only(kw)), "numpy loop", fairseq_spans, 9),
    "whole words": (lambda groups, **kw: maskops.group_masking(groups, 0.15, **_only(kw)), "Python loop", whole_words_loop, 1),
    "disjoint views": (lambda **kw: maskops.disjoint_masking(BATCH, TOKENS, (49, 49), **_only(kw))[1], "rand + argsort x2",
                       lambda **_: two_sorts(torch.rand(BATCH, TOKENS), 49), 0),
    "modalities (MultiMAE)": (lambda **kw: maskops.modality_masking(BATCH, (TOKENS,) * 3, 98, **_only(kw)),
                              "Dirichlet + 5 argsorts", multimae_sorts, 0),
    "Bernoulli": (lambda **kw: maskops.bernoulli_masking(BATCH, TOKENS, 0.15, **_only(kw)), "numpy rand < p",
                  lambda **_: (torch.from_numpy(np.random.rand(BATCH, TOKENS) < 0.15),), 3),
    "prefix": (lambda **kw: maskops.prefix_masking(BATCH, TOKENS, **_only(kw)), "numpy loop", prefix_loop, 25),
    "frequency (MFM)": (lambda **kw: maskops.frequency_masking(BATCH, GRID, 4.0, **_only(kw)).flatten(1), "loop over images",
                        frequency_loop, 30),
    "nested views": (lambda **kw: maskops.nested_masking(BATCH, TOKENS, (49, 98), **_only(kw))[0], "rand + argsort x2",
                     lambda **_: two_sorts(torch.rand(BATCH, TOKENS), 49), 0),
    "n-grams": (lambda ngrams, **kw: maskops.group_masking(ngrams, 0.15, unit="group", **_only(kw)), "Python loop", ngram_loop, 3),
    "sectors (R-MAE)": (lambda points, **kw: maskops.group_masking(maskops.sector_groups(points, 36), 0.8, num_groups=36,
                                                                   unit="group", **_only(kw)), "numpy loop", sector_loop, 5),
    "80/10/10": (lambda ids, masked, **kw: maskops.corrupt_tokens(ids, masked, 103, 30000, **_only(kw)), "bernoulli x2 + randint",
                 bert_corruption, math.inf),
    "gates": (lambda logits, **kw: maskops.sample_gates(logits, **_only(kw)), "Gumbel-sigmoid", gumbel_sigmoid, 4),
    "spans to move (CM3)": (lambda lengths, **kw: maskops.draw_spans(lengths, **_only(kw)), "numpy loop", cm3_loop, math.inf),
}  # fmt: skip


def _only(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in ("seed", "backend") if name in given}


def make(device: torch.device, seed: int) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    groups = (torch.rand(BATCH, TOKENS, generator=g) < 0.7).int().cumsum(1).long() - 1
    starts = torch.rand(BATCH, TOKENS, generator=g) < 0.5
    inputs = {
        "ngrams": starts.index_fill(1, torch.tensor(0), True).long().cumsum(1) - 1,
        "points": torch.randn(BATCH, TOKENS, 2, generator=g), "noise": torch.randn(BATCH, 64, 64, generator=g),
        "weight": torch.rand(BATCH, TOKENS, generator=g), "score": torch.randn(BATCH, TOKENS, generator=g),
        "logits": torch.randn(BATCH, TOKENS, generator=g), "groups": groups, "lengths": torch.full((BATCH,), TOKENS),
        "ids": torch.randint(30000, (BATCH, TOKENS), generator=g), "masked": torch.rand(BATCH, TOKENS, generator=g) < 0.15,
    }  # fmt: skip
    return {name: x.to(device) for name, x in inputs.items()} | {"seed": torch.tensor(seed, device=device)}


def gate_of(forward: Callable, rival: Callable, slack: float) -> Callable[[Inputs], None]:
    def gate(inputs: Inputs) -> None:
        found, reference = forward(**inputs), forward(**inputs, backend="reference")
        assert all(torch.equal(a, b) for a, b in zip(found, reference, strict=True)), "ours differs from its reference"
        masked, theirs = masked_of(found), masked_of(rival(**inputs))
        assert slack == math.inf or abs(masked - theirs) <= slack, f"{masked} masked, the rival's {theirs}"

    return gate


def cases() -> list[Case]:
    out = []
    for law, (draw, name, rival, slack) in LAWS.items():
        forward = ours(draw)
        out.append(
            Case(
                f"{law} ({BATCH},{TOKENS})", mode="build", dtype=torch.float32, make=make, ours=forward, rivals={name: rival},
                gate=gate_of(forward, rival, slack), sets="one", quick=True, asked={name: 10.0}, rounds=60,
            )
        )  # fmt: skip
    return out
