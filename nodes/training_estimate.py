"""What a training will take: rough figures, and how they are computed.

Work    forward passes of the network x its operations for one image and branch of guidance. An
        update costs three forward passes a trained step (forward, and a backward worth two), four
        where activations are computed again. The operations were counted from the layers.
Memory  weights, adapters with AdamW's moments, and what a forward pass keeps for the backward one,
        for all images of a micro-batch and both branches. Counted likewise, without what the
        system, the autoencoder and the text encoder take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .kinds import FLUX, SD1, SD3, family_of_source


@dataclass(frozen=True, slots=True)
class Network:
    """A family's network at its own size.

    Attributes:
        name: for the text.
        side: px.
        weights: how many.
        flop: of a forward pass on one image.
        kept: bytes that one image's forward pass keeps for the backward one, in float32.
        kept_again: the same where activations are computed again.
        rates: operations a second that are reached in practice, by computer.
        native: px of an image where none are given, if not `side`.
    """

    name: str
    side: int
    weights: float
    flop: float
    kept: float
    kept_again: float
    rates: Mapping[str, float]
    native: int | None = None


CARDS = {"a mid-range card (25 TFLOP/s)": 25e12, "a data-centre card (300 TFLOP/s)": 300e12}
CORES = {"two CPU cores": 0.02e12}
DEMO = Network("the demo model", 64, 1.08e6, 6.05e7, 2.6e6, 1e6, CORES)
FLOW_DEMO = Network("the demo model", 64, 3.77e6, 9.81e7, 9.8e5, 4.4e5, CORES)
NETWORKS = {
    SD1: Network("SD1.x", 512, 8.6e8, 8.03e11, 4.3e9, 8e8, CARDS),
    SD3: Network("SD3.5-M", 512, 2.24e9, 2.14e12, 6.8e9, 4.7e8, CARDS, 1024),
    FLUX: Network("FLUX", 512, 1.19e10, 1.77e13, 1.83e10, 1.4e9, CARDS, 1024),
}
"""At their own size, by family; DEMO and FLOW_DEMO are the demo models'."""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
HALF_KEPT = 0.85
"""Of `kept`, at half precision: norms, softmax and their like stay in float32."""
ADAPTED = 232e-6
"""Adapter weights a rank for each weight, with the default targets (SD1.x: 0.8 million at 4)."""
ADAM_BYTES = 16
"""A trained weight: itself, its gradient and two moments, float32."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Rough figures of a run.

    Attributes:
        network: that they are for.
        flop: of an iteration.
        iterations: of the run.
        memory: bytes of the device.
    """

    network: Network
    flop: float
    iterations: int
    memory: float


def estimate(values: Mapping[str, Mapping[str, Any]]) -> Estimate:
    """Work out what a config takes.

    Args:
        values: sections and fields of a `TrainConfig`.

    Returns:
        Figures that may be off by a factor of two.
    """
    model, sampler, prompts = values["model"], values["sampler"], values["prompts"]
    network = network_of(model["source"])
    area = _side(model["width"], network) * _side(model["height"], network) / network.side**2
    branches = 1 if sampler["guidance_scale"] in (0, 1) else 2
    again = model["gradient_checkpointing"]
    passes = sampler["steps"] + trained_steps(values) * (4 if again else 3)
    images = prompts["per_iteration"] * prompts["images_per_prompt"]
    at_once = min(values["run"]["micro_batch"], images) * branches
    kept = (network.kept_again if again else network.kept) * area
    kept *= 1 if model["precision"] == "float32" else HALF_KEPT
    adapters = ADAPTED * values["trainable"]["rank"] * network.weights
    weights = network.weights * BYTES[model["precision"]]
    return Estimate(
        network,
        images * branches * passes * network.flop * area,
        values["run"]["iterations"],
        weights + adapters * ADAM_BYTES + at_once * kept,
    )


def network_of(source: str) -> Network:
    """The network behind `model.source` of a preset."""
    demos = {"demo": DEMO, "demo-flow": FLOW_DEMO}
    return demos.get(source) or NETWORKS[family_of_source(source) or SD1]


def _side(given: int | None, network: Network) -> int:
    return given or network.native or network.side


def trained_steps(values: Mapping[str, Mapping[str, Any]]) -> float:
    """How many of a sampler's steps an iteration trains."""
    method = values["method"]
    steps = values["sampler"]["steps"] - values["sampler"]["drop_last"]
    if method["selection"] == "random_fraction":
        return steps * method["fraction"]
    return min(steps, method["window"]) if method["selection"] == "sliding_window" else steps


def text_of(found: Estimate) -> str:
    """The estimate in words.

    Args:
        found: the figures.

    Returns:
        A few lines.
    """
    total = found.flop * found.iterations
    times = [f"  {took(total / rate)} on {name}" for name, rate in found.network.rates.items()]
    return "\n".join(
        [
            f"Estimate for {found.network.name} (rough, within a factor of two):",
            f"{found.flop / 1e12:.3g} TFLOP an iteration, {found.iterations} iterations:",
            *times,
            f"about {found.memory / 2**30:.1f} GiB of memory while training,",
            "besides ComfyUI's own. Counted: forward passes x the network's operations;",
            "weights + adapters with AdamW + kept activations of a micro-batch.",
        ]
    )


def took(seconds: float) -> str:
    """A duration in words.

    >>> took(40), took(600), took(90000), took(9e6)
    ('40 s', '10 min', '25 h', '104 days')
    """
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (2e5, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} days"
