"""Sample a token everywhere, and rank the tokens of a row."""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import accumulator, bits_of, cdiv, float_of, launch, philox4x32, rows_of


@triton.jit
def _uniform(word, ACC: tl.constexpr):
    """The upper 23 bits of a random word as a number in (0, 1), exact in float32."""
    return ((word >> 9).to(tl.int32).to(ACC) + 0.5) * (1.0 / 8388608.0)


@triton.jit
def _weights(x, top, inverse, PROBS: tl.constexpr):
    if PROBS:
        return tl.where(x < 0, float("nan"), x)
    else:
        return tl.exp((x - top) * inverse)


@triton.jit
def _sample_kernel(logits_ptr, known_ptr, seed_ptr, token_ptr, confidence_ptr, first_row, inverse, noise, N, V, s_b, s_n,
                   GREEDY: tl.constexpr, NOISY: tl.constexpr, PROBS: tl.constexpr, ACC: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    # One program owns a row of logits [B N, V] and walks over it BLOCK values at a time: once for the highest value and the sum of
    # the weights, then, with the row in cache, for the value at which the running sum passes the random number.
    row = tl.program_id(0).to(tl.int64)
    known = tl.load(known_ptr + row) != 0
    token = tl.full([], -1, tl.int64)
    confidence = tl.full([], float("-inf"), ACC)
    count = tl.where(known, 0, V)
    x_ptr = logits_ptr + row // N * s_b + row % N * s_n
    by = float_of(inverse).to(ACC)
    top = tl.full([], float("-inf"), ACC)
    total = tl.zeros([], ACC)
    best = tl.full([], -1, tl.int64)
    for v0 in range(0, count, BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + v, mask=v < V, other=0.0 if PROBS else float("-inf")).to(ACC)
        # NaN spreads through the sum, so the highest value may leave it out.
        high = tl.max(tl.where((v < V) & (x == x), x, float("-inf")), 0)
        if GREEDY:
            first = tl.min(tl.where((x == high) & (v < V), v, V), 0).to(tl.int64)
            best = tl.where(high > top, first, best)
        before = top
        top = tl.maximum(top, high)
        level = tl.where(top == float("-inf"), 0.0, top)
        if not PROBS:
            total = total * tl.exp((tl.where(before == float("-inf"), level, before) - level) * by)
        total += tl.sum(_weights(x, level, by, PROBS), 0)
    good = (total > 0) & (total < float("inf"))
    skipped = (tl.zeros([], tl.int64) + first_row) * N  # past 32 bits
    w0, w1, _w2, _w3 = philox4x32(skipped + row, tl.load(seed_ptr + 1), tl.load(seed_ptr))
    weight = tl.zeros([], ACC)
    if GREEDY:
        token = tl.where(good, best, -1)
        weight = _weights(top, top, by, PROBS)
    else:
        target = _uniform(w0, ACC) * total
        below = tl.zeros([], ACC)
        found = tl.full([], 0, tl.int32)
        for v0 in range(0, tl.where(good, count, 0), BLOCK):
            v = v0 + tl.arange(0, BLOCK)
            mask = v < tl.where(found > 0, 0, V)  # what is behind is not read
            x = tl.load(x_ptr + v, mask=mask, other=0.0 if PROBS else float("-inf")).to(ACC)
            w = tl.where(mask, _weights(x, top, by, PROBS), 0.0)
            sums = below + tl.cumsum(w, 0)
            some = tl.max((w > 0).to(tl.int32), 0) > 0
            passed = (sums > target) & (w > 0)
            here = tl.max(passed.to(tl.int32), 0)
            # The first that passes; for want of one, the last with a weight so far.
            at = tl.where(here > 0, tl.min(tl.where(passed, v, V), 0), tl.max(tl.where(w > 0, v, -1), 0))
            taken = tl.sum(tl.where(v == at, w, 0.0), 0)
            token = tl.where(some, at.to(tl.int64), token)
            weight = tl.where(some, taken, weight)
            below += tl.sum(w, 0)
            found = tl.maximum(found, here)
    gumbel = tl.zeros([], ACC)
    if NOISY:
        gumbel = -float_of(noise).to(ACC) * tl.log(-tl.log(_uniform(w1, ACC)))
    confidence = tl.where(good, tl.log(tl.where(good, weight / total, 1.0)) + gumbel, confidence)
    tl.store(token_ptr + row, token)
    tl.store(confidence_ptr + row, tl.where(known, float("inf"), confidence))


def feature_reuse_sample(logits, known, seed, first_row, temperature, noise, probs):
    B, N, V = logits.shape
    dtype, acc = accumulator(logits)
    logits = rows_of(logits)
    tokens = torch.empty((B, N), dtype=torch.int64, device=logits.device)
    confidence = torch.empty((B, N), dtype=dtype, device=logits.device)
    launch(
        _sample_kernel, B * N, logits, known.contiguous().view(torch.uint8), seed.contiguous(), tokens, confidence, first_row,
        bits_of(1 / temperature if temperature > 0 else 1.0), bits_of(noise), N, V, *logits.stride()[:2],
        GREEDY=temperature == 0, NOISY=noise != 0, PROBS=probs, ACC=acc,
        BLOCK=min(1024, max(16, triton.next_power_of_2(V))), num_warps=4, maxnreg=255,
    )  # fmt: skip
    return tokens, confidence


@triton.jit
def _rank_kernel(score_ptr, known_ptr, num_ptr, ids_ptr, rest_ptr, count_ptr, threshold, blocks, N, BLOCK: tl.constexpr,
                 BLOCK_KEYS: tl.constexpr):  # fmt: skip
    # One program owns BLOCK tokens of a row of score [B, N]: the place of each is the number of unknown tokens that come before it,
    # counted BLOCK_KEYS at a time. Every program counts the whole row, and so knows how many are chosen.
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(score_ptr + b * N + n, mask=n < N, other=0.0)[:, None]
    unknown = tl.load(known_ptr + b * N + n, mask=n < N, other=1) == 0
    nan = score != score
    place = tl.zeros([BLOCK], tl.int32)
    left = tl.zeros([], tl.int32)
    above = tl.zeros([], tl.int32)
    limit = float_of(threshold).to(tl.float64)
    for m0 in range(0, N, BLOCK_KEYS):
        m = m0 + tl.arange(0, BLOCK_KEYS)
        other = tl.load(score_ptr + b * N + m, mask=m < N, other=0.0)
        free = tl.load(known_ptr + b * N + m, mask=m < N, other=1) == 0
        left += tl.sum(free.to(tl.int32), 0)
        above += tl.sum((free & (other.to(tl.float64) > limit)).to(tl.int32), 0)
        other = other[None, :]
        other_nan = other != other
        same = (other == score) | (other_nan & nan)
        before = (other > score) | (nan & (other == other)) | (same & (m[None, :] < n[:, None]))
        place += tl.sum((before & free[None, :]).to(tl.int32), 1)
    if num_ptr is not None:
        count = tl.minimum(tl.load(num_ptr + b), left.to(tl.int64))
    else:
        count = tl.minimum(tl.maximum(above, 1), left).to(tl.int64)
    tl.store(ids_ptr + b * N + place, n.to(tl.int64), mask=unknown & (place < count))
    tl.store(rest_ptr + b * N + place - count, n.to(tl.int64), mask=unknown & (place >= count))
    # Each program fills its own part of the padding.
    empty = tl.full([BLOCK], -1, tl.int64)
    tl.store(ids_ptr + b * N + n, empty, mask=(n >= count) & (n < N))
    tl.store(rest_ptr + b * N + n, empty, mask=(n >= left - count) & (n < N))
    if tl.program_id(0) % blocks == 0:
        tl.store(count_ptr + b, count)


def feature_reuse_rank(score, known, num_select, threshold):
    B, N = score.shape
    ids, rest = (torch.empty((B, N), dtype=torch.int64, device=score.device) for _ in range(2))
    count = torch.empty(B, dtype=torch.int64, device=score.device)
    num = None if num_select is None else num_select.contiguous()
    blocks = max(1, cdiv(N, 64))
    launch(
        _rank_kernel, B * blocks, score.contiguous(), known.contiguous().view(torch.uint8), num, ids, rest, count,
        bits_of(threshold), blocks, N, BLOCK=64, BLOCK_KEYS=64, num_warps=4,
    )  # fmt: skip
    return ids, rest, count
