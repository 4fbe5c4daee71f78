"""The compressed form of an N:M weight: compress, decompress, select; each is the gradient of another."""

from typing import Any

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import FLOATS, check_is_tensor, fail
from maskops._registry import OpSpec, define_op
from maskops.ops.nm_matmul.mask import check_groups
from maskops.ops.nm_matmul.sizes import (
    check_compressed,
    check_floats,
    check_indices,
    check_pattern,
    groups_in,
    index_bytes,
    pattern,
)  # fmt: skip
from maskops.ops.nm_matmul.weight import NMWeight
from maskops.reference import nm_matmul as reference

COMPRESS, DECOMPRESS, SELECT = "nm_compress", "nm_decompress", "nm_select"


@public("nm_matmul_compress")
def nm_compress(weight: Tensor, n: int, m: int, *, backend: str = "auto") -> NMWeight:
    """Store a weight with at most n nonzeros in every m inputs by its n kept values and their places.

        per row and group: places = the nonzero columns, then the lowest zero columns until there are n, in ascending order
        values = weight at these places;  indices = the places, ceil(log2 m) bits each

    Args:
        weight: float [N, K].
        n, m: the pattern, 1 <= n < m <= 32.
        backend: "auto", "native", "triton", "reference".

    Returns:
        NMWeight; its values are differentiable (twice) in weight: the gradient of a weight that is not kept is 0.

    Notes:
        to_dense gives the weight back. NaN counts as nonzero, -0.0 as zero. If m does not divide K, the last group is filled up
        with zeros. Deterministic, the same bits on every backend.

    Raises:
        ValueError: wrong dtype or shape, n and m out of range, or a group with more than n nonzeros, which is named with its
        place and contents (on a GPU as a device-side assertion without them).

    Source:
        The compressed operand of sparse tensor cores (Mishra et al., 2021, arXiv 2104.08378), for any n and m.

    Example:
        >>> weight = maskops.nm_compress(torch.tensor([[0.0, 3.0, 0.0, 4.0], [5.0, 0.0, 0.0, 0.0]]), 2, 4)
        >>> weight.values.tolist(), weight.shape
        ([[3.0, 4.0], [5.0, 0.0]], (2, 4))
        >>> [f"{places:04b}" for places in weight.indices.flatten().tolist()]
        ['1101', '0100']
    """
    n, m = pattern(COMPRESS, n, m)
    check_is_tensor(COMPRESS, "weight", weight)
    values, indices = find_op("nm_matmul_compress", weight.device.type, backend)(weight, n, m)
    return NMWeight(values, indices, n, m, weight.shape[1])


# ---------------------------------------------------------------- the ops


def _check_compress(weight: Tensor, n: int, m: int) -> None:
    check_pattern(COMPRESS, n, m)
    check_floats(COMPRESS, "weight", weight, "[N, K]", 2)


def _check_compress_data(weight: Tensor, n: int, m: int) -> None:
    if weight.device.type == "cpu":
        check_groups(COMPRESS, weight, n, m)
    else:
        few = (reference.groups_of(weight, m, 0.0) != 0).sum(-1) <= n
        torch._assert_async(few.all(), f"{COMPRESS}: weight must have at most {n} nonzeros in every group of {m}")


def _fake_compress(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    slots = groups_in(weight.shape[1], m) * n
    indices = weight.new_empty(weight.shape[0], index_bytes(slots, m), dtype=torch.uint8)
    return weight.new_empty(weight.shape[0], slots), indices


def _setup_compress(ctx: Any, inputs: tuple, output: tuple) -> None:
    weight, ctx.n, ctx.m = inputs
    ctx.K = weight.shape[1]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_compress(ops: Any, ctx: Any, grad: Tensor, _grad_indices: Tensor) -> tuple:
    (indices,) = ctx.saved_tensors
    return ops.nm_matmul_decompress(grad, indices, ctx.n, ctx.m, ctx.K), None, None


def _check_decompress(values: Tensor, indices: Tensor, n: int, m: int, K: int) -> None:
    check_pattern(DECOMPRESS, n, m)
    if K < 0:
        fail(DECOMPRESS, "K", "be at least 0", K)
    check_compressed(DECOMPRESS, values, indices, n, m, K, FLOATS, values)


def _setup_decompress(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, indices, ctx.n, ctx.m, _ = inputs
    ctx.save_for_backward(indices)


def _check_select(dense: Tensor, indices: Tensor, n: int, m: int) -> None:
    check_pattern(SELECT, n, m)
    check_floats(SELECT, "dense", dense, "[N, K]", 2)
    check_indices(SELECT, indices, dense.shape[0], groups_in(dense.shape[1], m) * n, m, dense)


def _setup_select(ctx: Any, inputs: tuple, output: Tensor) -> None:
    dense, indices, ctx.n, ctx.m = inputs
    ctx.K = dense.shape[1]
    ctx.save_for_backward(indices)


define_op(
    OpSpec(
        "nm_matmul_compress(Tensor weight, int n, int m) -> (Tensor values, Tensor indices)",
        family="nm_matmul",
        reference=reference.nm_matmul_compress,
        check=_check_compress,
        check_data=_check_compress_data,
        fake=_fake_compress,
        setup=_setup_compress,
        backward=_backward_compress,
    )
)
define_op(
    OpSpec(
        "nm_matmul_decompress(Tensor values, Tensor indices, int n, int m, SymInt K) -> Tensor",
        family="nm_matmul",
        reference=reference.nm_matmul_decompress,
        check=_check_decompress,
        fake=lambda values, indices, n, m, K: values.new_empty(values.shape[0], K),
        setup=_setup_decompress,
        backward=lambda ops, ctx, grad: (
            ops.nm_matmul_select(grad, ctx.saved_tensors[0], ctx.n, ctx.m),
            *[None] * 4,
        ),
    )
)
define_op(
    OpSpec(
        "nm_matmul_select(Tensor dense, Tensor indices, int n, int m) -> Tensor",
        family="nm_matmul",
        reference=reference.nm_matmul_select,
        check=_check_select,
        fake=lambda dense, indices, n, m: dense.new_empty(dense.shape[0], groups_in(dense.shape[1], m) * n),
        setup=_setup_select,
        backward=lambda ops, ctx, grad: (
            ops.nm_matmul_decompress(grad, ctx.saved_tensors[0], ctx.n, ctx.m, ctx.K),
            *[None] * 3,
        ),
    )
)
