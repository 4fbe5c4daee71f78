"""Triton kernels of the laws of mask_sampling that draw per element, in whole numbers, as csrc/math/mask_sampling_draw.h.

One program owns BLOCK Philox counters, that is 4*BLOCK words, unless it says otherwise.
"""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import cdiv, launch, philox4x32


@triton.jit
def log2_fraction(m):
    """log2(m / 2^31) for int64 m in [2^31, 2^32), 26 bits after the point."""
    f = m - 2147483648
    r = ((f * 8138037) >> 31) - 45835024
    r = ((r * f) >> 31) + 121388650
    r = ((r * f) >> 31) - 211833397
    r = ((r * f) >> 31) + 296051740
    r = ((r * f) >> 31) - 384859663
    r = ((r * f) >> 31) + 516142836
    r = ((r * f) >> 31) - 774533280
    r = ((r * f) >> 31) + 1549081959
    return (r * f) >> 35


@triton.jit
def _shift_up(x, exponent, SHIFT: tl.constexpr):
    small = x < (1 << (63 - SHIFT))
    return tl.where(small, x << SHIFT, x), tl.where(small, exponent - SHIFT, exponent)


@triton.jit
def fixed_log2(x):
    """log2 of int64 x in [1, 2^63), 26 bits after the point."""
    exponent = tl.full(x.shape, 62, tl.int64)
    x, exponent = _shift_up(x, exponent, 32)
    x, exponent = _shift_up(x, exponent, 16)
    x, exponent = _shift_up(x, exponent, 8)
    x, exponent = _shift_up(x, exponent, 4)
    x, exponent = _shift_up(x, exponent, 2)
    x, exponent = _shift_up(x, exponent, 1)
    return (exponent << 26) + log2_fraction(x >> 31)


@triton.jit
def gumbel2(word):
    """-log2(-log2 u) of u = (word | 1) / 2^32, 26 bits after the point.  word int64."""
    x = word | 1
    v = 4294967296 - x
    r = ((v * 2234586229) >> 32) - 2631372645
    r = ((r * v) >> 32) + 1951859503
    r = ((r * v) >> 32) - 316848838
    r = ((r * v) >> 32) + 418019985
    r = ((r * v) >> 32) + 376077536
    r = ((r * v) >> 32) + 516932629
    r = ((r * v) >> 32) + 774529857
    r = ((r * v) >> 32) + 1549082040
    exponential = tl.where(v < 2147483648, (r * v) >> 6, (2147483648 - fixed_log2(x)) << 30)
    return 3758096384 - fixed_log2(exponential)


@triton.jit
def _my_words(seed_ptr, BLOCK: tl.constexpr):
    """Indices [4*BLOCK] of this program's words, and the words as int64."""
    counter = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = philox4x32(counter, tl.load(seed_ptr + 1), tl.load(seed_ptr))
    i = tl.program_id(0).to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    return i, tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)).to(tl.int64)


@triton.jit
def _words_kernel(seed_ptr, out_ptr, total, BLOCK: tl.constexpr):
    i, word = _my_words(seed_ptr, BLOCK)
    tl.store(out_ptr + i, word, mask=i < total)


@triton.jit
def _bernoulli_kernel(seed_ptr, threshold_ptr, out_ptr, total, N, down, across, BLOCK: tl.constexpr):
    i, word = _my_words(seed_ptr, BLOCK)
    threshold = tl.load(threshold_ptr + i // N * down + i % N * across, mask=i < total, other=0)
    tl.store(out_ptr + i, (word < threshold).to(tl.uint8), mask=i < total)


@triton.jit
def _race_kernel(seed_ptr, weight_ptr, out_ptr, total, BLOCK: tl.constexpr):
    i, word = _my_words(seed_ptr, BLOCK)
    bits = tl.load(weight_ptr + i, mask=i < total, other=0.0).to(tl.int32, bitcast=True).to(tl.int64) & 0x7FFFFFFF
    exponent = bits >> 23
    log_weight = ((exponent - 127) << 26) + log2_fraction(((bits & 0x7FFFFF) | 0x800000) << 8)
    key = tl.where(exponent == 0, (word << 8) + 1099511627776, -(log_weight + gumbel2(word)))
    tl.store(out_ptr + i, key.to(tl.float32), mask=i < total)


@triton.jit
def _gate_kernel(seed_ptr, logits_ptr, out_ptr, total, GUMBEL: tl.constexpr, BLOCK: tl.constexpr):
    i, word = _my_words(seed_ptr, BLOCK)
    logit = tl.load(logits_ptr + i, mask=i < total, other=0.0)
    bounded = tl.where(logit == logit, logit, -64.0)
    bounded = tl.where(bounded < -64.0, -64.0, tl.where(bounded > 64.0, 64.0, bounded))
    level = (bounded * 96817624.0).to(tl.int64)
    if GUMBEL:
        least = -(gumbel2(word) + 35484911)
    else:
        x = word | 1
        least = fixed_log2(4294967296 - x) - fixed_log2(x)
    tl.store(out_ptr + i, (level > least).to(tl.float32), mask=i < total)


@triton.jit
def _corrupt_kernel(seed_ptr, ids_ptr, mask_ptr, out_ptr, total, mask_id, low, high, hide, swap, BLOCK: tl.constexpr):
    # A token reads two words, so a program owns 2*BLOCK tokens.
    counter = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = philox4x32(counter, tl.load(seed_ptr + 1), tl.load(seed_ptr))
    action, other = tl.interleave(w0, w2).to(tl.int64), tl.interleave(w1, w3).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    ids = tl.load(ids_ptr + i, mask=i < total, other=0)
    masked = tl.load(mask_ptr + i, mask=i < total, other=0) != 0
    changed = tl.where(action < swap, low + ((other * (high - low)) >> 32), ids)
    changed = tl.where(action < hide, mask_id, changed)
    tl.store(out_ptr + i, tl.where(masked, changed, ids), mask=i < total)


@triton.jit
def _noise_kernel(seed_ptr, noise_ptr, total, counters, pixels, BLOCK: tl.constexpr):
    # One program owns BLOCK of all rows' counters, eight pixels each: noise [B, pixels] in [-2^15, 2^15).
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b, c = i // counters, i % counters
    w0, w1, w2, w3 = philox4x32((b << 32) + c, tl.load(seed_ptr + 1), tl.load(seed_ptr))
    for j in tl.static_range(8):
        word = w0 if j < 2 else w1 if j < 4 else w2 if j < 6 else w3
        half = ((word >> (16 * (j % 2))) & 0xFFFF).to(tl.int32) - 32768
        tl.store(noise_ptr + b * pixels + 8 * c + j, half, mask=(i < total) & (8 * c + j < pixels))


@triton.jit
def _across_kernel(noise_ptr, taps_ptr, across_ptr, total, S, T, fh, fw, w, BLOCK: tl.constexpr):
    # One program owns BLOCK numbers of across [B, S, fh, w]: a row of noise through filter s.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = i % w
    y = i // w % fh
    s = i // (w * fh) % S
    b = i // (w * fh * S)
    first = (b * fh + y) * fw + x
    sums = tl.zeros([BLOCK], tl.int32)
    for t in range(T):
        tap = tl.load(taps_ptr + s * T + t, mask=i < total, other=0)
        sums += tap * tl.load(noise_ptr + first + t, mask=i < total, other=0)
    tl.store(across_ptr + i, sums >> 6, mask=i < total)


@triton.jit
def _down_kernel(across_ptr, taps_ptr, out_ptr, total, S, T, fh, h, w, BLOCK: tl.constexpr):
    # One program owns BLOCK pixels of out [B, h, w]: the columns of all filters, with signs - + -, as the smallest are kept.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = i % w
    y = i // w % h
    b = i // (w * h)
    sums = tl.zeros([BLOCK], tl.int32)
    for s in range(S):
        first = ((b * S + s) * fh + y) * w + x
        own = tl.zeros([BLOCK], tl.int32)
        for t in range(T):
            own += tl.load(taps_ptr + s * T + t) * tl.load(across_ptr + first + t * w, mask=i < total, other=0)
        sums += tl.where(s % 2 == 0, own, -own)
    tl.store(out_ptr + i, (-sums).to(tl.float32), mask=i < total)


def _launch_words(kernel, total, *args, **meta):
    launch(kernel, cdiv(total, 1024), *args, BLOCK=256, num_warps=4, **meta)


def mask_sampling_words(seed, count):
    out = torch.empty(count, dtype=torch.int64, device=seed.device)
    _launch_words(_words_kernel, count, seed.contiguous(), out, count)
    return out


def mask_sampling_bernoulli(seed, threshold, B, N):
    out = torch.empty((B, N), dtype=torch.bool, device=seed.device)
    threshold = threshold.contiguous()
    down = 0 if threshold.shape[0] == 1 else threshold.shape[1]
    across = 0 if threshold.shape[1] == 1 else 1
    bits = out.view(torch.uint8)
    _launch_words(_bernoulli_kernel, B * N, seed.contiguous(), threshold, bits, B * N, N, down, across)
    return out


def mask_sampling_race(seed, weight):
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    _launch_words(_race_kernel, out.numel(), seed.contiguous(), weight.contiguous(), out, out.numel())
    return out


def mask_sampling_corrupt(seed, ids, mask, mask_id, low, high, hide, swap):
    out = torch.empty(ids.shape, dtype=torch.int64, device=ids.device)
    bits = mask.contiguous().view(torch.uint8)
    args = (seed.contiguous(), ids.contiguous(), bits, out, out.numel(), mask_id, low, high, hide, swap)
    _launch_words(_corrupt_kernel, 2 * out.numel(), *args)
    return out


def mask_sampling_gate(seed, logits, gumbel):
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    _launch_words(_gate_kernel, out.numel(), seed.contiguous(), logits.contiguous(), out, out.numel(), GUMBEL=gumbel)
    return out


def mask_sampling_colour(seed, taps, B, h, w):
    (S, T), int32 = taps.shape, {"dtype": torch.int32, "device": seed.device}
    fh, fw, taps = h + T - 1, w + T - 1, taps.contiguous()
    out = torch.empty((B, h * w), dtype=torch.float32, device=seed.device)
    if out.numel() == 0:
        return out
    noise, across = torch.empty((B, fh, fw), **int32), torch.empty((B, S, fh, w), **int32)
    counters = cdiv(fh * fw, 8)
    args = (seed.contiguous(), noise, B * counters, counters, fh * fw)
    launch(_noise_kernel, cdiv(B * counters, 256), *args, BLOCK=256, num_warps=4)
    args = (noise, taps, across, across.numel(), S, T, fh, fw, w)
    launch(_across_kernel, cdiv(across.numel(), 256), *args, BLOCK=256, num_warps=4)
    args = (across, taps, out, out.numel(), S, T, fh, h, w)
    launch(_down_kernel, cdiv(out.numel(), 128), *args, BLOCK=128, num_warps=4)
    return out
