"""MAGE on scikit-learn's digits: ReCAP is exact through encoder and decoder, and training reads what is kept.

| claim | measured | limit |
|---|---|---|
| local logits = full logits before any token changes | 1.1e-6 | 1e-5, and above 1e-3 once a token changed |
| loss with the image's own tokens kept / with another's, after learning 16 images by heart | 1.109 / 1.871 | 0.75 |
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

import maskops
from maskops.generation import FullOnly, MaskedGenerator, ReCAP, _Run
from maskops.models.mage import MAGE, MAGEConfig
from maskops.models.maskgit import PatchCodebook
from maskops.testing.works import train


def small() -> MAGE:
    torch.manual_seed(0)
    return MAGE(MAGEConfig((8, 8), 8, dim=48, depth=1, decoder_depth=1, heads=2, label_smoothing=0.0)).eval()


def test_local_steps_are_exact_through_encoder_and_decoder() -> None:
    model = small()
    tokens = torch.where(torch.rand(5, 64) < 0.4, torch.randint(8, (5, 64)), -1)
    run = _Run(MaskedGenerator(model, [64]), tokens, None, 0, 0)
    ids = torch.stack([torch.randperm(64)[:9] for _ in range(5)])
    with torch.no_grad():
        full = run.forward(None, store=True).gather(1, ids[..., None].expand(-1, -1, 8))
        difference = (run.forward(ids) - full).abs().max()
        print(f"local against full logits: {difference:.1e}")
        assert difference < 1e-5
        run.decode(ids[:, :4], torch.randint(8, (5, 4)))
        assert (run.forward(ids) - full).abs().max() > 1e-3


def test_generates_with_and_without_reuse() -> None:
    model, counts = small(), maskops.mask_schedule("cosine", 6, 64)
    full, same = (MaskedGenerator(model, counts, r).generate(3, seed=1).tokens for r in (FullOnly(), ReCAP(0, 0)))
    assert torch.equal(full, same) and full.min() >= 0
    assert MaskedGenerator(model, counts, ReCAP(2, 1)).generate(3, seed=1).tokens.min() >= 0


def test_training_reads_what_is_kept() -> None:
    """Sixteen images of 16 tokens are learned by heart: what is masked follows from what is kept."""
    images = torch.from_numpy(load_digits().images).float()[:, None] / 16
    tokens = PatchCodebook.fit(images[:500], 2, 16).encode(images[:16])
    torch.manual_seed(0)
    model = MAGE(MAGEConfig((4, 4), 16, dim=48, depth=1, decoder_depth=1, heads=2, label_smoothing=0.0))
    train(model.parameters(), lambda step: model.loss(tokens, seed=step), 250, 5e-3)
    kept = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.5

    def loss(shown: Tensor) -> float:
        with torch.no_grad():
            logits = model.logits(torch.where(kept, shown, -1))
        return float(F.cross_entropy(logits.flatten(0, 1), torch.where(kept, -100, tokens).flatten()))

    right, wrong = loss(tokens), loss(tokens.roll(1, 0))
    print(f"loss with own tokens kept {right:.3f}, with another image's {wrong:.3f}")
    assert right < 0.75 * wrong
