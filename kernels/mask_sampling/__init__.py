"""Triton kernels of mask_sampling; one launcher per op, with the op's name and arguments."""

from maskops.kernels.mask_sampling.draw import (
    mask_sampling_bernoulli,
    mask_sampling_colour,
    mask_sampling_corrupt,
    mask_sampling_gate,
    mask_sampling_race,
    mask_sampling_words,
)
from maskops.kernels.mask_sampling.rows import (
    mask_sampling_blocks,
    mask_sampling_groups,
    mask_sampling_intervals,
    mask_sampling_multiblock,
    mask_sampling_spans,
)
from maskops.kernels.mask_sampling.samples import AOT_SAMPLES, LIMITS
from maskops.kernels.mask_sampling.split import mask_sampling_rank, mask_sampling_top, mask_sampling_uniform

__all__ = [
    "AOT_SAMPLES",
    "LIMITS",
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
]
