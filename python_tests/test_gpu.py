"""The contract on a real GPU: run these, `make gpu-check` and `benchmarks/run.py --device cuda` on a machine that has one."""

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import maskops
from maskops import testing
from maskops._backends import has_kernel
from maskops._registry import OPS
from maskops.families import FAMILIES
from maskops.testing import ErrorSample, Sample, op_of

pytestmark = pytest.mark.gpu
MODULES = [importlib.import_module(f"maskops.testing.{family}") for family in FAMILIES]
SAMPLES = [sample for module in MODULES for sample in module.SAMPLES]
# Ids out of range end in a device-side assertion, which leaves the process unusable: not tested in this process.
ERRORS = [e for module in MODULES for e in module.ERRORS if e.error is ValueError and " must be at most" not in e.match]


def on_gpu(args: tuple) -> tuple:
    return tuple(a.cuda() if isinstance(a, Tensor) else a for a in args)


def here(cases: list, names: str) -> pytest.MarkDecorator:
    """One test per case; without a GPU one that is skipped and says how many: to collect thousands takes two processes 20 s."""
    if not torch.cuda.is_available():
        blank = (None,) * len(names.split(","))
        cases = [pytest.param(*blank, id=f"{len(cases)}_cases_need_a_gpu")]
    return pytest.mark.parametrize(names, cases, ids=str)


def cases() -> Iterator:
    for sample in SAMPLES:
        dtypes = testing.FLOAT_DTYPES if testing.takes_floats(sample.op) else (torch.float32,)
        for dtype in dtypes:
            for backend in ("native", "triton"):
                if not ("embed" in sample.op and dtype == torch.float64):
                    yield pytest.param(sample, backend, dtype, id=f"{sample}-{backend}-{str(dtype)[6:]}")


@here(list(cases()), "sample,backend,dtype")
def test_value(sample: Sample, backend: str, dtype: torch.dtype) -> None:
    args = sample.arguments(dtype)
    results = []
    for op, inputs in (
        (op_of("reference", sample.op), testing.in_float64(args)),
        (op_of("reference", sample.op), args),
        (op_of(backend, sample.op), on_gpu(args)),
    ):
        out = op(*inputs)
        results.append([out] if isinstance(out, Tensor) else list(out))
    for i, (exact, own, actual) in enumerate(zip(*results, strict=True)):
        testing.assert_close(actual.cpu(), exact, own, f"output {i} of {sample.op}")


@here(sorted(OPS), "op")
def test_a_gpu_kernel_is_registered(op: str) -> None:
    assert has_kernel("native", op, "cuda") and has_kernel("triton", op, "cuda")


@here([s for s in ERRORS if "num_" not in s.match and "cu_seqlens.*" not in s.match], "sample")
def test_shape_errors(sample: ErrorSample) -> None:
    first = next(s for s in SAMPLES if s.op == sample.op)
    with pytest.raises(sample.error, match=sample.match):
        op_of("native", sample.op)(*sample.spoil(*on_gpu(first.arguments())))


def test_masks_are_those_of_the_cpu() -> None:
    here, there = (maskops.random_masking(64, 1568, 0.9, seed=7, device=device) for device in ("cpu", "cuda"))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here[:6], there[:6], strict=True))


def test_tensors_of_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="must be on cuda"):
        maskops.gather_tokens(torch.ones(1, 4, 4, device="cuda"), torch.zeros(1, 1, dtype=torch.int64))


def test_captured_graph_draws_fresh_masks() -> None:
    seed = torch.zeros(2, dtype=torch.int64, device="cuda")
    x = torch.randn(8, 64, 32, device="cuda")

    def step() -> Tensor:
        return maskops.gather_tokens(x, maskops.random_masking(8, 64, num_keep=16, seed=seed).ids_keep)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    graph.replay()
    first = out.clone()
    seed[1] += 1
    graph.replay()
    assert not torch.equal(first, out)
