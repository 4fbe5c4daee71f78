"""Pre-training of the systems in SYSTEMS, on Hugging Face Accelerate: one process, or many under `accelerate launch` or `torchrun`.

A system is a config (a frozen dataclass with the class attribute `system`, its name in SYSTEMS) and a model, Model(config), with
`Config`, the config's class, `training_loss(samples, step)` and, if they have something to do, `prepare(data)` before the first
step and `after_step(step)` after the optimiser. A config's `samples` says what the system trains on.

The same losses come out of an unbroken run, of a run killed and resumed, and, on images, of two processes with half the batch each:
samples and masks depend on (seed, position in the stream of samples) alone, and a checkpoint holds all else. Models of text and
sound draw masks for their own rows: with another number of processes, the same sample gets other masks.
"""

import dataclasses
import gc
import json
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from maskops import checkpoint
from maskops.checkpoint import CheckpointError
from maskops.data import Crop, FileFolder, GlobalBatches, ImageFolder
from maskops.pretrained import SYSTEMS, jsonable, load_pretrained, model_class
from maskops.progress import TrainingProgress
from maskops.scenes import SceneFolder
from maskops.texts import TextFolder

__all__ = [
    "Result", "Settings", "Step", "TrainingError", "make_optimizer", "pretrain", "SYSTEMS", "load_pretrained", "model_class",
]  # fmt: skip

_LOG_EVERY = 10  # steps between two looks at the losses, each of which waits for the device


class TrainingError(RuntimeError):
    """Training cannot go on."""


@dataclass(frozen=True)
class Settings:
    """How to train. lr is for 256 samples a step and scaled linearly with the batch, as MAE does; batch_size is per process."""

    data: Path  # a folder of images, scenes or recordings; for systems of text a file or a folder of files
    out: Path
    epochs: float = 800
    batch_size: int = 64
    lr: float = 1.5e-4
    weight_decay: float = 0.05
    warmup_epochs: float = 40
    crop_scale: tuple[float, float] = (0.2, 1.0)
    seed: int = 0
    workers: int = 2
    bf16: bool = False
    resume: bool = False
    save_every: int | None = None  # steps; default: every save_minutes
    save_minutes: float = 5.0
    keep_checkpoints: int = 2
    max_seconds: float | None = None  # stop early, with a checkpoint


@dataclass(frozen=True)
class Result:
    """What pretrain returns. unit: what samples are called; unreadable: {file: reason}."""

    step: int
    total_steps: int
    loss: float
    samples_per_second: float
    model_folder: Path
    unit: str
    unreadable: dict[str, str]


class Step(NamedTuple):
    """Which part of which step of training a model is asked for.

    Attributes:
        seed: int64 [2] = (seed of the run, step) on the device; masks of the step are drawn from it.
        first, total: the batch is the rows from `first` on of a step of `total` rows over all processes: masks are drawn for all of
            them and cut with models.images.rows_of, so that they do not depend on the number of processes.
        progress: the share of training that is done, in [0, 1).
        draws: the seed of `generator`, for models that draw for their own rows: of the run's seed, the step and the process.
    """

    seed: Tensor
    first: int
    total: int
    progress: float
    draws: int = 0

    def generator(self) -> torch.Generator:
        """A generator on the device, whose draws depend on the seed, the step and the process alone."""
        return torch.Generator(self.seed.device).manual_seed(self.draws)


class _Loss(nn.Module):
    """The training loss as a forward pass, which is what data parallelism wraps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, samples: Tensor, step: Step) -> Tensor:
        return self.model.training_loss(samples, step)


def pretrain(config: Any, settings: Settings) -> Result:
    """Train the system of `config` on settings.data; writes losses.jsonl, checkpoints/ and model/ below settings.out.

    Raises:
        EmptyFolderError: no readable image, no text.
        CheckpointError: settings.out holds a run and resume is off, or the run there was started with other settings.
        TrainingError: the loss is not finite.
        ValueError: config masks nothing, so that there is nothing to learn from.
    """
    all_kept = hasattr(config, "num_tokens") and config.num_keep == config.num_tokens
    if not 0 < getattr(config, "mask_ratio", 0.5) < 1 or all_kept:
        raise ValueError(f"pretrain: mask_ratio must be in (0, 1), got {config.mask_ratio}, which masks nothing")
    if getattr(config, "num_keep", 1) == 0:
        raise ValueError(
            f"pretrain: mask_ratio must keep a patch, got {config.mask_ratio} of {config.num_tokens} patches"
        )
    accelerator = Accelerator(mixed_precision="bf16" if settings.bf16 else None)
    if accelerator.scaler is not None:
        raise TrainingError("mixed precision must be bf16 or off, got fp16")
    run = _Run(accelerator, config, settings)
    shown = accelerator.is_main_process
    with TrainingProgress(run.total_steps, run.step, title=config.system, shown=shown, unit=run.data.unit) as progress:
        run.train(progress)
    return run.finish(progress.samples_per_second)


def _samples(config: Any, settings: Settings) -> TextFolder | FileFolder:
    """What the system trains on."""
    if config.samples == "text":
        return TextFolder(settings.data, config.window, settings.seed)
    if config.samples == "sounds":
        from maskops.sounds import SoundFolder  # with libraries that the others do without

        return SoundFolder(settings.data, config.frames, config.bins, config.patch[0], settings.seed)
    folder = SceneFolder if config.samples == "scenes" else ImageFolder
    return folder(settings.data, Crop(config.image_hw, settings.crop_scale), settings.seed)


class _Run:
    """The state of one training run in one process."""

    def __init__(self, accelerator: Accelerator, config: Any, settings: Settings) -> None:
        self.accelerator, self.config, self.settings = accelerator, config, settings
        self.data = _samples(config, settings)
        self.global_batch = settings.batch_size * accelerator.num_processes
        self.total_steps = max(1, math.ceil(settings.epochs * len(self.data) / self.global_batch))
        if len(self.data) < self.global_batch and accelerator.is_main_process:
            warnings.warn(
                f"pretrain: a batch takes {self.global_batch} samples and there are {len(self.data)}: {self.total_steps} steps in"
                f" {settings.epochs:g} epochs. Give a smaller --batch-size.",
                stacklevel=2,
            )
        # Every process starts from the same weights.
        torch.manual_seed(settings.seed)
        self.plain_model = model_class(config.system)(config)
        if hasattr(self.plain_model, "prepare"):
            self.plain_model.prepare(self.data)
        optimizer = make_optimizer(self.plain_model, settings.weight_decay)
        # Placed by hand: the saved state of the optimiser must find its parameters where they stay.
        self.plain_model.to(accelerator.device)
        self.checkpoints = settings.out / "checkpoints"
        self.loss = math.nan
        self.step = self._saved_step = self._resume(optimizer)
        self.model, self.optimizer = accelerator.prepare(_Loss(self.plain_model), optimizer)
        self._pending: list[tuple[int, float, Tensor]] = []
        self._undecodable: set[int] = set()
        self._saved = time.monotonic()
        self._report(self.data.unreadable)

    # ------------------------------------------------------------ the loop

    def train(self, progress: TrainingProgress) -> None:
        began = time.monotonic()
        self.model.train()
        for samples, unreadable in self._loader():
            self._train_step(samples)
            self._undecodable.update(i for i in unreadable.tolist() if i >= 0)
            if self._due_to_look():
                self._write_losses()
            progress.update(self.step, self.loss, self.global_batch)
            if self._due_to_save():
                self._save()
            if self._out_of_time(time.monotonic() - began):
                break

    def _train_step(self, samples: Tensor) -> None:
        samples = samples.to(self.accelerator.device, non_blocking=True)
        lr = self.settings.lr * self.global_batch / 256 * self._schedule()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        step = self._step()
        loss = self.model(samples, step)
        self.accelerator.backward(loss)
        self.optimizer.step()
        if hasattr(self.plain_model, "after_step"):
            self.plain_model.after_step(step)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._pending.append((self.step, lr, loss.detach()))

    def _out_of_time(self, seconds: float) -> bool:
        """Whether max_seconds is over for one of the processes; all of them get the same answer."""
        if self.settings.max_seconds is None:
            return False
        over = torch.tensor([float(seconds > self.settings.max_seconds)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(over, "sum") > 0)

    def _step(self) -> Step:
        seed = torch.tensor([self.settings.seed, self.step], device=self.accelerator.device)
        first = self.accelerator.process_index * self.settings.batch_size
        # No two steps or processes of a run share a number, and neighbouring seeds are far apart.
        draws = (
            self.settings.seed * 2**40 + self.step * self.accelerator.num_processes + self.accelerator.process_index
        ) % 2**63
        return Step(seed, first, self.global_batch, self.step / self.total_steps, draws)

    def _schedule(self) -> float:
        """Linear warm-up, then half a cosine down to 0, as a factor of the learning rate."""
        warmup = self.total_steps * min(1.0, self.settings.warmup_epochs / self.settings.epochs)
        if self.step < warmup:
            return (self.step + 1) / (warmup + 1)  # also the first step learns
        return 0.5 * (1 + math.cos(math.pi * (self.step - warmup) / (self.total_steps - warmup)))

    def _loader(self) -> Iterator[tuple[Tensor, Tensor]]:
        a = self.accelerator
        batches = GlobalBatches(
            len(self.data), self.settings.batch_size, self.settings.seed, self.step, self.total_steps, a.process_index,
            a.num_processes,
        )  # fmt: skip
        # Not prepared by Accelerate, which would hand out the samples in another order.
        return iter(
            DataLoader(
                self.data, batch_sampler=batches, num_workers=self.settings.workers, pin_memory=a.device.type == "cuda"
            )
        )

    # ------------------------------------------------------------ losses

    def _due_to_look(self) -> bool:
        return self.accelerator.device.type == "cpu" or self.step % _LOG_EVERY == 0 or self.step == self.total_steps

    def _write_losses(self) -> None:
        """Append the losses since the last call, averaged over the processes, to losses.jsonl."""
        losses = self.accelerator.reduce(torch.stack([loss for _, _, loss in self._pending]), "mean").tolist()
        rows = [
            {"step": step, "epoch": step * self.global_batch / len(self.data), "loss": loss, "lr": lr}
            for (step, lr, _), loss in zip(self._pending, losses, strict=True)
        ]
        self._pending.clear()
        self.loss = losses[-1]
        if self.accelerator.is_main_process:
            with open(self._losses, "a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
        if not all(map(math.isfinite, losses)):
            raise TrainingError(f"the loss is not finite at step {self.step}: try a lower lr")

    @property
    def _losses(self) -> Path:
        return self.settings.out / "losses.jsonl"

    # ------------------------------------------------------------ checkpoints

    def _due_to_save(self) -> bool:
        if self.settings.save_every is not None:
            return self.step % self.settings.save_every == 0
        # The clocks of the processes differ: only where a save needs no talk between them, that is with no losses pending.
        return not self._pending and time.monotonic() - self._saved > self.settings.save_minutes * 60

    def _save(self) -> None:
        if self._pending:
            self._write_losses()
        self._saved, self._saved_step = time.monotonic(), self.step
        if self.accelerator.is_main_process:
            state = {"step": self.step, "mask_seed": [self.settings.seed, self.step], **self._identity()}
            optimizer = self.optimizer.optimizer
            checkpoint.save(
                self.checkpoints, self.step, self.plain_model, optimizer, state, self.settings.keep_checkpoints
            )

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run that it continues."""
        same = ("epochs", "lr", "weight_decay", "warmup_epochs", "seed")
        return {
            "system": self.config.system, "model": jsonable(dataclasses.asdict(self.config)), "total_steps": self.total_steps,
            "global_batch": self.global_batch, "mixed_precision": self.accelerator.mixed_precision, **self.data.identity(),
            **{name: getattr(self.settings, name) for name in same},
        }  # fmt: skip

    def _resume(self, optimizer: torch.optim.Optimizer) -> int:
        """The step to go on from: 0, or that of the newest checkpoint, which is loaded."""
        done = checkpoint.finished(self.checkpoints)
        if (done or self._losses.exists()) and not self.settings.resume:
            raise CheckpointError(
                f"{self.settings.out} holds a run already: resume it (--resume), or choose another folder"
            )
        step = 0
        if done:
            state = checkpoint.load_state(done[-1])
            checkpoint.check_same_run(done[-1], state, self._identity())
            checkpoint.load_model(done[-1], self.plain_model)
            checkpoint.load_optimizer(done[-1], self.plain_model, optimizer)
            step = state["step"]
        if self.accelerator.is_main_process:
            self.settings.out.mkdir(parents=True, exist_ok=True)
            checkpoint.remove_partial(self.checkpoints)
            self.loss = checkpoint.truncate_losses(self._losses, step)
        self.accelerator.wait_for_everyone()
        return step

    # ------------------------------------------------------------ the end

    def finish(self, samples_per_second: float) -> Result:
        """Save, report the files that could not be read, and write the model alone to out/model."""
        if self._saved_step != self.step:
            self._save()
        undecodable = sorted(set(gather_object(sorted(self._undecodable))))
        late = {self.data.paths[i]: "the file cannot be decoded" for i in undecodable}
        self._report(late)
        folder = self.settings.out / "model"
        if self.accelerator.is_main_process:
            fields = {"system": self.config.system, **jsonable(dataclasses.asdict(self.config))}
            checkpoint.save_model(folder, self.plain_model, fields)
        self.accelerator.wait_for_everyone()
        self._release()
        self.accelerator.end_training()
        unreadable = {str(path): reason for path, reason in {**self.data.unreadable, **late}.items()}
        return Result(self.step, self.total_steps, self.loss, samples_per_second, folder, self.data.unit, unreadable)

    def _release(self) -> None:
        """Let go of the data-parallel model while the process group is held by others.

        Its reducer, freed last, would destroy the group with the GIL held, and wait for ever for a thread of gloo that wants it.
        """
        del self.model, self.optimizer
        self.accelerator.free_memory()
        gc.collect()

    def _report(self, unreadable: dict[Path, str]) -> None:
        if unreadable:
            lines = [f"  {path}: {reason}" for path, reason in unreadable.items()]
            count = f"{len(lines)} unreadable {self.data.file}{'s' if len(lines) > 1 else ''} skipped:"
            self.accelerator.print("\n".join([count, *lines]))


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW as MAE: betas 0.9 and 0.95, no weight decay on biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
