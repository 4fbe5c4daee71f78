"""Regularized mask tuning: adapt a frozen network by choosing which of its weights to switch off.

Zheng et al., "Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models", 2023 (R-AMT).
N outputs, K inputs of a masked linear layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskops.nn import BitmaskLinear


class ThresholdLinear(BitmaskLinear):
    """A frozen linear layer under the mask scores > threshold, packed to bits at every call.  scores [N, K] is all that learns."""

    threshold: float

    @classmethod
    def of(cls, linear: nn.Linear, init: float, threshold: float) -> ThresholdLinear:
        layer = cls.from_dense(linear, torch.ones_like(linear.weight, dtype=torch.bool), scores=True)
        layer.threshold = threshold
        nn.init.constant_(layer.scores, init)
        for frozen in (layer.weight, layer.bias):
            if frozen is not None:
                frozen.requires_grad_(False)
        return layer

    def forward(self, x: Tensor, bitmask: Tensor | None = None) -> Tensor:
        if bitmask is None:
            self.set_mask(self.scores.detach() > self.threshold)
        return super().forward(x, bitmask)


def keep_probability(grad: Tensor, general: Tensor) -> Tensor:
    """How likely gradient dropout keeps each entry of `grad`, given the gradient of the general knowledge.

        P = (1 + sgn(g_a) (g_a + g_b) / (|g_a| + |g_b|)) / 2,  1 where both are 0

    Args:
        grad: g_a, of the task's loss.
        general: g_b, of the divergence from the frozen network; same shape.

    Returns:
        In [0, 1]: exactly 1 where both signs agree.
    """
    size = grad.abs() + general.abs()
    agreement = grad.sign() * (grad + general) / size
    return torch.where(size > 0, (1 + agreement) / 2, 1)


class RegularizedMaskTuning(nn.Module):
    """A classifier whose weights stay as they are while a score per weight learns which of them to switch off.

        W_eff = 1[m > threshold] * W,   dL/dm = dL/dW_eff * W                      (straight through)
        loss  = cross-entropy + regularization * sum over layers of ||m_l||_2
        g_a   = d loss / dm,   g_b = d KL(frozen || masked) / dm,   m.grad = g_a where P > U, else 0     (keep_probability)

    The published sizes are the defaults; every layer that is masked starts unmasked.

    Args:
        model: the network [B, ...] -> logits [B, C]; copied twice, not changed.
        select: which linear layers are masked, by name; default all.
        gradient_dropout: drop entries of the gradient that work against what the frozen network knows.

    Example:
        >>> model = RegularizedMaskTuning(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
        >>> optimizer = torch.optim.SGD(model.scores(), lr=0.1)
        >>> loss = model.backward(torch.rand(5, 4), torch.tensor([0, 1, 2, 1, 0]))
        >>> optimizer.step()
        >>> model(torch.rand(5, 4)).shape, model.zeros()
        (torch.Size([5, 3]), 0.0)
    """

    def __init__(
        self, model: nn.Module, select: Callable[[str], bool] = lambda name: True, *, init: float = 1e-2,
        threshold: float = 5e-3, regularization: float = 1e-4, gradient_dropout: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.init, self.threshold = init, threshold
        self.regularization, self.gradient_dropout = regularization, gradient_dropout
        self.frozen = copy.deepcopy(model).eval().requires_grad_(False)
        self.masked = copy.deepcopy(model).requires_grad_(False)
        chosen = [name for name, m in self.masked.named_modules() if isinstance(m, nn.Linear) and select(name)]
        if not chosen:
            raise ValueError("RegularizedMaskTuning: select must choose at least one linear layer of model, got none")
        for name in chosen:
            layer = ThresholdLinear.of(self.masked.get_submodule(name), init, threshold)
            if not name:
                self.masked = layer
            else:
                self.masked.set_submodule(name, layer)

    def layers(self) -> dict[str, ThresholdLinear]:
        return {name: m for name, m in self.masked.named_modules() if isinstance(m, ThresholdLinear)}

    def scores(self) -> list[nn.Parameter]:
        """What the optimizer gets."""
        return [layer.scores for layer in self.layers().values()]

    def forward(self, x: Tensor) -> Tensor:
        return self.masked(x)

    def backward(self, x: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Write the gradients of the scores, after gradient dropout; the loss is returned.  x [B, ...], labels int64 [B]."""
        scores, logits = self.scores(), self(x)
        loss = F.cross_entropy(logits, labels) + self.regularization * sum(m.norm() for m in scores)
        grads = torch.autograd.grad(loss, scores, retain_graph=self.gradient_dropout)
        if self.gradient_dropout:
            with torch.no_grad():
                target = self.frozen(x).log_softmax(-1)
            divergence = F.kl_div(logits.log_softmax(-1), target, reduction="batchmean", log_target=True)
            general = torch.autograd.grad(divergence, scores)
            grads = [drop(a, b, generator) for a, b in zip(grads, general, strict=True)]
        for m, grad in zip(scores, grads, strict=True):
            m.grad = grad
        return loss.detach()

    @torch.no_grad()
    def zeros(self) -> float:
        """Share of the masked layers' weights that are switched off."""
        scores = self.scores()
        return sum(int((m <= self.threshold).sum()) for m in scores) / sum(m.numel() for m in scores)

    def mask_state(self) -> dict[str, Tensor]:
        """The masks, one bit per weight: name of the layer -> uint8 [N, ceil(K / 8)]."""
        for layer in self.layers().values():
            layer.set_mask(layer.scores.detach() > self.threshold)
        return {name: layer.bitmask for name, layer in self.layers().items()}

    @torch.no_grad()
    def load_mask_state(self, state: dict[str, Tensor]) -> None:
        """Take over masks: scores become init where a weight is kept and 0 where not."""
        layers = self.layers()
        if set(state) != set(layers):
            raise ValueError(f"load_mask_state: state must have the layers {sorted(layers)}, got {sorted(state)}")
        for name, layer in layers.items():
            layer.bitmask = state[name].to(layer.bitmask.device)
            layer.scores.copy_(layer.mask() * self.init)

    def save_masks(self, path: str | Path) -> None:
        """Write mask_state as safetensors."""
        from safetensors.torch import save_file

        save_file({name: bits.contiguous() for name, bits in self.mask_state().items()}, path)

    def load_masks(self, path: str | Path) -> None:
        """Read what save_masks wrote."""
        from safetensors.torch import load_file

        self.load_mask_state(load_file(path))


def drop(grad: Tensor, general: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Gradient dropout: `grad` where keep_probability exceeds a uniform number in [0, 1), else 0."""
    uniform = torch.rand(grad.shape, generator=generator, device=grad.device, dtype=grad.dtype)
    return torch.where(keep_probability(grad, general) > uniform, grad, 0)
