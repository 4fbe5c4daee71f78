"""Triton kernels of feature_reuse; one launcher per op, with the op's name and arguments."""

from maskops.kernels.feature_reuse.attention import feature_reuse_attention
from maskops.kernels.feature_reuse.rows import feature_reuse_drift, feature_reuse_exclude, feature_reuse_write_
from maskops.kernels.feature_reuse.samples import AOT_SAMPLES, LIMITS
from maskops.kernels.feature_reuse.select import feature_reuse_rank, feature_reuse_sample

__all__ = [
    "AOT_SAMPLES",
    "LIMITS",
    "feature_reuse_attention",
    "feature_reuse_drift",
    "feature_reuse_exclude",
    "feature_reuse_rank",
    "feature_reuse_sample",
    "feature_reuse_write_",
]
