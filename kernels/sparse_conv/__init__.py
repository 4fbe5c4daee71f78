"""Triton kernels of sparse_conv; one launcher per op, with the op's name and arguments."""

from maskops.kernels.sparse_conv import block, block_norm, points
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
from maskops.kernels.sparse_conv.points import (
    _sparse_conv_grad_weight,
    sparse_conv,
    sparse_conv_map,
    sparse_conv_outputs,
    sparse_conv_reverse,
)

AOT_SAMPLES = points.AOT_SAMPLES | block.AOT_SAMPLES | block_norm.AOT_SAMPLES
LIMITS = points.LIMITS | block.LIMITS | block_norm.LIMITS

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
    "sparse_conv",
    "sparse_conv_block",
    "sparse_conv_block_layer_norm",
    "sparse_conv_block_max_pool",
    "sparse_conv_block_norm",
    "sparse_conv_map",
    "sparse_conv_outputs",
    "sparse_conv_reverse",
]
