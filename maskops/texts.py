"""Text as training samples: windows of bytes, functions of (seed, position) alone, as the crops of maskops.data."""

import hashlib
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from maskops.data import EmptyFolderError, Key

SUFFIXES = frozenset(
    (".txt", ".text", ".md", ".rst", ".tex", ".csv", ".tsv", ".json", ".jsonl", ".html", ".xml", ".py")
)


class TextFolder(Dataset):
    """The bytes of a text file, or of the text files below a folder, one after the other; kept in memory.

    Item of a Key: (int64 [window], -1). An epoch takes the text window by window, each from another first byte on; the last window
    ends with the text. `unreadable` lists the files that were left out: {path: reason}.

    Raises:
        EmptyFolderError: no such file, no text file in the folder, none that can be read, or less text than one window.
    """

    unit, file = "texts", "text file"

    def __init__(self, path: str | Path, window: int, seed: int = 0) -> None:
        self.path, self.window, self.seed = Path(path), window, seed
        if not self.path.exists():
            raise EmptyFolderError(f"{self.path} is no file and no folder")
        found = [self.path]
        if self.path.is_dir():
            found = sorted(p for p in self.path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        parts, self.unreadable = [], {}
        for file in found:
            part, reason = _read(file)
            if reason:
                self.unreadable[file] = reason
            else:
                parts.append(part)
        self.paths = [file for file in found if file not in self.unreadable]
        if not parts:
            names = ", ".join(sorted(SUFFIXES))
            what = f"no text files (looked for {names})"
            if found:
                first = f"{found[0].name}: {self.unreadable[found[0]]}"
                what = f"none of {len(found)} text files can be read; {first}"
            raise EmptyFolderError(f"{self.path}: {what}")
        data = b"".join(parts)
        if len(data) < window:
            raise EmptyFolderError(f"{self.path}: {len(data)} bytes of text, but a sample has {window}")
        self.bytes = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.bytes) // self.window

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        # A string seeds by its SHA-512, the same in every process.
        first = random.Random(f"{self.seed}/{key.epoch}").randrange(self.window)
        start = min(first + key.index * self.window, len(self.bytes) - self.window)
        return self.bytes[start : start + self.window].long(), -1

    def identity(self) -> dict[str, Any]:
        """What tells this text from another."""
        return {"bytes": len(self.bytes), "text": hashlib.sha256(self.bytes.numpy()).hexdigest()}


def _read(file: Path) -> tuple[bytes, str]:
    """The file's bytes, and why it cannot be used or an empty string."""
    try:
        data = file.read_bytes()
    except OSError as error:
        return b"", error.strerror or str(error)
    if not data:
        return b"", "the file is empty"
    return data, "the file holds NUL bytes, so it is no text" if 0 in data else ""
