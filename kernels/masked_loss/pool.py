"""Triton kernels of linear_max_pool: logits of a sample in a tile of registers, of which the highest are kept.

B samples, L tokens, D width, V classes.
"""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import accumulator, cdiv, dot_add, launch, rounded


@triton.jit
def _higher(a, b):
    # tl.max passes NaN over.
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pool_kernel(hidden_ptr, weight_ptr, bias_ptr, mask_ptr, out_ptr, at_ptr, L, D, V, ACC: tl.constexpr, PRECISION: tl.constexpr,
                 BLOCK_L: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_V classes of a sample and walks over its tokens; of equal logits the first counts.
    columns = tl.cdiv(V, BLOCK_V)
    b = (tl.program_id(0) // columns).to(tl.int64)
    v = tl.program_id(0) % columns * BLOCK_V + tl.arange(0, BLOCK_V)
    best = tl.full([BLOCK_V], float("-inf"), ACC)
    found = tl.full([BLOCK_V], -1, tl.int64)
    for l0 in range(0, L, BLOCK_L):
        token = l0 + tl.arange(0, BLOCK_L)
        seen = tl.load(mask_ptr + b * L + token, mask=token < L, other=0) != 0
        total = tl.zeros([BLOCK_L, BLOCK_V], ACC)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            x = tl.load(
                hidden_ptr + (b * L + token)[:, None] * D + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0
            )
            w = tl.load(
                weight_ptr + v.to(tl.int64)[None, :] * D + d[:, None],
                mask=(v < V)[None, :] & (d < D)[:, None],
                other=0.0,
            )
            total = dot_add(x, w, total, PRECISION)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + v, mask=v < V, other=0.0).to(ACC)[None, :]
        total = tl.where(seen[:, None], total, float("-inf"))
        high = tl.reduce(total, 0, _higher)
        place = tl.argmax(total, 0)
        any_seen = tl.max(seen.to(tl.int32), 0) > 0
        better = any_seen & ((high > best) | (found < 0) | (high != high))
        # Hidden tokens share -inf with logits of -inf: the first that is seen. So it is for NaN.
        first = tl.min(tl.where(seen, token, L), 0)
        place = tl.where(high > float("-inf"), l0 + place, first)
        found = tl.where(better, place.to(tl.int64), found)
        best = tl.where(better, high, best)
    tl.store(out_ptr + b * V + v, best, mask=v < V)
    tl.store(at_ptr + b * V + v, found, mask=v < V)


@triton.jit
def _pool_weight_kernel(grad_ptr, hidden_ptr, at_ptr, out_ptr, bias_ptr, B, L, D, V, ACC: tl.constexpr, BLOCK_V: tl.constexpr,
                        BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_V classes by BLOCK_D columns of the weight's gradient and adds the chosen token of each sample.
    columns = tl.cdiv(D, BLOCK_D)
    v = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_V, BLOCK_D], ACC)
    shift = tl.zeros([BLOCK_V], ACC)
    for b in range(0, B):
        row = tl.cast(b, tl.int64)
        at = tl.load(at_ptr + row * V + v, mask=v < V, other=-1)
        grad = tl.where(at >= 0, tl.load(grad_ptr + row * V + v, mask=v < V, other=0.0), 0.0)
        x = tl.load(
            hidden_ptr + (row * L + at)[:, None] * D + d[None, :], mask=(at >= 0)[:, None] & (d < D)[None, :], other=0.0
        )
        total += x.to(ACC) * grad[:, None]
        shift += grad
    tl.store(
        out_ptr + v[:, None] * D + d[None, :],
        rounded(total, out_ptr.dtype.element_ty),
        mask=(v < V)[:, None] & (d < D)[None, :],
    )
    if tl.program_id(0) % columns == 0:
        tl.store(bias_ptr + v, rounded(shift, bias_ptr.dtype.element_ty), mask=v < V)


@triton.jit
def _pool_hidden_kernel(grad_ptr, weight_ptr, order_ptr, starts_ptr, out_ptr, L, D, V, ACC: tl.constexpr, BLOCK_E: tl.constexpr,
                        BLOCK_D: tl.constexpr):  # fmt: skip
    # One program owns BLOCK_D columns of the gradient of a token and walks over the classes that chose it, in order:
    # order[b, starts[b, l] : starts[b, l + 1]].
    columns = tl.cdiv(D, BLOCK_D)
    token = (tl.program_id(0) // columns).to(tl.int64)
    b = token // L
    d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    at = starts_ptr + b * (L + 1) + token % L
    begin, end = tl.load(at), tl.load(at + 1)
    total = tl.zeros([BLOCK_D], ACC)
    for e0 in range(begin, end, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        v = tl.load(order_ptr + b * V + e, mask=e < end, other=0)
        grad = tl.load(grad_ptr + b * V + v, mask=e < end, other=0.0)
        w = tl.load(weight_ptr + v[:, None] * D + d[None, :], mask=(e < end)[:, None] & (d < D)[None, :], other=0.0)
        total += tl.sum(w.to(ACC) * grad[:, None], 0)
    tl.store(out_ptr + token * D + d, rounded(total, out_ptr.dtype.element_ty), mask=d < D)


def masked_loss_max_pool(hidden, weight, bias, mask):
    hidden, weight = hidden.contiguous(), weight.contiguous()
    (B, L, D), V = hidden.shape, weight.shape[0]
    acc, tl_acc = accumulator(hidden)
    out = torch.empty((B, V), dtype=acc, device=hidden.device)
    at = torch.empty((B, V), dtype=torch.int64, device=hidden.device)
    exact = hidden.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    wide = hidden.dtype.itemsize > 2
    block = 32 if wide else 64
    launch(
        _pool_kernel, B * cdiv(V, block), hidden, weight, None if bias is None else bias.contiguous(),
        mask.contiguous().view(torch.uint8), out, at, L, D, V, ACC=tl_acc, PRECISION="ieee" if exact else "tf32",
        BLOCK_L=16 if hidden.dtype == torch.float64 else block, BLOCK_V=block, BLOCK_D=16 if wide else 32,
        num_warps=4 if wide else 8, num_stages=1 if wide else 3, maxnreg=255,
    )  # fmt: skip
    return out, at


def _masked_loss_max_pool_backward(grad, hidden, weight, at):
    grad, hidden, weight, at = grad.contiguous(), hidden.contiguous(), weight.contiguous(), at.contiguous()
    (B, L, D), V = hidden.shape, weight.shape[0]
    if D == 0:  # no columns, and yet the bias has a gradient
        grad_bias = _masked_loss_max_pool_backward(grad, hidden.new_zeros(B, L, 1), weight.new_zeros(V, 1), at)[2]
        return torch.empty_like(hidden), torch.empty_like(weight), grad_bias
    acc = accumulator(hidden)[1]
    grad_hidden, grad_weight = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (hidden, weight))
    grad_bias = torch.empty(V, dtype=weight.dtype, device=weight.device)
    launch(
        _pool_weight_kernel, cdiv(V, 16) * cdiv(D, 64), grad, hidden, at, grad_weight, grad_bias, B, L, D, V, ACC=acc, BLOCK_V=16,
        BLOCK_D=64, num_warps=4,
    )  # fmt: skip
    ordered, order = at.sort(dim=1, stable=True)
    tokens = torch.arange(L + 1, device=at.device).expand(B, L + 1).contiguous()
    launch(
        _pool_hidden_kernel, B * L * cdiv(D, 64), grad, weight, order, torch.searchsorted(ordered, tokens), grad_hidden, L, D, V,
        ACC=acc, BLOCK_E=16, BLOCK_D=64, num_warps=4,
    )  # fmt: skip
    return grad_hidden, grad_weight, grad_bias
