"""Reference of the family mask_sampling: B rows, N tokens, K = max_keep kept slots, M = max_mask masked slots."""

from maskops.reference.mask_sampling.draw import (
    mask_sampling_bernoulli,
    mask_sampling_colour,
    mask_sampling_corrupt,
    mask_sampling_gate,
    mask_sampling_race,
    mask_sampling_words,
)
from maskops.reference.mask_sampling.rows import (
    mask_sampling_blocks,
    mask_sampling_groups,
    mask_sampling_intervals,
    mask_sampling_multiblock,
    mask_sampling_spans,
)
from maskops.reference.mask_sampling.split import (
    mask_sampling_rank,
    mask_sampling_top,
    mask_sampling_uniform,
    philox,
    philox_words,
)

__all__ = [
    "mask_sampling_bernoulli",
    "mask_sampling_blocks",
    "mask_sampling_colour",
    "mask_sampling_corrupt",
    "mask_sampling_gate",
    "mask_sampling_groups",
    "mask_sampling_intervals",
    "mask_sampling_multiblock",
    "mask_sampling_race",
    "mask_sampling_rank",
    "mask_sampling_spans",
    "mask_sampling_top",
    "mask_sampling_uniform",
    "mask_sampling_words",
    "philox",
    "philox_words",
]
