"""maskops: the kernels that masked models spend their time in, as torch ops with CPU, CUDA and Triton backends."""

import importlib

from maskops._backends import explain, register_backends
from maskops.compat import register_hf_attention
from maskops.families import FAMILIES
from maskops.sparsify import sparsify_

__version__ = "0.1.0"
__all__ = ["explain", "register_hf_attention", "sparsify_"]

for _family in FAMILIES:
    _module = importlib.import_module(f"maskops.ops.{_family}")
    globals().update({_name: getattr(_module, _name) for _name in _module.__all__})
    __all__ += _module.__all__

register_backends()
