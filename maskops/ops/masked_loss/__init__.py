"""The family masked_loss: losses on the positions that a mask selects; logits and targets are never whole in memory.

Each file names its size letters.
"""

from maskops.ops.masked_loss.linear import linear_cross_entropy
from maskops.ops.masked_loss.patch import masked_patch_loss
from maskops.ops.masked_loss.sample import linear_sample

__all__ = ["linear_cross_entropy", "linear_sample", "masked_patch_loss"]
