"""The emulated twins of matrix instructions and background copies, and the CUDA kernels built on them, at every kind of edge."""

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskops import testing
from maskops.reference import nm_matmul as reference
from maskops.testing import emulator
from maskops.testing.nm_matmul import nm_weight

pytestmark = pytest.mark.skipif(
    bool(emulator.reason_unavailable()), reason=emulator.reason_unavailable() or "the emulator can be built"
)

MATRIX = Path(__file__).parent / "planted_faults" / "matrix.cu"
FAULTS = ["", "MISSING_WAIT", "MISSING_BARRIER", "MISALIGNED_ROW", "WRONG_SELECTOR"]  # as in matrix.cu
HALVES = [torch.float16, torch.bfloat16]


def operands(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A 2:4 matrix [16, 32], rows [8, 32], and per row the places of its two halves of 16 columns as 16-bit words [16, 2]."""
    g = torch.Generator().manual_seed(seed)
    a, b = nm_weight(g, dtype, 16, 32, 2, 4), testing.randn(g, dtype, 8, 32)
    places = reference.nm_matmul_compress(a, 2, 4)[1]
    return a, b, places.view(torch.uint16).to(torch.int64)


def metadata_words(places: Tensor, selector: int) -> Tensor:
    """The operand of 32 lanes; those that do not contribute hold words that no group may have."""
    words = torch.full((8, 4), 0x1B1B1B1B, dtype=torch.int64)
    words[:, 2 * selector : 2 * selector + 2] = places[:8] | places[8:] << 16
    return words.flatten().to(torch.uint32)


def run_matrix(
    fault: str, a: Tensor, b: Tensor, metadata: Tensor, selector: int = 0, threads: int = 32, seed: int = 0
) -> tuple[str, Tensor]:
    """What the kernel complained of, and its output."""
    library = emulator.open_library(emulator.build(sources=[MATRIX], stable_abi=False))
    library.run_matrix.restype = ctypes.c_char_p
    library.maskops_emulator_set_seed(seed)
    kept, out = reference.nm_matmul_compress(a, 2, 4)[0], torch.zeros(16, 8)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (kept, b, metadata, out)]
    options = int(a.dtype == torch.bfloat16), selector, FAULTS.index(fault), threads
    return library.run_matrix(*pointers, *options).decode(), out


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_sparse_instruction_is_the_dense_product(dtype: torch.dtype, selector: int, seed: int) -> None:
    a, b, places = operands(dtype, seed)
    message, out = run_matrix("", a, b, metadata_words(places, selector), selector, seed=seed)
    assert message == ""
    torch.testing.assert_close(out, a.float() @ b.float().T, rtol=1e-5, atol=1e-5)


def test_one_kept_weight_meets_one_input() -> None:
    """Each element of both operands in turn, so that no two mistakes of the layout can cancel."""
    for row, column in [(0, 0), (3, 7), (8, 17), (15, 31), (6, 14), (11, 24)]:
        a = torch.zeros(16, 32, dtype=torch.float16)
        a[row, column] = 1
        places = reference.nm_matmul_compress(a, 2, 4)[1].view(torch.uint16).to(torch.int64)
        b = torch.arange(8 * 32).view(8, 32).half()
        message, out = run_matrix("", a, b, metadata_words(places, 0))
        assert message == "" and torch.equal(out, a.float() @ b.float().T)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("MISSING_BARRIER", "race on shared memory"),
        ("MISALIGNED_ROW", "a row of a matrix in shared memory is not aligned"),
        ("WRONG_SELECTOR", "the places of a group must ascend"),
    ],
)
def test_planted_fault_is_reported(fault: str, expected: str) -> None:
    a, b, places = operands(torch.float16)
    message, _ = run_matrix(fault, a, b, metadata_words(places, 0))
    assert message.startswith("CUDA emulator: ") and expected in message


def test_missing_wait_leaves_poison() -> None:
    a, b, places = operands(torch.float16)
    message, out = run_matrix("MISSING_WAIT", a, b, metadata_words(places, 0))
    assert message == "" and out.isnan().all()


def test_a_warp_that_is_not_full_is_refused() -> None:
    a, b, places = operands(torch.float16)
    message, _ = run_matrix("", a, b, metadata_words(places, 0), threads=16)
    assert "an instruction of a whole warp in a warp that is not full" in message


# ---------------------------------------------------------------- nm_matmul_linear

# Blocks own 128 outputs by 64 rows by 64 columns (2:4 of 16-bit floats) or 64 by 64 by up to 32: M, N, K just around them.
SPARSE_SIZES = [
    (1, 1, 1), (3, 2, 4), (2, 9, 6), (5, 7, 12), (4, 3, 36), (65, 130, 48), (64, 128, 64), (63, 127, 63), (2, 257, 68),
    (130, 5, 144), (7, 8, 130), (9, 16, 192),
]  # fmt: skip
TILED_SIZES = [
    (1, 1, 1, 1, 3),
    (65, 66, 33, 2, 4),
    (64, 64, 64, 1, 4),
    (5, 130, 96, 5, 6),
    (130, 3, 35, 16, 17),
    (3, 4, 64, 31, 32),
]


def check_linear(M: int, N: int, K: int, n: int, m: int, dtype: torch.dtype, shift: int = 0) -> None:
    """Against the reference; `shift` moves every argument away from the alignment of its allocation."""
    g = torch.Generator().manual_seed(M * 1000 + N * 10 + K)
    values, indices = reference.nm_matmul_compress(nm_weight(g, dtype, N, K, n, m), n, m)
    x, bias = testing.randn(g, dtype, M, K), testing.randn(g, dtype, N)
    args = [torch.cat([t.new_zeros(shift), t.flatten()])[shift:].view(t.shape) for t in (x, values, indices, bias)]
    expected = reference.nm_matmul_linear(*testing.in_float64((x, values, indices, bias)), n, m)
    own = reference.nm_matmul_linear(x, values, indices, bias, n, m)
    testing.assert_close(
        torch.ops.maskops_emulated.nm_matmul_linear(*args, n, m), expected, own, f"{M}x{N}x{K} {n}:{m}"
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", SPARSE_SIZES, ids=str)
def test_sparse_tensor_cores_at_edges(size: tuple, dtype: torch.dtype) -> None:
    check_linear(*size, 2, 4, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("size", TILED_SIZES, ids=str)
def test_tiles_at_edges(size: tuple, dtype: torch.dtype) -> None:
    if size[3:] == (2, 4) and dtype == torch.float16:
        size = (*size[:3], 2, 5)
    check_linear(*size, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("K", [64, 80])
def test_arguments_away_from_16_bytes(K: int, dtype: torch.dtype) -> None:
    check_linear(9, 16, K, 2, 4, dtype, shift=1)


def test_order_of_threads_does_not_change_a_bit() -> None:
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.float32):
        values, indices = reference.nm_matmul_compress(nm_weight(g, dtype, 70, 80, 2, 4), 2, 4)
        x, results = testing.randn(g, dtype, 9, 80), []
        for seed in range(3):
            emulator.set_seed(seed)
            results.append(torch.ops.maskops_emulated.nm_matmul_linear(x, values, indices, None, 2, 4))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_crowded_groups_are_reported_as_on_the_cpu() -> None:
    weight = torch.zeros(40, 24)
    weight[30, 4:8] = 1
    weight[7, 20:23] = torch.tensor([1.5, -2.0, float("nan")])
    for seed in range(3):
        emulator.set_seed(seed)
        with pytest.raises(
            ValueError,
            match=r"weight\[7, 20:24\] must have at most 2 nonzeros, got \[1.5, -2, nan, 0\]; too many in 2 of",
        ):
            torch.ops.maskops_emulated.nm_matmul_compress(weight, 2, 4)
