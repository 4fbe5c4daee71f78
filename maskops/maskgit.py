"""Train a small MaskGIT on images that packages ship, and draw what it makes: the work of two commands of maskops.

OUT holds losses.jsonl, checkpoints/ and model/; every step draws its batch and masks from (seed, step) alone, so that a resumed run
gives the losses of an unbroken one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from maskops import checkpoint
from maskops.checkpoint import CheckpointError
from maskops.generation import FullOnly, Generation, MaskedGenerator
from maskops.models.maskgit import DATA, MaskGIT, MaskGITConfig
from maskops.models.recap import SETTINGS, recap
from maskops.ops.feature_reuse import mask_schedule
from maskops.progress import TrainingProgress

SIZES = {"tiny": (64, 2, 2), "small": (128, 4, 4), "base": (256, 6, 8), "large": (768, 24, 12)}  # dim, depth, heads
LEARNING_RATE = 2e-3  # of the tiny model; it falls with the square root of dim


@dataclass(frozen=True)
class Settings:
    """How to train: data is a name in maskops.models.maskgit.DATA, lr None the default of the size."""

    out: Path
    data: str = "digits"
    size: str = "tiny"
    epochs: float = 100
    batch_size: int = 64
    lr: float | None = None
    seed: int = 0
    resume: bool = False
    save_every: int = 500


@dataclass(frozen=True)
class Result:
    step: int
    loss: float
    samples_per_second: float
    model_folder: Path


def pretrain(settings: Settings) -> Result:
    """Train; writes losses.jsonl, checkpoints/ and model/ below settings.out.

    Raises:
        ValueError: data or size that is not known.
        CheckpointError: settings.out holds a run and resume is off, or one of another kind.
    """
    for name, known in (("data", DATA), ("size", SIZES)):
        if getattr(settings, name) not in known:
            raise ValueError(f"pretrain: {name} must be one of {sorted(known)}, got {getattr(settings, name)!r}")
    tokens, classes, book = DATA[settings.data]()
    dim, depth, heads = SIZES[settings.size]
    config = MaskGITConfig((8, 8), len(book.codes), dim, depth, heads, int(classes.max()) + 1, min_mask_rate=0.0)
    total = max(1, math.ceil(settings.epochs * len(tokens) / settings.batch_size))
    torch.manual_seed(settings.seed)
    model = MaskGIT(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.03)
    same = {name: getattr(settings, name) for name in ("data", "size", "batch_size", "seed", "lr")} | {"total": total}
    start, loss = _resume(settings, model, optimizer, same)
    peak = settings.lr or LEARNING_RATE * math.sqrt(64 / dim)
    with TrainingProgress(total, start, title="maskgit") as progress, open(settings.out / "losses.jsonl", "a") as log:
        for step in range(start, total):
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1.0, 20 * (step + 1) / total) * math.cos(math.pi / 2 * step / total) ** 2
            generator = torch.Generator().manual_seed(settings.seed * 2**32 + step)
            rows = torch.randint(len(tokens), (settings.batch_size,), generator=generator)
            found = model.loss(tokens[rows], classes[rows], seed=generator)
            found.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss = found.item()
            log.write(json.dumps({"step": step + 1, "loss": loss}) + "\n")
            progress.update(step + 1, loss, settings.batch_size)
            if (step + 1) % settings.save_every == 0 or step + 1 == total:
                log.flush()
                checkpoint.save(settings.out / "checkpoints", step + 1, model, optimizer, {"step": step + 1, **same}, 2)
    folder = settings.out / "model"
    checkpoint.save_model(folder, model, {"system": "maskgit", "data": settings.data, **dataclasses.asdict(config)})
    return Result(total, loss, progress.samples_per_second, folder)


def _resume(settings: Settings, model: MaskGIT, optimizer: torch.optim.Optimizer, same: dict) -> tuple[int, float]:
    """The step to go on from and its loss; the log is cut back to it."""
    losses, done = settings.out / "losses.jsonl", checkpoint.finished(settings.out / "checkpoints")
    if (done or losses.exists()) and not settings.resume:
        raise CheckpointError(f"{settings.out} holds a run already: resume it (--resume), or choose another folder")
    settings.out.mkdir(parents=True, exist_ok=True)
    step, loss = 0, math.nan
    if done:
        state = checkpoint.load_state(done[-1])
        changed = [name for name, value in same.items() if state.get(name) != value]
        if changed:
            raise CheckpointError(f"{done[-1]} was made with another {', '.join(changed)}")
        checkpoint.load_model(done[-1], model)
        checkpoint.load_optimizer(done[-1], model, optimizer)
        step = state["step"]
    if losses.exists():
        lines = losses.read_text().splitlines(keepends=True)
        losses.write_text("".join(lines[:step]))
        loss = json.loads(lines[step - 1])["loss"] if 0 < step <= len(lines) else loss
    return step, loss


def load(folder: Path) -> tuple[MaskGIT, str]:
    """The model of a finished run, and the name of its data.  folder: OUT or OUT/model.

    Raises:
        CheckpointError: no MaskGIT there.
    """
    folder = folder / "model" if (folder / "model").is_dir() else folder
    try:
        config = json.loads((folder / "config.json").read_text())
    except OSError:
        raise CheckpointError(f"{folder} holds no finished model") from None
    if config.pop("system", None) != "maskgit":
        raise CheckpointError(f"{folder} holds no MaskGIT")
    data = config.pop("data")
    model = MaskGIT(MaskGITConfig(**{**config, "grid": tuple(config["grid"])}))
    checkpoint.load_model(folder, model)
    return model.eval(), data


# ---------------------------------------------------------------- a picture


def generate(
    folder: Path, out: Path, setting: str = "8+8", *, rows: int = 6, seed: int = 0, temperature: float = 20.0,
    sample_temperature: float = 0.8, say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Draw real images, images of as many full steps, and images of ReCAP, with their times, into the picture `out`.

    Raises:
        ValueError: a setting that is not in SETTINGS.
        CheckpointError: folder holds no MaskGIT.
    """
    if setting not in SETTINGS:
        raise ValueError(f"generate: setting must be one of {', '.join(SETTINGS)}, got {setting!r}")
    model, data = load(folder)
    tokens, classes, book = DATA[data]()
    columns = min(10, max(model.config.classes, 8))
    labels = (torch.arange(rows * columns) % columns) % model.config.classes
    options = {"temperature": temperature, "sample_temperature": sample_temperature}
    reused = recap(model, setting, **options)
    counts = mask_schedule("pow", SETTINGS[setting].steps, model.num_tokens, at_least_one=True)
    full = MaskedGenerator(model, counts, FullOnly(), **options)
    panels = [("real", _real(tokens, classes, labels))]
    for name, generator in ((f"{SETTINGS[setting].steps} full steps", full), (f"ReCAP {setting}", reused)):
        generator.generate(len(labels), labels, seed=seed)  # warm
        began = time.perf_counter()
        made: Generation = generator.generate(len(labels), labels, seed=seed)
        seconds = time.perf_counter() - began
        panels.append((f"{name}: {1e3 * seconds:.0f} ms, {made.positions} token evaluations", made.tokens))
        say(f"{name}: {1e3 * seconds:.0f} ms for {len(labels)} images. {generator.explain().splitlines()[0]}")
    images = [(title, _sheet(book.decode(found, model.config.grid), columns)) for title, found in panels]
    _draw(images, out)
    say(f"wrote {out}")


def _real(tokens: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    """One real row of tokens per label, each label's first, second, ..."""
    used: dict[int, int] = {}
    found = []
    for label in labels.tolist():
        at = torch.nonzero(classes == label)[:, 0]
        found.append(tokens[at[used.get(label, 0) % len(at)]])
        used[label] = used.get(label, 0) + 1
    return torch.stack(found)


def _sheet(images: Tensor, columns: int) -> Tensor:
    """images [B, 1, H, W] side by side, with a line between."""
    padded = torch.nn.functional.pad(images[:, 0], (0, 1, 0, 1), value=0.4)
    return torch.cat([torch.cat(list(row), 1) for row in padded.split(columns)], 0)


def _draw(panels: list[tuple[str, Tensor]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.6))
    for axis, (title, sheet) in zip(axes, panels, strict=True):
        axis.imshow(sheet.clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)
