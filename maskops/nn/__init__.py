"""Thin modules: parameters and one call of an op; no maths."""

from maskops.nn.block_masked import (
    BlockMaskedAvgPool2d,
    BlockMaskedConv2d,
    BlockMaskedLinear,
    BlockMaskedMaxPool2d,
    MaskedBatchNorm2d,
    MaskedGroupNorm,
    MaskedInstanceNorm2d,
    MaskedLayerNorm,
    MaskedLayerNorm2d,
    SyncedBatchNorm2d,
    block_mask,
)
from maskops.nn.convert import to_block_masked
from maskops.nn.masked_attention import MaskedAttention
from maskops.nn.nm_matmul import BitmaskLinear, NMLinear, SoftNMLinear
from maskops.nn.sparse_conv import (
    SparseConv1d,
    SparseConv2d,
    SparseConv3d,
    SparseConvTranspose1d,
    SparseConvTranspose2d,
    SparseConvTranspose3d,
    SparseInverseConv,
    SubMConv1d,
    SubMConv2d,
    SubMConv3d,
)
from maskops.nn.sparse_conv_pool import (
    SparseAvgPool1d,
    SparseAvgPool2d,
    SparseAvgPool3d,
    SparseGlobalPool,
    SparseMaxPool1d,
    SparseMaxPool2d,
    SparseMaxPool3d,
)
from maskops.nn.visible_tokens import PatchEmbed, TokenRestore

__all__ = [
    "BitmaskLinear",
    "BlockMaskedAvgPool2d",
    "BlockMaskedConv2d",
    "BlockMaskedLinear",
    "BlockMaskedMaxPool2d",
    "MaskedAttention",
    "MaskedBatchNorm2d",
    "MaskedGroupNorm",
    "MaskedInstanceNorm2d",
    "MaskedLayerNorm",
    "MaskedLayerNorm2d",
    "NMLinear",
    "PatchEmbed",
    "SoftNMLinear",
    "SparseAvgPool1d",
    "SparseAvgPool2d",
    "SparseAvgPool3d",
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseConvTranspose1d",
    "SparseConvTranspose2d",
    "SparseConvTranspose3d",
    "SparseGlobalPool",
    "SparseInverseConv",
    "SparseMaxPool1d",
    "SparseMaxPool2d",
    "SparseMaxPool3d",
    "SubMConv1d",
    "SubMConv2d",
    "SubMConv3d",
    "SyncedBatchNorm2d",
    "TokenRestore",
    "block_mask",
    "to_block_masked",
]
