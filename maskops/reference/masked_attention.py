"""Reference of the family masked_attention: B batch, H heads, L queries, S keys, D channels.

A mask is compiled to tiles of TILE x TILE: tiles [B, H, L / TILE, S / TILE] holds EMPTY, FULL or the row of `words` that has the
tile's bits, one 64-bit word per query.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from maskops.reference.mask_sampling import philox_words
from maskops.reference.visible_tokens import accumulation_dtype

TILE, EMPTY, FULL = 64, -1, -2
WIDTH = 8
AND, OR, NOT, ROW_RANGE, KEY_RANGE, LENGTH, BAND, BLOCK_CAUSAL, SAME, GROUPS, BITS = range(11)


# ---------------------------------------------------------------- masks


def evaluate(ints: Tensor, bytes: Tensor, program: list[int], B: int, H: int, L: int, S: int) -> Tensor:
    """bool [B, H, L, S]: which key each query sees."""
    b, h, q, k = torch.meshgrid(*(torch.arange(n, device=ints.device) for n in (B, H, L, S)), indexing="ij")
    stack = []
    for at in range(0, len(program), WIDTH):
        code, *operands = program[at : at + WIDTH]
        if code == NOT:
            stack.append(~stack.pop())
        elif code in (AND, OR):
            right, left = stack.pop(), stack.pop()
            stack.append(left & right if code == AND else left | right)
        else:
            stack.append(_rule(code, operands, ints, bytes, b, h, q, k))
    return stack[0]


def _rule(code: int, o: list[int], ints: Tensor, bytes: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    if code in (ROW_RANGE, KEY_RANGE):
        own, other = (q, k) if code == ROW_RANGE else (k, q)
        at = b * o[2] + h * o[3] + own
        return (other >= ints[o[0] + at]) & (other < ints[o[1] + at])
    if code == LENGTH:
        return k < ints[o[0] + b * o[1] + h * o[2]]
    if code == BAND:
        return (k - q >= o[0]) & (k - q <= o[1])
    if code == BLOCK_CAUSAL:
        return k // o[0] <= q // o[0]
    if code == BITS:
        bit = k // o[5]
        return (bytes[o[0] + b * o[1] + h * o[2] + q // o[4] * o[3] + bit // 8] >> bit % 8) & 1 != 0
    ids_q, ids_k = ints[o[0] + b * o[2] + q], ints[o[1] + b * o[3] + k]
    if code == SAME:
        return ids_q == ids_k
    return bytes[o[4] + ids_q.long() * o[5] + ids_k.long()] != 0


def masked_attention_map(
    ints: Tensor, bytes: Tensor, program: list[int], B: int, H: int, Lq: int, Lk: int
) -> tuple[Tensor, Tensor]:
    """tiles int32 [B, H, Lq / TILE, Lk / TILE] and words int64 [P, TILE] of the tiles that are neither empty nor full."""
    allowed = evaluate(ints, bytes, program, B, H, Lq, Lk)
    pad = (0, -Lk % TILE, 0, -Lq % TILE)
    cut = "b h (q l) (k s) -> b h q k l s"
    seen = rearrange(F.pad(allowed, pad), cut, l=TILE, s=TILE)
    inside = rearrange(F.pad(torch.ones_like(allowed), pad), cut, l=TILE, s=TILE)
    empty, full = ~seen.flatten(4).any(4), (seen == inside).flatten(4).all(4)
    partial = ~empty & ~full
    rows = partial.flatten().cumsum(0).view(partial.shape) - 1
    tiles = torch.where(empty, EMPTY, torch.where(full, FULL, rows)).int()
    words = (seen[partial].long() << torch.arange(TILE, device=ints.device)).sum(2)
    return tiles, words


def dense_mask(tiles: Tensor, words: Tensor, L: int, S: int) -> Tensor:
    """bool [B, H, L, S] of a compiled mask."""
    bits = (words[:, :, None] >> torch.arange(TILE, device=words.device)) & 1
    plain = torch.tensor([0, 1], device=words.device)[:, None, None].expand(2, TILE, TILE)
    table = torch.cat([plain, bits])  # an empty tile, a full one, then the partial ones
    at = torch.where(tiles == EMPTY, 0, torch.where(tiles == FULL, 1, tiles + 2)).long()
    return rearrange(table[at], "b h q k l s -> b h (q l) (k s)")[:, :, :L, :S] != 0


# ---------------------------------------------------------------- attention


def _allowed(q: Tensor, k: Tensor, tiles: Tensor | None, words: Tensor | None) -> Tensor:
    B, H, L, S = *q.shape[:3], k.shape[2]
    if tiles is None:
        return torch.ones(B, H, L, S, dtype=torch.bool, device=q.device)
    return dense_mask(tiles, words, L, S).expand(B, H, L, S)


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values of grouped heads, once per query head, in the dtype of sums."""
    return x.to(accumulation_dtype(x.dtype)).repeat_interleave(heads // max(x.shape[1], 1), 1)


def _sum_kept(weights: Tensor, kept: Tensor, values: Tensor, equation: str) -> Tensor:
    """einsum over pairs that are kept: what is not finite elsewhere stays out."""
    w, x = torch.where(kept, weights, 0), values
    clean = torch.einsum(equation, w, torch.where(x.isfinite(), x, 0))
    spoilt = torch.einsum(equation, kept.to(w.dtype), (~x.isfinite()).to(w.dtype)) > 0
    return torch.where(spoilt, math.nan, clean)


def _scores(q: Tensor, k: Tensor, allowed: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """[B, H, L, S], -inf where a query does not see a key."""
    score = q.to(accumulation_dtype(q.dtype)) @ _per_head(k, q.shape[1]).transpose(2, 3) * scale
    if bias is not None:
        score = score + bias.to(score.dtype)
    return torch.where(allowed, score, -math.inf)


def _weights(scores: Tensor, lse: Tensor, allowed: Tensor) -> Tensor:
    return torch.where(allowed & (lse != -math.inf)[..., None], (scores - lse[..., None]).exp(), 0)


def _kept(seed: Tensor, shape: torch.Size, dropout_p: float) -> Tensor:
    """bool [B, H, L, S]: which weights dropout leaves.  Each query has the words of round_up(S, TILE) keys to itself."""
    B, H, L, S = shape
    width = -(-S // TILE) * TILE
    words = philox_words(seed, B * H * L * width).view(B, H, L, width)[..., :S]
    return words >= int(dropout_p * 2**32)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor | None, words: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    scale: float, dropout_p: float, entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out [B, H, L, D], lse [B, H, L], entropy [B, H, L or 0]."""
    allowed = _allowed(q, k, tiles, words)
    scores = _scores(q, k, allowed, bias, scale)
    lse = scores.logsumexp(3)
    weights = _weights(scores, lse, allowed)
    surprise = torch.where(weights > 0, lse[..., None] - scores, 0)
    spread = (weights * surprise).sum(3) if entropy else lse.new_empty(*lse.shape[:2], 0)
    if seed is not None:
        weights = torch.where(_kept(seed, weights.shape, dropout_p), weights / (1 - dropout_p), 0)
    out = _sum_kept(weights, allowed, _per_head(v, q.shape[1]), "bhls,bhsd->bhld")
    return out.to(q.dtype), lse, spread


def _slopes(
    grad: Tensor, grad_lse: Tensor, grad_entropy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    entropy: Tensor, tiles: Tensor | None, words: Tensor | None, bias: Tensor | None, seed: Tensor | None, scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """allowed, the weights after dropout and the gradient of the scores, each [B, H, L, S]."""
    allowed = _allowed(q, k, tiles, words)
    acc = accumulation_dtype(q.dtype)
    scores = _scores(q, k, allowed, bias, scale)
    weights = _weights(scores, lse, allowed)
    slope = grad.to(acc) @ _per_head(v, q.shape[1]).transpose(2, 3)
    kept = weights
    if seed is not None:
        mask = _kept(seed, weights.shape, dropout_p)
        kept, slope = (torch.where(mask, x / (1 - dropout_p), 0) for x in (weights, slope))
    delta = (grad.to(acc) * out.to(acc)).sum(3) - grad_lse.to(acc)
    slope = slope - delta[..., None]
    if entropy.shape[2]:
        surprise = torch.where(weights > 0, lse[..., None] - scores, 0)
        slope = slope + (grad_entropy[..., None] * (surprise - entropy[..., None]))
    seen = allowed & (lse != -math.inf)[..., None]  # of a row that sees nothing, nothing is used
    return allowed, kept, torch.where(seen, weights * slope, 0)


def _masked_attention_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v, scale = args[0], *args[3:6], args[13]
    acc = accumulation_dtype(q.dtype)
    allowed, weights, slope = _slopes(*args)
    slope = slope * scale
    grad_q = _sum_kept(slope, allowed, _per_head(k, q.shape[1]), "bhls,bhsd->bhld")
    grad_k = _sum_kept(slope, allowed, q.to(acc), "bhls,bhld->bhsd")
    grad_v = _sum_kept(weights, allowed, grad.to(acc), "bhls,bhld->bhsd")
    groups = q.shape[1] // max(k.shape[1], 1)
    grad_k, grad_v = (rearrange(x, "b (h g) s d -> b h g s d", g=max(groups, 1)).sum(2) for x in (grad_k, grad_v))
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _masked_attention_grad_bias(*args: Any) -> Tensor:
    bias = args[11]
    _, _, slope = _slopes(*args)
    return slope.sum_to_size(bias.shape).to(bias.dtype)
