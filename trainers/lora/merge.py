"""A LoRA merged into a model of the kind it was trained on: a checkpoint or a diffusers folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Family, Files, load_family
from ..families.assemble import swap_halves
from ..families.errors import ModelError
from ..families.header import NETWORK_PREFIXES, Header
from ..families.registry import FAMILIES
from ..families.source import inspect_source, weight_variant
from ..families.text.files import part_tensors
from ..families.weights import open_weights
from . import adapters, keys
from .base_notes import marks_of
from .read import Delta
from .safetensors_file import write_safetensors

STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Notes of a file that are not true of another."""


def write_merged(files: Files, lora: Path, target: Path, options: Mapping[str, Any]) -> Path:
    """Write a model with a LoRA merged into its network; all else is copied as it is.

    Args:
        files: of the model; what is copied is the file with its network, or its folder.
        lora: the LoRA.
        target: the new file (.safetensors), or the new folder if the model is one.
        options: of `load_family`. What the network predicts and does not say in its file is said by
            the marks that ComfyUI heeds.

    Raises:
        ModelError: if the model's weights are stored in 8 bits, or the LoRA does not fit it.
    """
    source = inspect_source(files.network).path
    if source.is_dir() == (target.suffix == ".safetensors"):
        kind = "a folder" if source.is_dir() else "one file, *.safetensors"
        raise ModelError(f"{source.name} becomes {kind}; name {target.name} accordingly")
    weights = None if source.is_dir() else open_weights(source)
    dtype = torch.bfloat16 if weights is None else _dtype_of(weights.header)
    family = load_family(files, dtype=dtype, parts="network", **options)
    deltas = adapters.read_lora(family.network, lora)
    if weights is None:
        return _write_folder(source, family, deltas, target)
    tensors = weights.under("")
    tensors |= _changed(tensors, family, deltas)
    tensors |= {mark: torch.zeros(0) for mark in marks_of(family)}
    notes = {name: text for name, text in weights.header.metadata.items() if name not in STALE}
    return write_safetensors(tensors, target, notes | {"pcpo_merged": lora.name})


def _write_folder(source: Path, family: Family, deltas: Mapping[str, Delta], target: Path) -> Path:
    part = FAMILIES[family.name].folders[0]
    tensors = part_tensors(source / part)
    tensors |= _changed(tensors, family, deltas)
    variant = weight_variant(source / part)
    name = f"diffusion_pytorch_model{f'.{variant}' if variant else ''}.safetensors"
    weights = shutil.ignore_patterns("*.safetensors", "*.bin", "*.index*.json")
    others = shutil.ignore_patterns(part)
    shutil.copytree(source, target, ignore=others, dirs_exist_ok=True)
    shutil.copytree(source / part, target / part, ignore=weights, dirs_exist_ok=True)
    write_safetensors(tensors, target / part / name, {"format": "pt"})
    return target


def _dtype_of(header: Header) -> torch.dtype:
    """The dtype in which a file's network is read without a copy; `ModelError` if it is fp8."""
    stored = {*header.dtypes.values()}
    if any(dtype.startswith("F8") for dtype in stored):
        raise ModelError(
            f"{header.name} is stored in 8 bits, where a LoRA's changes would be lost in rounding: "
            "choose its file in float16, bfloat16 or float32"
        )
    found = {"F16": torch.float16, "BF16": torch.bfloat16}
    return next((found[name] for name in found if name in stored), torch.float32)


def _changed(
    tensors: Mapping[str, Tensor], family: Family, deltas: Mapping[str, Delta]
) -> dict[str, Tensor]:
    """The tensors that a LoRA changes, by their names in the file, in their dtype."""
    rows = adapters.rows_of(family.network)
    places = keys.places(FAMILIES[family.name], rows)

    def named(prefix: str) -> dict[str, keys.Place]:
        ends = {key: key[len(prefix) :] for key in tensors if key.startswith(prefix)}
        flat = {key: end.removesuffix(".weight").replace(".", "_") for key, end in ends.items()}
        return {
            key: places[name]
            for key, name in flat.items()
            if key.endswith(".weight") and name in places
        }

    found = max((named(prefix) for prefix in NETWORK_PREFIXES), key=len)
    merged, left = {}, set(deltas)
    for key, place in found.items():
        if left.isdisjoint(place.paths):
            continue
        left -= {*place.paths}
        parts = [
            _full(deltas.get(path), family.network.get_submodule(path)) for path in place.paths
        ]
        change = torch.cat(parts)
        change = swap_halves(change) if place.is_swapped else change
        merged[key] = (tensors[key].float() + change.view_as(tensors[key])).to(tensors[key].dtype)
    if left:
        raise ModelError(f"the file has no weight of {min(left)}, which the LoRA changes")
    return merged


def _full(delta: Delta | None, module: nn.Module) -> Tensor:
    """A LoRA's change of a weight, or zeros."""
    weight: Any = module.weight
    if delta is None:
        return torch.zeros(weight.shape)
    return (delta.up.flatten(1) @ delta.down.flatten(1) * delta.scale).view(weight.shape)
