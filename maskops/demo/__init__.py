"""The demo: pre-train a small MAE on real photos and judge it on parts of them that it has not seen."""

import json
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor

import maskops
from maskops.data import to_pixels
from maskops.demo import baselines
from maskops.demo.photos import cut_photos
from maskops.demo.report import draw_loss, draw_reconstruction
from maskops.demo.speed import measure_speed, write_speed
from maskops.models.mae import MAE, MAEConfig, MAEOutput
from maskops.train import Settings, load_pretrained, make_optimizer, pretrain

CONFIG = MAEConfig(
    image_size=64, patch_size=8, dim=128, depth=4, heads=4, mlp_dim=512, decoder_dim=128, decoder_depth=2, decoder_heads=4,
    decoder_mlp_dim=512, norm_pix=False,
)  # fmt: skip
STEPS, BATCH, LR = 1000, 64, 2e-3
_MASKS = 8  # masks per held-out crop
_PICTURES = 10
_MARK = ".maskops-demo"


def run(out: Path, seconds: float) -> bool:
    """Run the demo. Returns whether the held-out error beats both baselines."""
    began = time.monotonic()
    _empty(out)
    crops = cut_photos(out / "photos", CONFIG.image_hw[0])
    photos = len(list((out / "photos").iterdir()))
    print(f"{photos} photos; {len(crops)} held-out crops, {CONFIG.mask_ratio:.0%} of their patches masked", flush=True)
    steps = _affordable_steps(seconds)
    settings = Settings(
        data=out / "photos", out=out / "run", epochs=steps * BATCH / photos, batch_size=BATCH, lr=LR * 256 / BATCH,
        warmup_epochs=0.05 * steps * BATCH / photos, crop_scale=(0.06, 0.4), workers=1, max_seconds=1.2 * seconds,
    )  # fmt: skip
    result = pretrain(CONFIG, settings)
    model = load_pretrained(result.model_folder)
    errors, shown = evaluate(model, crops)
    _write_errors(out, errors)
    title = f"Held-out crops, {CONFIG.mask_ratio:.0%} masked, after {result.step} steps"
    draw_reconstruction(out / "reconstruction.png", shown, title)
    draw_loss(out / "loss.png", out / "run" / "losses.jsonl", errors)
    print(write_speed(out, measure_speed(CONFIG)))
    print(f"{out}/: reconstruction.png, loss.png, speed.md, errors.md; {time.monotonic() - began:.0f} s in all")
    ours, *others = errors.values()
    return ours < min(others)


@torch.no_grad()
def evaluate(model: MAE, crops: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Errors on masked pixels by method, ours first, and rows of pictures of some crops."""
    images = crops.repeat(_MASKS, 1, 1, 1)
    out: MAEOutput = model(images, seed=1)
    size, grid, mask = model.patch_size, model.config.grid, out.split.mask
    patches = maskops.patchify(images, size)
    guesses = {
        "MAE": out.pred,
        "neighbour average": baselines.neighbour_average(patches, mask, grid),
        "mean patch": baselines.mean_patch(patches, mask),
    }
    errors = {name: baselines.masked_error(guess, patches, mask) for name, guess in guesses.items()}
    visible, painted = model.reconstruct(images, out)
    chosen = torch.linspace(0, len(crops) - 1, _PICTURES).long()
    hidden = maskops.unpatchify(mask[:, :, None].expand_as(patches).to(patches.dtype), size, model.config.image_hw)
    pictures = {
        "original": to_pixels(images),
        "masked": torch.where(hidden > 0, 0.5, to_pixels(visible)),
        "reconstruction": to_pixels(painted),
    }
    return errors, {label: pixels[chosen] for label, pixels in pictures.items()}


def _affordable_steps(seconds: float) -> int:
    """STEPS, or as many as this machine does in the time; a plan, so that the learning rate still ends at 0."""
    torch.manual_seed(0)
    model = MAE(CONFIG)
    optimizer = make_optimizer(model, 0.0)
    images = torch.randn(BATCH, 3, *CONFIG.image_hw)
    times = []
    for _ in range(12):
        start = time.monotonic()
        model(images).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.monotonic() - start)
    # The loader takes its share of the cores: 1.3 times the bare step was measured.
    step = 1.3 * sorted(times)[len(times) // 2]
    affordable = int(seconds / step)
    if affordable < STEPS:
        print(f"a step takes {1000 * step:.0f} ms here: {affordable} steps instead of {STEPS}", flush=True)
    return max(1, min(STEPS, affordable))


def _empty(out: Path) -> None:
    """Remove what an earlier demo left. A folder that no demo has marked as its own is somebody's, and is refused."""
    own = [out / name for name in ("photos", "run")]
    if any(folder.exists() for folder in own) and not (out / _MARK).exists():
        raise ValueError(
            f"demo: {out} must be a new folder or one of an earlier demo, and it holds photos/ or run/ of another"
        )
    for folder in own:
        shutil.rmtree(folder, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).write_text("Made by `maskops demo`, which replaces photos/ and run/ here.\n")


def _write_errors(out: Path, errors: dict[str, float]) -> None:
    rows = [f"| {name} | {value:.4f} |" for name, value in errors.items()]
    table = "\n".join(["| held-out error of masked pixels | squared, normalised pixels |", "|---|---|", *rows])
    (out / "errors.md").write_text(table + "\n")
    (out / "errors.json").write_text(json.dumps(errors, indent=2) + "\n")
    print(table, flush=True)
