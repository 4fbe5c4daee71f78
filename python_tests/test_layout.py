"""Every family has its files and no file lacks a family; layers import downwards only; files and functions stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import maskops
from maskops._registry import OPS
from maskops.families import FAMILIES

ROOT = Path(maskops.__file__).resolve().parents[1]
SOURCES = [
    p
    for folder in ("maskops", "kernels", "python_tests", "benchmarks", "csrc", "scripts")
    for p in (ROOT / folder).rglob("*")
]
PYTHON = [p for p in SOURCES if p.suffix == ".py"] + [ROOT / "setup.py"]

# folder -> suffix of a family's file there; a folder of the family's name will do as well
PLACES = {
    "csrc/math": ".h", "csrc/cpu": ".cpp", "csrc/cuda": ".cu", "maskops/ops": ".py", "maskops/reference": ".py",
    "maskops/testing": ".py", "kernels": ".py",
}  # fmt: skip


@pytest.mark.parametrize("folder", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_files(family: str, folder: str) -> None:
    file, directory = ROOT / folder / f"{family}{PLACES[folder]}", ROOT / folder / family
    assert file.is_file() or any(directory.glob(f"*{PLACES[folder]}")), (
        f"{family} has neither {file} nor files in {directory}"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_tests_and_benchmarks(family: str) -> None:
    assert (ROOT / f"python_tests/test_{family}.py").is_file()
    assert (ROOT / f"benchmarks/bench_{family}.py").is_file()


@pytest.mark.parametrize(
    "folder", [f for f in PLACES if f.startswith("csrc/c") or f == "kernels" or f == "maskops/ops"]
)
def test_no_file_lacks_a_family(folder: str) -> None:
    entries = [p for p in (ROOT / folder).iterdir() if not p.name.startswith(("_", "."))]
    strangers = [p.name for p in entries if p.name.split(".")[0] not in FAMILIES]
    assert not strangers


def test_every_op_belongs_to_its_family() -> None:
    for name, spec in OPS.items():
        assert spec.family in FAMILIES and name.lstrip("_").startswith(spec.family)


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    return found | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


ALLOWED = {
    "maskops/reference": {"torch", "einops", "math", "itertools", "typing", "maskops.reference"},
    "kernels": {
        "torch",
        "triton",
        "math",
        "maskops.kernels",
        "dataclasses",
        "collections",
        "functools",
        "typing",
        "itertools",
        "os",
        "contextlib",
    },
}


@pytest.mark.parametrize("folder", ALLOWED)
def test_layers_import_downwards_only(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for name in imports_of(path):
            assert any(name == ok or name.startswith(f"{ok}.") for ok in ALLOWED[folder]), f"{path.name} imports {name}"


def test_ops_know_no_models_and_kernels_no_autograd() -> None:
    for path in (ROOT / "maskops/ops").rglob("*.py"):
        assert not any(name.startswith(("maskops.nn", "maskops.models")) for name in imports_of(path))
    for path in (ROOT / "kernels").rglob("*.py"):
        assert "autograd" not in path.read_text()


def test_one_file_touches_torch_library() -> None:
    users = [p for p in (ROOT / "maskops").rglob("*.py") if "torch.library." in p.read_text()]
    assert [p.name for p in users] == ["_registry.py"]


def test_files_and_functions_are_small() -> None:
    for path in SOURCES + PYTHON:
        if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh"):
            lines = path.read_text().count("\n")
            assert lines <= 400, f"{path} has {lines} lines"
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                size = node.end_lineno - node.lineno + 1
                limit = 130 if "kernels" in path.parts else 70  # docstrings and examples included
                assert size <= limit, f"{path}: {node.name} has {size} lines"


def test_import_is_light() -> None:
    """`import maskops` must not pull in triton, accelerate or matplotlib."""
    heavy = "{'triton', 'accelerate', 'matplotlib', 'transformers', 'skimage'}"
    code = f"import sys, maskops; print({heavy} & set(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    assert out.stdout.strip() == "set()"
