"""MaskLLM: learn which n of every m weights a frozen language model keeps, by gradient descent on its own loss.

Fang et al., "MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models", 2024. The numbers are those of the published
scripts. Prepare the model with maskops.sparsify_(model, n, m, "learned", ...), learn, then harden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskops.nn import SoftNMLinear


@dataclass(frozen=True)
class MaskLLMConfig:
    """How to learn masks. A pair is (first, last), linear in the step.

    Attributes:
        steps: of the optimiser; published: 2000.
        lr: of the model; logits learn lr_factor times as fast, down to a tenth of that along a cosine.
        tau: temperature of the soft masks.
        scale: factor of the logits against the Gumbel noise.
        norm_weight: of the squared norm of the kept weights, which is maximised; falls linearly to 0.
    """

    steps: int = 2000
    lr: float = 5e-5
    lr_factor: float = 10.0
    tau: tuple[float, float] = (4.0, 0.05)
    scale: tuple[float, float] = (1e2, 5e2)
    norm_weight: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"MaskLLMConfig: steps must be at least 1, got {self.steps}")
        if min(self.tau) <= 0:
            raise ValueError(f"MaskLLMConfig: tau must be above 0, got {self.tau}")


class Step(NamedTuple):
    """step: how many are done; loss: of the model under sampled masks; kept_norm: sum of (W * mask)^2 over the layers."""

    step: int
    loss: float
    kept_norm: float


def soft_layers(model: nn.Module) -> dict[str, SoftNMLinear]:
    """The layers that learn a mask."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, SoftNMLinear)}


def set_schedule(model: nn.Module, config: MaskLLMConfig, step: int) -> None:
    """Give the layers their temperature and scale at `step`."""
    share = step / config.steps
    for layer in soft_layers(model).values():
        layer.tau = config.tau[0] + (config.tau[1] - config.tau[0]) * share
        layer.scale = config.scale[0] + (config.scale[1] - config.scale[0]) * share


def learn_masks(
    model: nn.Module, batches: Iterator[Any], loss_of: Callable[[nn.Module, Any], Tensor], config: MaskLLMConfig, *,
    seed: int = 0, on_step: Callable[[Step], None] | None = None,
) -> list[Step]:  # fmt: skip
    """Train the logits of the SoftNMLinear layers of `model`; everything else stays as it is.

        loss = loss_of(model, batch) - norm_weight (1 - step / steps) sum over layers ||W * mask||_F^2

    Args:
        model: with SoftNMLinear layers, from maskops.sparsify_(model, n, m, "learned"). Left in evaluation mode: most likely masks.
        batches: at least config.steps of them.
        loss_of: (model, batch) -> scalar, the mean loss.
        seed: of the Gumbel noise.
        on_step: called after every step.

    Returns:
        A Step per step.

    Raises:
        ValueError: the model has no layer that learns.  FloatingPointError: the loss is not finite.
    """
    layers = soft_layers(model)
    if not layers:
        raise ValueError("learn_masks: model must have SoftNMLinear layers, got none: call maskops.sparsify_ first")
    logits = [layer.logits for layer in layers.values()]
    optimizer = torch.optim.AdamW(logits, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    history = []
    model.train()
    devices = {layer.weight.device for layer in layers.values() if layer.weight.is_cuda}
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for step in range(config.steps):
            set_schedule(model, config, step)
            optimizer.param_groups[0]["lr"] = _lr(config, step)
            loss = loss_of(model, next(batches))
            kept = sum(layer.kept_norm for layer in layers.values())
            objective = loss - config.norm_weight * (1 - step / config.steps) * kept
            grads = torch.autograd.grad(objective, logits)
            for parameter, grad in zip(logits, grads, strict=True):
                parameter.grad = grad
            nn.utils.clip_grad_norm_(logits, config.clip)
            optimizer.step()
            history.append(Step(step + 1, loss.item(), kept.item()))
            if not math.isfinite(history[-1].loss):
                raise FloatingPointError(f"learn_masks: the loss is not finite at step {step + 1}")
            if on_step is not None:
                on_step(history[-1])
    for parameter in logits:
        parameter.grad = None
    model.eval()
    return history


def harden_(model: nn.Module) -> nn.Module:
    """Replace the layers that learned by compressed NMLinear layers on their most likely masks, in place."""
    for name, layer in soft_layers(model).items():
        model.set_submodule(name, layer.harden().train(layer.training))
    return model


def kept_norm_share(model: nn.Module) -> float:
    """sum((W * mask)^2) / sum(W^2) over the layers that learn, under their most likely masks."""
    kept = total = 0.0
    for layer in soft_layers(model).values():
        squares = layer.weight.detach().double().square()
        kept += (squares * layer.mask()).sum().item()
        total += squares.sum().item()
    return kept / total


def _lr(config: MaskLLMConfig, step: int) -> float:
    low = 0.1
    return config.lr * config.lr_factor * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * step / config.steps)))
