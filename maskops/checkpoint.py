"""Checkpoints that survive a kill at any moment: safetensors and JSON in a folder that appears whole or not at all.

OUT/checkpoints/step-00000200/{model.safetensors, optimizer.safetensors, state.json}
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_PREFIX, _PARTIAL = "step-", ".partial-"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, or that does not fit the run."""


def save(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Write the checkpoint of `step` below `folder` and delete all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    partial, final = folder / f"{_PARTIAL}{step:08d}-{os.getpid()}", folder / f"{_PREFIX}{step:08d}"
    partial.mkdir()
    save_file(_contiguous(model.state_dict()), partial / "model.safetensors")
    save_file(_contiguous(optimizer_tensors(model, optimizer)), partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    for path in partial.iterdir():
        _sync(path)
    _sync(partial)
    if final.exists():
        # Only where a run was resumed before this step was its newest: the same contents, so either may stay.
        shutil.rmtree(partial)
    else:
        partial.rename(final)
        _sync(folder)
    for old in finished(folder)[:-keep]:
        # Renamed first: a kill during the deletion must not leave half a checkpoint under a good name.
        shutil.rmtree(old.rename(folder / f"{_PARTIAL}{old.name}"))
    return final


def save_model(folder: Path, model: nn.Module, config: dict[str, Any]) -> None:
    """Write the weights and config.json, the config last: where it stands, the model is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".model.partial-{os.getpid()}"
    save_file(_contiguous(model.state_dict()), partial)
    _sync(partial)
    partial.replace(folder / "model.safetensors")
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")


def finished(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())


def remove_partial(folder: Path) -> None:
    """Delete what a killed run left behind."""
    for path in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    try:
        return json.loads((checkpoint / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{checkpoint} is not a maskops checkpoint: {error}") from error


def load_model(checkpoint: Path, model: nn.Module) -> None:
    """Copy the saved weights into `model`."""
    try:
        model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())  # torch gives a list over several lines
        raise CheckpointError(f"{checkpoint} does not fit this model: {reason}") from error


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give `optimizer` the saved tensors of each parameter of `model`."""
    parameters = dict(model.named_parameters())
    for key, value in load_file(checkpoint / "optimizer.safetensors").items():
        slot, name = key.split("/", 1)
        if name not in parameters:
            raise CheckpointError(f"{checkpoint} does not fit this model: no parameter {name}")
        # AdamW keeps its step counter on the CPU, everything else beside the parameter.
        device = value.device if slot == "step" else parameters[name].device
        optimizer.state[parameters[name]][slot] = value.to(device)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors as {"exp_avg/<parameter name>": tensor}."""
    slots = ((name, optimizer.state.get(p, {})) for name, p in model.named_parameters())
    return {
        f"{slot}/{name}": value for name, state in slots for slot, value in state.items() if isinstance(value, Tensor)
    }


def write_atomic(path: Path, text: str) -> None:
    """Replace a text file: readers see the old or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(text)
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in tensors.items()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_same_run(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """CheckpointError, which names what differs, unless a run goes on with what its checkpoint in folder was made with."""
    saved, now = _flat(saved), _flat(now)
    names = dict.fromkeys([*now, *(name for name in saved if name.startswith("model."))])
    different = [
        f"{name} was {saved.get(name)}, now {now.get(name)}" for name in names if saved.get(name) != now.get(name)
    ]
    if different:
        raise CheckpointError(f"{folder} is of a run with other settings: {'; '.join(different)}")


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with those of the model beside them, as model.<name>."""
    model = fields.get("model") or {}
    return {k: v for k, v in fields.items() if k != "model"} | {f"model.{k}": v for k, v in model.items()}


def truncate_losses(path: Path, step: int) -> float:
    """Drop the lines of steps after the checkpoint, and a last line that a kill cut off. Returns the last loss that stays."""
    kept, loss = [], math.nan
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] <= step:
            kept.append(line + "\n")
            loss = row["loss"]
    if path.exists():
        write_atomic(path, "".join(kept))
    return loss
