"""The weight files of rewards and metrics, read from catalogue.toml, which describes its fields."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...registry import REWARDS


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file of weights, or of a vocabulary; its key is the name of its table in catalogue.toml."""

    key: str
    name: str
    what: str
    page: str
    size: int
    licence: str
    folder: str = "reward_models"
    repo: str | None = None
    file: str | None = None
    sha256: str | None = None
    url: str | None = None
    beside: Sequence[str] = ()
    hints: Sequence[str] = ()
    unverified: Sequence[str] = ()

    @property
    def size_told(self) -> str:
        """Its size, for a person.

        >>> WEIGHTS["aesthetic_head"].size_told, WEIGHTS["pick_score"].size_told
        ('3.71 MB', 'about 3.94 GB')
        """
        return f"{'about ' if 'size' in self.unverified else ''}{size_told(self.size)}"

    @property
    def licence_told(self) -> str:
        return f"{self.licence} (unverified)" if "licence" in self.unverified else self.licence


def size_told(size: int) -> str:
    """A number of bytes, for a person."""
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    unit, name = next((unit for unit in units if size >= unit[0]), (1.0, "bytes"))
    return f"{size / unit:.3g} {name}"


_DATA = tomllib.loads(Path(__file__).with_name("catalogue.toml").read_text(encoding="utf-8"))

WEIGHTS = {key: WeightFile(key, **fields) for key, fields in _DATA["files"].items()}
METRICS: dict[str, list[str]] = _DATA["metrics"]


def of_metric(name: str) -> list[WeightFile]:
    """The weight files that a metric needs.

    >>> [file.key for file in of_metric("lpips")], of_metric("fd_random")
    (['lpips_alex', 'alexnet'], [])
    """
    return [WEIGHTS[key] for key in METRICS.get(name, ())]


def of_reward(name: str) -> list[WeightFile]:
    """The weight files that a reward needs at its default options.

    >>> [file.key for file in of_reward("aesthetic")], of_reward("scene")
    (['aesthetic_head', 'clip_l_vision'], [])
    """
    return [WEIGHTS[key] for key in REWARDS.entries[name].files] if name in REWARDS else []


def rewards_of(key: str) -> list[str]:
    """The rewards that need a weight file, first those that need it by default.

    >>> rewards_of("bert_vocab"), rewards_of("clip_b32")
    (['image_reward'], ['clip_score'])
    """
    others = ["clip_score"] if key == "clip_b32" else []
    return [reward for reward, entry in REWARDS.entries.items() if key in entry.files] + others


def metrics_of(key: str) -> list[str]:
    """The metrics that need a weight file.

    >>> metrics_of("inception_2015"), metrics_of("clip_l")
    (['fid', 'inception_score'], [])
    """
    return [metric for metric, keys in METRICS.items() if key in keys]
