"""The demo's speed table: images/s of a training step, this library against the usual code and an encoder over all tokens."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import maskops
from maskops.demo.usual import all_tokens_loss, usual_loss
from maskops.models.mae import MAE, MAEConfig
from maskops.train import make_optimizer

OURS, USUAL, ALL = "this library", "the usual way", "encoder over all tokens"
Step = Callable[[], Tensor]


def measure_speed(demo: MAEConfig, seconds: float = 10.0) -> list[dict[str, object]]:
    """Rows {"model", "batch", "images_per_s": {way: n}}, of the demo's model and of MAE-tiny on 224 x 224; about `seconds` each."""
    cases = (("demo model", demo, 64), ("MAE-tiny, 224 x 224 / 16", MAEConfig.of_size("tiny"), 16))
    return [_measure(name, config, batch, seconds) for name, config, batch in cases]


def _measure(name: str, config: MAEConfig, batch: int, seconds: float) -> dict[str, object]:
    torch.manual_seed(0)
    model = MAE(config)
    images, noise = torch.randn(batch, config.channels, *config.image_hw), torch.rand(batch, config.num_patches)
    _check_equal(model, images, noise)
    # A step of lr 0: the optimiser does its work and the weights stay, so every way sees the same ones.
    optimizer = make_optimizer(model, 0.0)

    def ours() -> Tensor:
        return model(images, split=maskops.random_masking(batch, config.num_patches, num_keep=config.num_keep)).loss

    ways: dict[str, Step] = {
        OURS: ours,
        USUAL: lambda: usual_loss(model, images, torch.rand(batch, config.num_patches)),
        ALL: lambda: all_tokens_loss(model, images, torch.rand(batch, config.num_patches)),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    began = time.perf_counter()
    # Interleaved, so that a busy machine slows all of them alike; the first round warms up.
    while time.perf_counter() - began < seconds or len(times[OURS]) < 4:
        for way, loss in ways.items():
            start = time.perf_counter()
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
            times[way].append(time.perf_counter() - start)
    speeds = {way: batch / statistics.median(t[1:]) for way, t in times.items()}
    return {"model": name, "batch": batch, "images_per_s": speeds}


def _check_equal(model: MAE, images: Tensor, noise: Tensor) -> None:
    """RuntimeError unless loss and gradients of the usual code are ours."""
    trained = [p for p in model.parameters() if p.requires_grad]
    ours, usual = model(images, noise).loss, usual_loss(model, images, noise)
    pairs = zip(torch.autograd.grad(ours, trained), torch.autograd.grad(usual, trained), strict=True)
    worst = max(((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in pairs)
    if abs(ours.item() - usual.item()) > 1e-4 * abs(usual.item()) or worst > 1e-2:
        raise RuntimeError(
            f"this library and the usual code disagree: losses {ours.item()} and {usual.item()}, gradients off by {worst:.1e}"
        )


def write_speed(folder: Path, rows: list[dict[str, object]]) -> str:
    """Write speed.md and speed.json; returns the table."""
    lines = [
        f"| images/s, training step | {OURS} | {USUAL} | {ALL} | ours / usual | ours / all |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, usual, everything = (row["images_per_s"][way] for way in (OURS, USUAL, ALL))
        cells = f"{ours:.0f} | {usual:.0f} | {everything:.0f} | {ours / usual:.2f} | {ours / everything:.2f}"
        lines.append(f"| {row['model']}, batch {row['batch']} | {cells} |")
    note = (
        f"float32 on {torch.get_num_threads()} threads, forward, backward and AdamW step, median of interleaved runs. "
        f"Same weights; losses and gradients of the first two were checked to be equal. "
        f"The transformer blocks are the same code in all three."
    )
    table = "\n".join(lines)
    (folder / "speed.md").write_text(f"{table}\n\n{note}\n")
    (folder / "speed.json").write_text(json.dumps(rows, indent=2) + "\n")
    return table
