"""Reference of nm_matmul: N outputs, K inputs, G groups of m along K, J = G n kept slots, M rows, S samples, P patterns.

A compressed weight is `values` [N, J] and `indices` uint8 [N, ceil(J bits / 8)], bits = ceil(log2 m): the place of slot j in its
group stands in bits [j bits, (j + 1) bits) of the row, little endian. A slot whose column is K or more is padding.
"""

import math
from itertools import combinations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from maskops.reference.mask_sampling import philox_words
from maskops.reference.visible_tokens import accumulation_dtype

# ---------------------------------------------------------------- groups and bits


def groups_of(x: Tensor, m: int, fill: float) -> Tensor:
    """[R, K] -> [R, G, m]; the last group is filled up."""
    return rearrange(pad(x, (0, -x.shape[1] % m), value=fill), "r (g m) -> r g m", m=m)


def descending_order(scores: Tensor) -> Tensor:
    """The order of the last axis by descending score: ties by lower index, -0.0 equal to 0.0, NaN after everything."""
    value = torch.where(scores.isnan(), -math.inf, scores) + 0.0
    order = value.argsort(dim=-1, descending=True, stable=True)
    last = scores.isnan().to(torch.int8).gather(-1, order)
    return order.gather(-1, last.argsort(dim=-1, stable=True))


def pack_bits(bits: Tensor) -> Tensor:
    """bool [R, L] -> uint8 [R, ceil(L / 8)]: bit i is bit i % 8 of byte i / 8, spare bits are 0."""
    padded = pad(bits.to(torch.int32), (0, -bits.shape[1] % 8))
    eight = rearrange(padded, "r (b eight) -> r b eight", eight=8)
    return (eight << torch.arange(8, device=bits.device)).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, length: int) -> Tensor:
    """uint8 [R, ceil(length / 8)] -> bool [R, length]."""
    bits = (packed.to(torch.int32)[:, :, None] >> torch.arange(8, device=packed.device)) & 1
    return bits.flatten(1)[:, :length].bool()


def bits_per_place(m: int) -> int:
    return (m - 1).bit_length()


def pack_places(places: Tensor, m: int) -> Tensor:
    """int64 [R, J] of places in [0, m) -> uint8 [R, ceil(J bits / 8)]."""
    bits = (places[:, :, None] >> torch.arange(bits_per_place(m), device=places.device)) & 1
    return pack_bits(bits.flatten(1).bool())


def unpack_places(indices: Tensor, slots: int, m: int) -> Tensor:
    """uint8 [R, ceil(J bits / 8)] -> int64 [R, J]."""
    width = bits_per_place(m)
    bits = unpack_bits(indices, slots * width).view(indices.shape[0], slots, width)
    return (bits.long() << torch.arange(width, device=indices.device)).sum(-1)


def columns_of(indices: Tensor, n: int, m: int, K: int) -> Tensor:
    """int64 [R, J]: the column that each slot stands for, K for padding."""
    slots = -(-K // m) * n
    group = torch.arange(slots, device=indices.device) // n
    return (group * m + unpack_places(indices, slots, m)).clamp(max=K)


# ---------------------------------------------------------------- masks and compressed weights


def nm_matmul_mask(scores: Tensor, n: int, m: int) -> Tensor:
    # The filling is NaN and comes last: a tie between it and a real NaN goes to the lower index.
    order = descending_order(groups_of(scores, m, math.nan))
    kept = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return rearrange(kept, "r g m -> r (g m)")[:, : scores.shape[1]].contiguous()


def nm_matmul_compress(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    groups = groups_of(weight, m, 0.0)
    # The nonzero places first, then the zeros, each in ascending order; NaN is no zero.
    order = (groups == 0).to(torch.int8).argsort(dim=-1, stable=True)
    places = order[..., :n].sort(-1).values
    values = rearrange(groups.gather(-1, places), "r g n -> r (g n)").contiguous()
    return values, pack_places(rearrange(places, "r g n -> r (g n)"), m)


def nm_matmul_decompress(values: Tensor, indices: Tensor, n: int, m: int, K: int) -> Tensor:
    dense = values.new_zeros(values.shape[0], K + 1)  # the last column takes the padding
    return dense.scatter_(1, columns_of(indices, n, m, K), values)[:, :K].contiguous()


def nm_matmul_select(dense: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    return pad(dense, (0, 1)).gather(1, columns_of(indices, n, m, dense.shape[1]))


# ---------------------------------------------------------------- product with a compressed weight


def nm_matmul_linear(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    rows, weight, K = x.to(dtype), values.to(dtype), x.shape[1]
    if x.isfinite().all():
        y = rows @ nm_matmul_decompress(weight, indices, n, m, K).T
    else:
        # In the dense product NaN and inf of x would reach, through 0 * NaN, outputs that keep no weight there.
        rows, columns = pad(rows, (0, 1)), columns_of(indices, n, m, K)
        outputs = [rows[:, at] @ kept for at, kept in zip(columns, weight, strict=True)]
        y = torch.stack(outputs, 1) if outputs else rows.new_empty(rows.shape[0], 0)
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


def _nm_matmul_linear_backward(
    grad: Tensor, x: Tensor, values: Tensor, indices: Tensor, n: int, m: int, need_x: bool, need_values: bool
) -> tuple[Tensor, Tensor]:
    dtype, grad_x, grad_values = accumulation_dtype(x.dtype), x.new_empty(0), x.new_empty(0)
    if need_x:
        weight = nm_matmul_decompress(values.to(dtype), indices, n, m, x.shape[1])
        grad_x = (grad.to(dtype) @ weight).to(x.dtype)
    if need_values:
        grad_values = nm_matmul_select(grad.to(dtype).T @ x.to(dtype), indices, n, m).to(x.dtype)
    return grad_x, grad_values


# ---------------------------------------------------------------- product with a bit-packed mask


def nm_matmul_pack(mask: Tensor) -> Tensor:
    return pack_bits(mask)


def mask_of_bits(bits: Tensor, K: int) -> Tensor:
    """uint8 [S, N, ceil(K / 8)] -> bool [S, N, K]."""
    return unpack_bits(bits.flatten(0, 1), K).view(*bits.shape[:2], K)


def nm_matmul_bitmask(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, scores: Tensor | None) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    kept = torch.where(mask_of_bits(bits, x.shape[2]), weight.to(dtype), 0)
    y = x.to(dtype) @ kept.transpose(1, 2)
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


def _nm_matmul_bitmask_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, need_x: bool, need_weight: bool, need_scores: bool,
    scores_per_sample: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype, mask = accumulation_dtype(x.dtype), mask_of_bits(bits, x.shape[2])
    grad_x, grad_weight, grad_scores = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if need_x:
        grad_x = (grad.to(dtype) @ torch.where(mask, weight.to(dtype), 0)).to(x.dtype)
    outer = grad.to(dtype).transpose(1, 2) @ x.to(dtype)  # [S, N, K]
    if need_weight:
        grad_weight = torch.where(mask, outer, 0).sum(0).to(x.dtype)
    if need_scores:
        grad_scores = (outer if scores_per_sample else outer.sum(0)) * weight.to(dtype)
    return grad_x, grad_weight, grad_scores.to(x.dtype)


# ---------------------------------------------------------------- product with a learnable mask


def patterns_of(n: int, m: int) -> Tensor:
    """bool [P, m]: every choice of n places out of m, in lexicographic order of the places."""
    # Not torch.combinations, which builds all m^n tuples first.
    chosen = torch.tensor(list(combinations(range(m), n)), dtype=torch.int64)
    return torch.zeros(len(chosen), m, dtype=torch.bool).scatter_(1, chosen, True)


def gumbel_noise(seed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """[count], the first words of the Philox stream of seed = (seed, offset) as standard Gumbel numbers."""
    uniform = ((philox_words(seed, count) >> 9).to(dtype) + 0.5) * 2.0**-23
    return -(-uniform.log()).log()


def noisy_logits(logits: Tensor, seed: Tensor, scale: float) -> Tensor:
    return logits * scale + gumbel_noise(seed, logits.numel(), logits.dtype).view(logits.shape)


def relaxed_top_n(a: Tensor, n: int, m: int, tau: float) -> list[Tensor]:
    """The n softmax distributions [N, G, m] of a relaxed choice without replacement; their sum is the mask."""
    eps = 1e-12 if a.dtype == torch.float64 else 1e-6
    r, steps = rearrange(a, "o (g m) -> o g m", m=m), []
    for _ in range(n):
        steps.append(torch.softmax(r / tau, -1))
        r = r + (1 - steps[-1]).clamp(min=eps).log()
    return steps


def soft_masks(
    logits: Tensor, seed: Tensor, n: int, m: int, tau: float, scale: float, hard: bool
) -> tuple[Tensor, list[Tensor]]:
    """The mask [N, K] of the forward pass, and the softmax distributions that the gradient goes through."""
    a = noisy_logits(logits, seed, scale)
    if logits.dim() == 3:
        patterns = patterns_of(n, m).to(a)
        steps = [torch.softmax(a / tau, -1)]
        mask = patterns[descending_order(a)[..., 0]] if hard else steps[0] @ patterns
        return rearrange(mask, "o g m -> o (g m)"), steps
    steps = relaxed_top_n(a, n, m, tau)
    soft = torch.stack(steps).sum(0)
    return nm_matmul_mask(a, n, m).to(a) if hard else rearrange(soft, "o g m -> o (g m)"), steps


def nm_matmul_soft(
    x: Tensor, weight: Tensor, logits: Tensor, seed: Tensor, n: int, m: int, tau: float, scale: float, hard: bool
) -> tuple[Tensor, Tensor]:
    mask, _ = soft_masks(logits, seed, n, m, tau, scale, hard)
    masked = weight.to(mask.dtype) * mask
    return (x.to(mask.dtype) @ masked.T).to(x.dtype), masked.square().sum()


def _nm_matmul_soft_backward(
    grad: Tensor, grad_kept: Tensor, x: Tensor, weight: Tensor, logits: Tensor, seed: Tensor, n: int, m: int, tau: float,
    scale: float, hard: bool, need_x: bool, need_logits: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    mask, steps = soft_masks(logits, seed, n, m, tau, scale, hard)
    dtype, grad_x, grad_logits = mask.dtype, x.new_empty(0), logits.new_empty(0)
    w, g = weight.to(dtype), grad.to(dtype)
    if need_x:
        grad_x = (g @ (w * mask)).to(x.dtype)
    if need_logits:
        grad_mask = (g.T @ x.to(dtype)) * w + 2 * grad_kept * w.square() * mask
        grad_mask = rearrange(grad_mask, "o (g m) -> o g m", m=m)
        if logits.dim() == 3:
            grad_a = softmax_gradient(steps[0], grad_mask @ patterns_of(n, m).to(grad_mask).T, tau)
        else:
            grad_a = rearrange(relaxed_top_n_gradient(steps, grad_mask, tau), "o g m -> o (g m)")
        grad_logits = grad_a * scale
    return grad_x, grad_logits.contiguous()


def softmax_gradient(p: Tensor, grad: Tensor, tau: float) -> Tensor:
    return p * (grad - (p * grad).sum(-1, keepdim=True)) / tau


def relaxed_top_n_gradient(steps: list[Tensor], grad_mask: Tensor, tau: float) -> Tensor:
    """Back through r_{i+1} = r_i + log(max(1 - p_i, eps)), p_i = softmax(r_i / tau); every p_i is a summand of the mask."""
    eps = 1e-12 if grad_mask.dtype == torch.float64 else 1e-6
    grad_r = torch.zeros_like(grad_mask)
    for p in reversed(steps):
        rest = 1 - p
        grad_p = grad_mask - torch.where(rest > eps, grad_r / rest, 0)
        grad_r = grad_r + softmax_gradient(p, grad_p, tau)
    return grad_r
