"""Prune a byte language model to N:M and say what it costs: the work behind `maskops prune`.

OUT/dense and OUT/pruned each hold model.safetensors and config.json; where config.json stands, the folder is whole.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskops import checkpoint
from maskops._checks import fail
from maskops.checkpoint import CheckpointError
from maskops.models import byte_lm, maskllm
from maskops.models.byte_lm import ByteLM, ByteLMConfig, Text, perplexity
from maskops.nn import NMLinear
from maskops.ops.nm_matmul import nm_mask
from maskops.ops.nm_matmul.sizes import check_pattern
from maskops.progress import TrainingProgress
from maskops.sparsify import METHODS, SparsifyReport, sparsify_

SYSTEM = "byte_lm"
CALIBRATION_BATCHES, CALIBRATION_ROWS = 8, 32
HELD_OUT_BATCHES = 32
DENSE_LR, MASK_LR = 4e-3, 5e-5


@dataclass(frozen=True)
class Settings:
    """What to prune and how. model: folder or safetensors file of a dense model; None: train one on the text."""

    text: list[Path]
    out: Path
    method: str = "magnitude"
    n: int = 2
    m: int = 4
    model: Path | None = None
    train_steps: int = 300
    steps: int = 150
    batch_size: int = 16
    seed: int = 0
    resume: bool = False
    sizes: ByteLMConfig = field(default_factory=ByteLMConfig)


@dataclass(frozen=True)
class Result:
    """Perplexities per byte on held-out text, bytes of both checkpoints, and what sparsify_ reported."""

    dense: float
    pruned: float
    dense_bytes: int
    pruned_bytes: int
    folder: Path
    report: SparsifyReport


def prune(settings: Settings, say: Callable[[str], None] = print) -> Result:
    """Train or load a dense model, prune it, compare both on held-out text, write the compressed checkpoint.

    Raises:
        ValueError: unknown method, a pattern that is none, or one that cannot be learned, or a text that is empty or too short.
        FileNotFoundError: a text is missing.
        CheckpointError: settings.model holds no model, or settings.out holds a run already.
    """
    check_pattern("prune", settings.n, settings.m)
    if settings.method not in METHODS:
        raise ValueError(f"prune: method must be one of {', '.join(METHODS)}, got {settings.method!r}")
    if (settings.out / "pruned" / "config.json").exists() and not settings.resume:
        raise CheckpointError(f"{settings.out} holds a pruned model already: choose another folder, or resume")
    check_files(settings.text)
    torch.manual_seed(settings.seed)
    model = _dense_model(settings)
    if settings.method == "learned":
        _check_learnable(model, settings.n, settings.m)
    text = read_text(settings.text, model.config.context)
    if model.training:
        _train(model, text, settings)
        checkpoint.save_model(settings.out / "dense", model, config_of(model) | {"training": _training_of(settings)})
    dense = perplexity(model, text.held_out_batches(most=HELD_OUT_BATCHES))
    say(f"dense: held-out perplexity {dense:.3f} a byte")
    report = _prune(model, text, settings)
    say(str(report))
    pruned = perplexity(model, text.held_out_batches(most=HELD_OUT_BATCHES))
    folder = settings.out / "pruned"
    # An older config must not stand beside the new weights, should the run be killed between the two.
    (folder / "config.json").unlink(missing_ok=True)
    checkpoint.save_model(folder, model, config_of(model) | {"method": settings.method, "perplexity": [dense, pruned]})
    sizes = [sum(p.nbytes for p in module.state_dict().values()) for module in (ByteLM(model.config), model)]
    return Result(dense, pruned, *sizes, folder, report)


def check_files(paths: list[Path]) -> None:
    """Raise for the first file that is missing or empty."""
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file")
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty")


def read_text(paths: list[Path], context: int) -> Text:
    """The files as one text; the error of a short one names them."""
    try:
        return Text.from_files(paths, context)
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, paths))}: {error}") from error


def load(path: Path) -> ByteLM:
    """A dense or pruned model: the folder that `maskops prune` wrote, or a model.safetensors beside its config.json."""
    folder = path.parent if path.suffix == ".safetensors" else path
    model = _model_of(folder, _config_in(folder))
    checkpoint.load_model(folder, model)
    return model.eval()


def _config_in(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:  # no JSON, or not even text
        raise CheckpointError(f"{folder} holds no model: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder} holds no model: config.json holds a {type(config).__name__}, not an object")
    if config.get("system") != SYSTEM:
        raise CheckpointError(f"{folder} holds a model of the system {config.get('system')!r}, not {SYSTEM!r}")
    return config


def _model_of(folder: Path, config: dict[str, Any]) -> ByteLM:
    """The model that a config describes, its values still to be loaded."""
    sizes, sparse = config.get("sizes"), config.get("sparse")
    where = f"{folder / 'config.json'} describes no model"
    if not isinstance(sizes, dict) or not all(type(size) is int for size in sizes.values()):
        raise CheckpointError(f"{where}: sizes must be an object of int, got {sizes!r}")
    if not isinstance(sparse, dict) or not all(isinstance(nm, list) and len(nm) == 2 for nm in sparse.values()):
        raise CheckpointError(f"{where}: sparse must be an object of [n, m], got {sparse!r}")
    try:
        model = ByteLM(ByteLMConfig(**sizes))
        for name, (n, m) in sparse.items():
            # Any weight of the right pattern will do: its values and places are replaced by the saved ones.
            linear = model.get_submodule(name)
            model.set_submodule(name, NMLinear.from_dense(linear, n, m, mask=nm_mask(linear.weight.abs(), n, m)))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:  # RuntimeError: sizes that no memory holds
        raise CheckpointError(f"{where}: {error}") from error
    return model


def config_of(model: ByteLM) -> dict[str, Any]:
    """What load needs beside the tensors."""
    sparse = {name: [layer.n, layer.m] for name, layer in model.named_modules() if isinstance(layer, NMLinear)}
    return {"system": SYSTEM, "sizes": dataclasses.asdict(model.config), "sparse": sparse}


def inner_layer(name: str, layer: nn.Linear) -> bool:
    """The layers that are pruned: all but the output layer."""
    return name != "head"


def _dense_model(settings: Settings) -> ByteLM:
    """The given model, or that of an earlier run in settings.out, in evaluation mode; or a new one, in training mode."""
    found, earlier = settings.model, settings.out / "dense"
    if found is None and settings.resume and (earlier / "config.json").exists():
        found = earlier
        saved, now = _config_in(found).get("training"), _training_of(settings)
        saved = saved if isinstance(saved, dict) else {}
        different = [f"{name} was {saved.get(name)}, now {now[name]}" for name in now if saved.get(name) != now[name]]
        if different:
            raise CheckpointError(f"{found} was trained with other settings: {'; '.join(different)}")
    if found is None:
        return ByteLM(settings.sizes).train()
    model = load(found)
    if config_of(model)["sparse"]:
        raise CheckpointError(f"{found} holds a model that is pruned already")
    return model


def _check_learnable(model: ByteLM, n: int, m: int) -> None:
    """sparsify_ leaves a layer dense whose inputs m does not divide: if that is every layer, there is nothing to learn."""
    inputs = {layer.in_features for name, layer in model.named_modules() if type(layer) is nn.Linear and name != "head"}
    if all(size % m for size in inputs):
        sizes = " or ".join(map(str, sorted(inputs)))
        fail("prune", "m", f"divide the inputs of a layer, {sizes}, for masks to be learned", f"{n}:{m}")


def _training_of(settings: Settings) -> dict[str, Any]:
    """What a resumed run must have in common with the run whose dense model it takes."""
    digest = hashlib.sha256()
    for path in settings.text:
        digest.update(path.read_bytes())
    names = ("train_steps", "batch_size", "seed")
    return {name: getattr(settings, name) for name in names} | {"text": digest.hexdigest()}


def _train(model: ByteLM, text: Text, settings: Settings) -> None:
    with _bar(settings.train_steps, "dense") as progress:
        byte_lm.train(
            model, text.batches(settings.batch_size, settings.seed), settings.train_steps, lr=DENSE_LR,
            on_step=lambda step, loss: progress.update(step, loss, settings.batch_size),
        )  # fmt: skip
    model.eval()


def _prune(model: ByteLM, text: Text, settings: Settings) -> SparsifyReport:
    calibration = list(_calibration(text, settings.seed + 1)) if settings.method != "magnitude" else None
    # Compared are masks, not speed: every layer of the model is to have the pattern.
    report = sparsify_(
        model, settings.n, settings.m, settings.method, inner_layer, calibration, only_if_faster=False,
        prior="wanda" if settings.method == "learned" else None,
    )  # fmt: skip
    if settings.method == "learned":
        with _bar(settings.steps, "masks") as progress:
            maskllm.learn_masks(
                model, text.batches(settings.batch_size, settings.seed + 2), lambda model, batch: model.loss(batch),
                maskllm.MaskLLMConfig(steps=settings.steps, lr=MASK_LR), seed=settings.seed,
                on_step=lambda step: progress.update(step.step, step.loss, settings.batch_size),
            )  # fmt: skip
        maskllm.harden_(model)
    return report


def _calibration(text: Text, seed: int) -> Iterator[torch.Tensor]:
    batches = text.batches(CALIBRATION_ROWS, seed)
    for _ in range(CALIBRATION_BATCHES):
        yield next(batches)[:, :-1]


def _bar(steps: int, title: str) -> TrainingProgress:
    return TrainingProgress(steps, title=title, unit="texts")
