"""The pack's own kinds of sockets."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io

from .errors import NodeError

Trajectory = io.Custom("PCPO_TRAJECTORY")
Reward = io.Custom("PCPO_REWARD")


AUTO, OFF = "auto", "off"

SEEDS = 2**64
"""After the largest seed comes 0."""


def seed_input(tooltip: str) -> io.Int.Input:
    """The widget of a seed."""
    return io.Int.Input(
        "seed", default=0, min=0, max=SEEDS - 1, control_after_generate=True, tooltip=tooltip
    )


def number_or_word(
    id: str, word: str = AUTO, *, default: float | None = None, unset: float = -1, **about: Any
) -> io.MultiType.Input:
    """A widget that takes a number, or a word in its place; a number may be connected to it.

    Args:
        word: what stands for no number.
        default: None for the word.
        unset: what stood for it in workflows of before, as any number below 0 did.
        about: further keywords of the widget.
    """
    text = io.String.Input(
        id,
        default=word if default is None else f"{default:.15g}",
        extra_dict={"unset": unset, "word": word},  # for the frontend, which opens old workflows
        **about,
    )
    return io.MultiType.Input(text, [io.Float, io.Int])


def number_of(given: Any, name: str, word: str = AUTO, most: float = math.inf) -> float | None:
    """The number of such a widget; None for the word.

    >>> number_of("0,7", "noise_level"), number_of("Auto ", "noise_level"), number_of(-1, "x")
    (0.7, None, -1)
    """
    text = str(given).strip().lower()
    if text in (word, ""):
        return None
    try:
        number = float(text.replace(",", "."))
    except ValueError:
        number = math.nan
    if not (number <= most and math.isfinite(number)):
        upto = "" if most == math.inf else f" up to {most:g}"
        raise NodeError(f"{name} is {given!r}; write a number{upto}, or {word}")
    return int(number) if text.lstrip("-").isdecimal() else number
