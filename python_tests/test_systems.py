"""The registry of systems tells the truth: what works has a model and a Works check, and every model with a check is in it."""

from pathlib import Path

import pytest

import maskops
from maskops.systems import SYSTEMS, table

ROOT = Path(maskops.__file__).resolve().parents[1]
# Models and parts of models that are none of the 53.
OTHERS = {"__init__", "byte_lm", "images", "sizes", "mae", "maskgit", "mage", "mar", "llada"}


def test_there_are_53() -> None:
    assert len(SYSTEMS) == 53 == len({s.key for s in SYSTEMS})


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.key)
def test_status_is_true(system: object) -> None:
    model = ROOT / "maskops" / "models" / f"{system.key}.py"
    works = ROOT / "python_tests" / "models" / f"test_{system.key}.py"
    assert model.is_file() == works.is_file() == (system.status != "not yet")
    if works.is_file():
        text = works.read_text()
        assert f"maskops.models.{system.key} " in text and "def test_" in text
        assert {"works": "(the Works check)", "in part": "(the Works check, in part)"}[system.status] in text
        assert f"`{system.key}`" in (ROOT / "README.md").read_text()


def test_every_model_is_a_system() -> None:
    keys = {s.key for s in SYSTEMS}
    models = {p.stem for p in (ROOT / "maskops" / "models").glob("*.py")}
    tested = {p.stem.removeprefix("test_") for p in (ROOT / "python_tests" / "models").glob("test_*.py")}
    assert {m for m in models if m not in keys and m in tested} <= OTHERS


def test_table_has_every_system() -> None:
    lines = table().splitlines()
    assert len(lines) == 55 and all(
        s.key in line and s.status in line for s, line in zip(SYSTEMS, lines[1:], strict=False)
    )
    assert "mask_sampling" in table() and "of 53 work" in lines[-1]
