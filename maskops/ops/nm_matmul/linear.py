"""nm_linear: a linear layer on a compressed N:M weight."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import check_is_tensor, check_is_tensor_or_none, check_tensor, integer
from maskops._registry import OpSpec, define_op
from maskops.ops.nm_matmul.cost import against_dense, linear_path
from maskops.ops.nm_matmul.sizes import (
    as_rows,
    check_bias,
    check_compressed,
    check_floats,
    check_last_axis,
    check_pattern,
)
from maskops.ops.nm_matmul.weight import NMWeight
from maskops.reference import nm_matmul as reference

FUNCTION = "nm_linear"


def _explain_path(x: Tensor | None = None, weight: NMWeight | None = None, *rest: Any, **others: Any) -> str:
    """For maskops.explain: what backend="auto" does with these arguments, and what a dense layer would make of them."""
    _check_arguments(x, weight)
    path, reason = linear_path(weight.n, weight.m)
    ways = {"sparse": "the sparse kernel", "dense": "decompress, then torch's dense linear"}
    rows = as_rows(x).shape[0]
    estimate = against_dense(rows, *weight.shape, weight.n, weight.m, x.dtype, x.device.type)
    return f"auto takes the {path} path ({ways[path]}): {reason}\n  {estimate.reason}"


@public("nm_matmul_linear", path=_explain_path)
def nm_linear(x: Tensor, weight: NMWeight, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Multiply by a compressed N:M weight: a linear layer that reads the kept weights only.

        y = x @ weight.to_dense().T + bias

    Args:
        x: float [..., K].
        weight: NMWeight of a [N, K] weight, values in x's dtype.
        bias: [N] in x's dtype, or None.
        backend: "auto", "native", "triton", "reference". "auto" also decides between the sparse kernel and the dense product
            (maskops.explain("nm_linear", x, weight) says which, and why); a named backend always runs its sparse kernel.

    Returns:
        [..., N] in x's dtype, summed in float32 (float64 for float64); differentiable (once) in x, weight.values and bias.

    Notes:
        The gradient of values is taken at the kept places only, no dense [N, K] gradient is needed by the caller. On the sparse
        path NaN and inf of x reach only the outputs that keep a weight there. Under autocast x, values and bias are lowered.
        Empty sizes work. Deterministic; the dense product of "auto" is torch's, whose last bit may follow the number of threads.

    Raises:
        ValueError: wrong dtype, shape or device.  TypeError: weight is no NMWeight.

    Source:
        Sparse linear layers: Mishra et al., 2021, arXiv 2104.08378, for any n and m.

    Example:
        >>> weight = maskops.nm_compress(torch.tensor([[0.0, 3.0, 0.0, 4.0], [5.0, 0.0, 0.0, 0.0]]), 2, 4)
        >>> maskops.nm_linear(torch.tensor([[1.0, 1.0, 2.0, 2.0]]), weight, torch.tensor([0.5, 0.0])).tolist()
        [[11.5, 5.0]]
    """
    _check_arguments(x, weight)
    check_is_tensor_or_none(FUNCTION, "bias", bias)
    if backend == "auto" and linear_path(weight.n, weight.m)[0] == "dense":
        if not torch.is_autocast_enabled(x.device.type):  # which casts before anything is checked
            _check(as_rows(x), weight.values, weight.indices, bias, weight.n, weight.m)
        # Torch 2.13 multiplies rows of bfloat16 that lie apart with what lies between them, where their length is odd.
        return F.linear(x.contiguous(), weight.to_dense(), bias)
    op = find_op("nm_matmul_linear", x.device.type, backend)
    y = op(as_rows(x), weight.values, weight.indices, bias, weight.n, weight.m)
    return y.view(*x.shape[:-1], weight.shape[0])


def _check_arguments(x: Tensor, weight: NMWeight) -> None:
    if not isinstance(weight, NMWeight):
        raise TypeError(f"{FUNCTION}: weight must be an NMWeight, got {type(weight).__name__}")
    for name, part in (("values", weight.values), ("indices", weight.indices)):
        check_is_tensor(FUNCTION, f"weight.{name}", part)
    for name, part in (("n", weight.n), ("m", weight.m), ("K", weight.K)):
        integer(FUNCTION, f"weight.{name}", part)
    check_last_axis(FUNCTION, x, weight.K)


# ---------------------------------------------------------------- the op


def _check(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, n: int, m: int) -> None:
    check_pattern(FUNCTION, n, m)
    check_floats(FUNCTION, "x", x, "[M, K]", 2)
    check_compressed(FUNCTION, values, indices, n, m, x.shape[1], (x.dtype,), x)
    check_bias(FUNCTION, bias, values.shape[0], x)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, indices, _, ctx.n, ctx.m = inputs
    ctx.save_for_backward(x, values, indices)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    need_x, need_values, need_bias = ctx.needs[0], ctx.needs[1], ctx.needs[3]
    grad_x = grad_values = None
    if need_x or need_values:
        grad_x, grad_values = ops._nm_matmul_linear_backward(
            grad, *ctx.saved_tensors, ctx.n, ctx.m, need_x, need_values
        )
    grad_bias = grad.sum(0) if need_bias else None
    return grad_x if need_x else None, grad_values if need_values else None, None, grad_bias, None, None


def _check_backward(
    grad: Tensor, x: Tensor, values: Tensor, indices: Tensor, n: int, m: int, need_x: bool, need_values: bool
) -> None:
    _check(x, values, indices, None, n, m)
    check_tensor(FUNCTION, "grad", grad, "[M, N]", (x.dtype,), (x.shape[0], values.shape[0]), x)


def _fake_backward(
    grad: Tensor, x: Tensor, values: Tensor, indices: Tensor, n: int, m: int, need_x: bool, need_values: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), x.new_empty(values.shape if need_values else 0)


define_op(
    OpSpec(
        "nm_matmul_linear(Tensor x, Tensor values, Tensor indices, Tensor? bias, int n, int m) -> Tensor",
        family="nm_matmul",
        reference=reference.nm_matmul_linear,
        check=_check,
        fake=lambda x, values, indices, bias, n, m: x.new_empty(x.shape[0], values.shape[0]),
        setup=_setup,
        backward=_backward,
        autocast="lower",
    )
)
define_op(
    OpSpec(
        "_nm_matmul_linear_backward(Tensor grad, Tensor x, Tensor values, Tensor indices, int n, int m, bool need_x,"
        " bool need_values) -> (Tensor grad_x, Tensor grad_values)",
        family="nm_matmul",
        reference=reference._nm_matmul_linear_backward,
        check=_check_backward,
        fake=_fake_backward,
        cuda=False,
    )
)
