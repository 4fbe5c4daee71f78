"""What the Works checks of masked generation share: a MaskGIT trained for seconds, and a Frechet distance over PCA features."""

import functools

import torch
from torch import Tensor

from maskops.models.maskgit import MaskGIT, MaskGITConfig, PatchCodebook, digits
from maskops.testing.works import train

HELD_OUT = 200


@functools.cache
def trained_digits(
    steps: int = 300, classes: int = 10, heads: int = 2
) -> tuple[MaskGIT, Tensor, Tensor, PatchCodebook]:
    """(model, tokens, classes, codebook) of scikit-learn's digits; the last HELD_OUT images are not trained on.

    classes: 10, or 0 for a model that is not told them.
    """
    tokens, labels, book = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = MaskGITConfig(
            (8, 8), 8, dim=64, depth=2, heads=heads, classes=classes, min_mask_rate=0.0, label_smoothing=0.0
        )
        model = MaskGIT(config)
        generator = torch.Generator().manual_seed(0)

        def loss(step: int) -> Tensor:
            rows = torch.randint(len(tokens) - HELD_OUT, (32,), generator=generator)
            return model.loss(tokens[rows], labels[rows] if classes else None, seed=generator)

        train(model.parameters(), loss, steps, 4e-3)
    return model.eval(), tokens, labels, book


class FrechetDistance:
    """Between the Gaussians of two sets of images, over the first principal components of `real` [B, ...]."""

    def __init__(self, real: Tensor, components: int = 16) -> None:
        flat = real.flatten(1).double()
        self.mean = flat.mean(0)
        self.axes = torch.linalg.svd(flat - self.mean, full_matrices=False)[2][:components]
        self.real = self._moments(real)

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = (images.flatten(1).double() - self.mean) @ self.axes.T
        return found.mean(0), found.T.cov()

    def __call__(self, images: Tensor) -> float:
        (mean, cov), (other_mean, other_cov) = self._moments(images), self.real
        root = torch.linalg.eigvals(cov @ other_cov).real.clamp(min=0).sqrt().sum()
        return float((mean - other_mean).square().sum() + cov.trace() + other_cov.trace() - 2 * root)
