"""Autoencoders of the flow families: 16 latent channels, scaled and shifted.

A file holds an AutoencoderKL, in the original layout or in diffusers', or TAESD as ComfyUI stores
it: sequences, the decoder's counting its entry clamp as layer 0, with `vae_scale` and `vae_shift`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from jaxtyping import Float, UInt8
from torch import Tensor

from ...pcpo.finite import all_finite
from ..finite import NotFiniteError
from . import architecture
from .assemble import assemble
from .errors import ModelError
from .header import VAE_ENTRIES, vae_prefix
from .sd1.folder import place
from .sizes import check_sides
from .source import read_config
from .spec import FamilySpec
from .text.files import part_tensors
from .weights import Weights

Autoencoder = AutoencoderKL | AutoencoderTiny

_KINDS: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def latent_shape(spec: FamilySpec, width: int, height: int) -> tuple[int, int, int]:
    """(channels, height, width) of one latent; `ValueError` for sides that are no multiples."""
    check_sides(width, height, spec.multiple)
    return spec.channels, height // spec.factor, width // spec.factor


def load_autoencoder(weights: Weights, configs: Path, *, dtype: torch.dtype) -> Autoencoder:
    """The autoencoder of a file, on the CPU; the file may be a whole checkpoint.

    Its config's `scaling_factor` and `shift_factor` lead from the network's latents to what it
    decodes (see `decode_images`); `configs` is the family's folder, with vae/config.json.

    Raises:
        ModelError: if there is none, it is incomplete, or it belongs to another model.
    """
    name, prefix = weights.header.name, vae_prefix(weights.header)
    if prefix is None:
        raise ModelError(f"{name} holds no VAE: choose the VAE file of this model")
    config = read_config(configs / "vae" / "config.json")
    shapes = weights.header.under(prefix)
    channels = next(shapes[entry][1] for entry in VAE_ENTRIES if entry in shapes)
    if channels != config["latent_channels"]:
        raise ModelError(
            f"the VAE in {name} has {channels} latent channels and the network takes "
            f"{config['latent_channels']}: it belongs to another model"
        )
    tensors = weights.under(prefix)
    if "taesd_decoder.1.weight" in shapes:
        return place(tiny_autoencoder(tensors, config, name), dtype=dtype)
    return place(kl_autoencoder(tensors, configs, name), dtype=dtype)


def tiny_autoencoder(
    tensors: dict[str, Tensor], config: Mapping[str, Any], name: str
) -> AutoencoderTiny:
    """TAESD from the tensors of ComfyUI's file, named without a prefix.

    `vae_scale` and `vae_shift` are taken out of the tensors; `config` says how the family's own
    autoencoder scales and shifts latents.

    Raises:
        ModelError: if a tensor is missing, surplus or of another shape.
    """
    # ComfyUI decodes (latent / scaling_factor + shift_factor - vae_shift) * vae_scale
    scale = float(tensors.pop("vae_scale", 1.0))
    shift = float(tensors.pop("vae_shift", 0.0))
    if not scale:
        raise ModelError(f"the VAE in {name} scales latents by 0 (vae_scale): download it again")
    state = {}
    for key, tensor in tensors.items():
        part, layer, rest = key.removeprefix("taesd_").split(".", 2)
        state[f"{part}.layers.{int(layer) - (part == 'decoder')}.{rest}"] = tensor
    vae = AutoencoderTiny(
        latent_channels=tensors["taesd_decoder.1.weight"].shape[1],
        scaling_factor=config["scaling_factor"] / scale,
        shift_factor=((config.get("shift_factor") or 0.0) - shift) * scale,
    )
    try:
        vae.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"the VAE in {name} is not laid out as TAESD's: {error}") from error
    return vae


def kl_autoencoder(tensors: Mapping[str, Tensor], configs: Path, name: str) -> AutoencoderKL:
    """An AutoencoderKL from the tensors of a file, named without a prefix.

    Args:
        tensors: in the original layout or in diffusers'; those of other parts are left out.
        configs: the family's folder, with vae/config.json.
        name: of the file.

    Raises:
        ModelError: if a tensor is missing, surplus or of another shape.
    """
    tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(_PARTS)}
    # diffusers renames the tensors; here it is made sure that every one found its place
    shapes = {
        re.sub(r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block.", key): tuple(tensor.shape)
        for key, tensor in tensors.items()
    }
    sizes = architecture.vae_config(shapes) | {
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }
    kind: Any = AutoencoderKL
    try:
        vae = kind.from_single_file(
            dict(tensors), config=str(configs), subfolder="vae", local_files_only=True, **sizes
        )
    except (KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"the VAE in {name} is not laid out as AutoencoderKL: {error}") from error
    state = vae.state_dict()
    missing = [key for key, tensor in state.items() if tensor.is_meta]
    if missing or len(state) != len(tensors):
        raise ModelError(
            f"the VAE in {name} has {len(tensors)} tensors where {len(state)} are expected: the "
            "file is incomplete or of another architecture"
        )
    return vae


def autoencoder_from_folder(part: Path, *, dtype: torch.dtype) -> Autoencoder:
    """The autoencoder of a diffusers folder, on the CPU; `ModelError` if it is of another kind."""
    config = read_config(part / "config.json")
    name = config.get("_class_name", "")
    if name not in _KINDS:
        raise ModelError(f"the VAE in {part} is {name}; it must be one of {', '.join(_KINDS)}")
    kind: Any = _KINDS[name]
    if name == "AutoencoderTiny":
        config.pop("block_out_channels", None)  # diffusers writes it and warns when it reads it
    tensors = part_tensors(part, dtype)
    return assemble(lambda: kind.from_config(config), tensors, f"the VAE in {part}")


@torch.no_grad()
def decode_images(
    vae: Autoencoder, latents: Float[Tensor, "b c h w"], batch: int
) -> UInt8[Tensor, "b 3 height width"]:
    """Decode clean latents in the network's scale, `batch` at a time, to images of 0 to 255."""
    config: Any = vae.config  # diffusers calls it a dict, but its fields are attributes
    shift = getattr(config, "shift_factor", None) or 0.0
    raw = (latents / config.scaling_factor + shift).to(vae.dtype)
    if isinstance(vae, AutoencoderTiny) and raw.device.type == "cpu":  # a fifth faster there
        raw = raw.to(memory_format=torch.channels_last)
    return decode_raw(vae, raw, batch)


@torch.no_grad()
def decode_raw(vae: Any, raw: Tensor, batch: int) -> UInt8[Tensor, "b 3 height width"]:
    """Decode what the decoder takes, `batch` at a time, to images of 0 to 255."""
    return torch.cat([_decode(vae, part) for part in raw.split(batch)])


def _decode(vae: Any, raw: Tensor) -> Tensor:  # diffusers annotates latents as torch.FloatTensor
    """Decode one batch; `NotFiniteError` if the result is not finite."""
    image = vae.decode(raw, return_dict=False)[0].float()
    if not all_finite([image]):
        raise NotFiniteError(
            "the autoencoder's images are not finite (NaN or infinite), so that they would be "
            f"black: it overflows in {raw.dtype}".replace("torch.", "")
            + ", or its weights are damaged; use another VAE"
        )
    rounded = ((image / 2 + 0.5).clamp(0, 1) * 255).round()
    return rounded.to(torch.uint8, memory_format=torch.contiguous_format)
