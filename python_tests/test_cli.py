"""The command line: exit codes and messages."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import maskops
from maskops.testing.forks import Forked

pytest.importorskip("accelerate")


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "COLUMNS": "200"}


def fresh(*args: object) -> subprocess.CompletedProcess:
    """In a process of its own from the start."""
    # Not from the repository root: there `python -m` puts our kernels/ folder in front of Hugging Face's package.
    command = [sys.executable, "-P", "-m", "maskops", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}, timeout=100)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    def run(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
        return Forked("maskops", list(map(str, args)), ENVIRONMENT, tmp_path / "output", cwd).wait(timeout=100)

    return run


def test_each_system_is_offered_and_knows_what_it_trains_on() -> None:
    from maskops.cli import System
    from maskops.pretrained import SYSTEMS, samples_of

    assert {system.value for system in System} == {*SYSTEMS, "maskgit"}
    found = {name: samples_of(name) for name in SYSTEMS}
    assert {name for name in found if found[name] == "text"} == {"cm3", "electra", "dupmae", "ernie_gram"}
    assert found["multimae"] == "scenes" and found["openbeats"] == "sounds" and found["mae"] == "images"


def test_help_lists_the_commands() -> None:
    done = fresh("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("pretrain", "generate", "info", "bench", "demo"))


def test_info() -> None:
    done = fresh("info")
    assert done.returncode == 0, done.stderr
    facts = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert facts["maskops"] == maskops.__version__
    assert {"torch", "_C", "_C_cuda", "cuda", "triton"} <= set(facts)


def test_pretrain_resume_and_refusal(run: Callable, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 50, 200 - 80 * i)).save(images / f"{i}.png")
    command = [
        "pretrain", "--system", "mae", "--images", images, "--out", out, "--size", "tiny", "--image-size", 32, "--patch-size", 8,
        "--batch-size", 3, "--epochs", 2, "--workers", 0,
    ]  # fmt: skip
    done = fresh(*command)
    assert done.returncode == 0, done.stderr
    assert "2 steps, loss" in done.stdout and (out / "model" / "model.safetensors").exists()
    assert "images/s" in done.stderr and "left" in done.stderr
    refused = run(*command)
    assert refused.returncode == 2 and "holds a run already" in refused.stderr and "Traceback" not in refused.stderr
    again = run(*command, "--resume")
    assert again.returncode == 0 and "already finished" in again.stdout and "nan" not in again.stdout
    other = run(*command, "--resume", "--patch-size", 16, "--lr", 1e-3)
    assert other.returncode == 2 and "Traceback" not in other.stderr
    assert other.stderr.strip().endswith("other settings: lr was 0.00015, now 0.001; model.patch_size was 8, now 16")


def test_pretrain_spark(run: Callable, tmp_path: Path) -> None:
    from maskops.train import load_pretrained

    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    Image.new("RGB", (40, 30), (80, 50, 200)).save(images / "0.png")
    command = [
        "pretrain", "--system", "spark", "--images", images, "--out", out, "--size", "tiny", "--image-size", 64, "--batch-size", 2,
        "--epochs", 2, "--workers", 0,
    ]  # fmt: skip
    done = run(*command)
    assert done.returncode == 0 and "1 steps, loss" in done.stdout, done.stderr
    assert run(*command, "--resume").returncode == 0
    model = load_pretrained(out)
    assert type(model).__name__ == "SparK" and model.config.num_keep == 2


def test_pretrain_on_text(run: Callable, tmp_path: Path) -> None:
    import torch

    from maskops.train import load_pretrained

    text, out = tmp_path / "text", tmp_path / "out"
    text.mkdir()
    (text / "a.txt").write_text("some words, and some more words, " * 8)
    (text / "b.txt").write_bytes(b"")
    command = [
        "pretrain", "--system", "ernie_gram", "--text", text, "--out", out, "--size", "tiny", "--context", 32, "--batch-size", 4,
        "--epochs", 2, "--workers", 0,
    ]  # fmt: skip
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert " steps, loss" in done.stdout and "texts/s" in done.stdout and "texts/s" in done.stderr
    assert "b.txt: the file is empty" in done.stdout and "unreadable, skipped: 1" in done.stdout
    refused = run(*command)
    assert refused.returncode == 2 and "holds a run already" in refused.stderr and "Traceback" not in refused.stderr
    assert run(*command, "--resume").returncode == 0
    (text / "a.txt").write_text("some words, and some more w0rds, " * 8)
    other = run(*command, "--resume")
    assert other.returncode == 2 and "text was" in other.stderr and "Traceback" not in other.stderr
    model = load_pretrained(out)
    assert model.encode(torch.randint(256, (1, 20))).shape == (1, 20, 128) and model.lexicon[0] < 2**63 - 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--text", "."), "no text files"),
        (("--text", "missing"), "missing is no file and no folder"),
        ((), "--text must be given with --system electra"),
        (("--text", ".", "--images", "."), "trains on --text: leave out --images\n"),
        (
            ("--text", ".", "--patch-size", 8, "--image-size", 8),
            "trains on --text: leave out --image-size, --patch-size\n",
        ),
        (("--system", "mae", "--text", "."), "trains on --images: leave out --text\n"),
        (("--system", "maskgit", "--text", ".", "--bf16"), "trains on --data, in float32: leave out --text, --bf16\n"),
        (("--system", "maskgit", "--seconds", 3), "trains on --data, in float32: leave out --seconds\n"),
        (("--system", "openbeats", "--sounds", ".", "--seconds", "inf"), "--seconds"),
        (("--system", "cm3", "--text", ".", "--mask-ratio", 0.5), "CM3Config has no mask_ratio"),
        (("--system", "cm3", "--text", ".", "--context", 33), "CM3Config: context must be at least 34, got 33"),
        (("--text", ".", "--size", "huge"), "size must be one of ['tiny', 'small', 'base', 'large'], got 'huge'"),
    ],
)
def test_wrong_use_of_text_is_exit_code_2_and_one_message(
    run: Callable, tmp_path: Path, args: tuple, message: str
) -> None:
    done = run("pretrain", "--system", "electra", "--out", tmp_path / "out", "--size", "tiny", *args, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--system", "spark", "--patch-size", 16), "patch_size must be 32, the stride of the backbone, got 16"),
        ((), "no images"),
        (("--image-size", 30), "image_size must be a multiple of patch_size 16, got 30"),
        (("--mask-ratio", 0), "--mask-ratio must be above 0 and below 1, got 0"),
        (("--mask-ratio", "nan"), "--mask-ratio must be above 0 and below 1, got nan"),
        (("--mask-ratio", 0.999), "keeps none of 196 patches"),
        (("--size", "huge"), "huge"),
    ],
)
def test_wrong_use_is_exit_code_2_and_one_message(run: Callable, tmp_path: Path, args: tuple, message: str) -> None:
    (tmp_path / "images").mkdir()
    done = run("pretrain", "--images", tmp_path / "images", "--out", tmp_path / "out", "--size", "tiny", *args)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_unknown_system_names_the_known_ones(run: Callable, tmp_path: Path) -> None:
    done = run("pretrain", "--system", "nothing", "--images", tmp_path, "--out", tmp_path)
    assert done.returncode == 2 and "mae" in done.stderr
