"""Text as training samples: windows by (seed, position), and what is said of files that cannot be used."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from maskops.data import EmptyFolderError, Key
from maskops.texts import TextFolder


def test_windows_depend_on_seed_epoch_and_index_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(1, 101)))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.MD").write_bytes(bytes(range(101, 201)))
    (tmp_path / "picture.png").write_bytes(b"not text, and not looked at")
    data = TextFolder(tmp_path, 16, seed=3)
    assert len(data) == 200 // 16 and not data.unreadable and len(data.paths) == 2

    def windows(epoch: int, seed: int = 3) -> list[list[int]]:
        folder = TextFolder(tmp_path, 16, seed)
        return [folder[Key(epoch, i)][0].tolist() for i in range(len(folder))]

    first = windows(0)
    torch.rand(3)
    assert windows(0) == first and all(w == list(range(w[0], w[0] + 16)) for w in first)
    starts = [w[0] for w in first]
    assert all(b - a <= 16 for a, b in pairwise(starts)) and starts[0] <= 16
    assert windows(1) != first and windows(0, seed=4) != first
    assert {w[0] for epoch in range(60) for w in windows(epoch)} >= set(range(1, 185)), "every place is a first byte"


def test_a_single_file_needs_no_suffix(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("grüße", encoding="utf-8")
    data = TextFolder(tmp_path / "text", 7)
    item, unreadable = data[Key(0, 0)]
    assert bytes(item.tolist()).decode() == "grüße" and unreadable == -1 and item.dtype == torch.int64


def test_files_that_cannot_be_used_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("a.txt", b"good text"), ("b.txt", b""), ("c.txt", b"a\0b"), ("d.txt", b"kept from us")):
        (tmp_path / name).write_bytes(content)
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "d.txt":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    data = TextFolder(tmp_path, 4)
    assert {path.name: reason for path, reason in data.unreadable.items()} == {
        "b.txt": "the file is empty", "c.txt": "the file holds NUL bytes, so it is no text", "d.txt": "Permission denied",
    }  # fmt: skip
    assert bytes(data.bytes.tolist()) == b"good text"


@pytest.mark.parametrize(
    ("content", "at", "message"),
    [
        ({}, "", "no text files"),
        ({"a.png": "x"}, "", "no text files"),
        ({}, "missing.txt", "missing.txt is no file and no folder"),
        ({"a.txt": ""}, "a.txt", "none of 1 text files can be read; a.txt: the file is empty"),
        ({"a.txt": "", "b.md": ""}, "", "none of 2 text files can be read"),
        ({"a.txt": "short"}, "", "5 bytes of text, but a sample has 16"),
    ],
)
def test_nothing_to_train_on(tmp_path: Path, content: dict[str, str], at: str, message: str) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(EmptyFolderError, match=message):
        TextFolder(tmp_path / at, 16)
