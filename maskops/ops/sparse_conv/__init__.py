"""The family sparse_conv: convolution and pooling over the places that are active, in one to three axes, and voxels of points.

Size letters: N active places read, M written, K places of the kernel, C and D channels, G groups, P points, V voxels, S segments.
"""

from maskops.ops.sparse_conv.conv import sparse_conv
from maskops.ops.sparse_conv.fill import downsample_mask, neighbour_fill
from maskops.ops.sparse_conv.map import KernelMap, kernel_map
from maskops.ops.sparse_conv.pool import sparse_avg_pool, sparse_max_pool
from maskops.ops.sparse_conv.segments import Segments, sparse_global_pool
from maskops.ops.sparse_conv.tensor import SparseTensor
from maskops.ops.sparse_conv.voxelize import Voxels, voxelize

__all__ = [
    "KernelMap",
    "Segments",
    "SparseTensor",
    "Voxels",
    "downsample_mask",
    "kernel_map",
    "neighbour_fill",
    "sparse_avg_pool",
    "sparse_conv",
    "sparse_global_pool",
    "sparse_max_pool",
    "voxelize",
]
