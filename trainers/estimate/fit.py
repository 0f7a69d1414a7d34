"""Whether a run fits a card, what would make it fit, how long it takes, and all of it in words.

No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .memory import Estimate, Values, estimate
from .network_costs import DEMO_WEIGHTS, Network

GIB = float(2**30)


@dataclass(frozen=True, slots=True)
class Computer:
    """A device whose time is estimated.

    Attributes:
        flops: operations per second reached in practice.
        bandwidth: bytes per second of its memory.
        bus: bytes per second that it is sent from main memory.
    """

    name: str
    flops: float
    bandwidth: float
    bus: float


CPU = Computer("two CPU cores", 0.05e12, 1e10, 1e10)
CARDS = (
    Computer("a mid-range card (25 TFLOP/s)", 25e12, 0.4e12, 12e9),
    Computer("a fast 24 GB card (80 TFLOP/s)", 80e12, 0.9e12, 24e9),
    Computer("a data-centre card (300 TFLOP/s)", 300e12, 2.5e12, 50e9),
)


Change = tuple[str, str, Any]
"""Section, field and value."""

REMEDIES: tuple[Change, ...] = (
    ("run", "store_on", "cpu"),
    ("model", "offload", "always"),
    ("model", "gradient_checkpointing", True),
    ("run", "micro_batch", 1),
    ("model", "precision", "bfloat16"),
    ("optimizer", "kind", "adamw8bit"),
    ("model", "base", "fp8"),
    ("model", "base", "nf4"),
    ("model", "offload", "blocks"),
    ("model", "width", 512),
    ("model", "height", 512),
)
"""Changes that save memory, the cheapest first."""


def remedies(values: Values, network: Network, card: float) -> list[Change] | None:
    """The fewest changes, in the order of `REMEDIES`, with which a run fits.

    None if all of them together are not enough. `card` is in bytes.
    """
    useful = [change for change in REMEDIES if _is_less(values, network, change)]
    for single in useful:
        if _fits(values, network, card, [single]):
            return [single]
    chosen: list[Change] = []
    for change in useful:
        chosen = [c for c in chosen if c[:2] != change[:2]] + [change]
        if _fits(values, network, card, chosen):
            break
    else:
        return None
    for change in list(chosen):
        rest = [c for c in chosen if c != change]
        if _fits(values, network, card, rest):
            chosen = rest
    return chosen


def _is_less(values: Values, network: Network, change: Change) -> bool:
    section, name, value = change
    now = values[section][name]
    if now == value or ((section, name) == ("model", "precision") and now != "float32"):
        return False
    is_of_frozen = name == "base" or change[2] == "blocks"
    if is_of_frozen and (values["trainable"]["kind"] == "full" or not network.packable):
        return False
    return name not in ("width", "height") or (now or network.side) > value


def _fits(values: Values, network: Network, card: float, changes: Sequence[Change]) -> bool:
    return estimate(apply_changes(values, changes), network, card).memory <= card


def apply_changes(values: Values, changes: Sequence[Change]) -> dict[str, dict[str, Any]]:
    """The sections and fields after changes."""
    copy = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    for section, name, value in changes:
        copy[section][name] = value
    return copy


# --- in words ------------------------------------------------------------------------------------


def took(seconds: float) -> str:
    """A duration in words.

    >>> took(40), took(600), took(90000), took(9e6)
    ('40 s', '10 min', '25 h', '104 days')
    """
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (2e5, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} days"


def computers(estimate: Estimate) -> tuple[Computer, ...]:
    """The devices whose time is shown for a network."""
    return (CPU,) if estimate.network.weights < DEMO_WEIGHTS else CARDS


def seconds(estimate: Estimate, computer: Computer) -> float:
    """Seconds per iteration; blocks are copied while others run."""
    computing = estimate.flop / computer.flops + estimate.moved / computer.bandwidth
    return max(computing, estimate.copied / computer.bus)


def text_of(estimate: Estimate) -> str:
    """An estimate in lines of text, memory stage by stage."""
    lines = [
        f"Estimate for {estimate.network.name}, counted from its layers:",
        "memory of the device",
    ]
    for stage in estimate.stages:
        lines.append(f"  {stage.name:8} {stage.total / GIB:7.2f} GiB  {_parts(stage.parts)}")
    lines.append(f"  at most  {estimate.memory / GIB:7.2f} GiB")
    work = ", ".join(f"{name} {flop / 1e12:.3g}" for name, flop in estimate.work.items())
    lines.append(f"work: {estimate.flop / 1e12:.3g} TFLOP an iteration ({work})")
    for computer in computers(estimate):
        once = seconds(estimate, computer)
        total = took(once * estimate.iterations)
        lines.append(f"  {took(once)} an iteration, {total} in all, on {computer.name}")
    return "\n".join(lines)


def _parts(parts: Mapping[str, float]) -> str:
    large = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in large if size > 0.005 * GIB)


def refusal(values: Values, estimate: Estimate, card: float) -> str | None:
    """One sentence on why a run does not fit a card and what would; None if it fits."""
    if estimate.memory <= card:
        return None
    worst = max(estimate.stages, key=lambda stage: stage.total)
    needs = (
        f"the {worst.name} needs {estimate.memory / GIB:.1f} GiB and the card has {card / GIB:.1f}"
    )
    changes = remedies(values, estimate.network, card)
    if changes is None:
        return f"{needs}; no setting of memory makes it fit: use a larger card or a smaller model"
    named = ", ".join(
        f"--{section}.{_with_dashes(name)} {value}" for section, name, value in changes
    )
    return f"{needs}; it fits with {named}"


def _with_dashes(name: str) -> str:
    return name.replace("_", "-")
