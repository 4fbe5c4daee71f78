"""The family sparse_conv: convolution and pooling over active places, in one to three axes, and of dense images under a mask.

Size letters: N active places read, M written, K places of the kernel, C and D channels, G groups, P points, V voxels, S segments.
"""

from maskops.ops.sparse_conv.block import block_masked_conv, block_masked_max_pool
from maskops.ops.sparse_conv.conv import sparse_conv
from maskops.ops.sparse_conv.fill import downsample_mask, neighbour_fill
from maskops.ops.sparse_conv.map import KernelMap, kernel_map
from maskops.ops.sparse_conv.norm import masked_batch_norm, masked_group_norm, masked_instance_norm, masked_layer_norm
from maskops.ops.sparse_conv.pool import sparse_avg_pool, sparse_max_pool
from maskops.ops.sparse_conv.segments import Segments, sparse_global_pool
from maskops.ops.sparse_conv.tensor import SparseTensor
from maskops.ops.sparse_conv.voxelize import Voxels, voxelize

__all__ = [
    "KernelMap",
    "Segments",
    "SparseTensor",
    "Voxels",
    "block_masked_conv",
    "block_masked_max_pool",
    "downsample_mask",
    "kernel_map",
    "masked_batch_norm",
    "masked_group_norm",
    "masked_instance_norm",
    "masked_layer_norm",
    "neighbour_fill",
    "sparse_avg_pool",
    "sparse_conv",
    "sparse_global_pool",
    "sparse_max_pool",
    "voxelize",
]
