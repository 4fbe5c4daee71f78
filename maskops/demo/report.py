"""The demo's pictures."""

import json
from pathlib import Path

import matplotlib
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_GREY = "#555555"


def draw_reconstruction(path: Path, rows: dict[str, Tensor], title: str) -> None:
    """rows: {label: images [n, 3, H, W] in [0, 1]}, drawn one below the other."""
    columns = len(next(iter(rows.values())))
    width, height = 1.25 * columns + 1.4, 1.25 * len(rows) + 0.5
    figure, axes = plt.subplots(len(rows), columns, figsize=(width, height), squeeze=False)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=8, fontsize=11)
    figure.suptitle(title, fontsize=11, y=1 - 0.16 / height)
    figure.subplots_adjust(
        left=1.35 / width, right=1 - 0.05 / width, top=1 - 0.42 / height, bottom=0.05 / height, wspace=0.04, hspace=0.04
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_loss(path: Path, losses: Path, final: dict[str, float]) -> None:
    """The loss of every step in losses.jsonl, its running mean, and the held-out errors of `final` as lines."""
    rows = [json.loads(line) for line in losses.read_text().splitlines()]
    steps, values = [row["step"] for row in rows], [row["loss"] for row in rows]
    figure, axis = plt.subplots(figsize=(8, 4.5))
    axis.plot(steps, values, color="#9ecae1", linewidth=0.7, label="training loss, each step")
    axis.plot(steps, _running_mean(values, 0.9), color="#08519c", linewidth=1.8, label="training loss, running mean")
    for (name, value), style in zip(final.items(), ("-", "--", ":"), strict=False):
        axis.axhline(value, color=_GREY, linestyle=style, linewidth=1.2, label=f"held-out, {name}: {value:.3f}")
    axis.set_yscale("log")
    axis.set_ylim(min(*final.values(), *values) * 0.85, max(*final.values(), values[0]) * 1.15)
    axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.2f"))
    axis.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%.2f"))
    axis.set_xlabel("step")
    axis.set_ylabel("squared error of masked pixels (normalised)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _running_mean(values: list[float], keep: float) -> list[float]:
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        out.append(mean / weight)
    return out
