"""The only file that picks a backend: names, availability with reasons, resolve().

The choice is plain Python on the device type, so it compiles with fullgraph=True; no environment switch, no swapped global.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from maskops import _extension
from maskops._registry import NAMESPACES, OPS, OpSpec, register_triton

BACKENDS = ("auto", *NAMESPACES)
_TRITON_KEYS = {"cuda": "CUDA", "xpu": "XPU"}
_triton_reason = ""

PUBLIC: dict[str, str] = {}
"""Public function name -> name of the op that it calls, over all families."""

_PATHS: dict[str, Callable[..., str]] = {}
"""Public function name -> function of its arguments that says which of several ways it takes."""

_SUPPORT = """

    Backends:
        native: {native}.
        triton: {triton}.
        reference: plain PyTorch, every device and floating dtype.
    """


def public(
    op: str, *, native: str = "", triton: str = "", path: Callable[..., str] | None = None
) -> Callable[[Callable], Callable]:
    """Mark the public function of an op, and let its docstring end with what its backends take.

    path: for a function that itself chooses between ways to compute: (the function's arguments) -> a sentence for explain.
    """
    native = native or "C++ on CPU (AVX-512, AVX2, portable) and CUDA C++; float32, float64, bfloat16, float16"
    triton = triton or "CUDA, ROCm and XPU; float32, float64, bfloat16, float16"

    def mark(function: Callable) -> Callable:
        PUBLIC[function.__name__] = op
        if path is not None:
            _PATHS[function.__name__] = path
        before, example = function.__doc__.rstrip().split("\n\n    Example:", 1)
        support = _SUPPORT.format(native=native, triton=triton).rstrip()
        function.__doc__ = f"{before}{support}\n\n    Example:{example}\n    "
        return function

    return mark


def register_backends() -> None:
    """Load the compiled libraries and register Triton where it can run. Called once, by maskops/__init__.py."""
    global _triton_reason
    _extension.load_all()
    if importlib.util.find_spec("triton") is None:
        _triton_reason = "the package triton is not installed"
        return
    for key in _TRITON_KEYS.values():
        register_triton(key)
        # Native on a GPU: CUDA C++ where it was built, Triton for the rest.
        register_triton(key, "maskops")
    if _extension.interpreting():
        register_triton("CPU")


def has_kernel(backend: str, name: str, device: str) -> bool:
    """Whether a kernel of its own, not the reference, is registered for this op, backend and device type."""
    key = {"cpu": "CPU", **_TRITON_KEYS}.get(device)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACES[backend]}::{name}", key)


def why_not(backend: str, name: str, device: str) -> str:
    """The sentence why a backend cannot run this op on this device type, or an empty string if it can."""
    if backend == "reference" or has_kernel(backend, name, device):
        return ""
    if backend == "triton":
        if _triton_reason:
            return _triton_reason
        return f"Triton kernels run on cuda and xpu tensors, on {device} only interpreted (TRITON_INTERPRET=1 before the import)"
    if backend == "emulated":
        return "the emulator is for the tests: maskops.testing.emulator.load()"
    library = "_C_cuda" if device == "cuda" else "_C"
    return f"no native kernel for {device}: {library} is {_extension.status().get(library, 'not loaded')}"


def find_op(name: str, device: str, backend: str, function: str = "", *, grad: bool = True) -> Any:
    """The op to call. auto: the native namespace, which falls back on the reference where no kernel exists.

    The overload, not the packet of overloads: finding one by its arguments costs as much as a small gather.
    function: what errors name, where it is not the public function of this op; grad: whether an argument may ask for a gradient.
    """
    if backend == "auto":
        return _in_mode(getattr(torch.ops.maskops, name).default, name, grad)
    if not isinstance(backend, str) or backend not in NAMESPACES:
        error = ValueError if isinstance(backend, str) else TypeError
        raise error(f"{function or _function_of(name)}: backend must be one of {BACKENDS}, got {backend!r}")
    reason = why_not(backend, name, device)
    if reason:
        raise RuntimeError(f"{function or _function_of(name)}: backend {backend!r} cannot run here: {reason}")
    return _in_mode(getattr(getattr(torch.ops, NAMESPACES[backend]), name).default, name, grad)


def may_need_grad(x: Tensor) -> bool:
    """Whether a gradient may be asked for x: what vmap wraps does not know whether what it wraps requires one."""
    # A compiled program calls the op as it is, whatever the answer, and cannot ask.
    return torch.compiler.is_compiling() or x.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(x)


def _function_of(op: str) -> str:
    return next((function for function, name in PUBLIC.items() if name == op), op)


def _in_mode(op: Any, name: str, grad: bool) -> Callable:
    """The op as it is where a gradient may be asked for, else past autograd's Python layer, which costs 5 to 10 us a call."""
    if torch.compiler.is_compiling():
        return op
    # A private name: without it nothing is refused.
    if getattr(forward_ad, "_current_level", -1) >= 0 and OPS[name].backward is not None:
        return _without_tangents(op, OPS[name])
    if grad and torch.is_grad_enabled():
        return op

    def call(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def _without_tangents(op: Any, spec: OpSpec) -> Callable:
    """The op where forward-mode differentiation is on: torch would take a missing formula for a derivative of zero."""

    def call(*args: Any) -> Any:
        for name, a in zip(spec.arguments, args, strict=False):
            if name not in spec.constants and isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None:
                raise NotImplementedError(
                    f"{spec.name}: forward-mode derivatives are not implemented, and {name} has a tangent"
                )
        return op(*args)

    return call


def explain(op: str, *args: Any, **keywords: Any) -> str:
    """Say which backend runs an op on these arguments, and why each other one does not.

    Args:
        op: a public function's name ("gather_tokens") or an op's name ("visible_tokens_gather").
        *args, **keywords: the op's arguments; the first tensor decides the device. Without tensors: the CPU.

    Returns:
        A text: what auto runs; for a function that chooses between ways to compute ("nm_linear", given its arguments) which
        one it takes, and why; then one line per backend.

    Example:
        >>> print(maskops.explain("visible_tokens_gather", torch.ones(1, 4, 8)).splitlines()[0])  # doctest: +ELLIPSIS
        visible_tokens_gather on cpu: auto runs ...
    """
    name = PUBLIC.get(op, op) if isinstance(op, str) else ""
    if name not in OPS:
        raise ValueError(f"explain: op must be one of {sorted(PUBLIC)}, got {op!r}")
    device = next((a.device.type for a in (*args, *keywords.values()) if isinstance(a, Tensor)), "cpu")
    order = ["native", "triton", "reference"] if device in ("cpu", "cuda") else ["triton", "reference"]
    reasons = {backend: why_not(backend, name, device) for backend in order}
    # auto calls the native namespace, where Triton stands in for missing CUDA C++ and the reference for all the rest.
    chosen = next(backend for backend in order if not reasons[backend] and (backend != "triton" or device != "cpu"))
    lines = [f"{name} on {device}: auto runs {_kind(chosen, name, device)}"]
    if op in _PATHS and (args or keywords):
        lines.append(f"  {_PATHS[op](*args, **keywords)}")
    lines += [f"  {backend}: {reason or 'can run'}" for backend, reason in reasons.items()]
    return "\n".join(lines)


def _kind(backend: str, name: str, device: str) -> str:
    if backend == "reference":
        return "the reference (plain PyTorch)"
    if backend == "native" and device == "cpu":
        return f"the C++ kernel ({_extension.isa_in_use()})"
    cuda = (
        device == "cuda" and backend == "native" and OPS[name].cuda and _extension.status().get("_C_cuda") == "loaded"
    )
    return "the CUDA C++ kernel" if cuda else "the Triton kernel"
