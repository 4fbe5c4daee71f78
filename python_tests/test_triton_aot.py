"""The Triton kernels compile for real GPUs, in a process of their own: this one may run with TRITON_INTERPRET=1."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from maskops._registry import OPS
from maskops.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("aot") / "report.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), "--triton-only", "--quick", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800, check=False)
    assert path.exists(), done.stderr[-2000:]
    return json.loads(path.read_text())["triton"]


def test_every_kernel_compiles_without_spills(report):
    assert [f"{row['kernel']} {row['target']} {row['config']}: {row['error']}" for row in report if row["error"]] == []
    assert {row["target"] for row in report} == {"cuda:80", "cuda:90", "cuda:100", "hip:gfx942"}


# Tiles of few rows, few queries or weights of few channels, are too small for the wide units of Hopper and Blackwell: mma serves.
ALWAYS_NARROW = ("masked_attention_grad_bias", "feature_reuse_attention")
SOMETIMES_NARROW = ("masked_attention", "sparse_conv_grad_weight", "sparse_conv_block_grad_weight", *ALWAYS_NARROW)


def test_dots_use_matrix_units(report):
    units = {"cuda:80": "mma", "cuda:90": "wgmma", "cuda:100": "tcgen05", "hip:gfx942": "v_mfma"}
    used = {target: {} for target in units}
    for row in report:
        if "PRECISION" in row["config"] and "DEPTHWISE=True" not in row["config"]:
            used[row["target"]].setdefault(row["op"].removeprefix("_"), set()).add(row["matrix"].split(".")[0])
    for target, unit in units.items():
        for op, found in used[target].items():
            assert found <= ({unit, "mma"} if op.startswith(SOMETIMES_NARROW) else {unit}), (target, op)
            assert unit in found or op in ALWAYS_NARROW, (target, op)


@pytest.mark.parametrize("name", sorted(name for name, spec in OPS.items() if spec.triton))
def test_every_op_has_a_launcher_and_samples(name):
    module = importlib.import_module(f"maskops.kernels.{OPS[name].family}")
    assert callable(getattr(module, name))
    arguments = re.findall(r"(\w+)(?:=[^,)]+)?(?=[,)])", OPS[name].schema.split("->")[0])
    launcher = getattr(module, name)
    code = launcher.__code__
    assert list(code.co_varnames[: code.co_argcount]) == arguments
    assert module.AOT_SAMPLES[name] and name in module.LIMITS


def test_no_samples_without_an_op():
    for family in FAMILIES:
        module = importlib.import_module(f"maskops.kernels.{family}")
        assert set(module.AOT_SAMPLES) == {name for name, spec in OPS.items() if spec.family == family and spec.triton}
