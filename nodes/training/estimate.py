"""Time and memory of a training, in the node's words; `trainers/estimate/memory.py` counts them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...trainers.estimate import memory as counted
from ...trainers.estimate.fit import GIB, computers, seconds, took
from ...trainers.estimate.memory import Estimate
from ...trainers.estimate.network_costs import network_for


def estimate(values: Mapping[str, Mapping[str, Any]]) -> Estimate:
    """Estimate time and memory of a config.

    Args:
        values: sections and fields of a `TrainConfig`.

    Returns:
        Figures for a card of the preset's family, however small it may be.
    """
    source = values["model"]["source"]
    return counted.estimate(values, network_for(source))


def text_of(found: Estimate) -> str:
    """The estimate in words."""
    times = [
        f"{took(seconds(found, computer) * found.iterations)} on {computer.name}"
        for computer in computers(found)
    ]
    flop = f"{found.flop / 1e12:.3g} TFLOP"
    return "\n".join(
        [
            f"{found.network.name}, {found.iterations} iterations of {flop}, roughly:",
            *times,
            f"up to {found.memory / GIB:.1f} GiB of memory beside ComfyUI's",
        ]
    )
