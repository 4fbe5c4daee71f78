"""OpenBEATs (the Works check): ragged batches equal single recordings, only masked patches are asked, their tokens are told.

Speech is JapaneseVowels (nine speakers, 7 to 29 frames of 12 cepstra, a frame a patch), the published split of 270 recordings to
train on and 370 held out; 16 codes. The other claims are exact, with recordings of 2 to 40 frames whose padding is NaN.

    claim                                                       measured (each)        broken, seed 0
    masked held-out tokens told right, over the share of the    2.44 (2.98, 2.03,      1.20: kept patches not put back, so that
      most frequent one > 2, mean of 3 seeds                      2.33)                  only places are known
    a padded batch is its recordings alone, to 1e-10            exact                  7e-3: empty slots are seen
    logits of kept and padded patches get no gradient           exact
"""

import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

import maskops
from maskops.models.openbeats import OpenBEATs, OpenBEATsConfig
from maskops.testing.works import train

SEEDS, STEPS = (0, 1, 2), 100
SIZES = dict(bins=12, patch=(1, 12), codes=16, code_dim=8, heads=4, taps=4, buckets=16, max_distance=30)


def recordings(part: str) -> tuple[Tensor, Tensor]:
    """(float [B, 29, 12], 0 after the end; frames int64 [B]) of the part TRAIN or TEST, which sktime ships in its wheel."""
    folder = Path(find_spec("sktime").origin).parent / "datasets" / "data" / "JapaneseVowels"
    lines = (folder / f"JapaneseVowels_{part}.ts").read_text().split("@data")[1].split()
    # Twelve rows of numbers and the speaker, separated by colons.
    found = [torch.tensor([[float(v) for v in row.split(",")] for row in line.split(":")[:12]]).T for line in lines]
    padded = torch.zeros(len(found), 29, 12)
    for row, values in zip(padded, found, strict=True):
        row[: len(values)] = values
    return padded, torch.tensor([len(values) for values in found])


def accuracies(seed: int) -> tuple[float, float]:
    """(share of masked held-out patches whose token is told, share of the most frequent token among them)."""
    torch.manual_seed(seed)
    model = OpenBEATs(OpenBEATsConfig(dim=32, depth=1, predictor_depth=1, **SIZES))
    (x, lengths), (new, new_lengths) = recordings("TRAIN"), recordings("TEST")
    real = (torch.arange(29) < lengths[:, None])[:, :, None]
    mean = (x * real).sum((0, 1)) / real.sum()
    x, new = x - mean, new - mean

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(x), (32,))
        return model(x[rows], lengths[rows], seed=step).loss

    train(model.parameters(), loss, STEPS, 8e-3)
    model.eval().requires_grad_(False)
    out = model(new, new_lengths, seed=99)
    told, truth = model.head(out.hidden[out.asked]).argmax(1), out.target[out.asked]
    return (told == truth).double().mean().item(), truth.bincount().max().item() / len(truth)


def test_tokens_of_masked_frames_are_told() -> None:
    found = torch.tensor([accuracies(seed) for seed in SEEDS])
    ratio = found[:, 0] / found[:, 1]
    print(found)
    assert ratio.mean() > 2, found.tolist()


# ---------------------------------------------------------------- exact


def small(**change: object) -> tuple[OpenBEATs, Tensor, Tensor]:
    """An untrained network and five recordings of different lengths; frames past their ends are NaN."""
    torch.manual_seed(0)
    sizes = {**dict(bins=8, patch=(2, 4), codes=10, dim=32, depth=2, heads=4, predictor_depth=2, taps=5), **change}
    model = OpenBEATs(OpenBEATsConfig(**sizes)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_()
    lengths = torch.tensor([40, 23, 31, 5, 2])
    x = torch.randn(5, 40, 8, dtype=torch.float64)
    return model, x.masked_fill((torch.arange(40) >= lengths[:, None])[:, :, None], math.nan), lengths


def alone(split: maskops.TokenSplit, row: int, count: int) -> maskops.TokenSplit:
    return maskops.split_tokens(split.mask[row : row + 1, :count])


def test_a_padded_batch_equals_its_recordings_alone() -> None:
    model, x, lengths = small()
    out, whole = model(x, lengths, seed=0), model.encode(x, lengths)
    losses, asked = 0.0, 0
    for row, (length, count) in enumerate(zip(lengths.tolist(), model.patches(lengths).tolist(), strict=True)):
        single = model(x[row : row + 1, :length], split=alone(out.split, row, count))
        assert torch.equal(single.target[0], out.target[row, :count])
        torch.testing.assert_close(single.hidden[0], out.hidden[row, :count], rtol=0, atol=1e-10)
        torch.testing.assert_close(model.encode(x[row : row + 1, :length])[0], whole[row, :count], rtol=0, atol=1e-10)
        losses, asked = losses + single.loss * single.asked.sum(), asked + single.asked.sum()
    torch.testing.assert_close(out.loss, losses / asked, rtol=1e-12, atol=0)


def test_counts_order_and_places_of_kept_patches() -> None:
    model, x, lengths = small()
    split = model(x, lengths, seed=3).split
    real = model.patches(lengths)
    assert split.num_keep.tolist() == [round(0.25 * n) for n in real.tolist()] == [10, 6, 8, 1, 0]
    for ids, count in zip(split.ids_keep, split.num_keep, strict=True):
        assert (ids[:count].diff() > 0).all() and (ids[count:] == -1).all()
    tokens = torch.randn(5, 40, 32, dtype=torch.float64)
    back = maskops.restore_tokens(maskops.gather_tokens(tokens, split.ids_keep), split, model.mask_token)
    kept = ~split.mask
    assert torch.equal(back[kept], tokens[kept]) and (back[~kept] == model.mask_token).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_of_kept_and_padded_patches_get_no_gradient(smoothing: float) -> None:
    """And the loss is the one of plain PyTorch over the logits of all patches, label smoothing among it."""
    model, x, lengths = small(label_smoothing=smoothing)
    out = model(x, lengths, seed=0)
    grad = torch.autograd.grad(out.loss, out.hidden, retain_graph=True)[0]
    real = torch.arange(40) < model.patches(lengths)[:, None]
    assert torch.equal(out.asked, real & out.split.mask) and torch.equal((grad != 0).any(-1), out.asked)
    logits = model.head(out.hidden)
    target = out.target.where(out.asked, -2)
    plain = torch.nn.functional.cross_entropy(logits.mT, target, ignore_index=-2, label_smoothing=smoothing)
    torch.testing.assert_close(out.loss, plain)
    torch.testing.assert_close(torch.autograd.grad(plain, out.hidden)[0], grad)


def test_nan_of_hidden_and_padded_frames_reaches_no_gradient() -> None:
    model, x, lengths = small()
    out = model(x, lengths, seed=0)
    target = out.target
    spoilt = x.clone()
    hidden = out.split.mask.view(5, 20, 1, 2, 1).expand(-1, -1, 2, -1, 4).reshape(5, 40, 8)
    spoilt[hidden] = math.nan
    again = model(spoilt, lengths, target=target, split=out.split)
    assert torch.equal(again.loss, out.loss)
    again.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_buckets_are_exact_near_and_logarithmic_far() -> None:
    encoder = OpenBEATs(
        OpenBEATsConfig(bins=4, patch=(1, 4), dim=16, depth=1, heads=2, predictor_depth=1, taps=2)
    ).encoder
    found = encoder.bucket(torch.tensor([0, -79, -80, 79, 80, 800, 10_000, -10_000]))
    assert found.tolist() == [0, 79, 80, 239, 240, 319, 319, 159]
    steps = encoder.bucket(torch.arange(1, 900))
    assert (steps.diff() >= 0).all() and len(steps.unique()) > 140
