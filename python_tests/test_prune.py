"""`maskops prune`, from text to a checkpoint that loads again."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from maskops.nn import NMLinear
from maskops.sparsify import METHODS

pytest.importorskip("safetensors")
from typer.testing import CliRunner

from maskops import cli, prune
from maskops.checkpoint import CheckpointError
from maskops.models.byte_lm import ByteLMConfig, perplexity

TINY = ByteLMConfig(context=16, dim=16, depth=1, heads=2, mlp_dim=32)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text("the quick brown fox jumps over the lazy dog, again and again. " * 200)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_prune_and_load_again(text: Path, tmp_path: Path, method: str) -> None:
    said: list[str] = []
    settings = prune.Settings([text], tmp_path / "out", method, train_steps=30, steps=3, sizes=TINY)
    result = prune.prune(settings, said.append)
    assert 1 < result.dense < 256 and 1 < result.pruned < 256 and result.pruned_bytes < result.dense_bytes
    assert "held-out perplexity" in said[0] and "4 of 4 layers converted" in said[1]
    again = prune.load(result.folder)
    held_out = prune.read_text([text], TINY.context).held_out_batches()
    assert perplexity(again, held_out) == pytest.approx(result.pruned, rel=1e-6)
    assert isinstance(again.blocks[0].attn.qkv, NMLinear) and type(again.head) is nn.Linear
    dense = prune.load(tmp_path / "out" / "dense" / "model.safetensors")
    assert type(dense.blocks[0].attn.qkv) is nn.Linear
    with pytest.raises(CheckpointError, match="holds a pruned model already"):
        prune.prune(settings, said.append)


def test_resume_takes_the_dense_model_of_the_same_run_only(text: Path, tmp_path: Path) -> None:
    settings = prune.Settings([text], tmp_path / "out", train_steps=5, sizes=TINY)
    first = prune.prune(settings, lambda line: None)
    written = (tmp_path / "out" / "dense" / "model.safetensors").stat().st_mtime_ns
    again = copy.copy(settings)
    object.__setattr__(again, "resume", True)
    assert prune.prune(again, lambda line: None).dense == first.dense
    assert (tmp_path / "out" / "dense" / "model.safetensors").stat().st_mtime_ns == written
    object.__setattr__(again, "train_steps", 6)
    with pytest.raises(CheckpointError, match="other settings: train_steps was 5, now 6"):
        prune.prune(again, lambda line: None)


def test_checkpoints_that_are_none_are_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model"):
        prune.load(tmp_path)
    result = prune.prune(prune.Settings([text], tmp_path / "out", train_steps=2, sizes=TINY), lambda line: None)
    with pytest.raises(CheckpointError, match="pruned already"):
        prune.prune(prune.Settings([text], tmp_path / "other", model=result.folder), lambda line: None)
    config = json.loads((result.folder / "config.json").read_text())
    config["sparse"]["blocks.0.attn.qkv"] = [1, 4]
    (result.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not fit this model"):
        prune.load(result.folder)
    (result.folder / "config.json").write_text('{"system": "mae"}')
    with pytest.raises(CheckpointError, match="of the system 'mae'"):
        prune.load(result.folder)


# ---------------------------------------------------------------- the command


def test_command(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "COLUMNS": "200"}
    args = ("--text", text, "--out", out, "--method", "learned", "--train-steps", 3, "--steps", 2)
    command = [sys.executable, "-P", "-m", "maskops", "prune", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "learned 2:4: held-out perplexity" in done.stdout and "MB pruned" in done.stdout
    assert "masks step 2/2" in done.stderr and "texts/s" in done.stderr
    assert prune.load(out / "pruned").blocks[0].mlp.fc1.n == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--nm", "24"), "--nm must be n:m, as 2:4, got '24'"),
        (("--nm", "4:2"), "n and m must satisfy 1 <= n < m <= 32, got (4, 2)"),
        (("--text", "nowhere.txt"), "nowhere.txt is no file"),
        (("--text", os.devnull), "is no file"),
        (("--text", "EMPTY"), "empty is empty"),
        (("--text", "SHORT"), "data must have at least 1290 bytes for a context of 128, got 5"),
        (("--method", "random"), "magnitude"),
        (("--model", "nowhere"), "nowhere holds no model"),
        (
            ("--nm", "2:5", "--method", "learned"),
            "m must divide the inputs of a layer, 128 or 512, for masks to be learned, got 2:5",
        ),
    ],
)
def test_wrong_use_is_exit_code_2_and_one_message(text: Path, tmp_path: Path, args: tuple, message: str) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_text("short")
    args = tuple({"EMPTY": tmp_path / "empty", "SHORT": tmp_path / "short"}.get(arg, arg) for arg in args)
    given = args if args[0] == "--text" else ("--text", text, *args)
    command = ["prune", *map(str, given), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, command, env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


SIZES = '"system": "byte_lm", "sizes": {"context": 16, "dim": 16, "depth": 1, "heads": 2, "mlp_dim": 32}'


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"[]", "config.json holds a list, not an object"),
        (b"\xff\xfe", "MODEL holds no model: 'utf-8' codec"),
        ('{"system": "byte_lm"}', "config.json describes no model: sizes must be an object of int, got None"),
        ('{"system": "byte_lm", "sizes": {"foo": 1}, "sparse": {}}', "unexpected keyword argument 'foo'"),
        (
            '{"system": "byte_lm", "sizes": {"dim": "16"}, "sparse": {}}',
            "sizes must be an object of int, got {'dim': '16'}",
        ),
        ('{"system": "byte_lm", "sizes": {"dim": 1000000000000}, "sparse": {}}', "describes no model: "),
        ("{SIZES}", "sparse must be an object of [n, m], got None"),
        ('{SIZES, "sparse": {"head": null}}', "sparse must be an object of [n, m], got {'head': None}"),
        ('{SIZES, "sparse": {"nope": [2, 4]}}', "describes no model: ByteLM has no attribute `nope`"),
        ('{SIZES, "sparse": {"head": [4, 2]}}', "describes no model: nm_mask: n and m must satisfy"),
        ('{SIZES, "sparse": {"head": ["2", 4]}}', "describes no model: nm_mask: n must be int, got '2'"),
        ('{SIZES, "sparse": {}}', "MODEL does not fit this model: "),
        ('{SIZES, "sparse": {"head": [2, 4]}}', "MODEL does not fit this model: "),
    ],
)
def test_a_wrong_config_is_one_line(text: Path, tmp_path: Path, config: str | bytes, message: str) -> None:
    model = tmp_path / "MODEL"
    model.mkdir()
    config = config if isinstance(config, bytes) else config.replace("SIZES", SIZES).encode()
    (model / "config.json").write_bytes(config)
    (model / "model.safetensors").write_text("no tensors")
    command = ["prune", "--text", str(text), "--out", str(tmp_path / "out"), "--model", str(model)]
    done = CliRunner().invoke(cli.app, command, env={"COLUMNS": "200"})
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit)
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
