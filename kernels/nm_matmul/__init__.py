"""Triton kernels of nm_matmul; one launcher per op, with the op's name and arguments."""

from maskops.kernels.nm_matmul.bitmask import _nm_matmul_bitmask_backward, nm_matmul_bitmask
from maskops.kernels.nm_matmul.compress import nm_matmul_compress, nm_matmul_decompress, nm_matmul_select
from maskops.kernels.nm_matmul.linear import _nm_matmul_linear_backward, nm_matmul_linear
from maskops.kernels.nm_matmul.mask import nm_matmul_mask, nm_matmul_pack
from maskops.kernels.nm_matmul.samples import AOT_SAMPLES, LIMITS
from maskops.kernels.nm_matmul.soft import _nm_matmul_soft_backward, nm_matmul_soft

__all__ = [
    "AOT_SAMPLES",
    "LIMITS",
    "_nm_matmul_bitmask_backward",
    "_nm_matmul_linear_backward",
    "_nm_matmul_soft_backward",
    "nm_matmul_bitmask",
    "nm_matmul_compress",
    "nm_matmul_decompress",
    "nm_matmul_linear",
    "nm_matmul_mask",
    "nm_matmul_pack",
    "nm_matmul_select",
    "nm_matmul_soft",
]
