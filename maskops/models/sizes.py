"""Fields of a config by the name of a size, as `maskops pretrain --size` gives it."""

from __future__ import annotations

import dataclasses
from typing import Any


def fields_of(config: type, sizes: dict[str, dict[str, Any]], size: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Those of a size, with single ones changed.  ValueError for another size, or a field that the config does not have."""
    if size not in sizes:
        raise ValueError(f"{config.__name__}: size must be one of {list(sizes)}, got {size!r}")
    unknown = sorted(set(changes) - {field.name for field in dataclasses.fields(config)})
    if unknown:
        raise ValueError(f"{config.__name__} has no {', '.join(unknown)}")
    return {**sizes[size], **changes}
