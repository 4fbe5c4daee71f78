"""Triton kernels of sparse_conv; one launcher per op, with the op's name and arguments."""

from maskops.kernels.sparse_conv import block, block_norm, conv, fill, pool, voxelize
from maskops.kernels.sparse_conv.block import (
    _sparse_conv_block_grad_input,
    _sparse_conv_block_grad_weight,
    _sparse_conv_block_max_pool_backward,
    sparse_conv_block,
    sparse_conv_block_max_pool,
)
from maskops.kernels.sparse_conv.block_norm import (
    _sparse_conv_block_layer_norm_backward,
    _sparse_conv_block_moments,
    _sparse_conv_block_norm_backward,
    _sparse_conv_block_norm_sums,
    sparse_conv_block_layer_norm,
    sparse_conv_block_norm,
)
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

MODULES = (conv, pool, fill, voxelize, block, block_norm)
AOT_SAMPLES = {op: samples for module in MODULES for op, samples in module.AOT_SAMPLES.items()}
LIMITS = {name: limit for module in MODULES for name, limit in module.LIMITS.items()}

__all__ = [
    "AOT_SAMPLES",
    "LIMITS",
    "_sparse_conv_block_grad_input",
    "_sparse_conv_block_grad_weight",
    "_sparse_conv_block_layer_norm_backward",
    "_sparse_conv_block_max_pool_backward",
    "_sparse_conv_block_moments",
    "_sparse_conv_block_norm_backward",
    "_sparse_conv_block_norm_sums",
    "_sparse_conv_grad_weight",
    "_sparse_conv_max_backward",
    "sparse_conv",
    "sparse_conv_block",
    "sparse_conv_block_layer_norm",
    "sparse_conv_block_max_pool",
    "sparse_conv_block_norm",
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
