"""The family nm_matmul: weights that keep n of every m inputs, masks over weights, and linear layers on both.

Size letters: R rows of scores, N outputs, K inputs, G = ceil(K / m) groups, J = G n kept slots per output, M rows of x, S samples,
P = C(m, n) patterns; 1 <= n < m <= 32.
"""

from maskops.ops.nm_matmul.bitmask import bitmask_linear, pack_bitmask, unpack_bitmask
from maskops.ops.nm_matmul.compress import nm_compress
from maskops.ops.nm_matmul.linear import nm_linear
from maskops.ops.nm_matmul.mask import nm_mask, nm_validate
from maskops.ops.nm_matmul.soft import SoftLinearOutput, nm_mask_of_logits, nm_patterns, nm_soft_linear
from maskops.ops.nm_matmul.weight import NMWeight

__all__ = [
    "NMWeight", "SoftLinearOutput", "bitmask_linear", "nm_compress", "nm_linear", "nm_mask", "nm_mask_of_logits", "nm_patterns",
    "nm_soft_linear", "nm_validate", "pack_bitmask", "unpack_bitmask",
]  # fmt: skip
