"""What a training will take, in the words of the node; counted in `trainers/estimate.py`."""

from __future__ import annotations

from ..trainers.estimate import Estimate, estimate
from ..trainers.fitting import GIB, computers, seconds, took

__all__ = ["Estimate", "estimate", "text_of"]


def text_of(found: Estimate) -> str:
    """The estimate in words.

    Args:
        found: the figures.

    Returns:
        A few lines.
    """
    times = [
        f"  {took(seconds(found, computer) * found.iterations)} on {computer.name}"
        for computer in computers(found)
    ]
    return "\n".join(
        [
            f"Estimate for {found.network.name}:",
            f"{found.flop / 1e12:.3g} TFLOP an iteration, {found.iterations} iterations:",
            *times,
            f"up to {found.memory / GIB:.1f} GiB of memory, besides ComfyUI's own.",
            "Counted from the network's layers; times are rough, within a factor of two.",
        ]
    )
