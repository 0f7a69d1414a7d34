"""LoRA files of the flow families: their names for the network's modules, and how one is read.

Written: `transformer.<path>.lora_A/B.weight` and `.alpha`, with diffusers' paths, which ComfyUI and
diffusers both read. Read: that form and its relatives (`base_model.model.<path>`, a bare path,
`lora_transformer_<path with underscores>`), and the original names of the modules
(`lora_unet_double_blocks_0_img_attn_qkv`, `diffusion_model.joint_blocks.0.x_block.attn.qkv`), whose
fused layers are split: the parts share `down`, and each has its rows of `up`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..families.assemble import swap_halves
from ..families.errors import ModelError
from ..families.flux import file as flux_file
from ..families.sd3 import file as sd3_file
from .read import Delta, read_deltas

_PREFIX = re.compile(
    r"^(?:base_model\.model\.)?"
    r"(?:transformer\.|diffusion_model\.|lora_unet_|lora_transformer_|lycoris_)?"
)
_BLOCK = re.compile(r"(?:single_)?transformer_blocks\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class _Place:
    """The network's modules, in order of rows, that a module in a file changes."""

    paths: tuple[str, ...]
    is_swapped: bool = False  # the halves of its rows stand the other way round


def tensor_names(module: str) -> tuple[str, str, str]:
    """Names in a file of the tensors that change a module: down, up and alpha."""
    key = f"transformer.{module}"
    return f"{key}.lora_A.weight", f"{key}.lora_B.weight", f"{key}.alpha"


def read_lora(
    path: Path, family: str, rows: Mapping[str, int], *, ignore_text_encoder: bool = False
) -> dict[str, Delta]:
    """Read a LoRA file's changes by the path of the module that they change.

    Args:
        path: a .safetensors file.
        family: "sd3" or "flux".
        rows: paths of the network's modules, with the length of their outputs.
        ignore_text_encoder: skip changes of text encoders, instead of refusing them.

    Raises:
        ModelError: if the file is damaged, is no plain LoRA, or was made for another network.
    """
    places = _places(family, rows)
    changes: dict[str, Delta] = {}
    for module, delta in read_deltas(path, ignore_text_encoder=ignore_text_encoder).items():
        for name, part in _split(module, delta, _find(module, places), rows):
            if name in changes:
                raise ModelError(
                    f"the LoRA {path.name} changes {name} twice, under two names: save it again "
                    "from where it was trained"
                )
            changes[name] = part
    return changes


def _places(family: str, rows: Mapping[str, int]) -> dict[str, _Place]:
    """By flattened name: diffusers' paths and the original ones, which may stand for several."""
    numbers = [int(match[1]) for path in rows if (match := _BLOCK.match(path))]
    depth = max(numbers, default=-1) + 1
    places = {}
    for native, place in _NATIVES[family](depth):
        if all(path in rows for path in place.paths):
            places[native.replace(".", "_")] = place
    return places | {path.replace(".", "_"): _Place((path,)) for path in rows}


def _flux(depth: int) -> Iterator[tuple[str, _Place]]:
    layers = [f"double_blocks.{i}.{layer}" for i in range(depth) for layer in flux_file.DOUBLE]
    layers += [f"single_blocks.{i}.{layer}" for i in range(depth) for layer in flux_file.SINGLE]
    for native in [*flux_file.TOP, *layers]:
        yield native, _Place(flux_file.diffusers_names(native), native == flux_file.SWAPPED)


def _sd3(depth: int) -> Iterator[tuple[str, _Place]]:
    swapped = ("norm_out.linear", f"transformer_blocks.{depth - 1}.norm1_context.linear")
    layers = [f"joint_blocks.{i}.{layer}" for i in range(depth) for layer in sd3_file.BLOCK]
    for native in [*sd3_file.TOP, *layers]:
        paths = sd3_file.diffusers_names(native)
        yield native, _Place(paths, paths[0] in swapped)


_NATIVES: dict[str, Callable[[int], Iterator[tuple[str, _Place]]]] = {"flux": _flux, "sd3": _sd3}


def _find(module: str, places: Mapping[str, _Place]) -> _Place:
    flat = _PREFIX.sub("", module).replace(".processor", "").replace(".", "_")
    for candidate in (flat, f"{flat}_0"):  # to_out was once the name of to_out.0
        if candidate in places:
            return places[candidate]
    raise ModelError(
        f"the LoRA changes a module {module}, which this network does not have: it was made for "
        "another base model"
    )


def _split(
    module: str, delta: Delta, place: _Place, rows: Mapping[str, int]
) -> Iterator[tuple[str, Delta]]:
    sizes = [rows[path] for path in place.paths]
    if sum(sizes) != len(delta.up):
        raise ModelError(
            f"the LoRA's up weight of {module} has {len(delta.up)} rows where the network needs "
            f"{sum(sizes)}: it was made for another base model"
        )
    up = swap_halves(delta.up) if place.is_swapped else delta.up
    for path, part in zip(place.paths, torch.split(up, sizes), strict=True):
        yield path, replace(delta, up=part)
