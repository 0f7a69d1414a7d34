"""Versions of what is installed, for job files and `pcpo doctor`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "comfyui-pcpo",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "pydantic",
    "numpy",
    "pillow",
    "matplotlib",
    "tyro",
)


def versions() -> dict[str, str]:
    """The version of Python and of each package; "missing" if it is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found
