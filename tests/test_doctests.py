"""Examples in docstrings run. (`--doctest-modules` would import this layout twice.)"""

import doctest
import importlib
import pkgutil

import comfyui_pcpo
import pytest

MODULES = [
    module.name
    for part in ("pcpo", "trainers")
    for module in pkgutil.walk_packages(
        importlib.import_module(f"comfyui_pcpo.{part}").__path__, f"comfyui_pcpo.{part}."
    )
    if not module.name.endswith("__main__")
]


def test_there_are_modules():
    assert comfyui_pcpo.__doc__ and len(MODULES) > 30


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, extraglobs={"torch": importlib.import_module("torch")})
    assert failed == 0
