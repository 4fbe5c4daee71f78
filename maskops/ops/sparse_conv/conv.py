"""sparse_conv: the convolution over a kernel map, the gradient of its weight, and their checks."""

from typing import Any

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import FLOATS, check_is_tensor, check_is_tensor_or_none, check_tensor, describe, fail, integer
from maskops._registry import OpSpec, define_op
from maskops.ops.sparse_conv.map import INT32, KernelMap, check_rows
from maskops.reference import sparse_conv as reference
from maskops.reference.visible_tokens import accumulation_dtype

FUNCTION = "sparse_conv"


@public(
    "sparse_conv",
    native="C++ on CPU (AVX-512, AVX2, portable); on CUDA the Triton kernel; float32, float64, bfloat16, float16",
)
def sparse_conv(
    features: Tensor,
    weight: Tensor,
    map: KernelMap,
    bias: Tensor | None = None,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Convolve the features of active places: each place of the result sums what its kernel places read.

        out[m] = bias + sum over k of features[map[k, m]] weight[k]        (map[k, m] >= 0)

    Args:
        features: float [N, C], one row per active place.
        weight: features' dtype [K, C / groups, D] or [*kernel_size, C / groups, D].
        map: of kernel_map.
        bias: features' dtype [D].
        groups: of channels; C and D are divisible by it. groups = C = D is a depthwise convolution.
        backend: "auto", "native", "triton", "reference".

    Returns:
        features' dtype [M, D], rows in the order of map.out_coords. Differentiable, twice and more, in features, weight and
        bias.

    Notes:
        Sums are in float32 (float64 for float64), over k in one order, so results are the same on every run and for every number
        of threads. No row is read that the map does not name. M or N = 0 give no rows.

    Raises:
        ValueError: wrong dtype, shape, device or groups.  TypeError: an argument of another type.

    Source:
        Graham, Engelcke, van der Maaten, 2018 (arXiv 1711.10275).

    Example:
        >>> coords = torch.tensor([[0, 4], [0, 5], [0, 9]], dtype=torch.int32)
        >>> maskops.sparse_conv(torch.ones(3, 1), torch.ones(3, 1, 1), maskops.kernel_map(coords, 3)).tolist()
        [[2.0], [2.0], [1.0]]
    """
    check_is_tensor(FUNCTION, "features", features)
    check_is_tensor(FUNCTION, "weight", weight)
    check_is_tensor_or_none(FUNCTION, "bias", bias)
    if not isinstance(map, KernelMap):
        raise TypeError(f"{FUNCTION}: map must be a KernelMap, got {type(map).__name__}")
    if features.dim() == 2 and features.shape[0] != map.rows:
        fail(FUNCTION, "features", f"have {map.rows} rows, as the map", describe(features))
    if weight.dim() > 3:
        weight = weight.flatten(0, -3)
    reverse = map.reverse(backend) if torch.is_grad_enabled() and features.requires_grad else None
    op = find_op("sparse_conv", features.device.type, backend)
    return op(features, weight, bias, map.map, reverse, integer(FUNCTION, "groups", groups))


# ---------------------------------------------------------------- the ops


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, map: Tensor, reverse: Tensor | None, groups: int) -> None:
    check_tensor(FUNCTION, "features", x, "[N, C]", FLOATS, (None, None), x)
    shape = "[K, C / groups, D]"
    check_tensor(FUNCTION, "weight", weight, shape, (x.dtype,), (None, None, None), x)
    _check_groups(x, weight.shape[2], groups)
    check_tensor(FUNCTION, "weight", weight, shape, (x.dtype,), (None, x.shape[1] // groups, None), x)
    if bias is not None:
        check_tensor(FUNCTION, "bias", bias, "[D]", (x.dtype,), (weight.shape[2],), x)
    check_tensor(FUNCTION, "map", map, "[K, M]", INT32, (weight.shape[0], None), x)
    if reverse is not None:
        check_tensor(FUNCTION, "reverse", reverse, "[K, N]", INT32, (weight.shape[0], x.shape[0]), x)


def _check_groups(x: Tensor, columns: int, groups: int) -> None:
    if groups < 1 or x.shape[1] % groups or columns % groups:
        fail(FUNCTION, "groups", f"divide {int(x.shape[1])} and {int(columns)} channels", groups)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _, map, reverse, ctx.groups = inputs
    ctx.save_for_backward(x, weight, map, reverse)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    x, weight, map, reverse = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs[0]:
        reverse = ops.sparse_conv_reverse(map, x.shape[0]) if reverse is None else reverse
        grad_x = ops.sparse_conv(grad, transposed_weight(weight, ctx.groups), None, reverse, map, ctx.groups)
    if ctx.needs[1]:
        grad_weight = ops._sparse_conv_grad_weight(grad, x, map, ctx.groups)
    if ctx.needs[2]:
        grad_bias = grad.sum(0, dtype=accumulation_dtype(grad.dtype)).to(grad.dtype)
    return grad_x, grad_weight, grad_bias, None, None, None


def transposed_weight(weight: Tensor, groups: int) -> Tensor:
    """[K, C / G, D] as the weight [K, D / G, C] of the way back."""
    K, each, D = weight.shape
    parts = weight.reshape(K, each, groups, D // groups).permute(0, 3, 2, 1)
    return parts.reshape(K, D // groups, groups * each)


def _setup_grad_weight(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.groups = inputs
    ctx.save_for_backward(*tensors)


def _backward_grad_weight(ops: Any, ctx: Any, grad_out: Tensor) -> tuple:
    grad, x, map = ctx.saved_tensors
    grad_grad = ops.sparse_conv(x, grad_out, None, map, None, ctx.groups) if ctx.needs[0] else None
    grad_x = None
    if ctx.needs[1]:
        reverse = ops.sparse_conv_reverse(map, x.shape[0])
        grad_x = ops.sparse_conv(grad, transposed_weight(grad_out, ctx.groups), None, reverse, map, ctx.groups)
    return grad_grad, grad_x, None, None


def _check_grad_weight(grad: Tensor, x: Tensor, map: Tensor, groups: int) -> None:
    check_tensor(FUNCTION, "features", x, "[N, C]", FLOATS, (None, None), x)
    check_tensor(FUNCTION, "map", map, "[K, M]", INT32, (None, None), x)
    check_tensor(FUNCTION, "grad", grad, "[M, D]", (x.dtype,), (map.shape[1], None), x)
    _check_groups(x, grad.shape[1], groups)


define_op(
    OpSpec(
        "sparse_conv(Tensor x, Tensor weight, Tensor? bias, Tensor map, Tensor? reverse, SymInt groups) -> Tensor",
        family="sparse_conv",
        reference=reference.sparse_conv,
        check=_check,
        check_data=lambda x, weight, bias, map, reverse, groups: check_rows(FUNCTION, map, x.shape[0]),
        fake=lambda x, weight, bias, map, *rest: x.new_empty(map.shape[1], weight.shape[2]),
        setup=_setup,
        backward=_backward,
        cuda=False,
        autocast="lower",
    )
)
define_op(
    OpSpec(
        "_sparse_conv_grad_weight(Tensor grad, Tensor x, Tensor map, SymInt groups) -> Tensor",
        family="sparse_conv",
        reference=reference._sparse_conv_grad_weight,
        check=_check_grad_weight,
        check_data=lambda grad, x, map, groups: check_rows(FUNCTION, map, x.shape[0]),
        fake=lambda grad, x, map, groups: x.new_empty(map.shape[0], x.shape[1] // groups, grad.shape[1]),
        setup=_setup_grad_weight,
        backward=_backward_grad_weight,
        cuda=False,
    )
)
