"""FLUX.2's autoencoder: 32 channels at 1/8, which batch statistics normalise in squares of 2 x 2.

A file has Black Forest Labs' names, ComfyUI's, or diffusers', and perhaps a narrower decoder; or it
has TAEF2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, AutoencoderTiny
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle

from .. import autoencoder
from ..assemble import assemble
from ..errors import ModelError
from ..header import judge_vae, vae_prefix
from ..sd1.folder import place
from ..source import read_config
from ..text.files import part_tensors
from ..weights import Weights
from .header import ITS_VAE, VAE_CHANNELS, VAE_FILE

_ORIGINAL = "encoder.down.0.block.0.conv1.weight"
_STATISTICS = ("bn.running_mean", "bn.running_var")
_RENAMED = (
    ("encoder.quant_conv.", "quant_conv."),
    ("decoder.post_quant_conv.", "post_quant_conv."),
)


def load_vae(weights: Weights, *, dtype: torch.dtype) -> AutoencoderKLFlux2 | AutoencoderTiny:
    """The autoencoder of a file, on the CPU; the file may be a whole checkpoint.

    Raises:
        ModelError: if there is none, it is incomplete, or it belongs to another model.
    """
    judge_vae(weights.header, VAE_CHANNELS, ITS_VAE)
    name, tensors = weights.header.name, weights.under(vae_prefix(weights.header) or "")
    if "taesd_decoder.1.weight" in tensors:
        return place(
            autoencoder.tiny_autoencoder(tensors, {"scaling_factor": 1.0}, name), dtype=dtype
        )
    if missing := [key for key in _STATISTICS if key not in tensors]:
        raise ModelError(
            f"the VAE in {name} lacks {missing[0]}: it is no VAE of FLUX.2 ({VAE_FILE})"
        )
    for theirs, ours in _RENAMED:
        tensors = {
            ours + key.removeprefix(theirs) if key.startswith(theirs) else key: tensor
            for key, tensor in tensors.items()
        }
    own = {key: t for key, t in tensors.items() if key.startswith(autoencoder.KL_PARTS)}
    sizes = autoencoder.kl_sizes(own)
    widths, widest = sizes["block_out_channels"], len(own["decoder.conv_in.weight"])
    sizes["decoder_block_out_channels"] = [width * widest // widths[-1] for width in widths]
    state = convert_ldm_vae_checkpoint(own, sizes) if _ORIGINAL in own else own
    if len(state) < len(own):
        raise ModelError(f"the VAE in {name} is not laid out as FLUX.2's: {ITS_VAE}")
    state |= {key: tensors[key] for key in _STATISTICS}
    return _make_vae(sizes, state, f"the VAE in {name}", dtype)


def vae_from_folder(part: Path, *, dtype: torch.dtype) -> AutoencoderKLFlux2:
    """The autoencoder of a diffusers folder, on the CPU; `ModelError` if it is of another kind."""
    config = read_config(part / "config.json")
    if config.get("_class_name") != "AutoencoderKLFlux2":
        raise ModelError(
            f"the VAE in {part} is {config.get('_class_name')}; FLUX.2's is AutoencoderKLFlux2"
        )
    return _make_vae(config, part_tensors(part), f"the VAE in {part}", dtype)


def _make_vae(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], what: str, dtype: torch.dtype
) -> AutoencoderKLFlux2:
    kind: Any = AutoencoderKLFlux2
    state = {"bn.num_batches_tracked": torch.tensor(0)} | dict(tensors)
    vae = assemble(lambda: kind.from_config(config), state, what)
    nn.Module.to(vae, dtype)
    for key in _STATISTICS:  # these stay exact
        setattr(vae.bn, key.removeprefix("bn."), tensors[key].float())
    return vae


def denormalize(
    vae: AutoencoderKLFlux2 | AutoencoderTiny, latents: Float[Tensor, "b 128 h w"]
) -> Float[Tensor, "b 32 2h 2w"]:
    """What the decoder takes, of the network's latents; TAEF2 takes them normalised."""
    if isinstance(vae, AutoencoderTiny):
        return pixel_shuffle(latents, 2)
    statistics, config = vae.bn, vae.config
    mean, variance = statistics.running_mean, statistics.running_var
    assert mean is not None and variance is not None
    deviation = (variance + config["batch_norm_eps"]).sqrt()
    return pixel_shuffle(latents * deviation[:, None, None] + mean[:, None, None], 2)
