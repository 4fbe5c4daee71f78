"""Triton kernels of masked_loss; one launcher per op, with the op's name and arguments."""

from maskops.kernels.masked_loss.linear import _masked_loss_linear_backward, masked_loss_linear, masked_loss_sample
from maskops.kernels.masked_loss.patch import _masked_loss_patch_backward, masked_loss_patch
from maskops.kernels.masked_loss.pool import _masked_loss_max_pool_backward, masked_loss_max_pool
from maskops.kernels.masked_loss.rows import (
    _masked_loss_contrast_backward,
    _masked_loss_regression_backward,
    masked_loss_contrast,
    masked_loss_regression,
)
from maskops.kernels.masked_loss.samples import AOT_SAMPLES, LIMITS

__all__ = [
    "AOT_SAMPLES",
    "LIMITS",
    "_masked_loss_contrast_backward",
    "_masked_loss_linear_backward",
    "_masked_loss_max_pool_backward",
    "_masked_loss_patch_backward",
    "_masked_loss_regression_backward",
    "masked_loss_contrast",
    "masked_loss_linear",
    "masked_loss_max_pool",
    "masked_loss_patch",
    "masked_loss_regression",
    "masked_loss_sample",
]
