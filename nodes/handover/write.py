"""A loaded model as one checkpoint file, written tensor by tensor.

Never more than one tensor is held besides what ComfyUI has loaded. Patches (LoRAs) are merged by
ComfyUI itself, as its Save Checkpoint node does; names are those of the original checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...trainers.families.registry import FAMILIES
from ...trainers.families.spec import MARKS, InComfyUI
from ...trainers.job.files import replace_file, shortage
from ..errors import NodeError
from ..families import family_of_model
from ..host import is_v_prediction, sampling_of
from .state import FP8, layout_of

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names."""

SPARE = 64 << 20
"""Bytes of a disk that are left free."""

NETWORK = "model.diffusion_model."
"""What the names of a network's tensors begin with in a checkpoint."""

Tick = Callable[[int, int], None]
"""Told how many bytes of how many are written; may raise to end it."""


class Dequantised:
    """A quantised weight as the numbers it stands for, made when it is written."""

    def __init__(self, patcher: Any, key: str, weight: Any) -> None:
        self.patcher, self.key, self.weight = patcher, key, weight
        self.shape, self.dtype = weight.shape, weight.dtype

    def to(self, device: str) -> Tensor:
        """The numbers, patches merged into them."""
        from comfy.utils import get_attr

        module = get_attr(self.patcher.model, self.key.rpartition(".")[0])
        weight = self.weight
        if self.key in self.patcher.patches and not getattr(module, "comfy_patched_weights", False):
            where = self.patcher.load_device
            weight = self.patcher.patch_weight_to_device(self.key, where, return_weight=True)
        plain = weight.dequantize() if layout_of(weight) is not None else weight
        return plain.to(device)


def checkpoint_of(model: Any, clip: Any, vae: Any, kept_layers: int | None) -> dict[str, Any]:
    """The tensors of a checkpoint, each still to be made by `.to("cpu")`.

    Args:
        kept_layers: of the text encoder, where the last ones are skipped ("CLIP skip").

    Returns:
        Tensors, by their names in the original checkpoints.
    """
    found = tensors_of(model, clip, vae)
    if kept_layers is None:
        return found
    return {key: value for key, value in found.items() if not _is_skipped(key, kept_layers)}


def tensors_of(
    model: Any, clip: Any | None, vae: Any | None, *, with_network: bool = True
) -> dict[str, Any]:
    """The tensors of some parts of a model, each still to be made by `.to("cpu")`.

    Args:
        model: a MODEL, which says how the parts are named.
        clip: a CLIP, where it is wanted.
        vae: a VAE, where it is wanted.
    """
    from comfy.model_management import load_models_gpu

    load_models_gpu([*([model] if with_network else []), *([clip.load_model()] if clip else [])])
    network, text, prefix = {}, None, "diffusion_model."
    if with_network:
        state = model.model_state_dict_for_saving(model.model.diffusion_model, prefix)
        network = _plain(model, state, prefix)
    if clip is not None:
        text = _plain(clip.patcher, clip.state_dict_for_saving(), "")
    found = model.model.state_dict_for_saving(network, text, None if vae is None else vae.get_sd())
    family = family_of_model(model)
    if family is None:
        return found
    told = FAMILIES[family].comfyui
    named = {
        original_name(key, told.renamed if key.startswith(NETWORK) else ()): value
        for key, value in found.items()
        if not (told.heeds_marks and key in MARKS)  # those of the file that was loaded
    }
    return named | (_marks(told, model) if with_network else {})


def original_name(key: str, changes: tuple[tuple[str, str], ...]) -> str:
    """A tensor's name as it is in original checkpoints.

    >>> original_name("double_blocks.0.norm.query_norm.weight", (("_norm.weight", "_norm.scale"),))
    'double_blocks.0.norm.query_norm.scale'
    """
    for now, before in changes:
        if key.endswith(now):
            return key.removesuffix(now) + before
    return key


def _marks(told: InComfyUI, model: Any) -> dict[str, Tensor]:
    """The empty tensors that say how a MODEL is sampled, nodes included."""
    sampling = sampling_of(model)
    kind = "v_prediction" if is_v_prediction(sampling) else "epsilon"
    ends_in_noise = getattr(sampling, "zsnr", False)
    return {mark: torch.zeros(0) for mark in told.marks(kind, ends_in_noise=ends_in_noise)}


def _is_skipped(key: str, kept_layers: int) -> bool:
    _, found, rest = key.partition(".encoder.layers.")
    return bool(found) and int(rest.split(".")[0]) >= kept_layers


def _plain(patcher: Any, state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The same with dequantised weights in place of codes and their factors."""
    coded = {name: weight for name, weight in patcher.model.named_parameters() if layout_of(weight)}
    plain = dict(state)
    for name, weight in coded.items():
        place = name.removeprefix(prefix).removesuffix("weight")
        for key in [key for key in plain if key.startswith(place) and key != f"{place}bias"]:
            del plain[key]
        plain[f"{place}weight"] = Dequantised(patcher, name, weight)
    return plain


def write_checkpoint(
    file: Path, tensors: Mapping[str, Any], tick: Tick, notes: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all; fp8 becomes bfloat16.

    Args:
        file: the file; its folder is made.
        tensors: by name, each with `shape`, `dtype` and `to`.
    """
    header, size = header_of(tensors)
    header["__metadata__"].update(notes or {})
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        _check_room(file.parent, size)
        with replace_file(file) as fresh, fresh.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for key, tensor in tensors.items():
                made = tensor.to("cpu").detach().to(_file_dtype(tensor.dtype)).contiguous()
                stream.write(made.reshape(-1).view(torch.uint8).numpy().data)
                tick(header[key]["data_offsets"][1], size)
    except OSError as error:
        why = f"{file} cannot be written ({error.strerror or error})"
        raise NodeError(f"{why}; check the disk and queue again") from error


def _check_room(folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if lack := shortage(folder, size, SPARE):
        raise NodeError(f"the model {lack}; free some space and queue again")


def header_of(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """A safetensors header, and the bytes that follow it.

    >>> header_of({"a": torch.zeros(2, dtype=torch.float16)})[0]["a"]
    {'dtype': 'F16', 'shape': [2], 'data_offsets': [0, 4]}
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in tensors.items():
        dtype, shape = _file_dtype(tensor.dtype), list(tensor.shape)
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[key] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    return header, end


def _file_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype in FP8 else dtype
