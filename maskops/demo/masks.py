"""One picture of all mask laws."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import maskops

GRID = (14, 14)
SEQUENCE = 112


def _grid(draw: Callable) -> Tensor:
    """Four masks of a grid, side by side with a gap.  int [14, 59]: 0 visible, 1 masked, 3 nothing; other numbers as drawn."""
    masks = draw().view(4, *GRID).int()
    gap = torch.full((4, GRID[0], 1), 3, dtype=torch.int32)
    return torch.cat([masks, gap], 2).permute(1, 0, 2).reshape(GRID[0], -1)[:, :-1]


def _rows(mask: Tensor) -> Tensor:
    return mask.int()


def _multiblock(seed: int) -> Tensor:
    masks = maskops.multiblock_masking(4, GRID, seed=seed, shared_sizes=False)
    return torch.where(masks.targets.any(1), 2, (~masks.context).int())


def _words(seed: int) -> Tensor:
    lengths = 1 + maskops.random_words((12, SEQUENCE), seed=seed) % 5
    return torch.stack([torch.arange(SEQUENCE).repeat_interleave(row)[:SEQUENCE] for row in lengths])


def _nested(seed: int) -> Tensor:
    inner, outer = maskops.group_masking(_words(seed), (0.2, 0.4), seed=seed)
    return outer.int() + inner.int()


def _disjoint(seed: int) -> Tensor:
    first, second = maskops.disjoint_masking(4, 196, (49, 49), seed=seed)
    return torch.where(~first.mask, 0, torch.where(~second.mask, 2, 1))


def _sectors(seed: int) -> Tensor:
    y, x = torch.meshgrid(*(torch.arange(14) - 6.5 for _ in range(2)), indexing="ij")
    groups = maskops.sector_groups(torch.stack([x, y], -1).view(1, -1, 2), 24)
    return maskops.group_masking(groups, 0.7, num_groups=24, B=4, unit="group", seed=seed)


def _gate(seed: int) -> Tensor:
    x = torch.linspace(-4, 4, 14)
    return 1 - maskops.sample_gates(x.expand(4, 14, 14), seed=seed)


def panels(seed: int) -> list[tuple[str, Tensor]]:
    """(title, picture) of every law."""
    score = torch.exp(-((torch.arange(14) - 6.5).square()[:, None] + (torch.arange(14) - 6.5).square()) / 20)
    scores = score.view(1, 196).expand(4, 196).contiguous()
    spans = maskops.draw_spans(torch.full((12,), SEQUENCE), seed=seed)
    at = torch.arange(SEQUENCE)
    inside = ((at >= spans[:, :, :1]) & (at < spans[:, :, 1:])).any(1)
    ids = torch.zeros(12, SEQUENCE, dtype=torch.int64)
    masked = maskops.bernoulli_masking(12, SEQUENCE, 0.3, seed=seed)
    corrupted = maskops.corrupt_tokens(ids, masked, 1, (2, 3), seed=seed + 1)
    grids = {
        "random 75%": lambda: maskops.random_masking(4, 196, 0.75, seed=seed).mask,
        "blocks, 98 of 196 (CAE)": lambda: maskops.block_masking(4, GRID, 98, seed=seed).mask,
        "cells of 2 x 2, 60%": lambda: maskops.cell_masking(4, GRID, 2, 0.6, seed=seed).mask,
        "targets and context (I-JEPA)": lambda: _multiblock(seed),
        **{
            f"{colour} noise, 75%": lambda colour=colour: maskops.colour_masking(4, GRID, 0.75, colour=colour, seed=seed).mask
            for colour in ("red", "green", "blue", "purple")
        },
        "weighted: the middle is kept, 70%": lambda: maskops.weighted_masking(scores, 0.7, seed=seed).mask,
        "guided: 73 hardest in the middle + random": lambda: maskops.guided_masking(scores, 0.75, num_hard=73, seed=seed).mask,
        "two disjoint views of 25%": lambda: _disjoint(seed),
        "sectors, 70%": lambda: _sectors(seed),
        "low or high frequencies": lambda: maskops.frequency_masking(4, GRID, 4.0, seed=seed),
        "gates, logit -4 to 4": lambda: _gate(seed),
        "three modalities, first of them (MultiMAE)": lambda: maskops.modality_masking(4, (196,) * 3, 98, seed=seed).mask[:, :196],
        "tubes, 4 frames of one video": lambda: maskops.tube_masking(1, 4, 196, 0.9, seed=seed).mask,
    }  # fmt: skip
    rows = {
        "spans of 10, p = 0.65 (HuBERT)": maskops.span_masking(12, SEQUENCE, 0.65, seed=seed),
        "the same, rows equalised": maskops.span_masking(12, SEQUENCE, 0.65, equalise=True, seed=seed),
        "whole words, 20% inside 40%": _nested(seed),
        "prefixes": maskops.prefix_masking(12, SEQUENCE, seed=seed),
        "spans to move (CM3)": inside,
        "80/10/10 of 30%": corrupted,
    }
    return [(title, _grid(draw)) for title, draw in grids.items()] + [(t, _rows(m)) for t, m in rows.items()]


def draw(out: Path, seed: int = 0) -> None:
    """Write the picture: dark is masked, light visible, orange the second kind of a law."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap

    found = panels(seed)
    colours = ListedColormap(["#e8e6e1", "#2b3a55", "#e07b39", "#ffffff"])
    figure, axes = pyplot.subplots(
        -(-len(found) // 2), 2, figsize=(12, 1.75 * -(-len(found) // 2)), layout="constrained"
    )
    for axis, (title, picture) in zip(axes.flat, found, strict=False):
        axis.imshow(picture, cmap=colours, vmin=0, vmax=3, interpolation="nearest", aspect="equal")
        axis.set_title(title, fontsize=9, loc="left")
    for axis in axes.flat:
        axis.set_axis_off()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
