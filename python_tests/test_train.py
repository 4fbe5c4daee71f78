"""Training: killed and resumed, on two processes, on bad folders."""

import dataclasses
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("accelerate")

from maskops import checkpoint
from maskops.checkpoint import CheckpointError
from maskops.data import Crop, EmptyFolderError, GlobalBatches, ImageFolder, Key, load_rgb
from maskops.testing.forks import Forked

PROGRAM = """
import gc
import sys
from pathlib import Path
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from maskops.models.mae import MAEConfig
from maskops.models.spark import SparKConfig
from maskops.train import Settings, model_class, pretrain

data, out, batch, epochs, resume, workers, system = sys.argv[1:8]
if system == "mae":
    config = MAEConfig(image_size=32, patch_size=8, dim=32, depth=1, heads=2, mlp_dim=64, decoder_dim=32, decoder_depth=1,
                       decoder_heads=2, decoder_mlp_dim=64)
elif system == "cm3":
    config = model_class(system).Config.of_size("tiny", context=20, dim=32, depth=1, max_spans=2)
elif system in ("electra", "dupmae", "ernie_gram"):
    config = model_class(system).Config.of_size("tiny", context=16, dim=32, depth=1)
else:
    config = SparKConfig(image_size=32, patch_size=8, depths=(1, 1), width=8, decoder_dim=16)
ended = Accelerator.end_training
def end_training(self):  # freed after it, data parallelism may wait for ever for a thread of gloo
    assert not any(type(found) is DistributedDataParallel for found in gc.get_objects())
    ended(self)
Accelerator.end_training = end_training
result = pretrain(config, Settings(
    Path(data), Path(out), epochs=float(epochs), batch_size=int(batch), lr=3e-2, warmup_epochs=1, resume=resume == "resume",
    workers=int(workers), save_every=3, seed=5))
print("LOSS", result.loss, "UNREADABLE", len(result.unreadable))
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = random.Random(0)
    for i in range(7):
        colours = bytes(rng.randrange(256) for _ in range(6 * 5 * 3))
        Image.frombytes("RGB", (6, 5), colours).resize((60, 50), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name in "ab":
        (folder / f"{name}.txt").write_text(f"some text of the file {name}, ")
    return folder


def started(
    data: Path, out: Path, *, batch: int = 4, epochs: float = 12, resume: str = "new", workers: int = 0, system: str = "mae",
    **env: str,
) -> Forked:  # fmt: skip
    arguments = list(map(str, (data, out, batch, epochs, resume, workers, system)))
    output = out.with_name(f"{out.name}_output") / env.get("RANK", "0")
    return Forked(PROGRAM, arguments, {**ENVIRONMENT, **env}, output)


# One thread: the machine may be busy, and two processes must not fight for the cores.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}


def train(*args: object, **kwargs: object) -> str:
    done = started(*args, **kwargs).wait(timeout=110)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def unbroken(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """In a fresh process."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    command = [sys.executable, "-P", "-c", PROGRAM, *map(str, (images, out, 4, 12, "new", 0, "mae"))]
    subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=True, timeout=110)
    found = losses(out)
    assert len(found) == 21 and found[-1] < found[0]
    return found


def test_killed_runs_resume_to_the_same_losses(images: Path, tmp_path: Path, unbroken: list[float]) -> None:
    assert killed_and_resumed(images, tmp_path / "run") == unbroken


@pytest.mark.parametrize("system", ["cm3", "electra", "dupmae", "ernie_gram"])
def test_text_is_learnt_and_killed_runs_resume_to_the_same_losses(text: Path, tmp_path: Path, system: str) -> None:
    """Four windows of text; read by other processes, which must not change what is read, in the unbroken run."""
    train(text, tmp_path / "unbroken", epochs=21, system=system, workers=2)
    unbroken = losses(tmp_path / "unbroken")
    assert len(unbroken) in (21, 16) and sum(unbroken[-3:]) < sum(unbroken[:3])
    # The loop is the same for all; this system has a state of its own, its lexicon.
    if system == "ernie_gram":
        assert killed_and_resumed(text, tmp_path / "run", epochs=21, system=system) == unbroken


def killed_and_resumed(data: Path, out: Path, **options: object) -> list[float]:
    rng = random.Random(1)
    for kill_at in (2, 8, 14):
        # Killed once a step has been logged, a random moment later: in a step, in a save, between two files of a checkpoint.
        process = started(data, out, resume="resume", **options)
        log = out / "losses.jsonl"
        deadline = time.monotonic() + 60
        while process.returncode is None and (not log.exists() or log.read_text().count("\n") < kill_at):
            assert time.monotonic() < deadline, "the run is stuck"
            time.sleep(0.001)
        assert process.returncode in (None, 0), process.stderr.read_text()
        time.sleep(rng.random() * 0.02)
        process.kill()
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    (out / "checkpoints" / ".partial-00000099-1").mkdir()
    with open(out / "losses.jsonl", "a") as file:
        file.write('{"step": 99, "lo')
    train(data, out, resume="resume", **options)
    left = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert left[-1] == f"step-{len(losses(out)):08d}" and not any("partial" in name for name in left)
    return losses(out)


def test_workers_give_the_same_losses(images: Path, tmp_path: Path, unbroken: list[float]) -> None:
    train(images, tmp_path / "run", workers=2)
    assert losses(tmp_path / "run") == unbroken


def test_two_processes_equal_one_with_the_doubled_batch(images: Path, tmp_path: Path, unbroken: list[float]) -> None:
    found = train_on_two_processes(images, tmp_path / "run")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(unbroken), rtol=1e-4, atol=1e-5)


def test_spark_resumes_and_trains_on_two_processes(images: Path, tmp_path: Path) -> None:
    """Batch norms of a CNN: their running statistics are kept, and those of a step are over all processes."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(images, whole, epochs=4, system="spark")
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "step-00000007")
    train(images, broken, epochs=4, system="spark", resume="resume")
    assert losses(broken) == losses(whole) and losses(whole)[-1] < losses(whole)[0]
    found = train_on_two_processes(images, tmp_path / "two", epochs=4, system="spark")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses(whole)), rtol=1e-3, atol=1e-4)


def test_text_trains_on_two_processes(text: Path, tmp_path: Path) -> None:
    """Each process masks its own rows anew, so the losses are others than those of one process."""
    found = train_on_two_processes(text, tmp_path / "two", epochs=4, system="electra")
    train(text, tmp_path / "one", epochs=4, system="electra")
    one = losses(tmp_path / "one")
    assert len(found) == len(one) and found != one
    torch.testing.assert_close(torch.tensor(found), torch.tensor(one), rtol=0.3, atol=0)


def train_on_two_processes(data: Path, out: Path, **options: object) -> list[float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1"}
    processes = [
        started(data, out, batch=2, **options, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)
    ]
    try:
        outputs = [process.wait(timeout=100) for process in processes]
    except TimeoutError as error:  # perhaps the other one failed and is waited for
        raise AssertionError([(p.returncode, p.stderr.read_text()) for p in processes]) from error
    finally:
        for process in processes:
            process.kill()
    assert [done.returncode for done in outputs] == [0, 0], outputs
    return losses(out)


def test_unreadable_images_are_named_counted_and_skipped(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for path in images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "text.png").write_text("not an image")
    whole = (images / "0.png").read_bytes()
    (folder / "cut_off.png").write_bytes(whole[: len(whole) // 2])
    output = train(folder, tmp_path / "run", epochs=2)
    assert "text.png: cannot identify image file" in output
    assert "cut_off.png: the file cannot be decoded" in output
    assert output.count("1 unreadable image skipped:") == 2
    assert output.strip().endswith("UNREADABLE 2")


@pytest.mark.parametrize(
    ("content", "message"),
    [({}, "no images"), ({"a.txt": "x"}, "no images"), ({"a.png": "x"}, "none of 1 images can be read")],
)
def test_folder_without_images(tmp_path: Path, content: dict[str, str], message: str) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(EmptyFolderError, match=message):
        ImageFolder(tmp_path, Crop((8, 8)))
    with pytest.raises(EmptyFolderError, match="is not a folder"):
        ImageFolder(tmp_path / "missing", Crop((8, 8)))


def test_folder_in_which_nothing_decodes(images: Path, tmp_path: Path) -> None:
    whole = (images / "0.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EmptyFolderError, match="none of 1 images can be decoded"):
        ImageFolder(tmp_path, Crop((8, 8)))[Key(0, 0)]


def test_samples_depend_on_seed_epoch_and_index_only(images: Path) -> None:
    def sample(seed: int, epoch: int, index: int, cache_mb: int = 256) -> torch.Tensor:
        return ImageFolder(images, Crop((16, 16)), seed, cache_mb)[Key(epoch, index)][0]

    first = sample(0, 0, 1)
    torch.rand(3)
    random.random()
    assert torch.equal(sample(0, 0, 1, cache_mb=0), first)
    assert not any(torch.equal(sample(*other), first) for other in ((1, 0, 1), (0, 1, 1), (0, 0, 2)))


def test_crops_stay_inside_narrow_images() -> None:
    rng, crop = random.Random(0), Crop((8, 8))
    for size in ((1, 1), (500, 1), (1, 500), (37, 11)):
        for _ in range(20):
            left, top, right, bottom = crop.box(*size, rng)
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def test_odd_image_modes_become_rgb(tmp_path: Path) -> None:
    Image.new("I;16", (4, 4), 257 * 100).save(tmp_path / "deep.png")
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    found = {path.stem: load_rgb(path).getpixel((0, 0)) for path in tmp_path.iterdir()}
    assert found == {"deep": (100, 100, 100), "clear": (255, 255, 255), "grey": (7, 7, 7)}


def test_batches_cover_each_epoch_once_over_all_processes() -> None:
    keys = [
        key
        for step in range(7)
        for rank in range(2)
        for key in next(iter(GlobalBatches(5, 3, seed=0, start=step, stop=step + 1, rank=rank, processes=2)))
    ]
    assert keys[:30] == [key for batch in GlobalBatches(5, 6, seed=0, start=0, stop=5) for key in batch]
    for epoch in range(8):
        assert sorted(key.index for key in keys if key.epoch == epoch) == list(range(5))


def test_a_run_is_neither_overwritten_nor_mixed(images: Path, tmp_path: Path) -> None:
    from maskops.models.mae import MAEConfig
    from maskops.train import Settings, load_pretrained, pretrain

    config = MAEConfig.of_size("tiny", image_size=32, patch_size=16, mask_ratio=0.5, depth=1, decoder_depth=1)
    settings = dict(data=images, out=tmp_path / "run", epochs=1, batch_size=4, workers=0)
    result = pretrain(config, Settings(**settings))
    assert result.samples_per_second > 0
    assert load_pretrained(tmp_path / "run").config == config
    with pytest.raises(CheckpointError, match="holds a run already"):
        pretrain(config, Settings(**settings))
    with pytest.raises(CheckpointError, match="seed was 0, now 1"):
        pretrain(config, Settings(**settings, seed=1, resume=True))
    with pytest.raises(CheckpointError, match=r"settings: model.dim was 192, now 96$"):
        pretrain(dataclasses.replace(config, dim=96), Settings(**settings, resume=True))
    again = pretrain(config, Settings(**settings, resume=True))
    assert (again.step, again.loss) == (result.step, result.loss)


def test_a_mask_that_hides_nothing_is_an_error(images: Path, tmp_path: Path) -> None:
    from maskops.models.mae import MAEConfig
    from maskops.train import Settings, pretrain

    config = MAEConfig.of_size("tiny", image_size=32, mask_ratio=0.0)
    with pytest.raises(ValueError, match=r"mask_ratio must be in \(0, 1\), got 0.0"):
        pretrain(config, Settings(images, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_half_deleted_checkpoint_is_never_found(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, model, optimizer, {"step": step}, keep=2)
    assert [path.name for path in checkpoint.finished(tmp_path)] == ["step-00000002", "step-00000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
