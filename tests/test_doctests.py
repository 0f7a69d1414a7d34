"""Every example in every docstring runs."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
from pathlib import Path

import comfy_api_fixture  # noqa: F401 (a stand-in for what nodes import)
import comfyui_pcpo
import pytest

WALKED = (m.name for m in pkgutil.walk_packages(comfyui_pcpo.__path__, "comfyui_pcpo."))
MODULES = [comfyui_pcpo.__name__, *(name for name in WALKED if name != "comfyui_pcpo.install")]


def test_every_file_of_the_package_is_walked():
    root = Path(comfyui_pcpo.__path__[0])
    files = [p for part in ("pcpo", "trainers", "nodes") for p in (root / part).rglob("*.py")]
    assert len(MODULES) == len(files) + 3  # of the root, itself and two that all may know


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    file = importlib.util.find_spec(name).origin
    has_examples = ">>> " in Path(file).read_text(encoding="utf-8")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name.split(".")[0] in ("comfy", "comfy_api")  # a node, without ComfyUI around
        assert not has_examples
        return
    result = doctest.testmod(module)
    assert result.failed == 0
    assert (result.attempted > 0) == has_examples
