"""What rewards with a network share: finding weights, batches, gradients, fingerprints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from ..errors import versions_of
from ..pictures.tensors import Images
from ..pretrained.find import digest, find
from ..pretrained.network import DTYPES, device_of, no_autocast
from ..pretrained.preprocess import Preparation, Prepared, sides, too_long
from ..scores import Scores
from .base import BatchReward


def failed_scores(count: int, why: str) -> Scores:
    """NaN, with the reason, for each image of a batch."""
    return Scores(torch.full((count,), float("nan")), errors=(why,) * count)


@dataclass(frozen=True, eq=False)
class NetworkReward(BatchReward):
    """A reward that a network computes from prepared images.

    Attributes:
        weights: path of the weight file; it is searched where None.
        folders: where it is searched first.
        dtype: of the network: "float32", "float16" or "bfloat16"; what follows it is float32.

    Raises:
        ValueError: for an option it does not have.
    """

    weights: str | None = None
    folders: list[str] = field(default_factory=list)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if isinstance(self.folders, str):
            raise ValueError(f"folders is {self.folders!r}; give a list of folders")
        _ = self.paths  # what is missing is said at once

    @property
    def files(self) -> Mapping[str, tuple[str | None, tuple[str, ...]]]:
        """By key of the catalogue: the path given, and the prefixes of the names it reads."""
        raise NotImplementedError

    @property
    def preparation(self) -> Preparation:
        """What is done to images before the network."""
        raise NotImplementedError

    def judge(self, prepared: Prepared, prompts: Sequence[str]) -> Float32[Tensor, " b"]:
        """Score prepared images, on the network's device."""
        raise NotImplementedError

    @cached_property
    def paths(self) -> dict[str, Path]:
        return {key: find(key, self.folders, given) for key, (given, _) in self.files.items()}

    @property
    def device(self) -> torch.device:
        return device_of(self.modules()[0])

    def measure(self, images: Images, prompts: Sequence[str]) -> Scores:
        if why := too_long(*sides(images)):
            return failed_scores(len(images), why)
        with torch.no_grad(), no_autocast(self.device):
            values = self.judge(self.preparation(images.to(self.device)), prompts)
        return Scores(values.float().cpu())

    def value(
        self, pixels: Float[Tensor, "b 3 h w"], prompts: Sequence[str]
    ) -> Float32[Tensor, " b"]:
        """The reward of pixels in 0 to 1 with its gradient, not rounded to 8 bits."""
        with no_autocast(self.device):
            values = self.judge(self.preparation.with_gradient(pixels.to(self.device)), prompts)
        return values.to(pixels.device)

    def settings(self) -> dict[str, Any]:
        """Options besides files and dtype that its numbers depend on."""
        return {}

    def fingerprint(self) -> dict[str, Any]:
        """What its numbers depend on; the hash is that of the tensors read, whatever the file."""
        weights = {
            key: {"file": self.paths[key].name, "sha256": digest(self.paths[key], *parts)}
            for key, (_, parts) in self.files.items()
        }
        return {
            "reward": self.name,
            **self.settings(),
            "weights": weights,
            "preparation": self.preparation.id,
            "dtype": self.dtype,
            "versions": versions_of("torch", "transformers", "pillow"),
        }
