"""Samples, error samples and traffic of the family nm_matmul."""

from maskops.testing.nm_matmul.errors import ERRORS
from maskops.testing.nm_matmul.samples import SAMPLES, nm_weight
from maskops.testing.nm_matmul.traffic import TRAFFIC, bitmask_flops, linear_flops, soft_flops

__all__ = ["ERRORS", "SAMPLES", "TRAFFIC", "bitmask_flops", "linear_flops", "nm_weight", "soft_flops"]
