"""Costs of the published networks, from `network_costs.json`. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..families.registry import FAMILIES, spec_of_source

COSTS = Path(__file__).parent / "network_costs.json"

DEMO_WEIGHTS = 1e8
"""A network with fewer weights is a demo's."""


@dataclass(frozen=True, slots=True)
class Network:
    """The costs of a network, and of the autoencoder beside it; polynomials are in n.

    Attributes:
        packable: those that `model.base` packs.
        largest: weights of the largest layer that is packed.
        blocks: weights of all blocks, which `model.offload` "blocks" swaps.
        block: of the largest one.
        adapters: weights of adapters per rank, with the default targets.
        forward: operations of a forward pass on one image.
        update: of a forward and a backward pass, for "lora" and "full".
        memory: bytes alive at the worst moment, of one image, by mode.
        decode: operations of decoding one image.
        decode_memory: bytes alive then.
        side: px of an image, if a config gives none.
    """

    name: str
    family: str
    weights: int
    packable: int
    largest: int
    adapters: int
    forward: Sequence[float]
    update: Mapping[str, Sequence[float]]
    memory: Mapping[str, Sequence[float]]
    vae_weights: int
    decode: Sequence[float]
    decode_memory: Sequence[float]
    text: int
    side: int
    blocks: int = 0
    block: int = 0


@cache
def networks() -> dict[str, Network]:
    table = json.loads(COSTS.read_text(encoding="utf-8"))
    return {name: Network(name=name, **entry) for name, entry in table.items()}


def network_for(source: str, family: str | None = None) -> Network:
    """The network of `model.source`, or that of its family if the model itself is not known.

    The family is the first one if it is None and the source does not show it.
    """
    named = spec_of_source(source)
    spec = named or FAMILIES[family or next(iter(FAMILIES))]
    demo = spec.demos.get(source)
    return networks()[spec.network if demo is None else demo.network]
