"""Bridges to other libraries; each imports its library when it is called, not before."""

from maskops.compat.hf import register_hf_attention

__all__ = ["register_hf_attention"]
