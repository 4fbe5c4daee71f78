"""Sparse or dense: which path nm_linear takes, and what maskops expects an N:M layer to gain on a machine."""

import pytest
import torch

import maskops
from maskops.ops.nm_matmul.cost import Machine, against_dense, linear_path


def pruned(rows: int, columns: int, n: int, m: int) -> torch.Tensor:
    weight = torch.randn(rows, columns)
    return torch.where(maskops.nm_mask(weight.abs(), n, m), weight, 0)


def test_auto_takes_the_dense_path_where_little_is_pruned() -> None:
    sparse, dense = (maskops.nm_compress(pruned(6, 32, n, m), n, m) for n, m in ((3, 4), (7, 8)))
    x = torch.randn(3, 32, requires_grad=True)
    assert "auto takes the sparse path" in maskops.explain("nm_linear", x, sparse)
    assert "auto takes the sparse path" in maskops.explain("nm_linear", x=x, weight=sparse, bias=None)
    assert "auto takes the dense path (decompress, then torch's dense linear): " in maskops.explain(
        "nm_linear", x, dense
    )
    assert "path" not in maskops.explain("nm_linear") and "path" not in maskops.explain("nm_compress", x)
    assert linear_path(25, 32)[0] == "dense"
    dense.requires_grad_()
    auto, named = maskops.nm_linear(x, dense), maskops.nm_linear(x, dense, backend="reference")
    torch.testing.assert_close(auto, named)
    grads = [torch.autograd.grad(y.square().sum(), (x, dense.values)) for y in (auto, named)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


XEON = Machine("Intel Xeon", "avx512", "avx512", False, 1)


@pytest.mark.parametrize(
    ("sizes", "pattern", "dtype", "machine", "low", "high"),
    [  # sizes: rows, outputs, inputs; measured dense time / sparse time, one thread
        ((2048, 384, 1536), (2, 4), torch.float32, XEON, 0.9, 1.25),  # MiniLM: 0.99 to 1.11
        ((1, 384, 384), (2, 4), torch.float32, XEON, 0.3, 0.8),  # 0.42
        ((1, 3072, 3072), (2, 4), torch.float32, XEON, 1.1, 2.0),  # 1.6
        ((512, 1536, 768), (2, 4), torch.float32, XEON, 1.0, 1.4),  # 1.16
        ((512, 1536, 1536), (1, 4), torch.float32, XEON, 1.6, 2.4),  # 2.04
        ((512, 1536, 1536), (2, 4), torch.bfloat16, XEON, 1.5, 2.5),  # 2.2
        ((512, 3072, 768), (2, 4), torch.bfloat16, XEON._replace(amx=True), 0.6, 0.95),  # 0.77
        ((16, 4096, 4096), (2, 4), torch.bfloat16, XEON._replace(amx=True), 0.9, 1.3),  # 1.1
        ((1, 4096, 4096), (2, 4), torch.bfloat16, XEON._replace(amx=True), 1.2, 3.5),  # 2.7
        ((2048, 1536, 1536), (2, 4), torch.float32, XEON._replace(isa="avx2"), 0.5, 0.9),  # 0.76
        ((512, 1536, 1536), (2, 4), torch.float32, XEON._replace(isa="portable"), 0.2, 0.4),  # 0.27
        ((1, 1536, 1536), (3, 4), torch.float32, XEON, 0.05, 0.25),  # 0.14, no shuffles for this pattern
        ((1, 384, 384), (2, 4), torch.float64, XEON, 0.05, 0.4),  # 0.10
    ],
)
def test_expected_against_dense(
    sizes: tuple, pattern: tuple, dtype: torch.dtype, machine: Machine, low: float, high: float
) -> None:
    estimate = against_dense(*sizes, *pattern, dtype, "cpu", machine)
    assert low < estimate.speedup < high and estimate.path == ("sparse" if estimate.speedup >= 1 else "dense")
    assert f"{sizes[0]} rows of {sizes[2]} inputs" in estimate.reason and machine.isa in estimate.reason


def test_expectations_that_are_guesses_say_so() -> None:
    work = 512, 768, 768, 2, 4, torch.float32
    assert "by figures of" not in against_dense(*work, "cpu", XEON).reason
    assert "by figures of Intel for AMD EPYC" in against_dense(*work, "cpu", XEON._replace(cpu="AMD EPYC")).reason
    assert against_dense(*work, "cuda") == (
        "sparse",
        "the pattern keeps at most 3/4 of the weight; no timings on cuda",
        None,
    )
    assert against_dense(*work, "cpu", XEON._replace(isa="")).path == "dense"
    assert against_dense(0, 0, 8, 2, 4, torch.float32, "cpu").path in ("sparse", "dense")
    said = maskops.explain("nm_linear", torch.ones(3, 32), maskops.nm_compress(pruned(6, 32, 2, 4), 2, 4))
    assert "times as fast as dense: 3 rows of 32 inputs, float32" in said or "compiled kernels" in said
