"""Set up before any test module is imported: Triton interpreted, the emulated CUDA kernels loaded, memory poisoned."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Iterator

import pytest
import torch

from maskops.testing import emulator, interpreter

interpreter.quicken()
EMULATOR_REASON = emulator.reason_unavailable()
if not EMULATOR_REASON:
    emulator.load()
elif os.environ.get("CI"):
    raise RuntimeError(f"CI must not pass by skipping the emulated CUDA kernels: {EMULATOR_REASON}")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """In deterministic mode torch fills new memory with NaN (integers: the largest), so an unwritten result is seen."""
    torch.use_deterministic_algorithms(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.use_deterministic_algorithms(False)


# What takes longest starts first, so that no process is left alone with it at the end (make test keeps this order).
FIRST = (
    "test_sanitizers.py", "test_contract.py", "test_triton_aot.py", "test_contract_compile.py", "test_train.py", "test_recap.py",
    "test_dupmae.py", "test_spark.py", "test_meap.py", "test_thesis_pretrained.py", "test_electra.py", "test_cm3.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU here"))
