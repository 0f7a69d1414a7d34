"""What cannot be had here, and which versions there are."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


class RewardUnavailable(ValueError):
    """A reward cannot be had; the text says what is missing and what to do."""


def versions_of(*packages: str) -> dict[str, str]:
    """The installed version of each package, "missing" if there is none."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    return versions
