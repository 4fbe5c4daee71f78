"""Find and load the compiled libraries; where one cannot be loaded, keep the sentence that says why."""

import importlib.util
import os
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_STATUS: dict[str, str] = {}


def load(name: str) -> bool:
    """Load maskops/<name>.so once. True if its kernels are there."""
    if name not in _STATUS:
        _STATUS[name] = _try_load(name)
    return _STATUS[name] == "loaded"


def status() -> dict[str, str]:
    """{"_C": "loaded" or the reason why not, "_C_cuda": ...}"""
    return dict(_STATUS)


def _try_load(name: str) -> str:
    if name == "_C_cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    found = sorted(_FOLDER.glob(f"{name}.*so")) + sorted(_FOLDER.glob(f"{name}.so"))
    if not found:
        compiler = "nvcc" if name == "_C_cuda" else "a C++ compiler"
        return f"not built (install with {compiler} on the PATH to build it)"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} cannot be loaded: {error}"
    return "loaded"


def load_host() -> None:
    """Import maskops._host, which shares the instruction-set choice with _C, so it comes after it."""
    if load("_C"):
        load_module = importlib.util.find_spec("maskops._host")
        _STATUS["_host"] = "loaded" if load_module else "not built"


def interpreting() -> bool:
    """Whether Triton kernels run interpreted, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
