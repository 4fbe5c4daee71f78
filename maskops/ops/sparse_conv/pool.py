"""Pooling of active places over a kernel map: the ops and their gradients.

Sizes: N rows read, M written, K places of the kernel, C channels.
"""

from typing import Any

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import FLOATS, boolean, check_is_tensor, check_tensor, describe, fail
from maskops._registry import OpSpec, define_op
from maskops.ops.sparse_conv.map import INT32, KernelMap, check_rows
from maskops.reference import sparse_conv_pool as reference
from maskops.reference.visible_tokens import accumulation_dtype

NATIVE = "C++ on CPU (AVX-512, AVX2, portable); on CUDA the Triton kernel; float32, float64, bfloat16, float16"


def _features_of(function: str, features: Tensor, map: KernelMap) -> None:
    check_is_tensor(function, "features", features)
    if not isinstance(map, KernelMap):
        raise TypeError(f"{function}: map must be a KernelMap, got {type(map).__name__}")
    check_features(function, features)
    if features.dim() == 2 and features.shape[0] != map.rows:
        fail(function, "features", f"have {map.rows} rows, as the map", describe(features))


def _reverse_of(features: Tensor, map: KernelMap, backend: str) -> Tensor | None:
    return map.reverse(backend) if torch.is_grad_enabled() and features.requires_grad else None


@public("sparse_conv_max_pool", native=NATIVE)
def sparse_max_pool(features: Tensor, map: KernelMap, *, backend: str = "auto") -> Tensor:
    """Take the largest value that the active places under a kernel have, channel by channel.

        out[m, c] = max over k of features[map[k, m], c]        (map[k, m] >= 0)

    Args:
        features: float [N, C], one row per active place.
        map: of kernel_map, onto the same places or others.
        backend: "auto", "native", "triton", "reference".

    Returns:
        features' dtype [M, C]. Differentiable, more than once; of equal values the first in map order gets the gradient.

    Notes:
        Places that are not active do not count, not even as 0. A place that reads nothing is 0, without a gradient. NaN is larger
        than all, as in torch. Deterministic, backward too: each row collects its gradient through the reversed map.

    Raises:
        ValueError: wrong dtype, shape or device.  TypeError: an argument of another type.

    Source:
        Graham: Sparse 3D convolutional neural networks, 2015 (arXiv 1505.02890).

    Example:
        >>> coords = torch.tensor([[0, 4], [0, 5], [0, 9]], dtype=torch.int32)
        >>> maskops.sparse_max_pool(torch.tensor([[1.0], [2.0], [-3.0]]), maskops.kernel_map(coords, 3)).tolist()
        [[2.0], [2.0], [-3.0]]
    """
    _features_of("sparse_max_pool", features, map)
    op = find_op("sparse_conv_max_pool", features.device.type, backend)
    return op(features, map.map, _reverse_of(features, map, backend))[0]


@public("sparse_conv_sum_pool", native=NATIVE)
def sparse_avg_pool(
    features: Tensor, map: KernelMap, count_include_inactive: bool = False, *, backend: str = "auto"
) -> Tensor:
    """Average the values of the active places under a kernel, channel by channel.

        out[m] = sum over k of features[map[k, m]] / how many of map[:, m] are >= 0

    Args:
        features: float [N, C], one row per active place.
        map: of kernel_map, onto the same places or others.
        count_include_inactive: divide by K, as if places that are not active were 0.
        backend: "auto", "native", "triton", "reference".

    Returns:
        features' dtype [M, C]. Differentiable, more than once.

    Notes:
        A place that reads nothing is 0. Sums are in float32 (float64 for float64), over k in one order; backward goes through the
        reversed map. Deterministic.

    Raises:
        ValueError: wrong dtype, shape or device.  TypeError: an argument of another type.

    Source:
        Graham: Sparse 3D convolutional neural networks, 2015 (arXiv 1505.02890).

    Example:
        >>> coords = torch.tensor([[0, 4], [0, 5], [0, 9]], dtype=torch.int32)
        >>> maskops.sparse_avg_pool(torch.tensor([[1.0], [2.0], [-3.0]]), maskops.kernel_map(coords, 3)).tolist()
        [[1.5], [1.5], [-3.0]]
    """
    _features_of("sparse_avg_pool", features, map)
    boolean("sparse_avg_pool", "count_include_inactive", count_include_inactive)
    if count_include_inactive:
        count = map.map.new_full((map.map.shape[1],), map.map.shape[0])
    else:
        count = map.counts()
    op = find_op("sparse_conv_sum_pool", features.device.type, backend)
    return op(features, map.map, _reverse_of(features, map, backend), None, inverse_of(count, features))


def inverse_of(count: Tensor, like: Tensor) -> Tensor:
    """1 / count, in the dtype of sums over `like`; 1 for a count of 0, whose sum is 0."""
    return 1 / count.clamp(min=1).to(accumulation_dtype(like.dtype))


# ---------------------------------------------------------------- checks


def _check_map(op: str, x: Tensor, map: Tensor, reverse: Tensor | None) -> None:
    check_features(op, x)
    check_tensor(op, "map", map, "[K, M]", INT32, (None, None), x)
    if reverse is not None:
        check_tensor(op, "reverse", reverse, "[K, N]", INT32, (map.shape[0], x.shape[0]), x)


def check_features(op: str, x: Tensor) -> None:
    check_tensor(op, "features", x, "[N, C]", FLOATS, (None, None), x)
    # A traced size that only the data tells is checked when the program runs.
    if not torch.compiler.is_compiling() and isinstance(x.shape[0], int) and x.shape[0] >= 2**31:
        fail(op, "features", "have fewer than 2^31 rows", describe(x))


def check_scale(op: str, name: str, scale: Tensor | None, rows: int, shape: str, x: Tensor) -> None:
    if scale is not None:
        check_tensor(op, name, scale, shape, (accumulation_dtype(x.dtype),), (rows,), x)


def _check_sum(x: Tensor, map: Tensor, reverse: Tensor | None, read_scale: Tensor | None, scale: Tensor | None) -> None:
    op = "sparse_avg_pool"
    _check_map(op, x, map, reverse)
    check_scale(op, "read_scale", read_scale, x.shape[0], "[N]", x)
    check_scale(op, "scale", scale, map.shape[1], "[M]", x)


def _check_max_backward(grad: Tensor, arg: Tensor, reverse: Tensor) -> None:
    op = "_sparse_conv_max_backward"
    check_tensor(op, "grad", grad, "[M, C]", FLOATS, (None, None), grad)
    check_tensor(op, "arg", arg, "[M, C]", INT32, (grad.shape[0], grad.shape[1]), grad)
    check_tensor(op, "reverse", reverse, "[K, N]", INT32, (None, None), grad)


# ---------------------------------------------------------------- gradients


def _reversed(ops: Any, map: Tensor, reverse: Tensor | None, rows: int) -> Tensor:
    return ops.sparse_conv_reverse(map, rows) if reverse is None else reverse


def _setup_sum(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, *rest = inputs
    ctx.rows = x.shape[0]
    ctx.save_for_backward(*rest)


def _backward_sum(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    map, reverse, read_scale, scale = ctx.saved_tensors
    reverse = _reversed(ops, map, reverse, ctx.rows)
    return ops.sparse_conv_sum_pool(grad, reverse, map, scale, read_scale), None, None, None, None


def _setup_max(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, map, reverse = inputs
    ctx.rows = x.shape[0]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(map, reverse, output[1])


def _backward_max(ops: Any, ctx: Any, grad: Tensor, _: Any) -> tuple:
    map, reverse, arg = ctx.saved_tensors
    return ops._sparse_conv_max_backward(grad, arg, _reversed(ops, map, reverse, ctx.rows)), None, None


def _setup_max_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_max_backward(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    (arg,) = ctx.saved_tensors
    # One row more, for results that took no row at all.
    rows = torch.cat([grad, grad.new_zeros(1, grad.shape[1])])
    taken = torch.where(arg >= 0, arg, grad.shape[0]).long()
    return rows.gather(0, taken), None, None


# ---------------------------------------------------------------- the ops

FAMILY = {"family": "sparse_conv", "cuda": False}

define_op(
    OpSpec(
        "sparse_conv_sum_pool(Tensor x, Tensor map, Tensor? reverse, Tensor? read_scale, Tensor? scale) -> Tensor",
        reference=reference.sparse_conv_sum_pool,
        check=_check_sum,
        check_data=lambda x, map, *rest: check_rows("sparse_avg_pool", map, x.shape[0]),
        fake=lambda x, map, *rest: x.new_empty(map.shape[1], x.shape[1]),
        setup=_setup_sum,
        backward=_backward_sum,
        constants=("read_scale", "scale"),
        **FAMILY,
    )
)
define_op(
    OpSpec(
        "sparse_conv_max_pool(Tensor x, Tensor map, Tensor? reverse) -> (Tensor, Tensor)",
        reference=reference.sparse_conv_max_pool,
        check=lambda x, map, reverse: _check_map("sparse_max_pool", x, map, reverse),
        check_data=lambda x, map, reverse: check_rows("sparse_max_pool", map, x.shape[0]),
        fake=lambda x, map, reverse: tuple(like.new_empty(map.shape[1], x.shape[1]) for like in (x, map)),
        setup=_setup_max,
        backward=_backward_max,
        **FAMILY,
    )
)
define_op(
    OpSpec(
        "_sparse_conv_max_backward(Tensor grad, Tensor arg, Tensor reverse) -> Tensor",
        reference=reference._sparse_conv_max_backward,
        check=_check_max_backward,
        check_data=lambda grad, arg, reverse: check_rows(
            "_sparse_conv_max_backward", reverse, grad.shape[0], name="reverse"
        ),
        fake=lambda grad, arg, reverse: grad.new_empty(reverse.shape[1], grad.shape[1]),
        setup=_setup_max_backward,
        backward=_backward_max_backward,
        **FAMILY,
    )
)
