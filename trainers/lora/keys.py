"""LoRA files of every family: their names for the network's modules, and how one is read.

Written, as ComfyUI and diffusers both read them:

- kohya's form, `lora_unet_<path with underscores>.lora_down/up.weight` and `.alpha`, which A1111
  reads too;
- `transformer.<path>.lora_A/B.weight` and `.alpha`, with diffusers' paths.

Read: these and their relatives (`base_model.model.<path>`, `unet.<path>`, a bare path,
`lora_transformer_<path with underscores>`, `.processor.to_q_lora.down.weight`), and the original
names of the modules (`lora_unet_double_blocks_0_img_attn_qkv`,
`diffusion_model.joint_blocks.0.x_block.attn.qkv`), whose fused layers are split: the parts share
`down`, and each has its rows of `up`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..families.assemble import swap_halves
from ..families.errors import ModelError
from ..families.registry import FAMILIES, families_of_lora
from ..families.spec import FamilySpec
from .read import Delta, read_deltas

_PREFIX = re.compile(
    r"^(?:base_model\.model\.)?"
    r"(?:unet\.|transformer\.|diffusion_model\.|lora_unet_|lora_transformer_|lycoris_)?"
)


@dataclass(frozen=True, slots=True)
class Place:
    """The network's modules, in order of rows, that a module in a file changes."""

    paths: tuple[str, ...]
    is_swapped: bool = False  # the halves of its rows stand the other way round


def tensor_names(spec: FamilySpec, module: str) -> tuple[str, str, str]:
    """Names in a file of the tensors that change a module: down, up and alpha."""
    if spec.is_kohya:
        key = "lora_unet_" + module.replace(".", "_")
        return f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha"
    key = f"{spec.lora_prefix}{module}"
    return f"{key}.lora_A.weight", f"{key}.lora_B.weight", f"{key}.alpha"


def read_lora(
    path: Path, spec: FamilySpec, rows: Mapping[str, int], *, ignore_text_encoder: bool = False
) -> dict[str, Delta]:
    """Read a LoRA file's changes by the path of the module that they change.

    Args:
        rows: paths of the network's modules, with the length of their outputs.
        ignore_text_encoder: skip changes of text encoders, instead of refusing them.

    Raises:
        ModelError: if the file is damaged, is no plain LoRA, or was made for another network.
    """
    found = places(spec, rows)
    changes: dict[str, Delta] = {}
    deltas = read_deltas(path, ignore_text_encoder=ignore_text_encoder)
    for module, delta in deltas.items():
        place = _find(module, found)
        if place is None:
            raise ModelError(
                f"the LoRA changes a module {module}, which this network does not have: it was "
                f"made for {_base_of(deltas, spec)}"
            )
        for name, part in _split_rows(module, delta, place, rows):
            if name in changes:
                raise ModelError(
                    f"the LoRA {path.name} changes {name} twice, under two names: save it again "
                    "from where it was trained"
                )
            changes[name] = part
    return changes


def places(spec: FamilySpec, rows: Mapping[str, int]) -> dict[str, Place]:
    """By flattened name: diffusers' paths and the original ones, which may stand for several."""
    found = {}
    if spec.has_original_names:
        for native, paths, is_swapped in spec.part("file").original_layers(rows):
            if all(path in rows for path in paths):
                found[native.replace(".", "_")] = Place(paths, is_swapped)
    return found | {path.replace(".", "_"): Place((path,)) for path in rows}


def _base_of(modules: Iterable[str], spec: FamilySpec) -> str:
    """What a LoRA was made for that does not fit a family, as far as its names tell."""
    made_for = families_of_lora(modules)
    if spec.name in made_for or not made_for:
        return "another base model"
    return " or ".join(FAMILIES[name].title for name in made_for)


def _find(module: str, places: Mapping[str, Place]) -> Place | None:
    flat = _PREFIX.sub("", module).replace(".processor", "").removesuffix("_lora").replace(".", "_")
    return places.get(flat) or places.get(f"{flat}_0")  # to_out was once the name of to_out.0


def _split_rows(
    module: str, delta: Delta, place: Place, rows: Mapping[str, int]
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
