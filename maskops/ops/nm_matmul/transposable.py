"""Transposable masks: n kept per row and per column of each m x m block.  Composed of PyTorch ops, all blocks at once."""

import itertools
import math
from functools import cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from maskops._checks import FLOATS, describe, fail
from maskops.reference.nm_matmul import descending_order

LARGEST_EXACT = 4
BLOCKS_AT_ONCE = 1 << 16  # the scores of all candidates stay below 50 MB


class _PastVmap(torch.autograd.Function):
    """transposable_mask under torch.vmap: its loops ask the data, so a mapped axis becomes one more leading axis."""

    @staticmethod
    def forward(op: str, scores: Tensor, n: int, m: int) -> Tensor:
        return _mask(op, scores, n, m)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return (None,) * 4

    @staticmethod
    def vmap(info: Any, in_dims: tuple, op: str, scores: Tensor, n: int, m: int) -> tuple[Tensor, int]:
        if scores.dim() < 3:
            _mask(op, scores.select(in_dims[1], 0), n, m)  # which names the shape that the caller sees
        return _PastVmap.apply(op, scores.movedim(in_dims[1], 0), n, m), 0


def transposable_mask(op: str, scores: Tensor, n: int, m: int) -> Tensor:
    """scores [..., R, K] -> bool of the same shape."""
    if torch.compiler.is_compiling():
        return _mask(op, scores, n, m)
    return _PastVmap.apply(op, scores, n, m)


def _mask(op: str, scores: Tensor, n: int, m: int) -> Tensor:
    if scores.layout != torch.strided or scores.is_nested:
        fail(op, "scores", "be a dense tensor [..., R, K]", "a nested one" if scores.is_nested else scores.layout)
    if scores.dtype not in FLOATS:
        names = " or ".join(str(d).removeprefix("torch.") for d in FLOATS)
        fail(op, "scores", f"be {names} [..., R, K]", describe(scores))
    if scores.dim() < 2 or scores.shape[-1] % m or scores.shape[-2] % m:
        fail(
            op,
            "scores",
            f"have shape [..., R, K] with R and K divisible by m = {m} to be transposable",
            describe(scores),
        )
    leading, (R, K) = scores.shape[:-2], scores.shape[-2:]
    rows = scores.detach().reshape(math.prod(leading), R, K)
    blocks = rearrange(rows, "b (r i) (c j) -> (b r c) (i j)", i=m, j=m)
    choose = _best_of_all if m <= LARGEST_EXACT else _greedy
    kept = torch.cat([choose(part, n, m) for part in blocks.split(BLOCKS_AT_ONCE)])
    kept = rearrange(kept, "(b r c) (i j) -> b (r i) (c j)", b=rows.shape[0], r=R // m, c=K // m, i=m, j=m)
    return kept.reshape(scores.shape)


@cache
def _candidates(n: int, m: int) -> tuple[tuple[int, ...], ...]:
    """Every m x m mask with n per row and column, as m * m zeros and ones; rows are patterns in lexicographic order."""
    patterns = [tuple(int(i in chosen) for i in range(m)) for chosen in itertools.combinations(range(m), n)]
    found = (
        rows for rows in itertools.product(patterns, repeat=m) if all(sum(c) == n for c in zip(*rows, strict=True))
    )
    return tuple(tuple(itertools.chain(*rows)) for rows in found)


def _best_of_all(scores: Tensor, n: int, m: int) -> Tensor:
    """[B, m m] -> bool: the candidate with the fewest NaN, then the fewest -inf, the most +inf, the largest finite sum."""
    masks = torch.tensor(_candidates(n, m), dtype=torch.float64, device=scores.device)
    exact, finite = scores.double(), scores.isfinite()
    keys = (-scores.isnan().double(), -scores.isneginf().double(), scores.isposinf().double(), exact.where(finite, 0))
    left = torch.ones(scores.shape[0], len(masks), dtype=torch.bool, device=scores.device)
    for key in keys:
        total = (key @ masks.T).masked_fill(~left, -math.inf)
        left &= total == total.amax(1, keepdim=True)
    return masks.bool()[left.to(torch.int8).argmax(1)]  # of several, argmax is the first


def _greedy(scores: Tensor, n: int, m: int) -> Tensor:
    """[B, m m] -> bool: take scores in descending order where row and column have room, then fill what is missing."""
    order = descending_order(scores)
    count, block = scores.shape[0], torch.arange(scores.shape[0], device=scores.device)
    kept = torch.zeros(count, m, m, dtype=torch.bool, device=scores.device)
    in_row, in_column = (torch.zeros(count, m, dtype=torch.int64, device=scores.device) for _ in range(2))
    for step in range(m * m):
        row, column = order[:, step] // m, order[:, step] % m
        take = (in_row[block, row] < n) & (in_column[block, column] < n)
        kept[block, row, column] = take
        in_row[block, row] += take
        in_column[block, column] += take
    short = torch.nonzero((in_row < n).any(1)).flatten()
    while len(short):
        kept[short] = _exchange(scores[short].view(-1, m, m), kept[short], n)
        short = short[(kept[short].sum(2) < n).any(1)]
    return kept.flatten(1)


def _exchange(scores: Tensor, kept: Tensor, n: int) -> Tensor:
    """One more entry in a row and a column that miss one, by giving up the entry (i, j) whose exchange gains most.

    Greedy leaves a row r and a column c short only if (r, c) is kept. Then some kept (i, j) has (r, j) and (i, c) free: taking
    these two for it adds one to r and to c. (If there were none, every row that lacks c would have less than n entries, and
    greedy would have given it c.)
    """
    b, m = torch.arange(len(kept), device=kept.device), kept.shape[1]
    big = torch.finfo(torch.float64).max / 16  # sums of three stay finite
    value = scores.double().nan_to_num(nan=-2 * big, posinf=big, neginf=-big).clamp(-2 * big, big)
    r, c = (kept.sum(axis).lt(n).to(torch.int8).argmax(1) for axis in (2, 1))
    row, column = kept[b, r], kept[b, :, c]
    free = kept & ~row[:, None, :] & ~column[:, :, None]
    gain = value[b, r][:, None, :] + value[b, :, c][:, :, None] - value
    best = descending_order(gain.masked_fill(~free, -math.inf).flatten(1))[:, 0]
    i, j = best // m, best % m
    kept = kept.clone()
    kept[b, i, j], kept[b, r, j], kept[b, i, c] = (torch.tensor(v, device=kept.device) for v in (False, True, True))
    return kept
