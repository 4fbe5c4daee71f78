"""The ops of normalisation over active positions: statistics, and what is done with them.  S: rows of statistics, 1 or B."""

from typing import Any

import torch
from torch import Tensor

from maskops._checks import check_tensor, fail
from maskops._registry import OpSpec, define_op
from maskops.ops.sparse_conv.block import check_cells, empty_channels_last
from maskops.reference import sparse_conv_block as reference
from maskops.reference.visible_tokens import accumulation_dtype

NORM, LAYER = "sparse_conv_block_norm", "masked_layer_norm"


def all_reduce(x: Tensor, group: str) -> Tensor:
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))


def _check_stats(x: Tensor, cells: Tensor, **stats: Tensor) -> None:
    """Each of them [S, C] with the same S, 1 or B."""
    check_cells(NORM, x, cells)
    samples = next(iter(stats.values())).shape[:1]
    if len(samples) == 0 or samples[0] not in (1, x.shape[0]):
        fail(NORM, next(iter(stats)), f"have 1 or {int(x.shape[0])} rows", list(samples))
    for name, value in stats.items():
        check_tensor(NORM, name, value, "[S, C]", (accumulation_dtype(x.dtype),), (samples[0], x.shape[1]), x)


def _check_affine(op: str, x: Tensor, **given: Tensor | None) -> None:
    for name, value in given.items():
        if value is not None:
            check_tensor(op, name, value, "[C]", (accumulation_dtype(x.dtype),), (x.shape[1],), x)


def _check_norm(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, cells: Tensor, count: Tensor | None,
    groups: int, process_group: str,
) -> None:  # fmt: skip
    _check_stats(x, cells, mean=mean, rstd=rstd)
    _check_affine(NORM, x, weight=weight, bias=bias)
    if count is not None:
        check_tensor(NORM, "count", count, "[S]", (mean.dtype,), mean.shape[:1], x)
    if groups < 1 or x.shape[1] % groups:
        fail(NORM, "groups", f"divide {int(x.shape[1])} channels", groups)


def _setup_norm(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, mean, rstd, weight, _, cells, count, ctx.groups, ctx.group = inputs
    ctx.save_for_backward(x, mean, rstd, weight, cells, count)


def _backward_norm(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    """With count, mean and rstd are statistics of x over so many positions, and what x does to them is part of its gradient."""
    x, mean, rstd, weight, cells, count = ctx.saved_tensors
    sums = ops._sparse_conv_block_norm_sums(grad, x, mean, cells)
    grad_weight = (sums[1] * rstd).sum(0) if ctx.needs[3] else None
    grad_bias = sums[0].sum(0) if ctx.needs[4] else None
    if not ctx.needs[0]:
        return None, None, None, grad_weight, grad_bias, *[None] * 4
    of_grad = rstd if weight is None else rstd * weight
    of_x = constant = torch.zeros_like(rstd)
    if count is not None:
        sums = all_reduce(sums, ctx.group) if ctx.group else sums
        sums = sums if weight is None else sums * weight
        each = x.shape[1] // ctx.groups
        sums = (
            sums.unflatten(2, (ctx.groups, each)).sum(3).repeat_interleave(each, 2)
            / (count * each).clamp(min=1)[:, None]
        )
        of_x, constant = -sums[1] * rstd.pow(3), -sums[0] * rstd
    grad_x = ops._sparse_conv_block_norm_backward(grad, x, mean, of_grad, of_x, constant, cells)
    return grad_x, None, None, grad_weight, grad_bias, *[None] * 4


def _check_sums(grad: Tensor, x: Tensor, mean: Tensor, cells: Tensor) -> None:
    _check_stats(x, cells, mean=mean)
    check_tensor(NORM, "grad", grad, "[B, C, H, W]", (x.dtype,), x.shape, x)


def _check_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, of_grad: Tensor, of_x: Tensor, constant: Tensor, cells: Tensor
) -> None:
    _check_stats(x, cells, mean=mean, of_grad=of_grad, of_x=of_x, constant=constant)
    check_tensor(NORM, "grad", grad, "[B, C, H, W]", (x.dtype,), x.shape, x)


def _fake_moments(x: Tensor, cells: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    shape, dtype = (x.shape[0] if per_sample else 1, x.shape[1]), accumulation_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _same(x: Tensor) -> Tensor:
    return empty_channels_last(x, *x.shape)


define_op(
    OpSpec(
        "_sparse_conv_block_moments(Tensor x, Tensor cells, bool per_sample) -> (Tensor mean, Tensor square)",
        family="sparse_conv",
        reference=reference._sparse_conv_block_moments,
        check=lambda x, cells, per_sample: check_cells(NORM, x, cells),
        fake=_fake_moments,
        cuda=False,
    )
)
define_op(
    OpSpec(
        "sparse_conv_block_norm(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor cells, Tensor? count,"
        " SymInt groups, str process_group) -> Tensor",
        family="sparse_conv",
        reference=reference.sparse_conv_block_norm,
        check=_check_norm,
        fake=lambda x, *rest: _same(x),
        setup=_setup_norm,
        backward=_backward_norm,
        constants=("mean", "rstd", "count"),
        cuda=False,
    )
)
define_op(
    OpSpec(
        "_sparse_conv_block_norm_sums(Tensor grad, Tensor x, Tensor mean, Tensor cells) -> Tensor",
        family="sparse_conv",
        reference=reference._sparse_conv_block_norm_sums,
        check=_check_sums,
        fake=lambda grad, x, mean, cells: mean.new_empty((2, *mean.shape)),
        cuda=False,
    )
)
define_op(
    OpSpec(
        "_sparse_conv_block_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor of_grad, Tensor of_x, Tensor constant,"
        " Tensor cells) -> Tensor",
        family="sparse_conv",
        reference=reference._sparse_conv_block_norm_backward,
        check=_check_norm_backward,
        fake=lambda grad, x, *rest: _same(x),
        cuda=False,
    )
)


def _check_layer(x: Tensor, weight: Tensor | None, bias: Tensor | None, cells: Tensor, eps: float) -> None:
    check_cells(LAYER, x, cells)
    _check_affine(LAYER, x, weight=weight, bias=bias)


def _setup_layer(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _, cells, ctx.eps = inputs
    ctx.save_for_backward(x, weight, cells)


def _backward_layer(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    found = ops._sparse_conv_block_layer_norm_backward(grad, *ctx.saved_tensors, ctx.eps)
    return *(g if need else None for g, need in zip(found, ctx.needs, strict=False)), None, None


def _check_layer_backward(grad: Tensor, x: Tensor, weight: Tensor | None, cells: Tensor, eps: float) -> None:
    _check_layer(x, weight, None, cells, eps)
    check_tensor(LAYER, "grad", grad, "[B, C, H, W]", (x.dtype,), x.shape, x)


def _fake_layer_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    sums = (x.new_empty((x.shape[1],), dtype=accumulation_dtype(x.dtype)) for _ in range(2))
    return _same(x), *sums


define_op(
    OpSpec(
        "sparse_conv_block_layer_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor cells, float eps) -> Tensor",
        family="sparse_conv",
        reference=reference.sparse_conv_block_layer_norm,
        check=_check_layer,
        fake=lambda x, *rest: _same(x),
        setup=_setup_layer,
        backward=_backward_layer,
        cuda=False,
    )
)
define_op(
    OpSpec(
        "_sparse_conv_block_layer_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor cells, float eps)"
        " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
        family="sparse_conv",
        reference=reference._sparse_conv_block_layer_norm_backward,
        check=_check_layer_backward,
        fake=_fake_layer_backward,
        cuda=False,
    )
)
