"""The family sparse_conv: convolution over the places that are active, in one to three axes, and of dense images under a mask.

Size letters: N active places read, M written, K places of the kernel, C and D channels, G groups.
"""

from maskops.ops.sparse_conv.block import block_masked_conv, block_masked_max_pool
from maskops.ops.sparse_conv.conv import sparse_conv
from maskops.ops.sparse_conv.map import KernelMap, kernel_map
from maskops.ops.sparse_conv.norm import masked_batch_norm, masked_group_norm, masked_instance_norm, masked_layer_norm
from maskops.ops.sparse_conv.tensor import SparseTensor

__all__ = [
    "KernelMap",
    "SparseTensor",
    "block_masked_conv",
    "block_masked_max_pool",
    "kernel_map",
    "masked_batch_norm",
    "masked_group_norm",
    "masked_instance_norm",
    "masked_layer_norm",
    "sparse_conv",
]
