"""Triton kernels of masked_attention; one launcher per op, with the op's name and arguments."""

from maskops.kernels.masked_attention.backward import _masked_attention_backward
from maskops.kernels.masked_attention.forward import masked_attention
from maskops.kernels.masked_attention.grad_bias import _masked_attention_grad_bias
from maskops.kernels.masked_attention.map import masked_attention_map
from maskops.kernels.masked_attention.samples import AOT_SAMPLES, LIMITS

__all__ = [
    "AOT_SAMPLES",
    "LIMITS",
    "_masked_attention_backward",
    "_masked_attention_grad_bias",
    "masked_attention",
    "masked_attention_map",
]
