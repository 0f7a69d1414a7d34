"""Costs of the published networks; `python -m` on this module writes `network_costs.json`.

Blocks of one kind cost the same, so networks of a few blocks suffice. The results are polynomials
in n, tokens of 16 x 16 pixels: arithmetic of degree two (attention), memory of degree one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from ..config.train_config import DEMO_FLOW_FOLDER, DEMO_FOLDER
from ..families.files import Files
from ..families.flux import file as flux_file
from ..families.flux.model import Flux
from ..families.sd1.model import StableDiffusion
from ..families.sd3 import file as sd3_file
from ..families.sd3.model import StableDiffusion3
from ..families.source import Source, read_config
from ..families.weights import open_weights
from ..lora import adapters as lora
from ..memory.low_bit import is_packable
from .count import Cost, cost, shapes_alone, without_memory
from .network_costs import COSTS, FAMILIES, Network, networks

CONFIGS = Path(__file__).parents[1] / "families" / "configs"
RANK = 32

Depth = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """How the networks of a family are made and called.

    Attributes:
        family: its name.
        config: of the published network.
        depth: its blocks, by kind.
        make: makes a network of some depth.
        call: its output for a batch of images of a height and width in tokens.
        targets: layers that get adapters.
        text: tokens of a prompt.
        vae: config of the autoencoder.
        sides: tokens along the side of the images that are counted.
    """

    family: str
    config: dict[str, Any]
    depth: Depth
    make: Callable[[dict[str, Any], Depth], nn.Module]
    call: Callable[[Any, int, int, int], Tensor]
    targets: tuple[str, ...]
    text: int
    vae: dict[str, Any]
    sides: tuple[int, int, int] = (32, 48, 64)  # 512, 768 and 1024 px


# --- the families --------------------------------------------------------------------------------


def _unet(config: dict[str, Any], depth: Depth) -> nn.Module:
    kind: Any = UNet2DConditionModel
    return kind.from_config(config)


def _call_unet(network: Any, batch: int, side: int, text: int) -> Tensor:
    dtype, config = network.dtype, network.config
    latents = torch.empty(batch, config.in_channels, 2 * side, 2 * side, dtype=dtype)
    context = torch.empty(batch, text, config.cross_attention_dim, dtype=dtype)
    return network(latents, torch.ones(batch), encoder_hidden_states=context, return_dict=False)[0]


def _sd3(config: dict[str, Any], depth: Depth) -> nn.Module:
    kind: Any = SD3Transformer2DModel
    if not depth:
        return kind.from_config(config)
    dual, plain = depth
    layers = {"num_layers": dual + plain, "dual_attention_layers": tuple(range(dual))}
    return kind.from_config(config | layers)


def _call_sd3(network: Any, batch: int, side: int, text: int) -> Tensor:
    dtype, config = network.dtype, network.config
    return network(
        hidden_states=torch.empty(batch, config.in_channels, 2 * side, 2 * side, dtype=dtype),
        timestep=torch.ones(batch),
        encoder_hidden_states=torch.empty(batch, text, config.joint_attention_dim, dtype=dtype),
        pooled_projections=torch.empty(batch, config.pooled_projection_dim, dtype=dtype),
        return_dict=False,
    )[0]


def _flux(config: dict[str, Any], depth: Depth) -> nn.Module:
    kind: Any = FluxTransformer2DModel
    if not depth:
        return kind.from_config(config)
    return kind.from_config(config | {"num_layers": depth[0], "num_single_layers": depth[1]})


def _call_flux(network: Any, batch: int, side: int, text: int) -> Tensor:
    dtype, config = network.dtype, network.config
    return network(
        hidden_states=torch.empty(batch, side**2, config.in_channels, dtype=dtype),
        timestep=torch.ones(batch),
        guidance=torch.ones(batch),
        encoder_hidden_states=torch.empty(batch, text, config.joint_attention_dim, dtype=dtype),
        pooled_projections=torch.empty(batch, config.pooled_projection_dim, dtype=dtype),
        img_ids=torch.empty(side**2, 3),
        txt_ids=torch.empty(text, 3),
        return_dict=False,
    )[0]


def kinds() -> dict[str, Kind]:
    """The published networks and the demo's, by name."""

    def read(folder: Path, part: str) -> dict[str, Any]:
        return read_config(folder / part / "config.json")

    sd1, sd3, flux = (CONFIGS / name for name in ("sd1", "sd3", "flux"))
    unet = ("sd1", read(sd1, "unet"), (), _unet, _call_unet, StableDiffusion.lora_targets, 77)
    wide, deep = read(sd3, "transformer"), read(flux, "transformer")
    dual = len(wide["dual_attention_layers"])
    blocks = (dual, wide["num_layers"] - dual), (deep["num_layers"], deep["num_single_layers"])
    joint = StableDiffusion3.lora_targets
    demo = ("sd1", read(DEMO_FOLDER, "unet"), (), _unet, _call_unet, unet[5], 77)
    flow = ("sd3", read(DEMO_FLOW_FOLDER, "transformer"), (), _sd3, _call_sd3, joint, 24)
    return {
        "SD1.5": Kind(*unet, read(sd1, "vae")),
        "SD3.5-M": Kind("sd3", wide, blocks[0], _sd3, _call_sd3, joint, 333, read(sd3, "vae")),
        "FLUX.1-dev": Kind(
            *("flux", deep, blocks[1], _flux, _call_flux, Flux.lora_targets, 512),
            read(flux, "vae"),
        ),
        "tiny-sd": Kind(*demo, read(DEMO_FOLDER, "vae"), (4, 6, 8)),
        "tiny-flow": Kind(*flow, read(DEMO_FLOW_FOLDER, "vae"), (4, 6, 8)),
    }


# --- counting ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mode:
    """How a pass is run.

    Attributes:
        trained: "lora", "full", or "" for a forward pass alone.
        is_half: under autocast.
        is_again: with gradient checkpointing.
    """

    trained: str
    is_half: bool
    is_again: bool = False


def network_of(kind: Kind, depth: Depth, mode: Mode) -> nn.Module:
    """A network on torch's "meta" device: with adapters of rank 32 in half precision, or in
    float32.
    """
    with torch.device("meta"):
        network = kind.make(kind.config, depth).requires_grad_(mode.trained == "full").eval()
    if mode.is_half and mode.trained != "full":
        nn.Module.to(network, torch.bfloat16)
    if mode.trained != "full":
        lora.add_lora(network, RANK, RANK, kind.targets, "default", seed=0)
    switch: Any = network
    (switch.enable_gradient_checkpointing if mode.is_again else lambda: None)()
    return network


def counted(kind: Kind, depth: Depth, mode: Mode, side: int) -> Cost:
    """Count a pass of one image through a network of some depth."""
    network = network_of(kind, depth, mode)
    with shapes_alone():
        without_memory(network)
        dtype = torch.bfloat16 if mode.is_half else torch.float32
        backward = mode.trained != ""
        return cost(
            network, lambda net: kind.call(net, 1, side, kind.text), dtype, backward=backward
        )


def whole(kind: Kind, mode: Mode, side: int) -> Cost:
    """The same at the network's own depth, extrapolated from a few blocks.

    With gradient checkpointing the worst moment is in the last blocks if there are many, else
    before them; all of those are counted.
    """
    small = (2,) * len(kind.depth)
    if mode.is_again and small:
        small = (*small[:-1], kind.depth[-1])
    first = counted(kind, small, mode, side)
    flop, peak = first.flop, float(first.peak)
    for place, (few, number) in enumerate(zip(small, kind.depth, strict=True)):
        if few == number:
            continue
        more = tuple(count + (i == place) for i, count in enumerate(small))
        cost_of_more = counted(kind, more, mode, side)
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
    costs = [whole(kind, lowest, side) for side in kind.sides]
    memory = {"rollout_half": _fit(kind.sides[:2], [c.peak for c in costs[:2]])}
    single = [whole(kind, Mode("", False), side).peak for side in kind.sides[:2]]
    memory["rollout_float32"] = _fit(kind.sides[:2], single)
    forward, update = [c.flop for c in costs], {}
    for trained, is_half, is_again in product(("lora", "full"), (True, False), (False, True)):
        mode = Mode(trained, is_half, is_again)
        passes = [whole(kind, mode, side) for side in kind.sides[:2]]
        name = f"{trained}_{'half' if is_half else 'float32'}{'_again' if is_again else ''}"
        memory[name] = _fit(kind.sides[:2], [c.peak for c in passes])
        if is_half and not is_again:
            flops = [*(c.flop for c in passes), whole(kind, mode, kind.sides[2]).flop]
            update[trained] = _fit(kind.sides, flops)
    return {
        "family": kind.family,
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
    return {
        "weights": sum(p.numel() for p in network.parameters()) - adapters,
        "packable": sum(m.weight.numel() for m in packable),
        "largest": max((m.weight.numel() for m in packable), default=0),
        "adapters": adapters // RANK,
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
    """The cost of a flow model's own network.

    This is the published network's entry if it is the same; else it is counted now, which may take
    some minutes.
    """
    name = FAMILIES[source.family]
    kind = kinds()[name]
    config = _config_of(files, source)
    if all(config.get(key) == value for key, value in kind.config.items() if key in _SIZES):
        return networks()[name]
    layers, dual = config["num_layers"], len(config.get("dual_attention_layers") or ())
    depth = (dual, layers - dual) if source.family == "sd3" else (layers, config[_SINGLE])
    # few blocks, or kinds that some have none of, are counted as they are
    depth = depth if min(depth) >= 2 else ()
    own = replace(kind, config=config, depth=depth, sides=_sides(config))
    entry = costs_of(own) | decoding_of(own)
    return Network(name=f"this {source.family} network", **entry)


_SINGLE = "num_single_layers"
_SIZES = ("num_layers", _SINGLE, "num_attention_heads", "attention_head_dim", "joint_attention_dim")


def _config_of(files: Files, source: Source) -> dict[str, Any]:
    if source.kind == "folder":
        return read_config(source.path / "transformer" / "config.json")
    load = sd3_file.load_transformer if source.family == "sd3" else flux_file.load_transformer
    network: Any = load(open_weights(files.network).outline(), dtype=torch.float32)
    return dict(network.config)


def _sides(config: dict[str, Any]) -> tuple[int, int, int]:
    """Sides that the network's positions reach."""
    reach = min(64, config.get("pos_embed_max_size", 64))
    return reach // 2, reach * 3 // 4, reach


def main(names: list[str]) -> None:
    """Write the table; only the named networks are counted again, if any are named."""
    for name, kind in kinds().items():
        if not names or name in names:
            table = json.loads(COSTS.read_text(encoding="utf-8")) if COSTS.exists() else {}
            table[name] = costs_of(kind) | decoding_of(kind)
            COSTS.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
