"""Thin modules: parameters and one call of an op; no maths."""

from maskops.nn.masked_attention import MaskedAttention
from maskops.nn.nm_matmul import BitmaskLinear, NMLinear, SoftNMLinear
from maskops.nn.visible_tokens import PatchEmbed, TokenRestore

__all__ = ["BitmaskLinear", "MaskedAttention", "NMLinear", "PatchEmbed", "SoftNMLinear", "TokenRestore"]
