"""What a training costs on this computer, in plain words, before it starts."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...trainers.estimate import memory as counted
from ...trainers.estimate.disk import disk_bytes
from ...trainers.estimate.fit import CARDS, CPU, GIB, Change, Computer, remedies, seconds, took
from ...trainers.estimate.memory import Estimate
from ...trainers.estimate.network_costs import Network, network_for
from ...trainers.families.registry import spec_of_source
from ...trainers.job.metrics import is_number, last_lines
from ..errors import NodeError
from ..families import DEMOS
from ..jobs.access import Jobs
from .settings import Values

LIKE = 4.0
"""By how much less an iteration may compute that tells the time of another: loading weighs less."""
SPARE = 64e6
"""Bytes of a disk that are left free."""
MID_RANGE, FAST, DATA_CENTRE = CARDS
NAMES = (
    (DATA_CENTRE, re.compile(r"[ABH][12]00|H20\b|GB?200|MI[23]\d\d", re.IGNORECASE)),
    (FAST, re.compile(r"[345]090|[45]080|5070 Ti|7900 XTX|A[56]000|L40|RTX \d000", re.IGNORECASE)),
)
"""Cards by their names; all others are mid-range ones."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a training would run.

    Attributes:
        device: "cpu", "cuda:0".
        name: of the card.
        memory: bytes.
        folders: that are written to.
    """

    device: str
    name: str
    memory: float
    folders: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a training costs.

    Attributes:
        seconds: in all.
        card: bytes of the device.
        disk: bytes.
        changes: that make it fit the device; none where it fits, None where nothing does.
    """

    seconds: float
    memory: float
    card: float
    disk: float
    changes: Sequence[Change] | None = ()


def network_of(base: str, source: str) -> Network:
    """The network that is trained: a demo's, or the one that the preset is for.

    Args:
        base: a demo model's source, or a family.
        source: `model.source` of the preset.
    """
    if base in DEMOS.values():
        return network_for(base)
    spec = spec_of_source(source)
    fits = spec is not None and spec.name == base and source not in spec.demos
    return network_for(source) if fits else network_for("", base)


def cost_of(values: Values, base: str, place: Place, jobs: Jobs, copy: float = 0.0) -> Cost:
    """Estimate a training.

    Args:
        values: of its config, with its rewards.
        base: a demo model's source, or a family.
        jobs: earlier ones, which say how fast this computer is.
        copy: bytes of a copy of the model that it would write.
    """
    network = network_of(base, values["model"]["source"])
    card = None if place.device == "cpu" else place.memory
    found = counted.estimate(values, network, card)
    changes: Sequence[Change] | None = ()
    if card is not None and found.memory > card:
        changes = remedies(values, network, card)
    time = _measured(found, place.device, jobs) or seconds(found, computer_of(place))
    disk = disk_bytes(values, network) + copy
    return Cost(time * found.iterations, found.memory, place.memory, disk, changes)


def computer_of(place: Place) -> Computer:
    """The kind of computer, by its card's name."""
    if place.device == "cpu":
        return CPU
    return next((kind for kind, names in NAMES if names.search(place.name)), MID_RANGE)


def _measured(now: Estimate, device: str, jobs: Jobs) -> float | None:
    """Seconds of an iteration, by the newest job on the same network and device."""
    for job in jobs.jobs():
        if job["device"] != device or job["iteration"] < 2:
            continue
        folder = jobs.folder(job["id"])
        about = folder.read("job.json")
        values, base = about.get("config"), about.get("inputs", {}).get("base")
        if not values or base is None or network_of(base, values["model"]["source"]) != now.network:
            continue
        spent = [line.get("seconds") for line in last_lines(folder.metrics_file, 8)]
        known = sorted(filter(is_number, spent))
        before = counted.estimate(values, now.network)
        if known and before.flop > now.flop / LIKE:
            return known[len(known) // 2] * now.flop / before.flop
    return None


def in_words(cost: Cost) -> str:
    """A cost in one line.

    >>> in_words(Cost(10000, 7.1 * GIB, 8 * GIB, 40e6))
    'about 3 h, 7.1 of 8 GB of memory, 40 MB on disk'
    """
    memory = f"{cost.memory / GIB:.1f} of {cost.card / GIB:.3g} GB of memory"
    line = f"about {took(cost.seconds)}, {memory}, {size(cost.disk)} on disk"
    if cost.changes is None:
        return f"{line}; that does not fit, whatever the settings: use a smaller model"
    if not cost.changes:
        return line
    named = " and ".join(f"{section}_{name} {value}" for section, name, value in cost.changes)
    return f"{line}; that does not fit: set {named} in PCPO Training Settings"


def size(count: float) -> str:
    """Bytes for people.

    >>> size(4.1e7), size(2.34e9)
    ('41 MB', '2.3 GB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(count / 1e6, 1):.0f} MB"


def check_disk(count: float, folders: Sequence[Path]) -> None:
    """Refuse a training that writes so many bytes, if a disk has no room for them."""
    for folder in folders:
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
        free = shutil.disk_usage(there).free
        if free < count + SPARE:
            raise NodeError(
                f"the disk of {folder.name} has {size(free)} free and this training writes about "
                f"{size(count)}; free some space, or raise run_save_every"
            )


def place_of(device: Any, name: str, folders: tuple[Path, ...]) -> Place:
    """Where a training would run, as ComfyUI knows it.

    Args:
        device: ComfyUI's, a `torch.device`.
        name: of the job's device.
        folders: that are written to.
    """
    import torch
    from comfy.model_management import get_total_memory

    if name == "cpu":
        return Place(name, "", float(get_total_memory(torch.device("cpu"))), folders)
    title = torch.cuda.get_device_name(device)
    return Place(name, title, float(get_total_memory(device)), folders)
