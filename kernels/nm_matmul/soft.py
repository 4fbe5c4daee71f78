"""Products with a learnable N:M mask, drawn from logits by Gumbel noise.

N outputs, K = G m inputs, T = N G groups, P = C(m, n) patterns. logits [N, G, P] choose a pattern per group, logits [N, K]
the n best columns of a group by a relaxed top-n. The masked weight is made once per call, in a buffer of the weight's size:
made anew by every row tile of the product, noise and softmax would take ten times as long as the matrix units. Noise,
probabilities and the mask itself stay on chip and are never kept for the backward pass, which draws them again.
"""

import math

import torch
import triton
import triton.language as tl
from maskops.kernels._common import accumulator, cdiv, launch, philox4x32, rounded
from maskops.kernels.nm_matmul.bitmask import masked_grad_weight, masked_grad_x, masked_product


@triton.jit
def _noisy_logits(logits_ptr, seed_ptr, t, T, scale, WIDTH: tl.constexpr, SPREAD: tl.constexpr, ACC: tl.constexpr):
    """(a, column, valid), each [BLOCK_T, SPREAD]: a = logits * scale + Gumbel noise of groups t, which have WIDTH logits.

    A Philox counter gives four numbers, and a group may begin inside one: the row of group t holds the numbers from the
    last multiple of four on, so that no counter is drawn twice. column = which of the WIDTH a place is, if valid.
    """
    first = t * WIDTH
    counter = (first // 4)[:, None] + tl.arange(0, SPREAD // 4)[None, :]
    w0, w1, w2, w3 = philox4x32(counter, tl.load(seed_ptr + 1), tl.load(seed_ptr))
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    uniform = ((word >> 9).to(tl.int32).to(ACC) + 0.5) * (2.0**-23)
    noise = -tl.log(-tl.log(uniform))
    column = tl.arange(0, SPREAD)[None, :] - (first % 4).to(tl.int32)[:, None]
    valid = (column >= 0) & (column < WIDTH) & (t < T)[:, None]
    logits = tl.load(logits_ptr + first[:, None] + column, mask=valid, other=0.0)
    return logits * scale + noise, column, valid


@triton.jit
def _softmax(a, valid, inverse_tau):
    most = tl.max(tl.where(valid, a, float("-inf")), 1)
    # Groups beyond the end have no valid value: their maximum must not become NaN.
    most = tl.where(most == float("-inf"), 0.0, most)
    p = tl.where(valid, tl.exp((a - most[:, None]) * inverse_tau), 0.0)
    return p / tl.maximum(tl.sum(p, 1), 1e-30)[:, None]


@triton.jit
def _pattern_bits(index, KEEP: tl.constexpr, GROUP: tl.constexpr, PATTERNS: tl.constexpr):
    """The pattern number `index` as an int32 of GROUP bits: place by place, skip the patterns that keep the place or those
    that do not. `count` is the number of patterns that are left to choose from, C(GROUP - i, left)."""
    bits = tl.zeros_like(index)
    left = tl.zeros_like(index) + KEEP
    count = tl.zeros_like(index) + PATTERNS
    for i in tl.static_range(GROUP):
        keeping = count * left // (GROUP - i)
        keep = (index < keeping) & (left > 0)
        bits |= keep.to(tl.int32) << i
        index = tl.where(keep, index, index - keeping)
        count = tl.where(keep, keeping, count - keeping)
        left = tl.where(keep, left - 1, left)
    return bits


@triton.jit
def _best_pattern(a, bits, valid):
    """bits [BLOCK_T] of the largest a; equal ones: the lower index. NaN comes last."""
    a = tl.where(valid & (a == a), a, float("-inf"))
    place = tl.arange(0, a.shape[1])[None, :] + tl.zeros(a.shape, tl.int32)
    best = tl.min(tl.where(valid & (a == tl.max(a, 1)[:, None]), place, a.shape[1]), 1)
    return tl.sum(tl.where(place == best[:, None], bits, 0), 1)


@triton.jit
def _pattern_mask(p, bits, best_bits, i, HARD: tl.constexpr):
    """Column i of the forward mask, [BLOCK_T]."""
    if HARD:
        return ((best_bits >> i) & 1).to(p.dtype)
    else:
        return tl.sum(tl.where(((bits >> i) & 1) != 0, p, 0.0), 1)


@triton.jit
def _best_columns(a, column, valid, KEEP: tl.constexpr, GROUP: tl.constexpr):
    """The KEEP largest a of every group as 0 and 1; equal ones: the lower column. NaN comes last."""
    before = tl.zeros(a.shape, tl.int32)
    for i in range(GROUP):
        other = tl.sum(tl.where(column == i, a, 0.0), 1)[:, None]
        larger = (other > a) | ((other == other) & (a != a))
        equal = (other == a) | ((other != other) & (a != a))
        before += (larger | (equal & (i < column))).to(tl.int32)
    return (valid & (before < KEEP)).to(a.dtype)


@triton.jit
def _relaxed_step(r, valid, inverse_tau, EPS: tl.constexpr):
    """One softmax, and the logits without what it took."""
    p = _softmax(r, valid, inverse_tau)
    return p, r + tl.log(tl.maximum(1.0 - p, EPS))


@triton.jit
def _relaxed_mask(a, valid, inverse_tau, KEEP: tl.constexpr, EPS: tl.constexpr):
    mask = tl.zeros(a.shape, a.dtype)
    for _ in range(KEEP):
        p, a = _relaxed_step(a, valid, inverse_tau, EPS)
        mask += p
    return mask


@triton.jit
def _float(bits):
    """A float64 that came as the integer of its bits: Triton passes floats as float32."""
    return (tl.zeros([], tl.int64) + bits).to(tl.float64, bitcast=True)


@triton.jit
def _masked_weight_kernel(weight_ptr, logits_ptr, seed_ptr, out_ptr, kept_ptr, T, inverse_tau, scale,
                          KEEP: tl.constexpr, GROUP: tl.constexpr, PATTERNS: tl.constexpr, HARD: tl.constexpr,
                          EPS: tl.constexpr, ACC: tl.constexpr, SPREAD: tl.constexpr, PADDED: tl.constexpr,
                          BLOCK_T: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_T groups of out [N, K] = W * mask, and kept[program], its sum of squares. A group is a row of
    # a tile: its logits side by side, so that softmax and top-n are sums over rows. PATTERNS 0: a logit per column.
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    tau1 = _float(inverse_tau).to(ACC)
    scale1 = _float(scale).to(ACC)
    if PATTERNS > 0:
        a, index, valid = _noisy_logits(logits_ptr, seed_ptr, t, T, scale1, PATTERNS, SPREAD, ACC)
        bits = _pattern_bits(index, KEEP, GROUP, PATTERNS)
        p = _softmax(a, valid, tau1)
        best_bits = tl.zeros([BLOCK_T], tl.int32)
        if HARD:
            best_bits = _best_pattern(a, bits, valid)
        column = tl.arange(0, PADDED)[None, :]
        inside = (column < GROUP) & (t < T)[:, None]
        mask = tl.zeros([BLOCK_T, PADDED], ACC)
        for i in range(GROUP):
            mask = tl.where(column == i, _pattern_mask(p, bits, best_bits, i, HARD)[:, None], mask)
    else:
        a, column, inside = _noisy_logits(logits_ptr, seed_ptr, t, T, scale1, GROUP, SPREAD, ACC)
        if HARD:
            mask = _best_columns(a, column, inside, KEEP, GROUP)
        else:
            mask = _relaxed_mask(a, inside, tau1, KEEP, EPS)
    at = (t * GROUP)[:, None] + column
    masked = tl.load(weight_ptr + at, mask=inside, other=0.0).to(ACC) * mask
    tl.store(out_ptr + at, rounded(masked, out_ptr.dtype.element_ty), mask=inside)
    if kept_ptr is not None:
        squares = tl.where(inside, masked * masked, 0.0)
        tl.store(kept_ptr + tl.program_id(0), tl.sum(tl.sum(squares, 1), 0))


@triton.jit
def _total_kernel(part_ptr, out_ptr, count, BLOCK: tl.constexpr):
    # The one program adds all partial sums, BLOCK side by side: a fixed order, and one number per thousand weights.
    total = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
    for i0 in range(0, count, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        total += tl.load(part_ptr + i, mask=i < count, other=0.0)
    tl.store(out_ptr, tl.sum(total, 0))


@triton.jit
def _relaxed_grad(a, valid, grad_mask, inverse_tau, KEEP: tl.constexpr, EPS: tl.constexpr):
    """The gradient of a relaxed top-n, from the last step to the first.

    A step's p is computed again from the beginning: KEEP^2 / 2 softmaxes instead of KEEP tiles kept in registers.
    """
    grad_r = tl.zeros(a.shape, a.dtype)
    for back in range(KEEP):
        r = a
        for _ in range(KEEP - 1 - back):
            _, r = _relaxed_step(r, valid, inverse_tau, EPS)
        p = _softmax(r, valid, inverse_tau)
        rest = 1.0 - p
        grad_p = grad_mask - tl.where(rest > EPS, grad_r / tl.maximum(rest, EPS), 0.0)
        grad_r += p * (grad_p - tl.sum(tl.where(valid, p * grad_p, 0.0), 1)[:, None]) * inverse_tau
    return grad_r


@triton.jit
def _grad_logits_kernel(outer_ptr, grad_kept_ptr, weight_ptr, logits_ptr, seed_ptr, out_ptr, T, inverse_tau, scale,
                        KEEP: tl.constexpr, GROUP: tl.constexpr, PATTERNS: tl.constexpr, HARD: tl.constexpr,
                        EPS: tl.constexpr, ACC: tl.constexpr, SPREAD: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    # One program owns the logits of BLOCK_T groups. outer [N, K] = grad^T x; the gradient of the mask is outer * W +
    # 2 grad_kept W^2 mask, and goes through the Jacobian of the soft mask, also where the forward mask was hard.
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    tau1 = _float(inverse_tau).to(ACC)
    scale1 = _float(scale).to(ACC)
    twice = 2.0 * tl.load(grad_kept_ptr).to(ACC)
    if PATTERNS > 0:
        a, index, valid = _noisy_logits(logits_ptr, seed_ptr, t, T, scale1, PATTERNS, SPREAD, ACC)
        bits = _pattern_bits(index, KEEP, GROUP, PATTERNS)
        p = _softmax(a, valid, tau1)
        best_bits = tl.zeros([BLOCK_T], tl.int32)
        if HARD:
            best_bits = _best_pattern(a, bits, valid)
        grad_p = tl.zeros([BLOCK_T, SPREAD], ACC)
        for i in range(GROUP):
            w = tl.load(weight_ptr + t * GROUP + i, mask=t < T, other=0.0).to(ACC)
            outer = tl.load(outer_ptr + t * GROUP + i, mask=t < T, other=0.0)
            grad_mask = outer * w + twice * w * w * _pattern_mask(p, bits, best_bits, i, HARD)
            grad_p += tl.where(((bits >> i) & 1) != 0, grad_mask[:, None], 0.0)
        grad = p * (grad_p - tl.sum(p * grad_p, 1)[:, None]) * tau1
        at = (t * PATTERNS)[:, None] + index
    else:
        a, column, valid = _noisy_logits(logits_ptr, seed_ptr, t, T, scale1, GROUP, SPREAD, ACC)
        if HARD:
            mask = _best_columns(a, column, valid, KEEP, GROUP)
        else:
            mask = _relaxed_mask(a, valid, tau1, KEEP, EPS)
        at = (t * GROUP)[:, None] + column
        w = tl.load(weight_ptr + at, mask=valid, other=0.0).to(ACC)
        outer = tl.load(outer_ptr + at, mask=valid, other=0.0)
        grad = _relaxed_grad(a, valid, outer * w + twice * w * w * mask, tau1, KEEP, EPS)
    tl.store(out_ptr + at, grad * scale1, mask=valid)


def _bits_of(value):
    """The bits of a float64 as an int, see _float."""
    return torch.tensor(value, dtype=torch.float64, device="cpu").view(torch.int64).item()


def _choice(weight, logits, n, m, tau, scale, hard):
    """(groups, groups per program, number arguments, constexprs) that both kernels share."""
    patterns = math.comb(m, n) if logits.dim() == 3 else 0
    width = patterns or m
    # A group may begin at any multiple of gcd(width, 4) inside a counter of four.
    spread = max(4, triton.next_power_of_2(width + 4 - math.gcd(width, 4)))
    double = logits.dtype == torch.float64
    constants = {
        "KEEP": n, "GROUP": m, "PATTERNS": patterns, "HARD": hard, "EPS": 1e-12 if double else 1e-6,
        "ACC": accumulator(logits)[1], "SPREAD": spread, "num_warps": 4,
    }  # fmt: skip
    block_t = max(1, (128 if double else 1024) // max(spread, triton.next_power_of_2(m)))
    return weight.numel() // m, block_t, (_bits_of(1.0 / tau), _bits_of(scale)), constants


def _masked_weight(weight, logits, seed, n, m, tau, scale, hard, need_kept):
    """(W * mask in W's dtype, sum of its squares); one read of weight and logits."""
    groups, block_t, numbers, constants = _choice(weight, logits, n, m, tau, scale, hard)
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    programs = cdiv(groups, block_t)
    partial = torch.empty(programs, dtype=logits.dtype, device=weight.device) if need_kept else None
    launch(
        _masked_weight_kernel, programs, weight, logits, seed, out, partial, groups, *numbers, **constants,
        PADDED=triton.next_power_of_2(m), BLOCK_T=block_t,
    )  # fmt: skip
    if not need_kept:
        return out, None
    kept = torch.empty((), dtype=logits.dtype, device=weight.device)
    launch(_total_kernel, 1, partial, kept, programs, BLOCK=1024, num_warps=4)
    return out, kept


def nm_matmul_soft(x, weight, logits, seed, n, m, tau, scale, hard):
    arguments = weight.contiguous(), logits.contiguous(), seed.contiguous(), n, m, tau, scale, hard
    masked, kept = _masked_weight(*arguments, need_kept=True)
    return masked_product(x[None], masked, None, None)[0], kept


def _nm_matmul_soft_backward(grad, grad_kept, x, weight, logits, seed, n, m, tau, scale, hard, need_x, need_logits):
    weight, logits, seed = weight.contiguous(), logits.contiguous(), seed.contiguous()
    grad_x, grad_logits = x.new_empty(0), logits.new_empty(0)
    if need_x:
        masked, _ = _masked_weight(weight, logits, seed, n, m, tau, scale, hard, need_kept=False)
        grad_x = masked_grad_x(grad[None], masked, None)[0]
    if need_logits:
        groups, block_t, numbers, constants = _choice(weight, logits, n, m, tau, scale, hard)
        grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        # With a logit per column, the outer product takes the place of the result, group by group.
        in_place = logits.dim() == 2
        outer = grad_logits if in_place else torch.empty(weight.shape, dtype=logits.dtype, device=weight.device)
        masked_grad_weight(grad[None], x[None], weight, None, outer, None, False)
        launch(
            _grad_logits_kernel, cdiv(groups, block_t), outer, grad_kept, weight, logits, seed, grad_logits, groups,
            *numbers, **constants, BLOCK_T=block_t,
        )  # fmt: skip
    return grad_x, grad_logits
