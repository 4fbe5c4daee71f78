"""Every sample through CPU kernels and emulated CUDA kernels built with AddressSanitizer and UBSan, in a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import maskops
from maskops.testing import emulator, instruction_sets

ROOT = Path(maskops.__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.sanitizer,
    pytest.mark.skipif(bool(emulator.reason_unavailable()), reason=emulator.reason_unavailable() or "-"),
]


def run_samples(path: str, *arguments: str) -> str:
    env = {**os.environ, **emulator.sanitizer_environment(), "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-P", "-m", "maskops.testing.run_samples", *arguments]
    out = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")
    found = min(
        (at for at in (out.stderr.find("AddressSanitizer"), out.stderr.find("runtime error")) if at >= 0), default=-1
    )
    assert found < 0, out.stderr[max(0, found - 200) : found + 4000]
    assert out.returncode == 0, out.stderr[-4000:]
    return out.stdout


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package whose _C is the sanitized build."""
    folder = tmp_path_factory.mktemp("sanitized")
    shutil.copytree(ROOT / "maskops", folder / "maskops", ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    shutil.copytree(ROOT / "kernels", folder / "maskops/kernels", ignore=shutil.ignore_patterns("__pycache__"))
    env = {**os.environ, "MASKOPS_SANITIZE": "1", "MASKOPS_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=env)
    return folder


def test_cpu_kernels_are_clean(sanitized: Path) -> None:
    out = run_samples(str(sanitized), "native")
    assert [line.rsplit(" ", 1)[1] for line in out.splitlines()] == list(instruction_sets())


def test_emulated_cuda_kernels_are_clean() -> None:
    out = run_samples("", "emulated", str(emulator.build(sanitize=True)))
    assert "samples ran on emulated" in out


def test_a_planted_overflow_is_seen(sanitized: Path, tmp_path: Path) -> None:
    """The proof that the run above can fail: a patch grid that claims more rows than the image has."""
    code = (
        "import torch, maskops\n"
        "x = torch.empty(1, 2, 4)\n"
        "y = torch.as_strided(x, (1, 2, 4), (8, 4, 1))\n"
        "y.set_(x.untyped_storage(), 0, (1, 2, 4), (8, 4, 1))\n"
        "x.untyped_storage().resize_(16)\n"
        "maskops.gather_tokens(y, torch.tensor([[1]]))\n"
    )
    env = {**os.environ, **emulator.sanitizer_environment(), "PYTHONPATH": str(sanitized), "TRITON_INTERPRET": "0"}
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=env, cwd="/")
    assert out.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in out.stderr
