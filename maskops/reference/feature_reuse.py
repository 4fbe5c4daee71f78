"""Reference of the family feature_reuse: B batch, H heads, N cached tokens, U local tokens, D channels of a head, V vocabulary."""

import math

import torch
from torch import Tensor

from maskops.reference.mask_sampling.split import philox
from maskops.reference.visible_tokens import accumulation_dtype

COSINE, L2 = 0, 1
UNIFORM_BITS = 23  # of a Philox word: u = (bits + 1 / 2) / 2^23 is exact in float32 and never 0 or 1


# ---------------------------------------------------------------- the cache


def feature_reuse_write_(k_cache: Tensor, v_cache: Tensor, valid: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> None:
    """cache[b, :, ids[b, u]] = rows [b, :, u], valid[b, ids[b, u]] = True; ids -1 is an empty slot."""
    row, slot = torch.nonzero(ids >= 0, as_tuple=True)
    token = ids[row, slot]
    k_cache[row, :, token] = k[row, :, slot]
    v_cache[row, :, token] = v[row, :, slot]
    valid[row, token] = True


def feature_reuse_exclude(valid: Tensor, ids: Tensor) -> Tensor:
    """valid [L, B, N] without the tokens ids [B, U]."""
    tokens = valid.shape[2]
    named = torch.zeros(ids.shape[0], tokens + 1, dtype=torch.bool, device=ids.device)
    named = named.scatter(1, torch.where(ids < 0, tokens, ids), True)[:, :tokens]
    return valid & ~named


# ---------------------------------------------------------------- attention


def feature_reuse_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, seen: Tensor, ids: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, H, U, D], lse [B, H, U] over [cached keys that are seen ; local keys whose slot is not empty]."""
    acc = accumulation_dtype(q.dtype)
    real = ids >= 0
    key_seen = torch.cat([seen, real], 1)[:, None, None, :]
    allowed = key_seen & real[:, None, :, None]
    keys = torch.cat([k_cache, k], 2).to(acc)
    values = torch.where(key_seen.transpose(2, 3), torch.cat([v_cache, v], 2).to(acc), 0)
    scores = torch.where(allowed, q.to(acc) @ keys.transpose(2, 3) * scale, -math.inf)
    lse = scores.logsumexp(3)
    weights = torch.where(allowed & (lse != -math.inf)[..., None], (scores - lse[..., None]).exp(), 0)
    return (weights @ values).to(q.dtype), lse


# ---------------------------------------------------------------- selection


def uniforms(seed: Tensor, first: int, rows: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two uniform numbers in (0, 1) per token: words 0 and 1 of Philox counter (first + b) * tokens + n."""
    words = philox(seed, first * tokens + torch.arange(rows * tokens, device=seed.device))[:, :2]
    u = ((words >> (32 - UNIFORM_BITS)).to(dtype) + 0.5) * 2.0**-UNIFORM_BITS
    return u[:, 0].view(rows, tokens), u[:, 1].view(rows, tokens)


def feature_reuse_sample(
    logits: Tensor, known: Tensor, seed: Tensor, first_row: int, temperature: float, noise: float, probs: bool
) -> tuple[Tensor, Tensor]:
    """tokens int64 [B, N] and confidence [B, N] = log p(token) + noise * Gumbel; -1 and inf where known."""
    acc = accumulation_dtype(logits.dtype)
    x = torch.where(known[..., None], 0, logits.to(acc))
    divisor = temperature if temperature > 0 else 1.0
    weights = torch.where(x < 0, math.nan, x) if probs else ((x - x.amax(2, keepdim=True)) / divisor).exp()
    total = weights.sum(2)
    draw, gumbel = uniforms(seed, first_row, *known.shape, acc)
    if temperature > 0:
        below = weights.cumsum(2) <= (draw * total)[..., None]
        last = torch.where(weights > 0, torch.arange(weights.shape[2], device=x.device), 0).amax(2)
        token = torch.minimum(below.sum(2), last)
    else:
        token = x.argmax(2)
    confidence = (weights.gather(2, token[..., None])[..., 0] / total).log() - noise * (-gumbel.log()).log()
    good = (total > 0) & (total < math.inf)
    token, confidence = torch.where(good, token, -1), torch.where(good, confidence, -math.inf)
    return torch.where(known, -1, token), torch.where(known, math.inf, confidence)


def feature_reuse_rank(
    score: Tensor, known: Tensor, num_select: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """ids [B, N] of the chosen unknown tokens by falling score, ids [B, N] of the others, how many are chosen [B]."""
    tokens = score.shape[1]
    # NaN comes last; a stable sort settles ties by the lower index.
    order = torch.where(score.isnan(), -math.inf, score).argsort(dim=1, descending=True, stable=True)
    for last in (score.isnan(), known):
        order = order.gather(1, last.gather(1, order).to(torch.int8).argsort(dim=1, stable=True))
    unknown = (~known).sum(1)
    wanted = ((score > threshold) & ~known).sum(1).clamp(min=1) if num_select is None else num_select
    count = torch.minimum(wanted, unknown)
    place = torch.arange(tokens, device=score.device)
    chosen = torch.where(place < count[:, None], order, -1)
    at = count[:, None] + place
    others = torch.where(at < unknown[:, None], order.gather(1, at.clamp(max=max(tokens - 1, 0))), -1)
    return chosen, others, count


def feature_reuse_drift(new: Tensor, cached: Tensor, kind: int) -> Tensor:
    """[B, N]: 1 - cosine of new and cached [B, N, D] (0 of two zero rows, 1 of one), or the length of their difference."""
    acc = accumulation_dtype(new.dtype)
    a, b = new.to(acc), cached.to(acc)
    if kind == L2:
        return (a - b).square().sum(2).sqrt()
    first, other = a.square().sum(2).sqrt(), b.square().sum(2).sqrt()
    some = (first != 0) | (other != 0)
    return torch.where(first * other == 0, some.to(acc), 1 - (a * b).sum(2) / (first * other))
