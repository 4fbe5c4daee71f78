"""Public docstrings: every section, in order, and an example that runs. The README's example runs too."""

import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

import maskops
from maskops._backends import PUBLIC

FUNCTIONS = sorted(name for name in maskops.__all__ if inspect.isfunction(getattr(maskops, name)))
SECTIONS = ("Args:", "Returns:", "Notes:", "Raises:", "Source:", "Backends:", "Example:")
ROOT = Path(maskops.__file__).resolve().parents[1]


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "explain"])
def test_docstring_has_its_sections_in_order(name: str) -> None:
    doc = inspect.getdoc(getattr(maskops, name))
    # A function that is composed of PyTorch ops has no op of its own, and so no backends.
    sections = [section for section in SECTIONS if section != "Backends:" or name in PUBLIC]
    places = [doc.find(f"\n{section}") for section in sections]
    assert -1 not in places and places == sorted(places), dict(zip(sections, places, strict=True))
    assert doc.splitlines()[0].endswith("."), "the first line is one sentence"
    for parameter in inspect.signature(getattr(maskops, name)).parameters:
        assert re.search(rf"\b{parameter}\b", doc), f"{parameter} is not described"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_example_runs(name: str) -> None:
    tests = doctest.DocTestFinder(recurse=False).find(
        getattr(maskops, name), name, globs={"maskops": maskops, "torch": torch}
    )
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    said: list[str] = []
    for test in tests:
        runner.run(test, out=said.append)
    assert runner.summarize(verbose=False).attempted > 0 and not said, "".join(said)


def test_readme_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_readme_names_every_public_function() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in text for name in PUBLIC)
