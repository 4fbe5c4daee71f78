"""Recordings as training samples: filterbanks of clips, functions of (seed, position) alone, as the crops of maskops.data."""

import functools
import math
import random
import warnings
from pathlib import Path

import numpy as np
import soundfile
import torch
from scipy.signal import resample_poly
from torch import Tensor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from maskops.data import FileFolder

RATE, WINDOW, HOP = 16000, 400, 160  # samples a second, of a frame, and from one frame to the next
MEAN, STD = 15.41663, 6.55582  # of AudioSet's filterbanks, as BEATs
SUFFIXES = frozenset((".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".au"))


class SoundFolder(FileFolder):
    """Recordings of any rate, all channels mixed: float32 [frames, bins], a clip of a recording; NaN after the end of a short one.

    bins: of the filterbank, as `fbank`; least: frames below which a recording is left out.
    """

    unit, file = "sounds", "recording"
    suffixes = SUFFIXES
    errors = (soundfile.LibsndfileError, OSError, ValueError)

    def __init__(self, folder: str | Path, frames: int, bins: int = 128, least: int = 16, seed: int = 0) -> None:
        self.frames, self.bins, self.least = frames, bins, least
        super().__init__(folder, seed)

    def why_unreadable(self, path: Path) -> str:
        try:
            info = soundfile.info(path)
        except self.errors as error:
            return str(error)
        seconds, needed = info.frames / info.samplerate, _samples(self.least) / RATE
        return "" if seconds >= needed else f"{seconds:.5g} s of sound, but a patch has {needed:.5g} s"

    def sample(self, index: int, rng: random.Random) -> Tensor:
        with soundfile.SoundFile(self.paths[index]) as file:
            wanted = math.ceil(_samples(self.frames) * file.samplerate / RATE)
            file.seek(rng.randint(0, max(0, file.frames - wanted)))
            sound = file.read(wanted, dtype="float32", always_2d=True).mean(1)
            common = math.gcd(RATE, file.samplerate)
            sound = resample_poly(sound, RATE // common, file.samplerate // common)
        found = fbank(torch.from_numpy(sound), self.bins)[: self.frames]
        if len(found) < self.least or not found.isfinite().all():
            raise ValueError(f"{self.paths[index]} is cut off, or not finite")
        return torch.nn.functional.pad(found, (0, 0, 0, self.frames - len(found)), value=math.nan)


def fbank(sound: Tensor, bins: int = 128) -> Tensor:
    """Kaldi's log mel filterbank of a sound at 16 kHz, normalised as BEATs.  float32 [samples] in [-1, 1] -> [T, bins].

    25 ms a frame, one each 10 ms, whole frames only; without dither.

    Example:
        >>> fbank(torch.rand(16000) * 2 - 1).shape
        torch.Size([98, 128])
    """
    if len(sound) < WINDOW:
        return torch.zeros(0, bins)
    window, filters = _filters(bins)
    found = spectrogram(
        sound.numpy() * np.float32(2**15), window, frame_length=WINDOW, hop_length=HOP, fft_length=512, power=2.0, center=False,
        preemphasis=0.97, mel_filters=filters, log_mel="log", mel_floor=2.0**-23, remove_dc_offset=True,
    )  # fmt: skip
    return (torch.from_numpy(found.T.astype(np.float32)) - MEAN) / (2 * STD)


@functools.cache
def _filters(bins: int) -> tuple[np.ndarray, np.ndarray]:
    """(window, filters [257, bins])"""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # the narrowest of 128 filters lie between two frequencies, as published
        filters = mel_filter_bank(257, bins, 20.0, RATE / 2, RATE, mel_scale="kaldi", triangularize_in_mel_space=True)
    return window_function(WINDOW, "povey", periodic=False), filters


def _samples(frames: int) -> int:
    """At RATE: how many samples so many frames cover."""
    return (frames - 1) * HOP + WINDOW
