"""Run every sample of every op once on one backend: what the sanitized builds are driven by, in a process of their own.

python -m maskops.testing.run_samples native|emulated [LIBRARY]
"""

import importlib
import sys
from collections.abc import Iterator

import torch

from maskops import testing
from maskops._registry import OPS
from maskops.families import FAMILIES


def runnable(backend: str) -> Iterator[tuple[testing.Sample, torch.dtype]]:
    for family in FAMILIES:
        for sample in importlib.import_module(f"maskops.testing.{family}").SAMPLES:
            if backend == "emulated" and not OPS[sample.op].cuda:
                continue
            dtypes = (torch.float32, torch.bfloat16) if testing.takes_floats(sample.op) else (torch.float32,)
            # What takes a minute under the sanitizers runs at one dtype.
            yield from ((sample, dtype) for dtype in dtypes[: 1 if backend in sample.slow_on else 2])


def run_all(backend: str) -> int:
    """Number of samples run, forward only: each gradient is an op with samples of its own."""
    count = 0
    for sample, dtype in runnable(backend):
        testing.op_of(backend, sample.op)(*sample.arguments(dtype))
        count += 1
    return count


def main() -> None:
    backend = sys.argv[1]
    if len(sys.argv) > 2:
        torch.ops.load_library(sys.argv[2])
    if backend == "native":
        for isa in testing.instruction_sets():
            with testing.instruction_set(isa):
                print(f"{run_all(backend)} samples ran on {isa}")
    else:
        print(f"{run_all(backend)} samples ran on {backend}")


if __name__ == "__main__":
    main()
