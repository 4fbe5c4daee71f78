"""What tests and benchmarks share: samples of every op, tolerances, backends that can be tested here.

maskops.testing.<family> holds SAMPLES, ERRORS and TRAFFIC of a family; from them test_contract.py makes the systematic tests.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from maskops import _extension
from maskops._registry import NAMESPACES, OPS

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ONE_OF_EACH_SIZE = (torch.float32, torch.bfloat16)
ISA_LEVELS = {"portable": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 2, "amx_bf16": 2}
# How AVX-512 multiplies bfloat16: as floats, through vdpbf16ps, in AMX tiles; whether or not that is the fast way on this CPU.
BF16_PRODUCTS = {"avx512_bf16": 1, "amx_bf16": 2}

# Relative to the largest expected value, what any correct kernel may be off at this dtype even where the reference is exact.
SLACK = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Root mean square of the error, relative to that of the expected values.
RMS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


@dataclass(frozen=True)
class Sample:
    """Arguments of one op.  make(dtype, generator) -> all arguments in the schema's order, on the CPU.

    slow_on: backends that simulate a GPU, and take a tenth of a second for a tile, on which this sample has one dtype of each size,
    ONE_OF_EACH_SIZE. For samples that show a walk over several tiles or passes: the choice of tiles knows sizes only, and every
    dtype has other samples of the op (test_contract checks it). Native kernels run every sample at every dtype.
    """

    op: str
    name: str
    make: Callable[[torch.dtype, torch.Generator], tuple]
    slow_on: tuple[str, ...] = ()

    def runs_on(self, backend: str, dtype: torch.dtype) -> bool:
        return backend not in self.slow_on or dtype in ONE_OF_EACH_SIZE

    def arguments(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple:
        return self.make(dtype, torch.Generator().manual_seed(seed))

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


@dataclass(frozen=True)
class ErrorSample:
    """A call that must fail: `spoil` changes good arguments, `match` is a regular expression of the message."""

    op: str
    name: str
    spoil: Callable[..., tuple]
    error: type[Exception]
    match: str

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def op_of(backend: str, name: str) -> Callable:
    return getattr(getattr(torch.ops, NAMESPACES[backend]), name)


def takes_floats(op: str) -> bool:
    """Whether the op computes on floating tensors, so that a test runs it at every dtype."""
    return OPS[op].family != "mask_sampling" and op not in (
        "visible_tokens_split",
        "nm_matmul_pack",
        "masked_attention_map",
        "sparse_conv_map",
        "sparse_conv_outputs",
        "sparse_conv_reverse",
        "feature_reuse_exclude",
        "feature_reuse_rank",
    )


def is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def in_float64(args: tuple) -> tuple:
    return tuple(a.double() if is_float(a) else a for a in args)


def assert_close(actual: Tensor, exact: Tensor, reference: Tensor, what: str) -> None:
    """actual is at most twice as wrong as the plain PyTorch version at the same dtype, plus SLACK; and its RMS is within RMS.

    Args:
        actual: the kernel's result.  exact: the float64 result.  reference: the reference's result at actual's dtype.
    """
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    assert actual.dtype == reference.dtype, f"{what}: dtype {actual.dtype}, expected {reference.dtype}"
    if not actual.is_floating_point():
        assert torch.equal(actual, exact.to(actual.dtype)), f"{what}: {actual} differs from {exact}"
        return
    if actual.numel() == 0:
        return
    finite = exact.isfinite()
    assert torch.equal(actual.isfinite(), finite), (
        f"{what}: not finite where the expected value is, or the other way round"
    )
    error, allowed = (actual.double() - exact)[finite].abs(), (reference.double() - exact)[finite].abs()
    scale = exact[finite].abs().max().item() if finite.any() else 0.0
    if scale == 0.0:
        assert (error == 0).all(), f"{what}: {error.max():.3g} where 0 is expected"
        return
    worst, limit = error.max().item(), 2 * allowed.max().item() + SLACK[actual.dtype] * scale
    assert worst <= limit, f"{what}: worst error {worst:.3g} above {limit:.3g}, scale {scale:.3g}"
    rms = error.square().mean().sqrt().item() / exact[finite].square().mean().sqrt().item()
    own = allowed.square().mean().sqrt().item() / exact[finite].square().mean().sqrt().item()
    assert rms <= 2 * own + RMS[actual.dtype], (
        f"{what}: RMS error {rms:.3g} above 2 x {own:.3g} + {RMS[actual.dtype]:.3g}"
    )


def assert_same_loss(ours: Tensor, theirs: Tensor, leaves: list[Tensor], scale: Tensor | float = 1.0) -> None:
    """Two float32 losses of the same leaves: values, and gradients of their sums, each weighted by `scale`."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad((x * scale).sum(), leaves, retain_graph=True) for x in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run the CPU kernels at a level of ISA_LEVELS; RuntimeError where this CPU lacks it."""
    library = cpu_library()
    before = library.maskops_isa_in_use(), library.maskops_bf16_products()
    if (
        library.maskops_set_isa(ISA_LEVELS[name]) != 0
        or library.maskops_set_bf16_products(BF16_PRODUCTS.get(name, 0)) != 0
    ):
        raise RuntimeError(f"this CPU has no {name}")
    try:
        yield
    finally:
        library.maskops_set_isa(before[0])
        library.maskops_set_bf16_products(before[1])


def cpu_library() -> ctypes.CDLL:
    return ctypes.CDLL(str(_extension.path_of("_C")))


def instruction_sets() -> tuple[str, ...]:
    """Those that this CPU has, from the least to the best."""
    library, best = cpu_library(), cpu_library().maskops_isa_best()
    before = library.maskops_bf16_products()
    products = {name for name, kind in BF16_PRODUCTS.items() if library.maskops_set_bf16_products(kind) == 0}
    library.maskops_set_bf16_products(before)
    return tuple(
        name for name, level in ISA_LEVELS.items() if level <= best and (name not in BF16_PRODUCTS or name in products)
    )


def randn(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def ragged_mask(generator: torch.Generator, batch: int, tokens: int) -> Tensor:
    """bool [B, N]: one row all masked, one row all visible, the others anything."""
    mask = torch.rand(batch, tokens, generator=generator) < 0.6
    mask[0] = True
    mask[-1] = batch == 1
    return mask
