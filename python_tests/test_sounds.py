"""Recordings as samples: the filterbank is Kaldi's, clips depend on (seed, epoch, index) alone, and training tells their tokens."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from maskops.data import EmptyFolderError, Key

soundfile = pytest.importorskip("soundfile")
from maskops.sounds import SoundFolder, fbank  # noqa: E402


def tones(seconds: float, rate: int = 16000, pitch: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * math.pi * pitch * np.arange(round(seconds * rate)) / rate)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "a.wav", tones(1.0), 16000)
    soundfile.write(tmp_path / "b.flac", np.stack([tones(0.3, 44100), tones(0.3, 44100)], 1), 44100)
    (tmp_path / "sub").mkdir()
    soundfile.write(tmp_path / "sub" / "c.ogg", tones(2.0, 8000), 8000)
    return tmp_path


def by_hand(sound: Tensor, bins: int) -> Tensor:
    """The definition in float64: offset, pre-emphasis, Povey's window, power of the Fourier transform, triangles in mel, log."""
    frames = (sound.double() * 2**15).unfold(0, 400, 160)
    frames = frames - frames.mean(1, keepdim=True)
    frames = frames - 0.97 * torch.cat([frames[:, :1], frames[:, :-1]], 1)
    window = torch.hann_window(400, periodic=False, dtype=torch.float64) ** 0.85
    power = torch.fft.rfft(frames * window, 512).abs() ** 2
    mel = lambda hertz: 1127 * torch.log1p(torch.as_tensor(hertz, dtype=torch.float64) / 700)  # noqa: E731
    edges = torch.linspace(mel(20.0).item(), mel(8000.0).item(), bins + 2, dtype=torch.float64)
    at = mel(torch.arange(257) * 31.25)[:, None]
    up, down = (at - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - at) / (edges[2:] - edges[1:-1])
    energy = power @ torch.minimum(up, down).clamp(min=0)
    return (energy.clamp(min=2.0**-23).log() - 15.41663) / (2 * 6.55582)


@pytest.mark.parametrize("bins", [23, 128])
def test_filterbank_is_kaldis(bins: int) -> None:
    sound = torch.rand(3000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = fbank(sound, bins)
    assert found.shape == (17, bins) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), by_hand(sound, bins), rtol=0, atol=1e-3)
    assert fbank(sound[:399], bins).shape == (0, bins)


def test_clips_are_cut_padded_and_resampled(folder: Path) -> None:
    data = SoundFolder(folder, frames=50)
    assert [path.name for path in data.paths] == ["a.wav", "b.flac", "c.ogg"] and not data.unreadable
    clips = [data[Key(0, i)][0] for i in range(3)]
    assert all(clip.shape == (50, 128) and clip.dtype == torch.float32 for clip in clips)
    lengths = [int(clip[:, 0].isfinite().sum()) for clip in clips]
    assert lengths == [50, 28, 50]
    assert all(
        torch.equal(clip.isfinite().all(1), torch.arange(50) < n) for clip, n in zip(clips, lengths, strict=True)
    )
    # The same tone at three rates: the loudest band is the same.
    assert len({int(clip[:n].mean(0).argmax()) for clip, n in zip(clips, lengths, strict=True)}) == 1


def test_clips_depend_on_seed_epoch_and_index_only(folder: Path) -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, 32000)
    soundfile.write(folder / "a.wav", noise, 16000)
    clip = lambda seed, epoch: SoundFolder(folder, frames=40, seed=seed)[Key(epoch, 0)][0]  # noqa: E731
    first = clip(0, 0)
    random.seed(1)
    assert torch.equal(clip(0, 0), first)
    assert not torch.equal(clip(0, 1), first) and not torch.equal(clip(1, 0), first)


def test_unreadable_recordings_are_told(folder: Path, tmp_path: Path) -> None:
    (folder / "d.wav").write_text("not a recording")
    soundfile.write(folder / "e.wav", tones(0.1), 16000)
    data = SoundFolder(folder, frames=50)
    reasons = {path.name: reason for path, reason in data.unreadable.items()}
    assert reasons["e.wav"] == "0.1 s of sound, but a patch has 0.175 s" and set(reasons) == {"d.wav", "e.wav"}
    soundfile.write(folder / "f.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    assert SoundFolder(folder, frames=50)[Key(0, 2)][1] == 2, "found when it is its turn"
    (tmp_path / "empty").mkdir()
    with pytest.raises(EmptyFolderError, match=r"no sounds \(looked for \.aif"):
        SoundFolder(tmp_path / "empty", frames=50)


def test_wrong_use_is_one_line(folder: Path, tmp_path: Path) -> None:
    from maskops.testing.forks import Forked

    def fails(*more: object) -> str:
        command = ["pretrain", "--system", "openbeats", "--out", tmp_path / "run", "--size", "tiny", *more]
        done = Forked("maskops", list(map(str, command)), {"OMP_NUM_THREADS": "1"}, tmp_path / "output").wait(
            timeout=100
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    (tmp_path / "bad").mkdir()
    soundfile.write(tmp_path / "bad" / "a.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    assert "none of 1 sounds can be decoded" in fails("--sounds", tmp_path / "bad", "--workers", 1)
    assert "0.001, which masks nothing" in fails("--sounds", folder, "--mask-ratio", 0.001)
    assert "must keep a patch, got 0.99 of 48 patches" in fails(
        "--sounds", folder, "--mask-ratio", 0.99, "--seconds", 1
    )


def test_openbeats_learns_from_a_folder_of_recordings(folder: Path, tmp_path: Path) -> None:
    from maskops.pretrained import load_pretrained
    from maskops.testing.forks import Forked

    arguments = [
        "pretrain", "--system", "openbeats", "--sounds", folder, "--out", tmp_path / "run", "--size", "tiny", "--seconds", 0.6,
        "--batch-size", 3, "--epochs", 12, "--workers", 0, "--lr", 0.05,
    ]  # fmt: skip
    environment = {"OMP_NUM_THREADS": "1"}
    done = Forked("maskops", list(map(str, arguments)), environment, tmp_path / "output").wait(timeout=100)
    assert done.returncode == 0 and "sounds/s" in done.stdout, done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    assert len(losses) == 12 and losses[-1] < 0.8 * losses[0]
    model = load_pretrained(tmp_path / "run")
    assert model.encode(torch.randn(1, 32, 128)).shape == (1, 16, 192) and model.config.frames == 60
