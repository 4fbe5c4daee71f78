"""The family masked_loss: losses on the positions that a mask selects; logits and targets take no memory of their own.

Each file names its size letters.
"""

from maskops.ops.masked_loss.composed import pairwise_rank_loss, replaced_token_loss
from maskops.ops.masked_loss.contrast import contrastive_loss
from maskops.ops.masked_loss.linear import linear_cross_entropy
from maskops.ops.masked_loss.patch import masked_patch_loss
from maskops.ops.masked_loss.pool import linear_max_pool, mask_pool
from maskops.ops.masked_loss.regression import masked_regression
from maskops.ops.masked_loss.sample import linear_sample

__all__ = [
    "contrastive_loss",
    "linear_cross_entropy",
    "linear_max_pool",
    "linear_sample",
    "mask_pool",
    "masked_patch_loss",
    "masked_regression",
    "pairwise_rank_loss",
    "replaced_token_loss",
]
