"""The systematic checks: every op x backend x dtype, generated from maskops.testing.<family>."""

import contextlib
import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from maskops import testing
from maskops._backends import has_kernel
from maskops._extension import interpreting
from maskops._registry import NAMESPACES, OPS
from maskops.families import FAMILIES
from maskops.testing import ErrorSample, Sample, op_of

FAMILY_MODULES = [importlib.import_module(f"maskops.testing.{family}") for family in FAMILIES]
SAMPLES = [sample for module in FAMILY_MODULES for sample in module.SAMPLES]
ERRORS = [sample for module in FAMILY_MODULES for sample in module.ERRORS]
EMULATED = has_kernel("emulated", "visible_tokens_gather", "cpu")
BACKENDS = ["native", *(["triton"] if interpreting() else []), *(["emulated"] if EMULATED else [])]
# The native kernels once per instruction set, so that a machine with AVX-512 proves the portable and AVX2 ones too.
VARIANTS = [f"native-{isa}" for isa in testing.instruction_sets()] + BACKENDS[1:] + ["reference"]
FIRST_SAMPLE = {sample.op: sample for sample in reversed(SAMPLES)}


def supported(backend: str, op: str, dtype: torch.dtype) -> bool:
    if backend == "emulated":
        return OPS[op].cuda
    if backend == "triton":
        if not OPS[op].triton:
            return False
        limits = importlib.import_module(f"maskops.kernels.{OPS[op].family}").LIMITS.get(op)
        return limits is None or not testing.takes_floats(op) or dtype in limits["dtypes"]
    return True


def dtypes_of(op: str) -> tuple[torch.dtype, ...]:
    return testing.FLOAT_DTYPES if testing.takes_floats(op) else (torch.float32,)


def value_cases() -> Iterator:
    for sample in SAMPLES:
        for variant in VARIANTS:
            for dtype in dtypes_of(sample.op):
                # The ways through AVX-512 differ in bfloat16 only.
                if variant.endswith(tuple(testing.BF16_PRODUCTS)) and dtype != torch.bfloat16:
                    continue
                backend = variant.split("-")[0]
                if sample.runs_on(backend, dtype) and supported(backend, sample.op, dtype):
                    yield pytest.param(sample, variant, dtype, id=f"{sample}-{variant}-{str(dtype)[6:]}")


VALUE_CASES = list(value_cases())


def with_grad(op: str, args: tuple) -> tuple:
    """Fresh arguments; the floating ones ask for a gradient where the op gives one."""
    spec = OPS[op]
    wanted = [testing.is_float(a) and name not in spec.constants for a, name in zip(args, spec.arguments, strict=True)]
    return tuple(
        a.detach().clone().requires_grad_(want and differentiable(op)) if isinstance(a, Tensor) else a
        for a, want in zip(args, wanted, strict=True)
    )


def run(backend: str, op: str, args: tuple, grads: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of the differentiable arguments for fixed output weights."""
    args = with_grad(op, args)
    with torch.set_grad_enabled(grads):
        out = op_of(backend, op)(*args)
    outs = written(op, args) if out is None else [out] if isinstance(out, Tensor) else list(out)
    wanted = [o for o in outs if o.requires_grad]
    if not wanted:
        return [o.detach() for o in outs], []
    weights = [torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view(o.shape).to(o.dtype) for o in wanted]
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    found = torch.autograd.grad(wanted, inputs, weights, allow_unused=True)
    zeros = [torch.zeros_like(a) if g is None else g for a, g in zip(inputs, found, strict=True)]
    return [o.detach() for o in outs], zeros


def written(op: str, args: tuple) -> list[Tensor]:
    """What an op that writes in place has for a result."""
    return [a for a, name in zip(args, OPS[op].arguments, strict=True) if name in OPS[op].mutates]


def differentiable(op: str) -> bool:
    return OPS[op].backward is not None


def has_gradient(backend: str, op: str) -> bool:
    """Whether the gradient stays in this backend: a gradient that CUDA C++ leaves to Triton has no kernel in the emulator."""
    return backend != "emulated" or OPS.get(f"_{op}_backward", OPS[op]).cuda


@pytest.mark.parametrize("sample,variant,dtype", VALUE_CASES)
def test_value_and_gradient(sample: Sample, variant: str, dtype: torch.dtype) -> None:
    backend, _, isa = variant.partition("-")
    args = sample.arguments(dtype)
    grads = has_gradient(backend, sample.op)
    # An op that computes in whole numbers takes the floats it is given by their bits.
    wide = testing.in_float64(args) if testing.takes_floats(sample.op) else args
    exact = run("reference", sample.op, wide, grads)
    reference = run("reference", sample.op, args, grads)
    with testing.instruction_set(isa) if isa else contextlib.nullcontext():
        actual = run(backend, sample.op, args, grads)
    for kind, results, exacts, references in zip(("output", "gradient"), actual, exact, reference, strict=True):
        assert len(results) == len(exacts)
        for i, (result, want, own) in enumerate(zip(results, exacts, references, strict=True)):
            testing.assert_close(result, want, own, f"{kind} {i} of {sample.op}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", sorted(OPS))
def test_kernel_is_registered(op: str, backend: str) -> None:
    """Without this, a test of a missing native kernel would silently test the reference."""
    expected = {"emulated": OPS[op].cuda, "triton": OPS[op].triton}.get(backend, True)
    assert has_kernel(backend, op, "cpu") == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", sorted(OPS))
def test_values_are_compared_on_every_backend(op: str, backend: str) -> None:
    """A limit that is too narrow drops cases without a sound: at least float32 must be left, and each dtype that is supported."""
    cases = [case.values for case in VALUE_CASES]
    found = {d for s, v, d in cases if s.op == op and v.split("-")[0] == backend}
    assert found == {d for d in dtypes_of(op) if supported(backend, op, d)}
    assert (torch.float32 in found) == {"emulated": OPS[op].cuda, "triton": OPS[op].triton}.get(backend, True)


@pytest.mark.parametrize("op", sorted(OPS))
def test_samples_and_traffic_exist(op: str) -> None:
    assert any(sample.op == op for sample in SAMPLES)
    assert op.startswith("_") or any(op in module.TRAFFIC for module in FAMILY_MODULES)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("sample", ERRORS, ids=str)
def test_errors(sample: ErrorSample, backend: str) -> None:
    if not supported(backend, sample.op, torch.float32):
        pytest.skip("this backend has no kernel for the op")
    bad = sample.spoil(*FIRST_SAMPLE[sample.op].arguments())
    with pytest.raises(sample.error, match=sample.match):
        op_of(backend, sample.op)(*bad)


@pytest.mark.parametrize("sample", ERRORS, ids=str)
def test_error_wording_is_the_same(sample: ErrorSample) -> None:
    bad = sample.spoil(*FIRST_SAMPLE[sample.op].arguments())
    said = set()
    for backend in ("native", "reference"):
        with pytest.raises(sample.error) as caught:
            op_of(backend, sample.op)(*bad)
        said.add(str(caught.value))
    assert len(said) == 1, said


# Finite differences do not see a kink, nor a gradient that is made up on purpose; they know no -inf, and take long on large inputs.
KINKED = ("l1", "smooth", "hard", "straight_through", "without_keys", "large")
RULED = ("nm_matmul_compress",)  # a weight with every value moved a little is no N:M weight
SMOOTH = [
    s for s in SAMPLES if differentiable(s.op) and s.op not in RULED and not any(word in s.name for word in KINKED)
]


def without_nan(args: tuple) -> tuple:
    """Finite differences of NaN are NaN: the hidden positions get a number."""
    return tuple(a.nan_to_num() if testing.is_float(a) else a for a in args)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"] + ["reference"])
@pytest.mark.parametrize("sample", SMOOTH, ids=str)
def test_gradcheck(sample: Sample, backend: str) -> None:
    if not supported(backend, sample.op, torch.float64) or not has_gradient(backend, sample.op):
        pytest.skip("this backend has no kernel for the op or its gradient")
    args = with_grad(sample.op, without_nan(sample.arguments(torch.float64)))
    op = op_of(backend, sample.op)
    assert torch.autograd.gradcheck(op, args, fast_mode=True)
    if OPS[sample.op].family == "visible_tokens" and "embed" not in sample.op:
        assert torch.autograd.gradgradcheck(op, args, fast_mode=True)


ONCE_DIFFERENTIABLE = (
    "visible_tokens_embed", "masked_loss_patch", "nm_matmul_linear", "nm_matmul_bitmask", "nm_matmul_soft",
    "masked_attention", "feature_reuse_attention", "sparse_conv_block", "sparse_conv_block_max_pool", "sparse_conv_block_norm",
    "sparse_conv_block_layer_norm",
    "masked_loss_linear", "masked_loss_regression", "masked_loss_contrast", "masked_loss_max_pool",
)  # fmt: skip


@pytest.mark.parametrize("op", ONCE_DIFFERENTIABLE)
def test_second_derivative_is_refused(op: str) -> None:
    args = with_grad(op, without_nan(FIRST_SAMPLE[op].arguments()))
    out = op_of("native", op)(*args)
    out = out[0] if isinstance(out, tuple) else out
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative is not implemented"):
        torch.autograd.grad(first[0].square().sum(), inputs)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("op", sorted(OPS))
def test_opcheck(op: str, backend: str) -> None:
    args = with_grad(op, without_nan(FIRST_SAMPLE[op].arguments()))
    torch.library.opcheck(op_of(backend, op).default, args)


def spread(x: Tensor) -> Tensor:
    """The same values with other strides: every axis transposed in memory."""
    if x.dim() == 0:
        return x
    return x.clone().permute(*range(x.dim() - 1, -1, -1)).contiguous().permute(*range(x.dim() - 1, -1, -1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", sorted(OPS))
def test_any_strides(op: str, backend: str) -> None:
    if not supported(backend, op, torch.float32):
        pytest.skip("this backend has no kernel for the op")
    args = FIRST_SAMPLE[op].arguments()
    other = tuple(spread(a) if isinstance(a, Tensor) else a for a in args)
    expected, actual = run(backend, op, args, False)[0], run(backend, op, other, False)[0]
    assert all(torch.equal(a, e) or torch.allclose(a, e, equal_nan=True) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("op", [op for op in sorted(OPS) if testing.takes_floats(op)])
def test_expanded_inputs(op: str) -> None:
    """A stride of zero, as a mask token expanded over the batch has; not of what is written."""
    given = zip(FIRST_SAMPLE[op].arguments(), OPS[op].arguments, strict=True)
    args = tuple(
        a[:1].expand_as(a) if testing.is_float(a) and a.dim() and name not in OPS[op].mutates else a
        for a, name in given
    )
    solid = tuple(a.clone(memory_format=torch.contiguous_format) if isinstance(a, Tensor) else a for a in args)
    expected, actual = run("native", op, solid, False)[0], run("native", op, args, False)[0]
    assert all(torch.allclose(a, e, equal_nan=True) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_threads_do_not_change_a_bit(sample: Sample) -> None:
    args, threads = sample.arguments(), torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outs, grads = run("native", sample.op, args)
        results.append(outs + grads)
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("op", sorted(OPS))
def test_inputs_are_not_changed(op: str) -> None:
    args = FIRST_SAMPLE[op].arguments()
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    op_of("native", op)(*args)
    for a, b, name in zip(args, before, OPS[op].arguments, strict=True):
        if isinstance(a, Tensor) and name not in OPS[op].mutates:
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("sample", [e for e in ERRORS if OPS[e.op].mutates], ids=str)
def test_nothing_is_written_by_a_call_that_fails(sample: ErrorSample, backend: str) -> None:
    bad = sample.spoil(*FIRST_SAMPLE[sample.op].arguments())
    before = [a.clone() if isinstance(a, Tensor) else a for a in bad]
    with pytest.raises(sample.error):
        op_of(backend, sample.op)(*bad)
    assert all(
        not isinstance(a, Tensor) or torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        for a, b in zip(bad, before, strict=True)
    )


def test_every_namespace_has_the_same_schema() -> None:
    for name in OPS:
        said = {
            str(getattr(getattr(torch.ops, ns), name).default._schema).split("::", 1)[1] for ns in NAMESPACES.values()
        }
        assert len(said) == 1
