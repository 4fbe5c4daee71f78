"""Reference of the laws of mask_sampling that draw per element, in whole numbers: element i reads word i of the stream."""

import torch
from torch import Tensor

from maskops.reference.mask_sampling.split import philox, philox_words

LOG_BITS = 26  # after the point of a logarithm
# log2(1 + f) / f on [0, 1) and -log2(1 - v) / v on (0, 1/2], highest power first, 30 bits after the point.
LOG2_TERMS = (8138037, -45835024, 121388650, -211833397, 296051740, -384859663, 516142836, -774533280, 1549081959)
NEAR_ONE_TERMS = (
    2234586229, -2631372645, 1951859503, -316848838, 418019985, 376077536, 516932629, 774529857, 1549082040,
)  # fmt: skip
LOG2_OF_LOG2_E = 35484911  # -log2(ln 2)
LOG2_E = 96817624.0  # to the 24 bits of a float


def below(words: Tensor, n: Tensor | int) -> Tensor:
    """Whole numbers in [0, n) of 32-bit words."""
    return (words * n) >> 32


def log2_fraction(m: Tensor) -> Tensor:
    """log2(m / 2^31) for m in [2^31, 2^32), LOG_BITS after the point."""
    f = m - (1 << 31)
    r = torch.full_like(f, LOG2_TERMS[0])
    for term in LOG2_TERMS[1:]:
        r = ((r * f) >> 31) + term
    return (r * f) >> (31 + 30 - LOG_BITS)


def fixed_log2(x: Tensor) -> Tensor:
    """log2 x for x in [1, 2^63)."""
    exponent = torch.full_like(x, 62)
    for shift in (32, 16, 8, 4, 2, 1):
        small = x < (1 << (63 - shift))
        x = torch.where(small, x << shift, x)
        exponent = exponent - small * shift
    return (exponent << LOG_BITS) + log2_fraction(x >> 31)


def exponential56(words: Tensor) -> Tensor:
    """-log2 u of u = (word | 1) / 2^32, 56 bits after the point; near 1 from 1 - u."""
    x = words | 1
    v = (1 << 32) - x
    r = torch.full_like(v, NEAR_ONE_TERMS[0])
    for term in NEAR_ONE_TERMS[1:]:
        r = ((r * v) >> 32) + term
    return torch.where(v < 1 << 31, (r * v) >> 6, ((32 << LOG_BITS) - fixed_log2(x)) << 30)


def gumbel2(words: Tensor) -> Tensor:
    """-log2(-log2 u): Gumbel noise in units of log 2."""
    return (56 << LOG_BITS) - fixed_log2(exponential56(words))


def mask_sampling_words(seed: Tensor, count: int) -> Tensor:
    return philox_words(seed, count)


def mask_sampling_bernoulli(seed: Tensor, threshold: Tensor, B: int, N: int) -> Tensor:
    return philox_words(seed, B * N).view(B, N) < threshold


def mask_sampling_race(seed: Tensor, weight: Tensor) -> Tensor:
    words = philox_words(seed, weight.numel()).view(weight.shape)
    bits = weight.contiguous().view(torch.int32).long() & 0x7FFFFFFF
    exponent, mantissa = bits >> 23, ((bits & 0x7FFFFF) | 0x800000) << 8
    log_weight = ((exponent - 127) << LOG_BITS) + log2_fraction(mantissa)
    return torch.where(exponent == 0, (1 << 40) + (words << 8), -(log_weight + gumbel2(words))).float()


def mask_sampling_corrupt(
    seed: Tensor, ids: Tensor, mask: Tensor, mask_id: int, low: int, high: int, hide: int, swap: int
) -> Tensor:
    action, other = philox_words(seed, 2 * ids.numel()).view(*ids.shape, 2).unbind(-1)
    changed = torch.where(action < swap, low + below(other, high - low), ids)
    changed = torch.where(action < hide, mask_id, changed)
    return torch.where(mask, changed, ids)


def mask_sampling_gate(seed: Tensor, logits: Tensor, gumbel: bool) -> Tensor:
    words = philox_words(seed, logits.numel())
    bounded = torch.where(logits.isnan(), -64.0, logits.float()).clamp(-64, 64)
    level = (bounded * LOG2_E).long()
    x = words | 1
    least = -(gumbel2(words) + LOG2_OF_LOG2_E) if gumbel else fixed_log2((1 << 32) - x) - fixed_log2(x)
    return (level > least).to(logits.dtype)


def mask_sampling_colour(seed: Tensor, taps: Tensor, B: int, h: int, w: int) -> Tensor:
    """The noise with its sign turned, so that the tokens with the smallest numbers are kept."""
    width = taps.shape[1]
    field_h, field_w = h + width - 1, w + width - 1
    if B * h * w == 0:
        return torch.empty(B, h * w, device=seed.device)
    counters = (torch.arange(B, device=seed.device) << 32)[:, None] + torch.arange(
        (field_h * field_w + 7) // 8, device=seed.device
    )
    words = philox(seed, counters).flatten(1)
    noise = torch.stack([words & 0xFFFF, words >> 16], -1).flatten(1)[:, : field_h * field_w] - 32768
    field, total = noise.view(B, field_h, field_w), 0
    for s, own in enumerate(taps.long()):
        across = (field.unfold(2, width, 1) * own).sum(-1) >> 6
        total = total - (-1) ** s * (across.unfold(1, width, 1) * own).sum(-1)
    return total.float().view(B, h * w)
