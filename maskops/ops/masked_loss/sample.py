"""linear_sample: loss and sample of a linear layer's logits from one pass. N rows, D width, G codebooks, V classes."""

from typing import Any

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import above_zero, finite, number
from maskops._registry import OpSpec, define_op
from maskops.ops.mask_sampling import Seed, seed_tensor
from maskops.ops.masked_loss.kept import check_forward, check_forward_data, keeps, kept_loss
from maskops.ops.masked_loss.linear import NATIVE, check_reduced, reduced, rows_of
from maskops.ops.masked_loss.linear_op import (
    LINEAR,
    OPTIONS,
    fake_loss,
    linear_gradients,
)
from maskops.reference import masked_loss as reference

FUNCTION = "linear_sample"


@public("masked_loss_sample", native=NATIVE)
def linear_sample(
    hidden: Tensor, weight: Tensor, target: Tensor, *, mask: Tensor | None = None, ids: Tensor | None = None,
    bias: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0, weight_per_token: Tensor | None = None,
    temperature: float = 1.0, cosine: bool = False, z_loss: float = 0.0, reduction: str = "mean",
    denominator: str | float | Tensor = "count", sample_temperature: float = 1.0, seed: Seed = None,
    generator: torch.Generator | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Take the cross-entropy of a linear layer and sample from its softmax in the same pass, without memory for the logits.

        loss   = linear_cross_entropy(hidden, weight, target, ...)
        sample = argmax over V of logits / sample_temperature + noise,   noise = -log(-log(uniform))

    Args:
        hidden, weight, target, mask, ids, bias, ignore_index, label_smoothing, weight_per_token, temperature, cosine, z_loss,
            reduction, denominator: as in linear_cross_entropy.
        sample_temperature: > 0; divides the logits for the sample alone.
        seed: int, or an int64 tensor on the device, 0-d or [2] = (seed, offset). Default: drawn from `generator`, else from
            PyTorch's generator of the device.
        generator: a torch.Generator to draw the seed from.
        backend: "auto", "native", "triton", "reference".

    Returns:
        (loss, sample): the loss as of linear_cross_entropy; int64 of target's shape, -1 where nothing counts, not
        differentiable.

    Notes:
        The noise depends on seed, row, codebook and class alone, so the same seed gives the same sample on every backend, but
        for logits that rounding makes equal. Other notes as in linear_cross_entropy.

    Raises:
        As linear_cross_entropy.

    Source:
        Generator of ELECTRA (Clark et al., 2020, arXiv 2003.10555); the Gumbel-max trick.

    Example:
        >>> hidden, weight = torch.eye(3) * 50, torch.eye(3)
        >>> loss, sample = maskops.linear_sample(hidden, weight, torch.tensor([0, 1, -100]), seed=0)
        >>> sample
        tensor([ 0,  1, -1])
    """
    rows = rows_of(FUNCTION, hidden, weight, target, mask, ids, bias, ignore_index, cosine)
    scale = 1 / above_zero(FUNCTION, "temperature", temperature)
    cool = above_zero(FUNCTION, "sample_temperature", sample_temperature)
    smoothing, z_loss = number(FUNCTION, "label_smoothing", label_smoothing), finite(FUNCTION, "z_loss", z_loss)
    check_reduced(FUNCTION, rows.counted, weight_per_token, reduction, denominator, "target's shape")
    words = seed_tensor(seed, generator, hidden.device, FUNCTION)
    op = find_op("masked_loss_sample", hidden.device.type, backend)
    args, options = (rows.hidden, rows.weight, rows.bias, rows.target), (rows.ignore, scale, smoothing, z_loss)
    if keeps(rows.weight, backend):
        loss, sample = kept_loss(*args, *options, words, cool)
    else:
        loss, _, sample = op(*args, words, *options, cool)
    loss = reduced(rows.of_target(loss), rows.counted, weight_per_token, reduction, denominator)
    return loss, rows.of_target(sample, -1)


# ---------------------------------------------------------------- the op


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, target, _, *options, _ = inputs
    ctx.options = options
    ctx.save_for_backward(hidden, weight, bias, target, output[1])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ops: Any, ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
    return linear_gradients(ops, ctx, grad, ctx.options)


define_op(
    OpSpec(
        f"masked_loss_sample({LINEAR}, Tensor seed, {OPTIONS}, float temperature)"
        " -> (Tensor loss, Tensor lse, Tensor sample)",
        family="masked_loss",
        reference=reference.masked_loss_sample,
        check=check_forward,
        check_data=check_forward_data,
        fake=lambda hidden, weight, bias, target, *rest: (
            fake_loss(hidden, target), fake_loss(hidden, target), target.new_empty(target.shape)
        ),
        setup=_setup,
        backward=_backward,
        cuda=False,
        autocast="lower",
    )
)  # fmt: skip
