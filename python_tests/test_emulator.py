"""The CUDA emulator: right kernels pass under every order of threads, and every planted fault is caught."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maskops._registry import OPS
from maskops.testing import emulator

pytestmark = pytest.mark.skipif(
    bool(emulator.reason_unavailable()), reason=emulator.reason_unavailable() or "the emulator can be built"
)

TILE = Path(__file__).parent / "planted_faults" / "tile.cu"
ROWS = 3


def build_tile(fault: str = "", *, sanitize: bool = False) -> Path:
    return emulator.build(sanitize, [TILE], [f"FAULT_{fault}"] if fault else [], stable_abi=False)


def run_tile(path: Path, *, seed: int = 0, threads: int = 64) -> tuple[str, torch.Tensor, int]:
    """What the kernel complained of, its output and the rows it counted."""
    library = emulator.open_library(path)
    library.run_tile.restype = ctypes.c_char_p
    library.maskops_emulator_set_seed(seed)
    x, out, count = tile_input(), torch.zeros(ROWS, 64), torch.zeros(1, dtype=torch.int32)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, out, count)]
    return library.run_tile(*pointers, ROWS, threads).decode(), out, int(count)


def tile_input() -> torch.Tensor:
    return torch.arange(ROWS * 64.0).view(ROWS, 64)


def tile_expected() -> torch.Tensor:
    mirrored = tile_input().flip(1)
    return mirrored + mirrored.view(ROWS, 2, 32).sum(2).repeat_interleave(32, 1)


@pytest.mark.parametrize("seed", range(5))
def test_right_kernel_passes_in_every_order(seed: int) -> None:
    message, out, count = run_tile(build_tile(), seed=seed)
    assert message == "" and count == ROWS
    assert torch.equal(out, tile_expected())


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("MISSING_BARRIER", "race on shared memory tile"),
        ("SHARED_RACE", "race on shared memory tile"),
        ("SHARED_OUT_OF_BOUNDS", "index 64 is outside shared memory tile[64]"),
        ("EXITED_BEFORE_BARRIER", "threads have exited"),
        ("DIVERGENT_BARRIER", "divergent barrier"),
        ("DIVERGENT_WARP", "divergent warp operations"),
        ("MISALIGNED_VECTOR", "is not aligned"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_fault_is_reported(fault: str, expected: str, seed: int) -> None:
    message, _, _ = run_tile(build_tile(fault), seed=seed)
    assert message.startswith("CUDA emulator: ") and expected in message


def test_wrong_stride_differs_from_the_reference() -> None:
    message, out, _ = run_tile(build_tile("WRONG_STRIDE"))
    assert message == "" and not torch.equal(out, tile_expected())


def test_float_atomic_does_not_compile() -> None:
    with pytest.raises(RuntimeError, match="float atomics are not deterministic"):
        build_tile("FLOAT_ATOMIC")


def test_block_of_too_many_threads_is_refused() -> None:
    message, _, _ = run_tile(build_tile(), threads=1025)
    assert "a block of 1025 threads cannot be launched" in message


RUN_SANITIZED = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.run_tile.restype = ctypes.c_char_p
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
x, out = (ctypes.c_void_p(libc.malloc(3 * 64 * 4)) for _ in range(2))
ctypes.memset(x, 0, 3 * 64 * 4)
print(library.run_tile(x, out, ctypes.byref(ctypes.c_int(0)), 3, 64).decode(), "finished")
"""


@pytest.mark.sanitizer
@pytest.mark.parametrize("fault", ["", "OUT_OF_BOUNDS"])
def test_out_of_bounds_store_is_seen_by_the_sanitizer(fault: str) -> None:
    command = [sys.executable, "-c", RUN_SANITIZED, str(build_tile(fault, sanitize=True))]
    env = {**os.environ, **emulator.sanitizer_environment()}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if fault:
        assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr and "tile_kernel" in done.stderr
    else:
        assert done.returncode == 0 and "finished" in done.stdout, done.stderr


# ---------------------------------------------------------------- faults planted into the real kernels


def mutated_ops(tmp_path: Path, namespace: str, source: str, file: str, old: str, new: str) -> tuple[object, object]:
    """The ops of csrc/cuda/<source>, with `old` replaced in csrc/<file>, in a namespace of their own; keep the library alive."""
    tree = tmp_path / "csrc"
    shutil.copytree(emulator.CSRC, tree)
    text = (tree / file).read_text()
    assert old in text, f"{file} no longer has the line that this test breaks"
    (tree / file).write_text(text.replace(old, new, 1))
    defines = [f"MASKOPS_EMULATED_NAMESPACE={namespace}"]
    path = emulator.build(sources=[tree / "cuda" / source], defines=defines, csrc=tree)
    library = torch.library.Library(namespace, "DEF")
    for spec in OPS.values():
        library.define(spec.schema)
    torch.ops.load_library(str(path))
    return getattr(torch.ops, namespace), library


SPLIT_MASK = torch.arange(600).view(2, 300) % 3 == 0


def test_missing_barrier_in_a_real_kernel(tmp_path: Path) -> None:
    old = "if (lane == 0) scratch[warp] = __popc(ballot);\n  __syncthreads();"
    new = "if (lane == 0) scratch[warp] = __popc(ballot);"
    source = "visible_tokens/split.cu"
    ops, _library = mutated_ops(tmp_path, "maskops_fault_barrier", source, "common/reduce.cuh", old, new)
    with pytest.raises(RuntimeError, match="race on shared memory scratch"):
        ops.visible_tokens_split(SPLIT_MASK, 300, 300)


def test_wrong_stride_in_a_real_kernel(tmp_path: Path) -> None:
    old, new = "to = out + row * channels;", "to = out + row / slots * slots * channels;"
    source = "visible_tokens/gather.cu"
    ops, _library = mutated_ops(tmp_path, "maskops_fault_stride", source, f"cuda/{source}", old, new)
    x, ids = torch.randn(2, 5, 8), torch.tensor([[0, 3], [4, 1]])
    assert not torch.equal(ops.visible_tokens_gather(x, ids), torch.ops.maskops_reference.visible_tokens_gather(x, ids))


def test_results_do_not_depend_on_the_order_of_threads() -> None:
    """Sums in a fixed order: the same bits under every seed."""
    ops = torch.ops.maskops_emulated
    grad = torch.randn(5, 41, 24)
    _, _, ids_restore, num_keep, _ = ops.visible_tokens_split(torch.rand(5, 40) < 0.5, 40, 40)
    results = []
    for seed in range(3):
        emulator.set_seed(seed)
        results.append(ops._visible_tokens_restore_backward(grad, ids_restore, num_keep, 40, 1, 1, True, True, True))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_counters_count() -> None:
    before = emulator.counters()
    torch.ops.maskops_emulated.visible_tokens_gather(torch.randn(1, 4, 8), torch.tensor([[2, 0]]))
    after = emulator.counters()
    assert after["launches"] == before["launches"] + 1
    assert after["bytes_written"] - before["bytes_written"] == 2 * 8 * 4
