"""Triton's interpreter, made quick for the tests: it computes the same, and leaves the language as it was."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from maskops._extension import interpreting

pytestmark = pytest.mark.skipif(not interpreting(), reason="Triton is not interpreted")


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _sums_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    value = _twice(_twice(tl.load(x_ptr + row * BLOCK + at)))
    tl.store(out_ptr + row, tl.sum(value, 0) + tl.max(value, 0))


def test_nested_functions_compute_and_the_language_is_put_back() -> None:
    before = {
        (owner, name): getattr(owner, name)
        for owner in (tl, tl.core, tl.math, tl.tensor)
        for name in ("load", "store", "arange", "exp", "range", "reduce", "static_range", "__add__", "__bool__", "sum")
        if hasattr(owner, name)
    }
    x, out = torch.randn(3, 8), torch.zeros(3)
    for _ in range(2):
        _sums_kernel[(3,)](x, out, BLOCK=8)
        torch.testing.assert_close(out, 4 * x.sum(1) + (4 * x).amax(1))
    assert all(getattr(owner, name) is value for (owner, name), value in before.items())


def test_a_failed_launch_puts_it_back() -> None:
    load = tl.load
    with pytest.raises(Exception, match="arange"):
        _sums_kernel[(1,)](torch.zeros(3), torch.zeros(1), BLOCK=3)
    assert tl.load is load
    x, out = torch.ones(1, 8), torch.zeros(1)
    _sums_kernel[(1,)](x, out, BLOCK=8)
    assert out.item() == 36


PROGRAM = """
import sys, torch, maskops
from maskops.testing import interpreter, op_of
if sys.argv[1] == "quick":
    assert interpreter.quicken()
from maskops.testing import masked_attention, masked_loss, visible_tokens
for samples, name in ((masked_attention.SAMPLES, "small_all"), (masked_loss.SAMPLES, "plain"), (visible_tokens.SAMPLES, "ragged")):
    sample = next(s for s in samples if s.name == name)
    for dtype in (torch.float32, torch.bfloat16):
        outs = op_of("triton", sample.op)(*sample.arguments(dtype))
        for out in outs if isinstance(outs, tuple) else (outs,):
            print(sample, dtype, out.double().nan_to_num(7).flatten().tolist())
"""


def test_results_are_those_of_the_plain_interpreter_bit_for_bit() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", PROGRAM]
    quick, plain = (
        subprocess.run([*command, how], env=env, capture_output=True, text=True, timeout=300, check=True).stdout
        for how in ("quick", "plain")
    )
    assert quick == plain and "small_all" in quick
