"""One call of every public function, at any batch and number of tokens, for test_contract_compile.py.

maskops.testing.calls.<family> holds
    CALLS: name -> (batch, count) -> (function of tensors that returns a tensor, its arguments);
    AUTOCAST: name -> dtype of the result for float32 arguments under autocast to bfloat16, of functions with a gradient.
"""

from collections.abc import Callable
from importlib import import_module

import torch

from maskops.families import FAMILIES

CALLS: dict[str, Callable] = {}
AUTOCAST: dict[str, torch.dtype] = {}
for _family in FAMILIES:
    _module = import_module(f"maskops.testing.calls.{_family}")
    CALLS |= _module.CALLS
    AUTOCAST |= _module.AUTOCAST
