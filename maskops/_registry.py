"""The only file that touches torch.library: one OpSpec becomes one op in every backend's namespace.

A backend is a namespace. `torch.ops.maskops.f` is the native op (C++ on CPU; CUDA C++, else Triton, on GPU; the reference
where neither exists), `torch.ops.maskops_triton.f`, `torch.ops.maskops_reference.f` and, in tests, `torch.ops.maskops_emulated.f`
are the same op, same schema, same gradient formula, with one fixed implementation.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NAMESPACES = {
    "native": "maskops",
    "triton": "maskops_triton",
    "reference": "maskops_reference",
    "emulated": "maskops_emulated",
}
AUTOCAST_POLICIES = ("preserve", "promote", "lower")


@dataclass(frozen=True)
class OpSpec:
    """All that one op is, besides its kernels.

    Args:
        schema: the one statement of argument names, order, defaults, results, and of what is written: `Tensor(a!) cache`.
        family: the family's name, which is the name of its files.
        reference: plain PyTorch definition.
        check: shapes, dtypes, devices; called with all arguments by every Python implementation and the fake.
        check_data: rules on the values of ids and counts; never called on fake tensors.
        fake: allocates the outputs.
        setup: (ctx, inputs, output), what backward needs.
        backward: (ops, ctx, *grads); `ops` is the namespace of the op, so a gradient stays in its backend; ctx.needs says per
            argument whether its gradient is wanted.
        constants: names of floating arguments that no gradient flows to.
        cuda: whether csrc/cuda has a kernel; without one the native op on a GPU is the Triton kernel.
        triton: whether kernels/ has a launcher; an op with neither is for the CPU.
        autocast: "preserve" (dtypes as they come), "promote" (to the widest floating dtype), "lower" (to autocast's dtype).
        autocast_skips: names of arguments that autocast leaves as they come.
    """

    schema: str
    family: str
    reference: Callable
    check: Callable
    fake: Callable
    check_data: Callable | None = None
    setup: Callable | None = None
    backward: Callable | None = None
    constants: tuple[str, ...] = ()
    cuda: bool = True
    triton: bool = True
    autocast: str = "preserve"
    autocast_skips: tuple[str, ...] = ()
    arguments: tuple[str, ...] = field(init=False)
    defaults: tuple = field(init=False)
    mutates: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.autocast not in AUTOCAST_POLICIES:
            raise ValueError(f"OpSpec: autocast must be one of {AUTOCAST_POLICIES}, got {self.autocast!r}")
        arguments = torch._C.parse_schema(self.schema).arguments
        object.__setattr__(self, "arguments", tuple(a.name for a in arguments))
        object.__setattr__(self, "defaults", tuple(a.default_value for a in arguments))
        written = tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
        object.__setattr__(self, "mutates", written)
        # Functionalisation under torch.compile takes an op apart only if what it writes is all that it gives.
        if written and (not self.name.endswith("_") or torch._C.parse_schema(self.schema).returns or self.backward):
            raise ValueError(
                f"OpSpec: {self.name} writes {written}: it must end in _, return nothing and have no gradient"
            )

    @property
    def name(self) -> str:
        return self.schema.split("(", 1)[0]


OPS: dict[str, OpSpec] = {}
_LIBRARIES = {namespace: torch.library.Library(namespace, "DEF") for namespace in NAMESPACES.values()}


def define_op(spec: OpSpec) -> None:
    """Define `spec` in every namespace: schema, fake, gradient, autocast and the Python implementations."""
    OPS[spec.name] = spec
    for namespace, library in _LIBRARIES.items():
        library.define(spec.schema, tags=(torch.Tag.pt2_compliant_tag,))
        if namespace in ("maskops", "maskops_reference"):
            library.impl(spec.name, _checked(spec, spec.reference), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{spec.name}", _fake(spec), lib=library)
        _register_gradient(namespace, library, spec)
        _register_autocast(namespace, library, spec)


def dynamic_size() -> torch.SymInt:
    """A size that only the data tells, for the fake of an op."""
    return torch.library.get_ctx().new_dynamic_size()


def register_triton(key: str, namespace: str = "maskops_triton") -> None:
    """Register the Triton launchers for a dispatch key ("CUDA", "XPU", or "CPU" for the interpreter), where it has no kernel."""
    for spec in OPS.values():
        if not spec.triton or torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{spec.name}", key):
            continue
        _LIBRARIES[namespace].impl(spec.name, _checked(spec, _launcher(spec)), key)


def _launcher(spec: OpSpec) -> Callable:
    """The Triton launcher of an op, imported at its first call: importing triton takes longer than all of maskops."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"maskops.kernels.{spec.family}"), spec.name)(*args)

    return launch


def _checked(spec: OpSpec, function: Callable) -> Callable:
    """The dispatcher drops trailing arguments that equal their default: fill them in, check everything, then call."""

    def implementation(*args: Any) -> Any:
        args = args + spec.defaults[len(args) :]
        spec.check(*args)
        if spec.check_data is not None:
            spec.check_data(*args)
        return function(*args)

    return implementation


def _fake(spec: OpSpec) -> Callable:
    def fake(*args: Any) -> Any:
        args = args + spec.defaults[len(args) :]
        spec.check(*args)
        return spec.fake(*args)

    return fake


def _register_gradient(namespace: str, library: torch.library.Library, spec: OpSpec) -> None:
    if spec.backward is None:
        if spec.name.startswith("_") and not spec.mutates:
            torch.library.register_autograd(f"{namespace}::{spec.name}", _no_double_backward(spec), lib=library)
        return

    # Here too trailing arguments that equal their default are missing.
    def backward(ctx: Any, *grads: Tensor) -> Any:
        given = len(ctx.needs_input_grad)
        ctx.needs = ctx.needs_input_grad + (False,) * (len(spec.defaults) - given)
        found = spec.backward(getattr(torch.ops, namespace), ctx, *grads)
        return found[:given] if isinstance(found, tuple) else found

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        spec.setup(ctx, inputs + spec.defaults[len(inputs) :], output)

    torch.library.register_autograd(f"{namespace}::{spec.name}", backward, setup_context=setup_context, lib=library)


def _no_double_backward(spec: OpSpec) -> Callable:
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"{spec.name.strip('_')}: a second derivative is not implemented")

    return backward


def _register_autocast(namespace: str, library: torch.library.Library, spec: OpSpec) -> None:
    if spec.autocast == "preserve":
        return
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA"), ("xpu", "AutocastXPU")):
        library.impl(spec.name, _autocast_kernel(namespace, spec, device, key), key, with_keyset=True)


def _autocast_kernel(namespace: str, spec: OpSpec, device: str, key: str) -> Callable:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(_keyset: Any, *args: Any) -> Any:
        # Trailing arguments that equal their default are missing from args.
        cast = [castable(a) and name not in spec.autocast_skips for a, name in zip(args, spec.arguments, strict=False)]
        floats = [a.dtype for a, wanted in zip(args, cast, strict=True) if wanted]
        if spec.autocast == "lower":
            dtype = torch.get_autocast_dtype(device)
        else:
            dtype = torch.float32 if torch.float32 in floats or len(set(floats)) > 1 else (floats or [None])[0]
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            op = getattr(getattr(torch.ops, namespace), spec.name)
            return op(*(a.to(dtype) if wanted else a for a, wanted in zip(args, cast, strict=True)))

    return kernel


def castable(a: Any) -> bool:
    return isinstance(a, Tensor) and a.dtype in (torch.float32, torch.bfloat16, torch.float16)
