"""A demo model's hand-over: as it is shipped, or as a copy of its folder with other weights.

Both are too small for the one-file layout, whose sizes are read off the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...trainers.job.files import copy_folder, replace_file, write_json
from ..demo.parts import TEXT, TOKENS
from ..errors import NodeError

UNET = Path("unet", "diffusion_pytorch_model.safetensors")
TRANSFORMER = Path("transformer", "diffusion_pytorch_model.safetensors")
TEXT_ENCODER = Path("text_encoder", "model.safetensors")
VAE = Path("vae", "diffusion_pytorch_model.safetensors")

Weights = dict[str, Tensor]


def demo_weights(model: Any, clip: Any, vae: Any, folder: Path) -> dict[Path, Weights] | None:
    """The loaded weights in the demo folder's files and names.

    Returns:
        The weights, or None if all are as shipped.
    """
    from comfy.model_management import load_models_gpu

    if clip.layer_idx not in (None, -1):
        raise NodeError(
            f"CLIP Set Last Layer is at {clip.layer_idx}, which the demo model has no layers for; "
            "connect PCPO Demo Model's CLIP directly"
        )
    load_models_gpu([model, clip.load_model()])
    network = UNET if (folder / UNET).is_file() else TRANSFORMER
    shipped = {file: _read(folder / file) for file in (network, TEXT_ENCODER, VAE)}
    found = {
        network: _unet(model) if network == UNET else _transformer(model),
        TEXT_ENCODER: _text(clip, shipped[TEXT_ENCODER]),
        VAE: _vae(vae),
    }
    for name, file in (("MODEL", network), ("CLIP", TEXT_ENCODER), ("VAE", VAE)):
        if _shapes(found[file]) != _shapes(shipped[file]):
            raise NodeError(
                f"this {name} is not the demo model's; connect the one of PCPO Demo Model"
            )
    is_as_shipped = all(
        found[file][key].equal(weight) for file in shipped for key, weight in shipped[file].items()
    )
    return None if is_as_shipped else found


def write_demo(folder: Path, weights: Mapping[Path, Weights], target: Path) -> None:
    """Copy a demo folder with other weights.

    Args:
        weights: from `demo_weights`.
        target: the copy; must not exist.
    """
    from safetensors.torch import save_file

    copy_folder(folder, target, without="*.safetensors")
    for file, tensors in weights.items():
        with replace_file(target / file) as fresh:
            save_file({key: value.contiguous() for key, value in tensors.items()}, fresh)
    config = target / TEXT_ENCODER.with_name("config.json")
    told = json.loads(config.read_text(encoding="utf-8"))
    write_json(config, told | {"dtype": "float32"})  # else transformers rounds to the shipped dtype


def _read(file: Path) -> Weights:
    from safetensors.torch import load_file

    return {key: value.float() for key, value in load_file(file).items()}


def _shapes(weights: Weights) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in weights.items()}


def _key_by_name(state: Mapping[str, Any]) -> Weights:
    return {key: value.to("cpu").detach().float() for key, value in state.items()}


def _unet(model: Any) -> Weights:
    from comfy.utils import unet_to_diffusers

    state = model.model_state_dict_for_saving(model.model.diffusion_model, "diffusion_model.")
    names = unet_to_diffusers(model.model.model_config.unet_config)
    return _key_by_name({name: state[key] for name, key in names.items() if key in state})


def _transformer(model: Any) -> Weights:
    from comfy.utils import mmdit_to_diffusers

    network = model.model.diffusion_model
    state = _key_by_name(model.model_state_dict_for_saving(network, "diffusion_model."))
    weights = {}
    for name, place in mmdit_to_diffusers(model.model.model_config.unet_config).items():
        # the original name; rows where several are one there; what is done to them
        key, rows, *changes = (place, None) if isinstance(place, str) else place
        if key in state:
            weight = state[key] if rows is None else state[key].narrow(*rows)
            weights[name] = changes[0](weight) if changes else weight  # a swap, its own inverse
    return weights


def _text(clip: Any, shipped: Weights) -> Weights:
    state = clip.state_dict_for_saving()
    ours = {key.removeprefix("text_model."): key for key in shipped}
    loaded = {
        key.removeprefix(TEXT).removeprefix("text_model."): value for key, value in state.items()
    }
    weights = _key_by_name({key: loaded[name] for name, key in ours.items() if name in loaded})
    tokens = ours[TOKENS.removeprefix("text_model.")]
    if tokens in weights:
        weights[tokens] = weights[tokens][: len(shipped[tokens])]
    return weights


def _vae(vae: Any) -> Weights:
    weights = {}
    for key, value in _key_by_name(vae.get_sd()).items():
        part, _, rest = key.removeprefix("taesd_").partition(".")
        layer, _, name = rest.partition(".")
        if layer.isdecimal():
            weights[f"{part}.layers.{int(layer) - (part == 'decoder')}.{name}"] = value
    return weights
