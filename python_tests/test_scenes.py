"""Scenes as samples: colours, depth and classes are cut alike, what does not fit together is told, and MultiMAE trains on them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskops.data import Crop, EmptyFolderError, Key, to_pixels
from maskops.scenes import SceneFolder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Each pixel's colour, depth and class tell its column: three parts that agree only where they are cut alike."""
    column = np.arange(64).repeat(48).reshape(64, 48).T
    for part, image in {
        "rgb": Image.fromarray(np.stack([4 * column] * 3, -1).astype(np.uint8)),
        "depth": Image.fromarray((1000 * column).astype(np.uint16)),
        "semseg": Image.fromarray((column // 16).astype(np.uint8)),
    }.items():
        (tmp_path / part / "sub").mkdir(parents=True)
        for name in ("a.png", "sub/b.png"):
            image.save(tmp_path / part / name)
    return tmp_path


@pytest.mark.parametrize("kind", ["uint16", "float", "palette"])
def test_three_parts_are_cut_alike(folder: Path, kind: str) -> None:
    if kind == "float":
        depth = np.asarray(Image.open(folder / "depth" / "a.png")).astype(np.float32)
        (folder / "depth" / "a.png").unlink()
        Image.fromarray(depth).save(folder / "depth" / "a.tiff")
    if kind == "palette":
        classes = Image.fromarray(np.asarray(Image.open(folder / "semseg" / "a.png")), "L")
        classes.putpalette([7, 7, 7] * 256)
        classes.save(folder / "semseg" / "a.png")
    data = SceneFolder(folder, Crop((32, 40)))
    assert len(data) == 2
    for epoch in range(6):
        scene, unreadable = data[Key(epoch, 0)]
        assert scene.shape == (5, 32, 40) and scene.dtype == torch.float32 and unreadable == -1
        column, depth, classes = to_pixels(scene[:3])[0] * 255 / 4, scene[3] / 1000, scene[4]
        inner = (slice(None), slice(2, -2))
        assert (column - depth)[inner].abs().max() < 1.0
        assert set(classes.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
        assert (classes - depth / 16).sub(-0.5).abs().max() <= 0.6, "the class of the nearest pixel"


def test_what_does_not_fit_together_is_told(folder: Path) -> None:
    for name, part in (("none", "depth"), ("small", "depth"), ("rgb", "semseg")):
        for other in ("rgb", "depth", "semseg"):
            Image.open(folder / other / "a.png").save(folder / other / f"{name}.png")
        target = folder / part / f"{name}.png"
        target.unlink() if name == "none" else None
        if name == "small":
            Image.new("L", (10, 10)).save(target)
        if name == "rgb":
            Image.new("RGB", (64, 48)).save(target)
    reasons = {path.stem: reason for path, reason in SceneFolder(folder, Crop((8, 8))).unreadable.items()}
    assert reasons == {
        "none": "no depth/none.*", "small": "sizes differ: 64 x 48, 10 x 10, 64 x 48", "rgb": "semseg has 3 channels, not one",
    }  # fmt: skip


def test_suffixes_of_either_case_and_what_is_not_finite(folder: Path) -> None:
    (folder / "semseg" / "a.png").rename(folder / "semseg" / "a.PNG")
    Image.fromarray(np.full((48, 64), np.nan, np.float32)).save(folder / "depth" / "sub" / "b.tif")
    (folder / "depth" / "sub" / "b.png").unlink()
    data = SceneFolder(folder, Crop((8, 8)))
    assert len(data) == 2 and data[Key(0, 0)][1] == -1
    assert data[Key(0, 1)][1] == 1, "found when it is its turn"
    with pytest.raises(EmptyFolderError, match="rgb is not a folder"):
        SceneFolder(folder / "depth", Crop((8, 8)))


def test_multimae_learns_from_a_folder_of_scenes(folder: Path, tmp_path: Path) -> None:
    from maskops.pretrained import load_pretrained
    from maskops.testing.forks import Forked

    def run(*more: object) -> object:
        command = [
            "pretrain", "--system", "multimae", "--images", folder, "--out", tmp_path / "run", "--size", "tiny", "--image-size", 32,
            "--patch-size", 8, "--batch-size", 4, "--epochs", 16, "--workers", 0, "--lr", 0.05, *more,
        ]  # fmt: skip
        return Forked("maskops", list(map(str, command)), {"OMP_NUM_THREADS": "1"}, tmp_path / "output").wait(
            timeout=100
        )

    few = run("--classes", 3)
    assert few.returncode == 2 and "classes must be in [0, 3), got 3" in few.stderr and "Traceback" not in few.stderr
    done = run("--classes", 4, "--resume")
    assert done.returncode == 0 and "scenes/s" in done.stdout, done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    assert len(losses) == 8 and losses[-1] < losses[0]
    config = load_pretrained(tmp_path / "run").config
    assert (config.classes, config.num_keep, config.num_tokens) == (4, 8, 48)
