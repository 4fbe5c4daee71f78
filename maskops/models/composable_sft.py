"""Composable sparse fine-tuning: few weights change, so that the changes for a task and for a language add up.

Ansell et al., "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", 2022 (LT-SFT).
theta: the weights that may change, flattened in order into one vector.  K of them do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SparseDelta:
    """What to add to a model.

    sizes: name -> number of entries of each tensor, in order; indices: int64 [K], ascending, into all of them laid end to end;
    values: [K].
    """

    sizes: dict[str, int]
    indices: Tensor
    values: Tensor

    @torch.no_grad()
    def apply_(self, model: nn.Module, scale: float = 1.0) -> None:
        """Add scale * values in place."""
        tensors, start = dict(model.named_parameters()), 0
        wrong = [name for name, size in self.sizes.items() if name not in tensors or tensors[name].numel() != size]
        if wrong:
            raise ValueError(
                f"SparseDelta: model must have the tensors of the delta, {wrong} are missing or of other size"
            )
        bounds = torch.tensor([0, *self.sizes.values()]).cumsum(0)
        places = torch.searchsorted(self.indices, bounds.to(self.indices.device)).tolist()
        for i, (name, size) in enumerate(self.sizes.items()):
            part, p = slice(places[i], places[i + 1]), tensors[name]
            index, values = self.indices[part] - start, self.values[part].to(p)
            p.view(-1).index_add_(0, index.to(p.device), values, alpha=scale)
            start += size

    def revert_(self, model: nn.Module) -> None:
        """Subtract it again."""
        self.apply_(model, -1.0)

    def save(self, path: str | Path) -> None:
        """Write safetensors: the values, and the steps from index to index in the smallest integer type that holds them."""
        from safetensors.torch import save_file

        gaps = self.indices.diff(prepend=self.indices.new_zeros(1))
        largest = int(gaps.max()) if len(gaps) else 0
        fits = next(t for t in (torch.uint8, torch.int16, torch.int32, torch.int64) if largest <= torch.iinfo(t).max)
        sizes = json.dumps(list(self.sizes.items()))
        save_file({"gaps": gaps.to(fits), "values": self.values.contiguous()}, path, metadata={"sizes": sizes})

    @classmethod
    def load(cls, path: str | Path) -> SparseDelta:
        """Read what save wrote."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            sizes = dict(json.loads(file.metadata()["sizes"]))
            return cls(sizes, file.get_tensor("gaps").long().cumsum(0), file.get_tensor("values"))


def largest_changes(deltas: Iterable[Tensor], k: int) -> Tensor:
    """Find the k entries that changed most over all tensors, under one threshold.

        threshold = k-th largest |delta|;  kept: all above it, then those equal to it by ascending index

    Args:
        deltas: tensors of any shapes, read as one vector.
        k: how many, at most the number of entries.

    Returns:
        int64 [k], ascending indices into the vector.

    Raises:
        ValueError: k out of range.
    """
    size = torch.cat([d.detach().flatten().abs() for d in deltas])
    if not 0 <= k <= len(size):
        raise ValueError(f"largest_changes: k must be in [0, {len(size)}], got {k}")
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=size.device)
    threshold = size.topk(k, sorted=True).values[-1]
    above, equal = (size > threshold).nonzero()[:, 0], (size == threshold).nonzero()[:, 0]
    return torch.cat([above, equal[: k - len(above)]]).sort().values


class SparseAdamW:
    """AdamW on chosen entries of some tensors: its state has K entries, and no other entry is ever written."""

    def __init__(self, tensors: list[nn.Parameter], indices: list[Tensor], **options: float) -> None:
        self.tensors, self.indices = tensors, indices
        self.values = [nn.Parameter(p.detach().view(-1)[i]) for p, i in zip(tensors, indices, strict=True)]
        self.inner = torch.optim.AdamW(self.values, **options)

    @torch.no_grad()
    def step(self) -> None:
        for p, index, value in zip(self.tensors, self.indices, self.values, strict=True):
            value.grad = None if p.grad is None else p.grad.view(-1)[index]
        self.inner.step()
        for p, index, value in zip(self.tensors, self.indices, self.values, strict=True):
            p.view(-1)[index] = value

    def zero_grad(self) -> None:
        for p in self.tensors:
            p.grad = None


class SparseFineTuning:
    """Fine-tune twice: first everything, to see which K weights want to change most, then from the start only those.

        phase 1: theta_1 = fine-tuned theta_0;   support = the K largest |theta_1 - theta_0|, over all tensors at once
        phase 2: theta = theta_0 again; only the support trains;   phi = theta_2 - theta_0, entries below 1e-7 dropped
        use:     theta_0 + phi_task + phi_language

    Args:
        model: changed in place while it trains; restore() brings theta_0 back.
        select: which parameters may change, by name. Others, such as a new classifier, are trained by the caller as usual.

    Example:
        >>> model = nn.Linear(8, 8)
        >>> sft = SparseFineTuning(model)
        >>> def train(optimizer):
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         (model(torch.ones(8)).square().sum() + 0.1 * sft.distance()).backward()
        ...         optimizer.step()
        >>> train(torch.optim.AdamW(sft.parameters, lr=1e-2))
        >>> train(sft.rewind(k=5, lr=1e-2))
        >>> phi = sft.delta()
        >>> len(phi.indices)
        5
        >>> sft.restore(); phi.apply_(model)
    """

    def __init__(self, model: nn.Module, select: Callable[[str], bool] = lambda name: True) -> None:
        chosen = {name: p for name, p in model.named_parameters() if select(name)}
        if not chosen:
            raise ValueError("SparseFineTuning: select must choose at least one parameter of model, got none")
        self.names, self.parameters = list(chosen), list(chosen.values())
        self.start = [p.detach().clone() for p in self.parameters]
        self.sizes = {name: p.numel() for name, p in chosen.items()}

    def distance(self) -> Tensor:
        """Mean |theta - theta_0|, to be added to the loss of both phases."""
        parts = zip(self.parameters, self.start, strict=True)
        return sum((p - p0).abs().sum() for p, p0 in parts) / sum(self.sizes.values())

    @torch.no_grad()
    def restore(self) -> None:
        """Back to theta_0, bit for bit."""
        for p, p0 in zip(self.parameters, self.start, strict=True):
            p.copy_(p0)

    @torch.no_grad()
    def rewind(self, k: int, **options: float) -> SparseAdamW:
        """End phase 1: choose the support, go back to theta_0, and return the optimizer of phase 2."""
        support = largest_changes(self._changes(), k)
        self.restore()
        counts = list(self.sizes.values())
        bounds = torch.tensor([0, *counts], device=support.device).cumsum(0)
        places = torch.searchsorted(support, bounds)
        lengths = places.diff().tolist()
        parts = [part - start for part, start in zip(support.split(lengths), bounds.tolist()[:-1], strict=True)]
        return SparseAdamW(self.parameters, parts, **options)

    @torch.no_grad()
    def delta(self, drop: float = 1e-7) -> SparseDelta:
        """phi: where theta differs from theta_0 by more than `drop`."""
        flat = torch.cat([d.flatten() for d in self._changes()])
        indices = (flat.abs() > drop).nonzero()[:, 0]
        return SparseDelta(self.sizes, indices, flat[indices])

    def _changes(self) -> list[Tensor]:
        return [p.detach() - p0 for p, p0 in zip(self.parameters, self.start, strict=True)]
