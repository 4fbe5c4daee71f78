"""The family mask_sampling: draw random masks on the device, the same ones on every backend.

Size letters: B rows, N tokens, K kept slots, M masked slots.
"""

from maskops.ops.mask_sampling import laws as _laws  # noqa: F401
from maskops.ops.mask_sampling.uniform import INT64, Seed, random_masking, seed_tensor, shuffled_split  # noqa: F401

__all__ = ["random_masking"]
