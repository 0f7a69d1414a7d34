"""Autoencoders of the flow families: 16 latent channels, scaled and shifted.

A file holds an AutoencoderKL, in the original layout or in diffusers', or TAESD as ComfyUI stores
it: sequences, the decoder's counting its entry clamp as layer 0, with `vae_scale` and `vae_shift`.
TAEF2 is a TAESD whose coarsest blocks have a `pool`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ...pcpo.finite import all_finite
from ..finite import NotFiniteError
from . import architecture
from .assemble import assemble
from .errors import ModelError
from .header import judge_vae, vae_prefix
from .sd1.folder import place
from .sizes import check_sides
from .source import read_config
from .spec import FamilySpec
from .text.files import part_tensors
from .weights import Weights

Autoencoder = AutoencoderKL | AutoencoderTiny

_KINDS: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
KL_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
"""Beginnings of the names of an AutoencoderKL."""


def latent_shape(spec: FamilySpec, width: int, height: int) -> tuple[int, int, int]:
    """(channels, height, width) of one latent; `ValueError` for sides that are no multiples."""
    check_sides(width, height, spec.multiple)
    return spec.channels, height // spec.factor, width // spec.factor


def load_autoencoder(weights: Weights, configs: Path, *, dtype: torch.dtype) -> Autoencoder:
    """The autoencoder of a file, on the CPU; the file may be a whole checkpoint.

    Its config's `scaling_factor` and `shift_factor` lead from the network's latents to what it
    decodes (see `decode_images`); `configs` is the family's folder, with vae/config.json.
    `ModelError` if there is none, it is incomplete, or it belongs to another model.
    """
    config = read_config(configs / "vae" / "config.json")
    judge_vae(weights.header, config["latent_channels"], "choose the VAE file of this model")
    name, tensors = weights.header.name, weights.under(vae_prefix(weights.header) or "")
    if "taesd_decoder.1.weight" in tensors:
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
    for path in {key.partition(".pool.")[0] for key in state if ".pool." in key}:
        parent, _, layer = path.rpartition(".")
        layers: Any = vae.get_submodule(parent)
        layers[int(layer)] = _Pooled(layers[int(layer)])
    try:
        vae.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"the VAE in {name} is not laid out as TAESD's: {error}") from error
    return vae


class _Pooled(nn.Module):
    """A block of TAEF2: TAESD's, on an input to which a sum over the whole image is added."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv, self.skip, self.fuse = block.conv, block.skip, block.fuse
        width = block.conv[0].in_channels
        self.pool = nn.Sequential(
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.GroupNorm(4, 4 * width),
            nn.ReLU(),
            nn.Conv2d(4 * width, width, 1, bias=False),
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        x = x + self.pool(x)
        return self.fuse(self.conv(x) + self.skip(x))


def kl_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of diffusers' config that differ between autoencoders, in either layout."""
    shapes = {
        re.sub(r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block.", key): tuple(tensor.shape)
        for key, tensor in tensors.items()
    }
    return architecture.vae_config(shapes) | {
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def kl_autoencoder(tensors: Mapping[str, Tensor], configs: Path, name: str) -> AutoencoderKL:
    """An AutoencoderKL from the tensors of a file, named without a prefix.

    Args:
        tensors: in the original layout or in diffusers'; those of other parts are left out.
        configs: the family's folder, with vae/config.json.
        name: of the file.

    Raises:
        ModelError: if a tensor is missing, surplus or of another shape.
    """
    tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(KL_PARTS)}
    # diffusers renames the tensors; here it is made sure that every one found its place
    sizes, kind = kl_sizes(tensors), cast("Any", AutoencoderKL)
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
    return decode_raw(vae, raw, batch)


@torch.no_grad()
def decode_raw(vae: Any, raw: Tensor, batch: int) -> UInt8[Tensor, "b 3 height width"]:
    """Decode what the decoder takes, `batch` at a time, to images of 0 to 255."""
    if isinstance(vae, AutoencoderTiny) and raw.device.type == "cpu":  # a fifth faster there
        raw = raw.to(memory_format=torch.channels_last)
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
