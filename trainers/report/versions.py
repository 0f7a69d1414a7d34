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
)


def versions() -> dict[str, str]:
    """The version of Python and of each package; "missing" if it is not installed."""
    by_package = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            by_package[package] = version(package)
        except PackageNotFoundError:
            by_package[package] = "missing"
    return by_package
