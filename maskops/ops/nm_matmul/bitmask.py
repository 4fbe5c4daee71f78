"""bitmask_linear: a linear layer whose weight is masked on the fly by a bit-packed mask, shared or one per sample."""

from typing import Any

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import FLOATS, check_is_tensor, check_is_tensor_or_none, check_tensor, describe, fail, integer
from maskops._registry import OpSpec, define_op
from maskops.ops.nm_matmul.sizes import (
    BOOL,
    UINT8,
    as_rows,
    check_bias,
    check_floats,
    check_last_axis,
    mask_bytes,
)
from maskops.reference import nm_matmul as reference

PACK, UNPACK, FUNCTION = "pack_bitmask", "unpack_bitmask", "bitmask_linear"
_ANY_GPU = "C++ on CPU (AVX-512, AVX2, portable), Triton on GPU; float32, float64, bfloat16, float16"


@public(
    "nm_matmul_pack",
    native="C++ on CPU (AVX-512, AVX2, portable) and CUDA C++; bool",
    triton="CUDA, ROCm and XPU; bool",
)
def pack_bitmask(mask: Tensor, *, backend: str = "auto") -> Tensor:
    """Pack a boolean mask, eight of its last axis to a byte.

        packed[..., b] = sum over i < 8 of mask[..., 8 b + i] << i

    Args:
        mask: bool [..., K].
        backend: "auto", "native", "triton", "reference".

    Returns:
        uint8 [..., ceil(K / 8)]; bits past K are 0. Not differentiable.

    Notes:
        unpack_bitmask is the inverse. Empty axes work. Deterministic.

    Raises:
        ValueError: wrong dtype, or a tensor without axes.

    Source:
        The bit order of numpy.packbits(bitorder="little").

    Example:
        >>> maskops.pack_bitmask(torch.tensor([[True, False, True, False, False, False, False, False, True]])).tolist()
        [[5, 1]]
    """
    check_is_tensor(PACK, "mask", mask)
    if mask.dim() == 0:
        fail(PACK, "mask", "have an axis to pack", describe(mask))
    packed = find_op("nm_matmul_pack", mask.device.type, backend)(as_rows(mask))
    return packed.view(*mask.shape[:-1], packed.shape[1])


def unpack_bitmask(bitmask: Tensor, K: int) -> Tensor:
    """Unpack what pack_bitmask made.

        mask[..., k] = bitmask[..., k // 8] >> (k % 8) & 1

    Args:
        bitmask: uint8 [..., ceil(K / 8)].
        K: length of the last axis of the mask.

    Returns:
        bool [..., K].

    Notes:
        Composed of PyTorch ops.

    Raises:
        ValueError: wrong dtype or length.

    Source:
        The bit order of numpy.packbits(bitorder="little").

    Example:
        >>> maskops.unpack_bitmask(torch.tensor([5, 1], dtype=torch.uint8), 9).int().tolist()
        [1, 0, 1, 0, 0, 0, 0, 0, 1]
    """
    check_is_tensor(UNPACK, "bitmask", bitmask)
    K = integer(UNPACK, "K", K)
    if K < 0:
        fail(UNPACK, "K", "be at least 0", K)
    sizes = (*bitmask.shape[:-1], mask_bytes(K)) if bitmask.dim() else (mask_bytes(K),)
    check_tensor(UNPACK, "bitmask", bitmask, "[..., ceil(K / 8)]", UINT8, sizes, bitmask)
    return reference.unpack_bits(as_rows(bitmask), K).view(*bitmask.shape[:-1], K)


@public("nm_matmul_bitmask", native=_ANY_GPU)
def bitmask_linear(
    x: Tensor, weight: Tensor, bitmask: Tensor, bias: Tensor | None = None, *, scores: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Multiply by a weight under a bit-packed mask; the masked weight is never stored.

        y = x @ where(mask, weight, 0).T + bias          (with a mask per sample: y[s] = x[s] @ where(mask[s], weight, 0).T + bias)

    Args:
        x: float [..., K]; with a mask or scores per sample [S, ..., K].
        weight: [N, K] in x's dtype.
        bitmask: uint8 [N, ceil(K / 8)] for all of x, or [S, N, ceil(K / 8)], one per sample; see pack_bitmask.
        bias: [N] in x's dtype, or None.
        scores: float [N, K] or [S, N, K], what the mask was made from: receives the straight-through gradient (as if the mask
            were the scores themselves). Its values are not read.
        backend: "auto", "native", "triton", "reference".

    Returns:
        [..., N] in x's dtype, summed in float32 (float64 for float64); differentiable (once) in x, weight, bias and scores:
        grad_weight = (grad^T x) * mask, grad_scores = (grad^T x) * weight.

    Notes:
        A masked-out weight that is NaN or inf reaches neither the result nor the gradients of x and weight. Under autocast x,
        weight and bias are lowered. Empty sizes work. Deterministic.

    Raises:
        ValueError: wrong dtype, shape or device.

    Source:
        Straight-through scores: Ramanujan et al., 2020, arXiv 1911.13299; the estimator: Bengio et al., 2013, arXiv 1308.3432.

    Example:
        >>> bitmask = maskops.pack_bitmask(torch.tensor([[True, False], [False, True]]))
        >>> maskops.bitmask_linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]), bitmask).tolist()
        [[3.0, 12.0]]
    """
    for name, tensor in (("weight", weight), ("bitmask", bitmask)):
        check_is_tensor(FUNCTION, name, tensor)
    for name, tensor in (("bias", bias), ("scores", scores)):
        check_is_tensor_or_none(FUNCTION, name, tensor)
    if weight.dim() != 2:
        fail(FUNCTION, "weight", "have shape [N, K]", describe(weight))
    check_last_axis(FUNCTION, x, weight.shape[1])
    per_sample = bitmask.dim() == 3 or (scores is not None and scores.dim() == 3)
    if per_sample and x.dim() < 2:
        fail(FUNCTION, "x", "have shape [S, ..., K] for a mask or scores per sample", describe(x))
    samples = x.unsqueeze(1) if per_sample and x.dim() == 2 else x
    rows = samples.flatten(1, -2) if per_sample else as_rows(x).unsqueeze(0)
    bits = bitmask.unsqueeze(0) if bitmask.dim() == 2 else bitmask
    op = find_op("nm_matmul_bitmask", x.device.type, backend)
    return op(rows, weight, bits, bias, scores).view(*x.shape[:-1], weight.shape[0])


# ---------------------------------------------------------------- the ops


def _check(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, scores: Tensor | None) -> None:
    check_floats(FUNCTION, "x", x, "[S, M, K]", 3)
    check_tensor(FUNCTION, "weight", weight, "[N, K]", (x.dtype,), (None, x.shape[2]), x)
    outputs, K = weight.shape
    check_tensor(FUNCTION, "bitmask", bits, "[1 or S, N, ceil(K / 8)]", UINT8, (None, outputs, mask_bytes(K)), x)
    if bits.shape[0] not in (1, x.shape[0]):
        fail(FUNCTION, "bitmask", f"have 1 or S = {int(x.shape[0])} masks", describe(bits))
    check_bias(FUNCTION, bias, outputs, x)
    if scores is not None and scores.dim() == 3:
        check_tensor(FUNCTION, "scores", scores, "[S, N, K]", FLOATS, (x.shape[0], outputs, K), x)
    elif scores is not None:
        check_tensor(FUNCTION, "scores", scores, "[N, K]", FLOATS, (outputs, K), x)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bits, _, scores = inputs
    ctx.save_for_backward(x, weight, bits)
    ctx.scores_per_sample = scores is not None and scores.dim() == 3
    ctx.scores_dtype = x.dtype if scores is None else scores.dtype


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    need = [ctx.needs[i] for i in (0, 1, 4)]
    grads = [None] * 3
    if any(need):
        found = ops._nm_matmul_bitmask_backward(grad, *ctx.saved_tensors, *need, ctx.scores_per_sample)
        grads = [g if n else None for g, n in zip(found, need, strict=True)]
    grad_bias = grad.sum((0, 1)) if ctx.needs[3] else None
    return grads[0], grads[1], None, grad_bias, None if grads[2] is None else grads[2].to(ctx.scores_dtype)


def _check_backward(grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, *rest: bool) -> None:
    _check(x, weight, bits, None, None)
    check_tensor(FUNCTION, "grad", grad, "[S, M, N]", (x.dtype,), (*x.shape[:2], weight.shape[0]), x)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, need_x: bool, need_weight: bool, need_scores: bool,
    scores_per_sample: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    scores = (x.shape[0], *weight.shape) if scores_per_sample else weight.shape
    sizes = (x.shape if need_x else 0, weight.shape if need_weight else 0, scores if need_scores else 0)
    return tuple(x.new_empty(size) for size in sizes)


define_op(
    OpSpec(
        "nm_matmul_pack(Tensor mask) -> Tensor",
        family="nm_matmul",
        reference=reference.nm_matmul_pack,
        check=lambda mask: check_tensor(PACK, "mask", mask, "[R, K]", BOOL, (None, None), mask),
        fake=lambda mask: mask.new_empty(mask.shape[0], mask_bytes(mask.shape[1]), dtype=torch.uint8),
    )
)
define_op(
    OpSpec(
        "nm_matmul_bitmask(Tensor x, Tensor weight, Tensor bits, Tensor? bias, Tensor? scores) -> Tensor",
        family="nm_matmul",
        reference=reference.nm_matmul_bitmask,
        check=_check,
        fake=lambda x, weight, bits, bias, scores: x.new_empty(*x.shape[:2], weight.shape[0]),
        setup=_setup,
        backward=_backward,
        cuda=False,
        autocast="lower",
        autocast_skips=("scores",),
    )
)
define_op(
    OpSpec(
        "_nm_matmul_bitmask_backward(Tensor grad, Tensor x, Tensor weight, Tensor bits, bool need_x, bool need_weight,"
        " bool need_scores, bool scores_per_sample) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_scores)",
        family="nm_matmul",
        reference=reference._nm_matmul_bitmask_backward,
        check=_check_backward,
        fake=_fake_backward,
        cuda=False,
    )
)
