"""The installed package: its modules, its libraries, the guard of the kernels folder, and life without compiled libraries."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import maskops
from maskops import _extension, _host

ROOT = Path(maskops.__file__).resolve().parents[1]


def python(code: str, *, path: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    if path is not None:
        env["PYTHONPATH"] = path
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=env, cwd="/")


def test_kernels_folder_does_not_shadow_the_package_of_that_name() -> None:
    out = python("import kernels", path=str(ROOT))
    assert out.returncode == 1 and "import maskops.kernels" in out.stderr
    assert python("import maskops.kernels").returncode == 0


def test_compiled_libraries_are_loaded() -> None:
    assert _extension.status()["_C"] == "loaded"
    assert _extension.status()["_host"] == "loaded"
    if torch.version.cuda is None:
        assert "not a CUDA build" in _extension.status()["_C_cuda"]


def test_instruction_set_can_be_capped() -> None:
    code = "from maskops import _host; print(_host.isa_in_use())"
    assert python(code, MASKOPS_ISA="portable").stdout.strip() == "portable"
    assert python(code).stdout.strip() == _host.isa_in_use()


def test_unknown_instruction_set_is_an_error() -> None:
    out = python("import maskops", MASKOPS_ISA="sse9")
    assert out.returncode != 0 and "MASKOPS_ISA must be portable, avx2 or avx512, got 'sse9'" in out.stderr


def test_works_without_compiled_libraries(tmp_path: Path) -> None:
    """What `pip install` gives where there is no compiler: the reference backend, and a sentence that says so."""
    shutil.copytree(ROOT / "maskops", tmp_path / "maskops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "kernels", tmp_path / "maskops/kernels")
    code = (
        "import torch, maskops\n"
        "s = maskops.random_masking(2, 16, 0.5, seed=0)\n"
        "print(maskops.gather_tokens(torch.ones(2, 16, 4), s.ids_keep).sum().item())\n"
        "print(maskops.explain('gather_tokens', torch.ones(1)))\n"
        "try: maskops.gather_tokens(torch.ones(2, 16, 4), s.ids_keep, backend='native')\n"
        "except RuntimeError as error: print(error)\n"
    )
    out = python(code, path=str(tmp_path))
    assert out.returncode == 0, out.stderr
    assert "64.0" in out.stdout and "the reference (plain PyTorch)" in out.stdout
    assert "_C is not built" in out.stdout and "reference" in out.stderr


def test_wheel_holds_everything_and_no_top_level_kernels(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "MAX_JOBS": "2"})
    names = zipfile.ZipFile(next(tmp_path.glob("torch_maskops-*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"maskops"}
    ours = [path.relative_to(ROOT) for path in (*ROOT.glob("maskops/**/*.py"), *ROOT.glob("kernels/**/*.py"))]
    wanted = {str(path) if path.parts[0] == "maskops" else f"maskops/{path}" for path in ours}
    assert len(wanted) > 100 and wanted | {"maskops/_C.so"} <= set(names), wanted - set(names)
    assert any(name.startswith("maskops/_host") for name in names)


@pytest.mark.parametrize("backend", ["triton", "native", "emulated"])
def test_reason_of_a_backend_that_cannot_run(backend: str) -> None:
    code = (
        "import torch, maskops\n"
        "from maskops._backends import why_not\n"
        f"print(why_not({backend!r}, 'visible_tokens_gather', 'cpu') or 'can run')"
    )
    out = python(code, TRITON_INTERPRET="0")
    assert out.returncode == 0, out.stderr
    expected = {"triton": "only interpreted", "native": "can run", "emulated": "for the tests"}
    assert expected[backend] in out.stdout


def test_unknown_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        maskops.gather_tokens(torch.ones(1, 2, 3), torch.zeros(1, 1, dtype=torch.int64), backend="gpu")


def test_explain_names_the_kernel() -> None:
    text = maskops.explain("gather_tokens", torch.ones(1, 2, 3))
    assert text.startswith(f"visible_tokens_gather on cpu: auto runs the C++ kernel ({_host.isa_in_use()})")
    with pytest.raises(ValueError, match="op must be one of"):
        maskops.explain("scatter_tokens")
