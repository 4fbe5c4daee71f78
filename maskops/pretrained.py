"""The systems that can be pre-trained, by name, and their trained models read from a folder: maskops.train writes it."""

import importlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from maskops import checkpoint
from maskops.checkpoint import CheckpointError

SYSTEMS = {  # what can be pre-trained: name -> module and class of its model
    "mae": "maskops.models.mae:MAE",
    "cm3": "maskops.models.cm3:CM3",
    "colormae": "maskops.models.colormae:ColorMAE",
    "dmjd": "maskops.models.dmjd:DMJD",
    "hpm": "maskops.models.hpm:HPM",
    "spark": "maskops.models.spark:SparK",
    "electra": "maskops.models.electra:ELECTRA",
    "dupmae": "maskops.models.dupmae:DupMAE",
    "ernie_gram": "maskops.models.ernie_gram:ERNIEGram",
    "multimae": "maskops.models.multimae:MultiMAE",
    "openbeats": "maskops.models.openbeats:OpenBEATs",
}


def model_class(system: str) -> type[nn.Module]:
    """The class of a system's model.  ValueError for a system that is not in SYSTEMS."""
    if system not in SYSTEMS:
        raise ValueError(f"pretrain: system must be one of {list(SYSTEMS)}, got {system!r}")
    module, name = SYSTEMS[system].split(":")
    return getattr(importlib.import_module(module), name)


def samples_of(system: str) -> str:
    """What a system trains on: "images", "scenes", "text" or "sounds"."""
    return model_class(system).Config.samples


def load_pretrained(folder: str | Path) -> nn.Module:
    """The model of a run, in eval mode: its out/model folder, or out itself."""
    given = folder = Path(folder)
    folder = folder if (folder / "config.json").exists() else folder / "model"
    try:
        fields = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{given} holds no trained model: give the folder that pretrain wrote to, its --out, or its model folder ({error})"
        ) from error
    made = model_class(fields.pop("system", "mae"))
    # JSON has no tuples.
    model = made(made.Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}))
    checkpoint.load_model(folder, model)
    return model.eval()


def jsonable(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config as JSON has them, without tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
