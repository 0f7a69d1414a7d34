"""What metrics with a network share: finding weights, exact computing, fingerprints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import versions_of
from ..pretrained.find import digest, find
from ..pretrained.network import load_frozen, no_autocast


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Compute in full float32 within it, without gradients."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    kept = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        with torch.no_grad(), no_autocast(device):
            yield
    finally:
        for backend, was in zip(backends, kept, strict=True):
            backend.allow_tf32 = was


@dataclass(frozen=True, eq=False)
class Weighted:
    """A metric with published weights, in float32.

    Attributes:
        weights: path of the weight file; it is searched where None.
        folders: where it is searched first.

    Raises:
        ValueError: for an option it does not have; `RewardUnavailable` if weights are missing.
    """

    name: ClassVar[str]
    weights: str | None = None
    folders: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.folders, str):
            raise ValueError(f"folders is {self.folders!r}; give a list of folders")
        _ = self.paths  # what is missing is said at once

    @property
    def files(self) -> Mapping[str, str | None]:
        """The given path of each weight file, None to search for it, by key of the catalogue."""
        raise NotImplementedError

    @property
    def preparation(self) -> str:
        """What is done to images before the network, for a fingerprint."""
        raise NotImplementedError

    @cached_property
    def paths(self) -> dict[str, Path]:
        return {key: find(key, self.folders, given) for key, given in self.files.items()}

    def network(self, key: str, make: Callable[[], nn.Module]) -> nn.Module:
        """The frozen network of a weight file; the one in memory if it has the same weights.

        Args:
            key: of the catalogue.
            make: makes the network without its weights.
        """
        return load_frozen(self.paths[key], ("",), key, make, "float32")

    def fingerprint(self) -> dict[str, Any]:
        """What its numbers depend on; the hash is that of the tensors read, whatever the file."""
        weights = {k: {"file": p.name, "sha256": digest(p)} for k, p in self.paths.items()}
        return {
            "features": self.name,
            "weights": weights,
            "preparation": self.preparation,
            "dtype": "float32",
            "versions": versions_of("torch", "pillow"),
        }
