"""One-shot N:M masks of a weight [N, K]: by magnitude, by Wanda, by SparseGPT; and the statistics of inputs that they need."""

import torch
from torch import Tensor, nn

from maskops.ops.nm_matmul import nm_mask

BLOCK = 128  # columns after which SparseGPT hands its errors on to the rest of the weight, as published
DAMPING = 0.01  # share of the mean diagonal that is added to the Hessian, as published


class InputStatistics:
    """Sums over the inputs [M, K] that a linear layer saw: rows and calls, squares per column, and the Gram matrix if asked."""

    def __init__(self, layer: nn.Linear, *, gram: bool) -> None:
        size = layer.in_features
        device = layer.weight.device
        self.rows = self.calls = 0
        # float64: sums of many positive terms.
        self.squares = torch.zeros(size, dtype=torch.float64, device=device)
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=device) if gram else None

    def add(self, x: Tensor) -> None:
        """x [..., K]."""
        x = x.detach().reshape(-1, self.squares.shape[0]).float()
        self.rows += x.shape[0]
        self.calls += 1
        self.squares += x.square().sum(0, dtype=torch.float64)
        if self.gram is not None:
            self.gram += x.T @ x


def magnitude_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """The n largest |W| of each group.  [N, K] -> bool [N, K]."""
    return nm_mask(weight.detach().abs(), n, m)


def wanda_mask(weight: Tensor, squares: Tensor, n: int, m: int) -> Tensor:
    """The n largest |W| ||x||_2 of each group (Sun et al., 2023, arXiv 2306.11695).  squares [K]: sum of x^2 per column."""
    return nm_mask(weight.detach().abs().double() * squares.sqrt(), n, m)


def sparsegpt(weight: Tensor, gram: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Prune and correct: (weight [N, K] with zeros and updated values, mask bool [N, K]).

    Columns are taken in order. The error of a column that is zeroed is spread over the later columns by the inverse Hessian
    (optimal brain surgeon); a group's mask is taken when its first column comes, by w^2 / diag(Hinv)^2 of the weights as they are
    then (Frantar and Alistarh, 2023, arXiv 2301.00774).  gram [K, K]: sum of x x^T.
    """
    w = weight.detach().double().clone()
    inputs = w.shape[1]
    inverse, dead = _inverse_factor(gram)
    w[:, dead] = 0
    mask = torch.zeros_like(w, dtype=torch.bool)
    width = max(m, BLOCK // m * m)
    for start in range(0, inputs, width):
        stop = min(start + width, inputs)
        errors = torch.zeros_like(w[:, start:stop])
        for i in range(start, stop):
            if i % m == 0:
                group = slice(i, min(i + m, inputs))
                mask[:, group] = nm_mask((w[:, group] / inverse.diagonal()[group]).square(), n, m)
            error = w[:, i].masked_fill(mask[:, i], 0) / inverse[i, i]
            w[:, i:stop] -= error[:, None] * inverse[i, i:stop]
            errors[:, i - start] = error
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    # The update zeroes a pruned column up to rounding.
    return w.masked_fill_(~mask, 0).to(weight.dtype), mask


def _inverse_factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the inverse of the damped Hessian, and which inputs were always 0."""
    hessian = gram.double().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True), dead
