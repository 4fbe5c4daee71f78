"""Thin modules: parameters and one call of an op; no maths."""

from maskops.nn.visible_tokens import PatchEmbed, TokenRestore

__all__ = ["PatchEmbed", "TokenRestore"]
