"""What is told and drawn of a compiled mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from maskops._checks import fail
from maskops.reference.masked_attention import EMPTY, FULL, TILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from maskops.ops.masked_attention.mask import BlockMap


def block_states(tiles: Tensor, q_block: int, k_block: int) -> Tensor:
    """int8 [B, H, nq, nk]: 0 where a block of so many queries and keys is empty, 1 partial, 2 full."""
    state = torch.where(tiles == EMPTY, 0, torch.where(tiles == FULL, 2, 1)).float()
    stride = tuple(min(block // TILE, max(n, 1)) for block, n in zip((q_block, k_block), tiles.shape[2:], strict=True))
    if not state.numel():
        shape = (-(-n // s) for n, s in zip(tiles.shape[2:], stride, strict=True))
        return torch.zeros(*tiles.shape[:2], *shape, dtype=torch.int8, device=tiles.device)
    most = torch.nn.functional.max_pool2d(state, stride, ceil_mode=True)
    least = -torch.nn.functional.max_pool2d(-state, stride, ceil_mode=True)
    return torch.where(most == 0, 0, torch.where(least == 2, 2, 1)).to(torch.int8)


def density(found: BlockMap) -> float:
    """The share of pairs that see each other."""
    rows, columns = (_sizes_of_tiles(n, found.tiles.device) for n in (found.Lq, found.Lk))
    full = torch.where(found.tiles == FULL, rows[:, None] * columns, 0).sum()
    bits = sum(((found.words >> i) & 1).sum() for i in range(TILE))
    pairs = found.tiles.shape[0] * found.tiles.shape[1] * found.Lq * found.Lk
    return int(full + bits) / pairs if pairs else 0.0


def _sizes_of_tiles(length: int, device: torch.device) -> Tensor:
    """int64 [tiles], TILE each but what is left in the last one."""
    return (length - torch.arange(0, length, TILE, device=device)).clamp(max=TILE)


def plot(found: BlockMap, ax: Axes | None) -> Axes:
    """What the first batch entry and head see, over the tiles that are computed."""
    from matplotlib import pyplot

    seen = found.dense()
    if not seen.numel():
        fail("AttentionMask.plot", "the mask", "have queries, keys, batch and heads", f"bool {list(seen.shape)}")
    seen = seen[0, 0].float()
    ax = ax or pyplot.figure(figsize=(4, 4), layout="constrained").gca()
    tiles = torch.where(found.tiles[0, 0] == EMPTY, 0.0, 0.35).repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    shown = torch.maximum(tiles[: found.Lq, : found.Lk], seen)
    ax.imshow(shown.cpu().numpy(), cmap="Blues", vmin=0, vmax=1.2, interpolation="nearest")
    ax.set(
        xlabel="key",
        ylabel="query",
        title=f"{seen.mean().item():.0%} of pairs, {(found.tiles[0, 0] != EMPTY).float().mean().item():.0%} of tiles",
    )
    return ax
