"""The family sparse_conv: convolution over the places that are active, in one to three axes.

Size letters: N active places read, M written, K places of the kernel, C and D channels, G groups.
"""

from maskops.ops.sparse_conv.conv import sparse_conv
from maskops.ops.sparse_conv.map import KernelMap, kernel_map
from maskops.ops.sparse_conv.tensor import SparseTensor

__all__ = ["KernelMap", "SparseTensor", "kernel_map", "sparse_conv"]
