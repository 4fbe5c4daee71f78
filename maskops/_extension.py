"""Find and load the compiled libraries; where one cannot be loaded, keep the sentence that says why."""

import ctypes
import importlib.util
import os
import warnings
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
    file = path_of(name)
    if file is None:
        if (_FOLDER.parent / "setup.py").exists():
            return f"not built in the source tree {_FOLDER.parent} (build it there with pip install -e, or leave this folder)"
        compiler = "nvcc" if name == "_C_cuda" else "a C++ compiler"
        return f"not built (install with {compiler} on the PATH to build it)"
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        return f"{file.name} cannot be loaded: {error}"
    if name == "_C":
        _refuse_unknown_isa(file)
    return "loaded"


def isa_in_use() -> str:
    """The instruction set that the CPU kernels run on: "portable", "avx2" or "avx512"."""
    return ("portable", "avx2", "avx512")[ctypes.CDLL(str(path_of("_C"))).maskops_isa_in_use()]


def cpu_facts() -> dict[str, object]:
    """What torch knows of the CPU: cpu_name, amx_bf16 and more; {} where it cannot tell."""
    ask = getattr(torch.cpu, "get_capabilities", None)  # not in every torch that maskops runs on
    return {} if ask is None else ask()


def cuda_archs() -> str:
    """The architectures that _C_cuda was built for, "75 80 90"; "none built" without it."""
    if _STATUS.get("_C_cuda") != "loaded":
        return "none built"
    library = ctypes.CDLL(str(path_of("_C_cuda")))
    library.maskops_cuda_archs.restype = ctypes.c_char_p
    return library.maskops_cuda_archs().decode()


def _refuse_unknown_isa(file: Path) -> None:
    library = ctypes.CDLL(str(file))
    library.maskops_isa_error.restype = ctypes.c_char_p
    error = library.maskops_isa_error().decode()
    if error:
        raise ValueError(error)


def load_all() -> None:
    """Load the CPU and CUDA kernels, then maskops._host, which shares the choice of the instruction set with _C."""
    _STATUS["_host"] = "needs _C"
    if load("_C"):
        _STATUS["_host"] = "loaded" if importlib.util.find_spec("maskops._host") else "not built"
    else:
        warnings.warn(f"maskops runs on its reference and Triton backends only: _C is {_STATUS['_C']}", stacklevel=3)
    load("_C_cuda")


def path_of(name: str) -> Path | None:
    """The file of a compiled library, or None where it was not built."""
    file = _FOLDER / f"{name}.so"
    return file if file.exists() else None


def interpreting() -> bool:
    """Whether Triton kernels run interpreted, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
