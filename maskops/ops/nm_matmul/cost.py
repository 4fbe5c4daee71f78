"""What an N:M layer is expected to gain over a dense one, and which way backend="auto" takes through nm_linear.

Two questions: nm_linear has a compressed weight already, so its dense path decompresses it in every call; sparsify_ can leave a
layer as it is, so there the sparse kernel must beat the plain dense product.
"""

from functools import cache
from typing import NamedTuple

import torch

from maskops import _extension

VECTOR = {"portable": 4, "avx2": 8, "avx512": 16}  # float32 in a vector
_TORCH_ISA = {"AVX512": "avx512", "AVX2": "avx2"}
CALIBRATED_ON = "Intel"
TILED_ROWS = 6  # kNmAmxLeastRows of csrc/cpu/nm_matmul/linear.h
GATHERED_ROWS = 4  # up to which csrc/cpu/nm_matmul/linear_few.cpp takes over without shuffles


class Machine(NamedTuple):
    """What the estimate depends on.

    Attributes:
        cpu: name of the CPU, "Intel Xeon", or "unknown CPU".
        isa: instruction set of maskops' kernels, as `maskops info` names it; "" without compiled kernels.
        torch_isa: the same of torch's kernels.
        amx: whether torch has matrix tiles for bfloat16.
        threads: torch's number of threads.
    """

    cpu: str
    isa: str
    torch_isa: str
    amx: bool
    threads: int


class Estimate(NamedTuple):
    """path: "sparse" or "dense", whichever is expected to be faster; reason; speedup: dense time / sparse time, None: unknown."""

    path: str
    reason: str
    speedup: float | None


def this_machine() -> Machine:
    return _this_machine()._replace(threads=torch.get_num_threads())


@cache
def _this_machine() -> Machine:
    """Asked once: a later set_isa, which is there for tests, changes no expectation."""
    known = _extension.cpu_facts()
    isa = _extension.isa_in_use() if _extension.status().get("_C") == "loaded" else ""
    torch_isa = _TORCH_ISA.get(torch.backends.cpu.get_cpu_capability(), "portable")
    return Machine(known.get("cpu_name", "unknown CPU"), isa, torch_isa, bool(known.get("amx_bf16", False)), 1)


def linear_path(n: int, m: int) -> tuple[str, str]:
    """("sparse" or "dense", the reason): what nm_linear does with a weight that keeps n of m.

    By the pattern only: torch.compile traces it with symbolic sizes, and an exported program must not depend on its rows.
    """
    # Above this share a sparse kernel reads nearly as much as a dense one, and computes less regularly.
    if 4 * n > 3 * m:
        return "dense", "the pattern keeps more than 3/4 of the weight"
    return "sparse", "the pattern keeps at most 3/4 of the weight"


def against_dense(
    M: int, N: int, K: int, n: int, m: int, dtype: torch.dtype, device_type: str, machine: Machine | None = None
) -> Estimate:
    """Whether nm_linear on x [M, K] and a weight [N, K] that keeps n of m is expected to beat torch's linear with a dense weight.

    machine: None: this one.
    """
    path, reason = linear_path(n, m)
    if device_type != "cpu":
        return Estimate(path, f"{reason}; no timings on {device_type}", None)
    machine = this_machine() if machine is None else machine
    if not machine.isa:
        return Estimate("dense", "without compiled kernels the weight is decompressed in every call", None)
    empty = M * N * K == 0
    speedup = 1.0 if empty else dense_time(M, N, K, dtype, machine) / sparse_time(M, N, K, n, m, dtype, machine)
    guess = "" if CALIBRATED_ON in machine.cpu else f", by figures of {CALIBRATED_ON} for {machine.cpu}"
    plural = "s" if machine.threads > 1 else ""
    where = f"{M} rows of {K} inputs, {str(dtype)[6:]}, {machine.threads} thread{plural}, {machine.isa}{guess}"
    path = "dense" if path == "dense" or speedup < 1 else "sparse"
    return Estimate(path, f"expected {speedup:.2f} times as fast as dense: {where}", speedup)


# Times in nanoseconds. The constants were read off medians of interleaved calls on a Xeon of the Sapphire Rapids line without AMX
# (torch 2.13): K 384 to 3072, N 384 to 3072, M 1 to 2048, patterns 1:4, 2:4, 4:8, 3:4, all three instruction sets, one thread. The
# ratio of both times is off by about a fifth. Of 28 float32 points with 64 to 1536 rows, measured twice on a shared host,
# the ratios themselves differed by 15%: the sparse product loses more of its speed to neighbours. bfloat16 in AMX: 2:4, (N, K) of
# (4096, 4096) with 1 to 512 rows and (3072, 768) with 1536, on another Xeon that has it, two threads.


def dense_time(M: int, N: int, K: int, dtype: torch.dtype, machine: Machine) -> float:
    """torch.nn.functional.linear: the weight is read, and every row of x costs as much again."""
    per_row = {torch.bfloat16: 0.026, torch.float16: 0.0165, torch.float64: 0.031}.get(dtype, 0.0155)
    per_row *= VECTOR["avx512"] / VECTOR[machine.torch_isa]
    read = (0.17 if M == 1 else 0.3) * (2 if dtype == torch.float64 else 1)
    if dtype == torch.bfloat16 and machine.amx:
        per_row, read = 0.0062, 0.23 if M == 1 else 0.1
    fixed = 20e3 if dtype == torch.bfloat16 else 3e3
    return fixed + N * K * (read + per_row * M) / machine.threads


def sparse_time(
    M: int, N: int, K: int, n: int, m: int, dtype: torch.dtype, machine: Machine
) -> float:  # fmt: skip
    """The kernel of nm_linear: shuffles for few rows, a gather for fewer, else lists of places that all rows share."""
    share, wide = n / m, dtype == torch.float64
    # As csrc/cpu/nm_matmul/linear_few.cpp decides.
    shuffles = machine.isa == "avx512" and not wide and 16 % n == 0 and 16 // n * m <= 64
    most = 28 if 4 * n <= m else 48 if m == 4 else 36
    tiles = dtype == torch.bfloat16 and machine.amx and machine.isa == "avx512" and M >= TILED_ROWS
    if tiles and (32 % m == 0 or not shuffles or most < M):
        return 30e3 + N * K * (0.08 + 0.0082 * M) / machine.threads
    if shuffles and most >= M:
        per_weight = 0.05 + 0.14 * share + 0.02 * M
    elif M <= GATHERED_ROWS:
        per_weight = 3 * share * M
    else:
        product = (0.23 + 0.7 * share + 0.7 * share**2) * 0.0156 * max(M, 64)
        per_weight = (0.7 * share + product) * (2.4 if wide else 1) * VECTOR["avx512"] / VECTOR[machine.isa]
    pack = 1.0 * M * K  # of x, which narrow outputs do not amortise: not divided by the threads
    return 30e3 + pack + N * K * per_weight / machine.threads
