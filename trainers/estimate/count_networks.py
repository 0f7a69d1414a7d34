"""Costs of the published networks; `python -m` on this module writes `network_costs.json`.

Blocks of one kind cost the same, so networks of a few blocks suffice. The results are polynomials
in n, tokens of 16 x 16 pixels: arithmetic of degree two (attention), memory of degree one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from ..config.train_config import DEMOS
from ..families.countable import Countable, Depth
from ..families.files import Files
from ..families.registry import FAMILIES, family_of_header
from ..families.source import Source, read_config
from ..families.spec import FamilySpec
from ..families.weights import header_of_pickle, open_weights
from ..lora import adapters as lora
from ..memory.low_bit import is_packable
from .count import Cost, cost, shapes_alone, without_memory
from .network_costs import COSTS, Network, networks

RANK = 32


@dataclass(frozen=True, slots=True)
class Kind:
    """A network that is counted.

    Attributes:
        sides: tokens along the side of the images that are counted.
    """

    spec: FamilySpec
    config: dict[str, Any]
    depth: Depth
    text: int
    vae: dict[str, Any]
    sides: tuple[int, int, int] = (32, 48, 64)  # 512, 768 and 1024 px

    @property
    def countable(self) -> Countable:
        return self.spec.part("costs").COUNTABLE


def network_kinds() -> dict[str, Kind]:
    """The published networks and the demos', by name."""
    found = {}
    for spec in FAMILIES.values():
        found[spec.network] = _published_kind(spec)
        for source, demo in spec.demos.items():
            small = replace(_kind(spec, DEMOS[source], demo.text), depth=(), sides=(4, 6, 8))
            found[demo.network] = small
    return found


def _published_kind(spec: FamilySpec) -> Kind:
    file = spec.part("costs").__file__
    assert file is not None
    return _kind(spec, Path(file).parent / "configs", spec.text)


def _kind(spec: FamilySpec, folder: Path, text: int) -> Kind:
    config, vae = (read_config(folder / part / "config.json") for part in spec.folders[:2])
    return Kind(spec, config, spec.part("costs").COUNTABLE.depth(config), text, vae)


# --- counting ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mode:
    """How a pass is run.

    Attributes:
        trained: "lora", "full", or "" for a forward pass alone.
        is_half: under autocast.
    """

    trained: str
    is_half: bool
    is_again: bool = False


def network_of(kind: Kind, depth: Depth, mode: Mode) -> nn.Module:
    """A network on torch's "meta" device: with adapters of rank 32 in half precision, or in
    float32.
    """
    with torch.device("meta"):
        network = (
            kind.countable.make(kind.config, depth).requires_grad_(mode.trained == "full").eval()
        )
    if mode.is_half and mode.trained != "full":
        nn.Module.to(network, torch.bfloat16)
    if mode.trained != "full":
        lora.add_lora(network, RANK, RANK, kind.spec.lora_targets, "default", seed=0)
    switch: Any = network
    (switch.enable_gradient_checkpointing if mode.is_again else lambda: None)()
    return network


def count_pass(kind: Kind, depth: Depth, mode: Mode, side: int) -> Cost:
    """Count a pass of one image through a network of some depth."""
    network = network_of(kind, depth, mode)
    with shapes_alone():
        without_memory(network)
        dtype = torch.bfloat16 if mode.is_half else torch.float32
        backward = mode.trained != ""
        return cost(
            network,
            lambda net: kind.countable.call(net, 1, side, kind.text),
            dtype,
            backward=backward,
        )


def count_full_depth(kind: Kind, mode: Mode, side: int) -> Cost:
    """The same at the network's own depth, extrapolated from a few blocks.

    With gradient checkpointing the worst moment is in the last blocks if there are many, else
    before them; all of those are counted.
    """
    small = (2,) * len(kind.depth)
    if mode.is_again and small:
        small = (*small[:-1], kind.depth[-1])
    first = count_pass(kind, small, mode, side)
    flop, peak = first.flop, float(first.peak)
    for place, (few, number) in enumerate(zip(small, kind.depth, strict=True)):
        if few == number:
            continue
        more = tuple(count + (i == place) for i, count in enumerate(small))
        cost_of_more = count_pass(kind, more, mode, side)
        flop += (number - few) * (cost_of_more.flop - first.flop)
        peak += (number - few) * (cost_of_more.peak - first.peak)
    return Cost(flop, round(peak))


def _fit(sides: Sequence[int], values: Sequence[float]) -> list[float]:
    """Coefficients of a polynomial in tokens, the constant first."""
    tokens = [float(side**2) for side in sides]
    powers = np.vander(tokens, len(tokens), increasing=True)
    coefficients = np.linalg.solve(powers, values)
    share = np.abs(coefficients * powers[-1]) / max(values)
    return [
        float(f"{c:.6g}") if s > 1e-9 else 0.0 for c, s in zip(coefficients, share, strict=True)
    ]


def costs_of(kind: Kind) -> dict[str, Any]:
    """A network's entry of the table."""
    lowest = Mode("", True)
    costs = [count_full_depth(kind, lowest, side) for side in kind.sides]
    memory = {"rollout_half": _fit(kind.sides[:2], [c.peak for c in costs[:2]])}
    single = [count_full_depth(kind, Mode("", False), side).peak for side in kind.sides[:2]]
    memory["rollout_float32"] = _fit(kind.sides[:2], single)
    forward, update = [c.flop for c in costs], {}
    for trained, is_half, is_again in product(("lora", "full"), (True, False), (False, True)):
        mode = Mode(trained, is_half, is_again)
        passes = [count_full_depth(kind, mode, side) for side in kind.sides[:2]]
        name = f"{trained}_{'half' if is_half else 'float32'}{'_again' if is_again else ''}"
        memory[name] = _fit(kind.sides[:2], [c.peak for c in passes])
        if is_half and not is_again:
            flops = [*(c.flop for c in passes), count_full_depth(kind, mode, kind.sides[2]).flop]
            update[trained] = _fit(kind.sides, flops)
    return {
        "family": kind.spec.name,
        **sizes_of(kind),
        "text": kind.text,
        "side": _side(kind),
        "forward": _fit(kind.sides, forward),
        "update": update,
        "memory": memory,
    }


def sizes_of(kind: Kind) -> dict[str, Any]:
    """Weights of the published network, of those that can be packed, and of adapters per rank."""
    network = network_of(kind, kind.depth, Mode("", True))
    modules: Any = network.named_modules()
    packable = [m for name, m in modules if is_packable(name, m)]
    adapters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    is_swapped = "base" in kind.spec.options
    blocks = [m for m in network.modules() if type(m).__name__ in kind.spec.blocks and is_swapped]
    sizes = [sum(p.numel() for p in b.parameters() if not p.requires_grad) for b in blocks]
    return {
        "weights": sum(p.numel() for p in network.parameters()) - adapters,
        "packable": sum(m.weight.numel() for m in packable),
        "largest": max((m.weight.numel() for m in packable), default=0),
        "adapters": adapters // RANK,
        "blocks": sum(sizes),
        "block": max(sizes, default=0),
    }


def _side(kind: Kind) -> int:
    """Side in px of the images that a network was made for; FLUX's config does not say: 1024."""
    return 8 * kind.config["sample_size"] if "sample_size" in kind.config else 1024


def decoding_of(kind: Kind) -> dict[str, Any]:
    """The cost of decoding one image in float32."""
    config: dict[str, Any] = {k: v for k, v in kind.vae.items() if k != "block_out_channels"}
    tiny: Any = AutoencoderTiny
    usual: Any = AutoencoderKL
    with torch.device("meta"):
        is_tiny = kind.vae["_class_name"] == "AutoencoderTiny"
        vae = tiny.from_config(config) if is_tiny else usual.from_config(kind.vae)
    vae.requires_grad_(False).eval()
    weights, costs = sum(p.numel() for p in vae.parameters()), []
    with shapes_alone():
        without_memory(vae)
        for side in kind.sides:

            def call(net: Any, side: int = side) -> Tensor:
                latents = torch.empty(1, kind.vae["latent_channels"], 2 * side, 2 * side)
                return net.decode(latents, return_dict=False)[0]

            costs.append(cost(vae, call, torch.float32, backward=False))
    return {
        "vae_weights": weights,
        "decode": _fit(kind.sides, [c.flop for c in costs]),
        "decode_memory": _fit(kind.sides[:2], [c.peak for c in costs[:2]]),
    }


def counted_network(files: Files, source: Source) -> Network:
    """The cost of a model's own network.

    This is the published network's entry if it is the same; else it is counted now, which may take
    some minutes.
    """
    spec = FAMILIES[source.family or _family_of(files)]
    if spec.part("costs").COUNTABLE.load is None:
        return networks()[spec.network]
    kind = _published_kind(spec)
    config = _config_of(kind, files, source)
    if all(config.get(key) == value for key, value in kind.config.items() if key in _SIZES):
        return networks()[spec.network]
    # few blocks, or kinds that some have none of, are counted as they are
    depth = kind.countable.depth(config)
    own = replace(kind, config=config, depth=depth if min(depth) >= 2 else (), sides=_sides(config))
    entry = costs_of(own) | decoding_of(own)
    return Network(name=f"this {spec.name} network", **entry)


_SIZES = (
    *("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim"),
    "joint_attention_dim",
)


def _family_of(files: Files) -> str:
    return family_of_header(header_of_pickle(files.network))


def _config_of(kind: Kind, files: Files, source: Source) -> dict[str, Any]:
    if source.kind == "folder":
        return read_config(source.path / kind.spec.folders[0] / "config.json")
    outline = open_weights(files.network).outline()
    assert kind.countable.load is not None
    return dict(kind.countable.load(outline, dtype=torch.float32).config)


def _sides(config: dict[str, Any]) -> tuple[int, int, int]:
    """Sides that the network's positions reach."""
    reach = min(64, config.get("pos_embed_max_size", 64))
    return reach // 2, reach * 3 // 4, reach


def main(names: list[str]) -> None:
    """Write the table; only the named networks are counted again, if any are named."""
    for name, kind in network_kinds().items():
        if not names or name in names:
            table = json.loads(COSTS.read_text(encoding="utf-8")) if COSTS.exists() else {}
            table[name] = costs_of(kind) | decoding_of(kind)
            COSTS.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
