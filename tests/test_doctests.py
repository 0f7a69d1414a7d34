"""Every example in every docstring runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import comfyui_pcpo
import pytest

MODULES = [
    comfyui_pcpo.__name__,
    *(m.name for m in pkgutil.walk_packages(comfyui_pcpo.__path__, f"{comfyui_pcpo.__name__}.")),
]


def test_every_file_of_the_package_is_walked():
    root = Path(comfyui_pcpo.__path__[0])
    files = [p for part in ("pcpo", "trainers", "nodes") for p in (root / part).rglob("*.py")]
    assert len(MODULES) == len(files) + 1


@pytest.mark.parametrize("name", [m for m in MODULES if ".nodes." not in m])
def test_doctests(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.failed == 0
    has_examples = ">>> " in Path(module.__file__).read_text(encoding="utf-8")
    assert (result.attempted > 0) == has_examples


@pytest.mark.parametrize("file", sorted(Path(comfyui_pcpo.__path__[0], "nodes").glob("*.py")))
def test_nodes_need_comfyui_and_so_have_no_examples(file):
    assert ">>> " not in file.read_text(encoding="utf-8")
