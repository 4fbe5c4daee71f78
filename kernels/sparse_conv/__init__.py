"""Triton kernels of sparse_conv; one launcher per op, with the op's name and arguments."""

from maskops.kernels.sparse_conv import conv, fill, pool, voxelize
from maskops.kernels.sparse_conv.conv import (
    _sparse_conv_grad_weight,
    sparse_conv,
    sparse_conv_map,
    sparse_conv_outputs,
    sparse_conv_reverse,
)
from maskops.kernels.sparse_conv.fill import sparse_conv_fill
from maskops.kernels.sparse_conv.pool import (
    _sparse_conv_max_backward,
    sparse_conv_max_pool,
    sparse_conv_segment_max,
    sparse_conv_segment_spread,
    sparse_conv_segment_sum,
    sparse_conv_sum_pool,
)
from maskops.kernels.sparse_conv.voxelize import sparse_conv_voxelize

AOT_SAMPLES = {**conv.AOT_SAMPLES, **pool.AOT_SAMPLES, **fill.AOT_SAMPLES, **voxelize.AOT_SAMPLES}
LIMITS = {**conv.LIMITS, **pool.LIMITS, **fill.LIMITS, **voxelize.LIMITS}

__all__ = [
    "AOT_SAMPLES",
    "LIMITS",
    "_sparse_conv_grad_weight",
    "_sparse_conv_max_backward",
    "sparse_conv",
    "sparse_conv_fill",
    "sparse_conv_map",
    "sparse_conv_max_pool",
    "sparse_conv_outputs",
    "sparse_conv_reverse",
    "sparse_conv_segment_max",
    "sparse_conv_segment_spread",
    "sparse_conv_segment_sum",
    "sparse_conv_sum_pool",
    "sparse_conv_voxelize",
]
