"""Normalisation over the active positions of dense [B, C, H, W] under a mask of cells: batch, group, instance and layer norm.

S samples have statistics of their own: 1 for batch norm, B for group and instance norm.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import boolean, check_is_tensor, check_is_tensor_or_none, check_tensor, fail, integer, number
from maskops.ops.sparse_conv.block import NATIVE, check_cells
from maskops.ops.sparse_conv.norm_ops import LAYER, all_reduce
from maskops.reference.visible_tokens import accumulation_dtype

BATCH, GROUP, INSTANCE = "masked_batch_norm", "masked_group_norm", "masked_instance_norm"


@public("sparse_conv_block_norm", native=NATIVE)
def masked_batch_norm(
    x: Tensor, cells: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, *, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    process_group: object = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Normalise each channel by its mean and variance over the active positions of the batch, as batch_norm of those alone.

        out = (x - mean) / sqrt(var + eps) * weight + bias in active cells, 0 elsewhere
        training: mean, var (biased) of x over active positions; running = (1 - momentum) running + momentum (mean, unbiased var)

    Args:
        x: float [B, C, H, W], contiguous or channels_last.
        cells: bool [B, h, w]; True = active. h divides H and w divides W.
        running_mean, running_var: [C], float32 (float64 for float64); changed in place when training. None only when training.
        weight, bias: of the same dtype [C], or None.
        training: whether statistics are of x or the running ones.
        momentum: of the running statistics, in [0, 1].
        eps: added to the variance, >= 0.
        process_group: a torch.distributed group, or True for the default one: sums and counts are of all its processes, so that
            each active position has the same weight wherever it lies. None: of this process.
        backend: "auto", "native", "triton", "reference".

    Returns:
        x's dtype [B, C, H, W], channels_last in memory. Differentiable, once, in x, weight and bias.

    Notes:
        What stands in hidden cells is not read. No active position anywhere: the running statistics stay as they are.

    Raises:
        ValueError: wrong dtype, shape, device or number.  TypeError: an argument of another type.

    Source:
        Tian et al., SparK, 2023 (arXiv 2301.03580).

    Example:
        >>> x, cells = torch.tensor([[[[1.0, 3.0, 99.0]]]]), torch.tensor([[[True, True, False]]])
        >>> maskops.masked_batch_norm(x, cells, None, None, training=True, eps=0.0).flatten().tolist()
        [-1.0, 1.0, 0.0]
    """
    training, momentum, eps = _options(BATCH, x, cells, weight, bias, eps, training, momentum)
    running = {"running_mean": running_mean, "running_var": running_var}
    if (running_mean is None) != (running_var is None) or (running_mean is None and not training):
        fail(BATCH, "running_mean and running_var", "both be given unless training", [*map(type, running.values())])
    for name, value in running.items():
        if value is not None:
            check_is_tensor(BATCH, name, value)
            check_tensor(BATCH, name, value, "[C]", (accumulation_dtype(x.dtype),), (x.shape[1],), x)
            if training and value.shape[0] > 1 and value.stride(0) == 0:
                fail(BATCH, name, "have no expanded axis, as it is written", "stride 0 along axis 0")
    if not training:
        rstd = (running_var + eps).rsqrt()[None]
        return _normalise(x, cells, running_mean.clone()[None], rstd, weight, bias, None, x.shape[1], "", backend)
    group = _group_name(process_group)
    mean, square, count = _statistics(x, cells, False, x.shape[1], group, backend)
    var = square / count.clamp(min=1)[:, None]
    if running_mean is not None:
        with torch.no_grad():
            share = torch.where(count > 0, momentum, 0.0).to(mean.dtype)
            unbiased = square[0] / (count - 1).clamp(min=1)
            running_mean.copy_(running_mean + (mean[0] - running_mean) * share)
            running_var.copy_(running_var + (unbiased - running_var) * share)
    return _normalise(x, cells, mean, (var + eps).rsqrt(), weight, bias, count, x.shape[1], group, backend)


@public("sparse_conv_block_norm", native=NATIVE)
def masked_group_norm(
    x: Tensor, cells: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Normalise the channels of each group of each sample by their mean and variance over its active positions.

        out = (x - mean) / sqrt(var + eps) * weight + bias in active cells, 0 elsewhere;  mean, var: [B, num_groups]

    Args:
        x: float [B, C, H, W], contiguous or channels_last.
        cells: bool [B, h, w]; True = active. h divides H and w divides W.
        num_groups: divides C.
        weight, bias: float32 (float64 for float64) [C], or None.
        eps: added to the variance, >= 0.
        backend: "auto", "native", "triton", "reference".

    Returns:
        x's dtype [B, C, H, W], channels_last in memory. Differentiable, once, in x, weight and bias.

    Notes:
        What stands in hidden cells is not read. A sample without active positions gives zeros.

    Raises:
        ValueError: wrong dtype, shape, device or number.  TypeError: an argument of another type.

    Source:
        Wu and He, Group Normalization, 2018 (arXiv 1803.08494), over active positions.

    Example:
        >>> x, cells = torch.tensor([[[[1.0, 3.0, 99.0]]]]), torch.tensor([[[True, True, False]]])
        >>> maskops.masked_group_norm(x, cells, 1, eps=0.0).flatten().tolist()
        [-1.0, 1.0, 0.0]
    """
    return _per_sample(GROUP, x, cells, integer(GROUP, "num_groups", num_groups), weight, bias, eps, backend)


@public("sparse_conv_block_norm", native=NATIVE)
def masked_instance_norm(
    x: Tensor, cells: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Normalise each channel of each sample by its mean and variance over the sample's active positions.

        out = (x - mean) / sqrt(var + eps) * weight + bias in active cells, 0 elsewhere;  mean, var: [B, C]

    Args:
        x: float [B, C, H, W], contiguous or channels_last.
        cells: bool [B, h, w]; True = active. h divides H and w divides W.
        weight, bias: float32 (float64 for float64) [C], or None.
        eps: added to the variance, >= 0.
        backend: "auto", "native", "triton", "reference".

    Returns:
        x's dtype [B, C, H, W], channels_last in memory. Differentiable, once, in x, weight and bias.

    Notes:
        What stands in hidden cells is not read. A sample without active positions gives zeros.

    Raises:
        ValueError: wrong dtype, shape, device or number.  TypeError: an argument of another type.

    Source:
        Ulyanov et al., Instance Normalization, 2016 (arXiv 1607.08022), over active positions.

    Example:
        >>> x, cells = torch.tensor([[[[1.0, 3.0, 99.0]]]]), torch.tensor([[[True, True, False]]])
        >>> maskops.masked_instance_norm(x, cells, eps=0.0).flatten().tolist()
        [-1.0, 1.0, 0.0]
    """
    check_is_tensor(INSTANCE, "x", x)
    groups = x.shape[1] if x.dim() > 1 else 1
    return _per_sample(INSTANCE, x, cells, groups, weight, bias, eps, backend)


@public("sparse_conv_block_layer_norm", native=NATIVE)
def masked_layer_norm(
    x: Tensor, cells: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Normalise the channels of each active position by their own mean and variance.

        out[b, :, y, x] = layer_norm(x[b, :, y, x], weight, bias, eps) in active cells, 0 elsewhere

    Args:
        x: float [B, C, H, W], contiguous or channels_last.
        cells: bool [B, h, w]; True = active. h divides H and w divides W.
        weight, bias: float32 (float64 for float64) [C], or None.
        eps: added to the variance, >= 0.
        backend: "auto", "native", "triton", "reference".

    Returns:
        x's dtype [B, C, H, W], channels_last in memory. Differentiable, once, in x, weight and bias.

    Notes:
        What stands in hidden cells is not read. The gradient takes the statistics anew instead of keeping them.

    Raises:
        ValueError: wrong dtype, shape, device or eps.  TypeError: an argument of another type.

    Source:
        Ba et al., Layer Normalization, 2016 (arXiv 1607.06450); at active positions: SparK (arXiv 2301.03580).

    Example:
        >>> x, cells = torch.tensor([[[[1.0, 7.0]], [[3.0, 7.0]]]]), torch.tensor([[[True, False]]])
        >>> maskops.masked_layer_norm(x, cells, eps=0.0).flatten().tolist()
        [-1.0, 0.0, 1.0, 0.0]
    """
    _, _, eps = _options(LAYER, x, cells, weight, bias, eps)
    return find_op("sparse_conv_block_layer_norm", x.device.type, backend)(x, weight, bias, cells, eps)


# ---------------------------------------------------------------- what they share


def _options(
    op: str, x: Tensor, cells: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, training: bool = False,
    momentum: float = 0.1,
) -> tuple[bool, float, float]:  # fmt: skip
    check_is_tensor(op, "x", x)
    check_is_tensor(op, "cells", cells)
    check_cells(op, x, cells)
    for name, value in (("weight", weight), ("bias", bias)):
        check_is_tensor_or_none(op, name, value)
        if value is not None:
            check_tensor(op, name, value, "[C]", (accumulation_dtype(x.dtype),), (x.shape[1],), x)
    momentum, eps = number(op, "momentum", momentum), number(op, "eps", eps)
    if not 0 <= momentum <= 1:
        fail(op, "momentum", "be in [0, 1]", f"{momentum:g}")
    if not 0 <= eps < math.inf:
        fail(op, "eps", "be at least 0 and finite", f"{eps:g}")
    return boolean(op, "training", training), momentum, eps


def _per_sample(
    op: str, x: Tensor, cells: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
) -> Tensor:
    _, _, eps = _options(op, x, cells, weight, bias, eps)
    if groups < 1 or x.shape[1] % groups:
        fail(op, "num_groups", f"divide {int(x.shape[1])} channels", groups)
    mean, square, count = _statistics(x, cells, True, groups, "", backend)
    each = x.shape[1] // groups
    rstd = (square / (count * each).clamp(min=1)[:, None] + eps).rsqrt().repeat_interleave(each, 1)
    return _normalise(x, cells, mean.repeat_interleave(each, 1), rstd, weight, bias, count, groups, "", backend)


def _statistics(
    x: Tensor, cells: Tensor, per_sample: bool, groups: int, group: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean [S, groups], sum of squared deviations [S, groups], active positions [S]) over positions, channels and processes."""
    op = find_op("_sparse_conv_block_moments", x.device.type, backend)
    with torch.no_grad():
        mean, square = op(x.detach(), cells, per_sample)
        each = (x.shape[2] // cells.shape[1]) * (x.shape[3] // cells.shape[2])
        count = ((cells.sum((1, 2)) if per_sample else cells.sum()[None]) * each).to(mean.dtype)
        if groups != x.shape[1]:
            own, square = mean.unflatten(1, (groups, -1)), square.unflatten(1, (groups, -1))
            mean = own.mean(2)
            square = square.sum(2) + (own - mean[..., None]).square().sum(2) * count[:, None]
        if group:
            total = all_reduce(count, group)
            everyone = all_reduce(mean * count[:, None], group) / total.clamp(min=1)[:, None]
            square = all_reduce(square + (mean - everyone).square() * count[:, None], group)
            mean, count = everyone, total
    return mean, square, count


def _normalise(
    x: Tensor, cells: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, count: Tensor | None,
    groups: int, group: str, backend: str,
) -> Tensor:  # fmt: skip
    op = find_op("sparse_conv_block_norm", x.device.type, backend)
    return op(x, mean, rstd, weight, bias, cells, count, groups, group)


def _group_name(group: object) -> str:
    """The name by which collectives know a group; "" where there is nobody to talk to."""
    if group is None or group is False:
        return ""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(f"{BATCH}: process_group must be None without torch.distributed, got {group!r}")
    group = dist.group.WORLD if group is True else group
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{BATCH}: process_group must be a process group, True or None, got {type(group).__name__}")
    return group.group_name if dist.get_world_size(group) > 1 else ""
