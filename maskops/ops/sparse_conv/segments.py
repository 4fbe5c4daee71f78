"""Reduction of disjoint sets of rows: the places of each sample, the points of each voxel. The ops and their gradients.

Sizes: N rows, C channels, S segments, R rows that segments list.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import FLOATS, check_is_tensor, check_tensor, fail, integer, one_of
from maskops._registry import OpSpec, define_op
from maskops.ops.sparse_conv.map import INT32, check_rows
from maskops.ops.sparse_conv.pool import FAMILY, NATIVE, check_features, check_scale, inverse_of
from maskops.reference import sparse_conv_pool as reference

REDUCTIONS = ("max", "mean", "sum")


class Segments(NamedTuple):
    """Disjoint sets of rows: segment s is order[begin[s] + i], i < count[s], and inverse names the segment of each row, or -1.

    All int32: order [R], begin and count [S], inverse [N].
    """

    order: Tensor
    begin: Tensor
    count: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, index: Tensor, segments: int) -> "Segments":
        """Rows of one index [N] in [0, segments) together, in their order."""
        order = torch.argsort(index, stable=True)
        ends = torch.searchsorted(index[order], torch.arange(1, segments + 1, dtype=index.dtype, device=index.device))
        ends = torch.cat([ends.new_zeros(1), ends])
        return cls(order.int(), ends[:-1].int(), ends.diff().int(), index.int())


def reduce_segments(function: str, features: Tensor, segments: Segments, reduce: str, backend: str) -> Tensor:
    """[S, C]: the "max", "mean" or "sum" of each segment, 0 for an empty one."""
    if one_of(function, "reduce", reduce, REDUCTIONS) == "max":
        return find_op("sparse_conv_segment_max", features.device.type, backend, function)(features, *segments)[0]
    scale = inverse_of(segments.count, features) if reduce == "mean" else None
    return find_op("sparse_conv_segment_sum", features.device.type, backend, function)(features, *segments, scale)


@public("sparse_conv_segment_sum", native=NATIVE)
def sparse_global_pool(
    features: Tensor, batch_index: Tensor, batch_size: int, reduce: str = "mean", *, backend: str = "auto"
) -> Tensor:
    """Reduce all active places of each sample to one row.

        out[b] = reduce over n with batch_index[n] == b of features[n]

    Args:
        features: float [N, C], one row per active place.
        batch_index: int32 or int64 [N], the sample of each row, in any order; the first column of coords.
        batch_size: samples, B.
        reduce: "max", "mean" or "sum".
        backend: "auto", "native", "triton", "reference".

    Returns:
        features' dtype [B, C]. Differentiable, more than once; of equal largest values the first row gets the gradient.

    Notes:
        A sample without a place is 0. Deterministic, without atomics: rows are taken sample by sample, in their order, and long
        samples in parts of fixed size.

    Raises:
        ValueError: wrong dtype, shape, device or reduce.  IndexError: a sample that is not in [0, batch_size).

    Source:
        Graham: Sparse 3D convolutional neural networks, 2015 (arXiv 1505.02890).

    Example:
        >>> maskops.sparse_global_pool(torch.tensor([[1.0], [5.0], [3.0]]), torch.tensor([0, 2, 0]), 3).tolist()
        [[2.0], [0.0], [5.0]]
    """
    name = "sparse_global_pool"
    check_is_tensor(name, "features", features)
    check_features(name, features)
    one_of(name, "reduce", reduce, REDUCTIONS)
    check_tensor(name, "batch_index", batch_index, "[N]", (torch.int32, torch.int64), (features.shape[0],), features)
    batch_size = integer(name, "batch_size", batch_size)
    if isinstance(batch_size, int) and not 0 <= batch_size < 2**31:
        fail(name, "batch_size", "be in [0, 2^31)", batch_size)
    check_batch(name, batch_index, batch_size)
    return reduce_segments(name, features, Segments.of(batch_index, batch_size), reduce, backend)


def check_batch(op: str, index: Tensor, batch_size: int) -> None:
    """Every sample is in [0, batch_size)."""
    outside = (index < 0) | (index >= batch_size)
    if index.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(~outside.any(), f"{op}: batch_index must be in [0, batch_size)")
    elif outside.any():
        at = int(torch.nonzero(outside)[0, 0])
        raise IndexError(f"{op}: batch_index[{at}] must be in [0, {batch_size}), got {int(index[at])}")


# ---------------------------------------------------------------- checks and gradients


def _check_segments(op: str, x: Tensor, order: Tensor, begin: Tensor, count: Tensor, inverse: Tensor) -> None:
    check_features(op, x)
    check_tensor(op, "order", order, "[R]", INT32, (None,), x)
    check_tensor(op, "begin", begin, "[S]", INT32, (None,), x)
    check_tensor(op, "count", count, "[S]", INT32, (begin.shape[0],), x)
    check_tensor(op, "inverse", inverse, "[N]", INT32, (x.shape[0],), x)


def _check_segment_data(op: str, x: Tensor, order: Tensor, begin: Tensor, count: Tensor) -> None:
    listed = order.shape[0]
    for name, values, end in (
        ("order", order, torch.full_like(order, x.shape[0] - 1)),
        ("begin", begin, torch.full_like(begin, listed)),
        ("count", count, listed - begin),
    ):
        outside = (values < 0) | (values > end)
        if values.device.type != "cpu":
            torch._assert_async(~outside.any(), f"{op}: {name} must be rows that are there")
        elif outside.any():
            at = int(torch.nonzero(outside)[0, 0])
            raise IndexError(f"{op}: {name}[{at}] must be in [0, {int(end[at])}], got {int(values[at])}")


def _setup_sum(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward_sum(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    return ops.sparse_conv_segment_spread(grad, *ctx.saved_tensors), *(None,) * 5


def _backward_spread(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    return ops.sparse_conv_segment_sum(grad, *ctx.saved_tensors), *(None,) * 5


def _setup_max(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[4], output[1])


def _backward_max(ops: Any, ctx: Any, grad: Tensor, _: Any) -> tuple:
    inverse, arg = ctx.saved_tensors
    return ops._sparse_conv_max_backward(grad, arg, inverse[None]), *(None,) * 4


# ---------------------------------------------------------------- the ops


def _check_sum(x: Tensor, order: Tensor, begin: Tensor, count: Tensor, inverse: Tensor, scale: Tensor | None) -> None:
    _check_segments("sparse_conv_segment_sum", x, order, begin, count, inverse)
    check_scale("sparse_conv_segment_sum", "scale", scale, begin.shape[0], "[S]", x)


def _check_spread(
    x: Tensor, order: Tensor, begin: Tensor, count: Tensor, inverse: Tensor, scale: Tensor | None
) -> None:
    op = "sparse_conv_segment_spread"
    check_tensor(op, "x", x, "[S, C]", FLOATS, (None, None), x)
    check_tensor(op, "order", order, "[R]", INT32, (None,), x)
    check_tensor(op, "begin", begin, "[S]", INT32, (x.shape[0],), x)
    check_tensor(op, "count", count, "[S]", INT32, (x.shape[0],), x)
    check_tensor(op, "inverse", inverse, "[N]", INT32, (None,), x)
    check_scale(op, "scale", scale, x.shape[0], "[S]", x)


define_op(
    OpSpec(
        "sparse_conv_segment_sum(Tensor x, Tensor order, Tensor begin, Tensor count, Tensor inverse, Tensor? scale) -> Tensor",
        reference=reference.sparse_conv_segment_sum,
        check=_check_sum,
        check_data=lambda x, *args: _check_segment_data("sparse_conv_segment_sum", x, *args[:3]),
        fake=lambda x, order, begin, *_: x.new_empty(begin.shape[0], x.shape[1]),
        setup=_setup_sum,
        backward=_backward_sum,
        constants=("scale",),
        **FAMILY,
    )
)
define_op(
    OpSpec(
        "sparse_conv_segment_spread(Tensor x, Tensor order, Tensor begin, Tensor count, Tensor inverse, Tensor? scale) -> Tensor",
        reference=reference.sparse_conv_segment_spread,
        check=_check_spread,
        check_data=lambda x, order, begin, count, inverse, scale: check_rows(
            "sparse_conv_segment_spread", inverse[None], x.shape[0], name="inverse"
        ),
        fake=lambda x, order, begin, count, inverse, scale: x.new_empty(inverse.shape[0], x.shape[1]),
        setup=_setup_sum,
        backward=_backward_spread,
        constants=("scale",),
        **FAMILY,
    )
)
define_op(
    OpSpec(
        "sparse_conv_segment_max(Tensor x, Tensor order, Tensor begin, Tensor count, Tensor inverse) -> (Tensor, Tensor)",
        reference=reference.sparse_conv_segment_max,
        check=lambda *args: _check_segments("sparse_conv_segment_max", *args),
        check_data=lambda x, *args: _check_segment_data("sparse_conv_segment_max", x, *args[:3]),
        fake=lambda x, order, begin, *_: tuple(like.new_empty(begin.shape[0], x.shape[1]) for like in (x, order)),
        setup=_setup_max,
        backward=_backward_max,
        **FAMILY,
    )
)
