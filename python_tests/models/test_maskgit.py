"""MaskGIT on scikit-learn's digits, its codebook, and the commands that train it and draw what it makes.

| claim | measured | broken on purpose | then |
|---|---|---|---|
| digits made for a class are nearest to that class's mean, > 0.6 of 200 | 0.99 | another class's token / none | 0.00 / 0.08 |
"""

import json
from pathlib import Path

import pytest
import torch

import maskops
from maskops.generation import MaskedGenerator
from maskops.maskgit import Settings, generate, load, pretrain
from maskops.models.maskgit import MaskGIT, MaskGITConfig, PatchCodebook, faces
from maskops.testing.generation import trained_digits


def test_a_class_makes_its_digits() -> None:
    model, tokens, classes, book = trained_digits()
    images = book.decode(tokens, (8, 8)).flatten(1)
    means = torch.stack([images[classes == c].mean(0) for c in range(10)])
    labels = torch.arange(200) % 10
    made = MaskedGenerator(model, maskops.mask_schedule("cosine", 8, 64)).generate(200, labels, seed=0).tokens
    found = torch.cdist(book.decode(made, (8, 8)).flatten(1), means).argmin(1)
    accuracy = (found == labels).double().mean()
    print(f"nearest to the mean of its class: {accuracy:.2f}")
    assert accuracy > 0.6


def test_only_masked_tokens_are_in_the_loss() -> None:
    model = MaskGIT(MaskGITConfig((4, 4), 8, dim=32, depth=1, heads=2))
    tokens = torch.randint(8, (3, 16))
    loss = model.loss(tokens, seed=torch.Generator().manual_seed(3))
    again = model.loss(tokens, seed=torch.Generator().manual_seed(3))
    assert torch.equal(loss, again)
    loss.backward()
    assert model.codes.weight.grad[8].abs().sum() > 0, "the mask token stands in the input"
    one = MaskGIT(MaskGITConfig((4, 4), 8, dim=32, depth=1, heads=2, min_mask_rate=1.0))
    one.loss(tokens).backward()
    assert (one.codes.weight.grad[:8] == 0).all(), "with all masked no code is seen"


def test_the_codebook_is_its_own_inverse_and_describes_faces() -> None:
    tokens, _, book = faces(32)
    assert tokens.shape == (200, 64) and torch.equal(book.encode(book.decode(tokens, (8, 8))), tokens)
    with pytest.raises(ValueError, match="vocab must be at most the 1 distinct patches, got 2"):
        PatchCodebook.fit(torch.zeros(1, 1, 4, 4), 2, 2)


def test_training_goes_on_where_it_stopped_and_draws(tmp_path: Path) -> None:
    """A run killed after its first checkpoint has the losses of an unbroken one."""
    sizes = {"epochs": 0.12, "batch_size": 32, "save_every": 4}
    whole = pretrain(Settings(tmp_path / "whole", **sizes))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "losses.jsonl").read_text().splitlines()]
    assert len(losses) == whole.step == 7
    cut = tmp_path / "cut"
    pretrain(Settings(cut, **sizes))
    newest = sorted((cut / "checkpoints").iterdir())[-1]
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    with pytest.raises(maskops.checkpoint.CheckpointError, match="holds a run already"):
        pretrain(Settings(cut, **sizes))
    pretrain(Settings(cut, resume=True, **sizes))
    assert pretrain(Settings(cut, resume=True, **sizes)).loss == losses[-1], "nothing was left to train"
    assert [json.loads(line)["loss"] for line in (cut / "losses.jsonl").read_text().splitlines()] == losses
    with pytest.raises(maskops.checkpoint.CheckpointError, match="made with another seed"):
        pretrain(Settings(cut, resume=True, seed=1, **sizes))
    model, data = load(cut)
    assert data == "digits" and model.config.classes == 10
    said: list[str] = []
    pytest.importorskip("matplotlib")
    generate(cut, tmp_path / "picture.png", rows=1, say=said.append)
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert "8 full and 8 local" in said[1] and "16 full and 0 local" in said[0]
