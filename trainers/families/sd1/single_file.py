"""An SD1.x model from one checkpoint file, offline.

The architecture is read from the tensors' names and shapes, on top of the configs shipped here:
what a file cannot show (the number of heads, the norms' groups) is SD1.x's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from .. import architecture
from ..autoencoder import tiny_autoencoder
from ..errors import ModelError
from ..header import SAFETENSORS, TEXT, UNET, VAE, Header, read_header
from ..prediction import prediction_of
from ..scheduler import SchedulerConfig
from ..source import read_config
from ..weights import check_finite, unpickle
from .folder import Parts, load_tokenizer, place
from .header import judge_sd1
from .spec import SD1

log = logging.getLogger(__name__)

CONFIGS = Path(__file__).parent / "configs"

_VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


@dataclass(frozen=True)
class _Checkpoint:
    header: Header
    path: Path
    tensors: Mapping[str, Tensor] | None  # of a .ckpt; a safetensors file is read part by part

    def under(self, prefix: str) -> dict[str, Tensor]:
        keys = [key for key in self.header.shapes if key.startswith(prefix)]
        if self.tensors is not None:
            tensors = {key: self.tensors[key] for key in keys}
        else:
            with safe_open(self.path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in keys}
        check_finite(tensors, self.path.name)
        return tensors


def load_parts(
    path: Path,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    prediction_type: str | None,
    zero_snr: bool | None,
    *,
    with_text: bool,
) -> Parts:
    """Read a checkpoint's modules.

    If `prediction_type` is None, the file's metadata say what the network predicts; else it is
    noise.
    """
    checkpoint = _open(path)
    scheduler = read_config(CONFIGS / "scheduler" / "scheduler_config.json")
    scheduler |= prediction_of(checkpoint.header, prediction_type, zero_snr, SD1)
    return Parts(
        unet=_load_unet(checkpoint, dtype),
        vae=place(_load_vae(checkpoint), dtype=vae_dtype),
        text_encoder=_load_text_encoder(checkpoint) if with_text else None,
        tokenizer=load_tokenizer(),
        scheduler_config=SchedulerConfig.from_dict(scheduler),
    )


def _open(path: Path) -> _Checkpoint:
    if path.suffix.lower() in SAFETENSORS:
        return _Checkpoint(read_header(path), path, None)
    tensors = unpickle(path)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    header = Header(path.name, shapes)
    judge_sd1(header)
    return _Checkpoint(header, path, tensors)


def _load_unet(checkpoint: _Checkpoint, dtype: torch.dtype) -> UNet2DConditionModel:
    config = architecture.unet_config(checkpoint.header.under(UNET))
    unet = _convert(
        UNet2DConditionModel, "unet", checkpoint.under(UNET), config, checkpoint.path.name
    )
    return place(unet, dtype=dtype)


def _load_vae(checkpoint: _Checkpoint) -> AutoencoderKL | AutoencoderTiny:
    tensors = checkpoint.under(VAE)
    if f"{VAE}taesd_decoder.1.weight" in tensors:
        tiny = {key[len(VAE) :]: tensor.float() for key, tensor in tensors.items()}
        config = read_config(CONFIGS / "vae" / "config.json")
        return tiny_autoencoder(tiny, config, checkpoint.path.name)
    wanted = tuple(VAE + part for part in _VAE_PARTS)
    tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(wanted)}
    config = architecture.vae_config(checkpoint.header.under(VAE))
    return _convert(AutoencoderKL, "vae", tensors, config, checkpoint.path.name)


def _convert(
    kind: Any,
    part: str,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    name: str,
) -> Any:
    # diffusers renames the tensors; here it is made sure that every one found its place
    try:
        model = kind.from_single_file(
            dict(tensors),
            config=str(CONFIGS),
            subfolder=part,
            local_files_only=True,
            **config,
        )
    except (KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"the {part} in {name} is not laid out as SD1.x's: {error}") from error
    state = model.state_dict()
    missing = [key for key, tensor in state.items() if tensor.is_meta]
    if missing or len(state) != len(tensors):
        example = f", for example {missing[0]}" if missing else ""
        raise ModelError(
            f"the {part} in {name} has {len(tensors)} tensors where {len(state)} are expected"
            f"{example}: the file is incomplete or of another architecture"
        )
    return model


def _load_text_encoder(checkpoint: _Checkpoint) -> CLIPTextModel:
    def plain(key: str) -> str:
        return key.removeprefix(TEXT).removeprefix("text_model.")

    tensors = {
        plain(key): tensor
        for key, tensor in checkpoint.under(TEXT).items()
        if not key.endswith("position_ids") and "text_projection" not in key
    }
    config = read_config(CONFIGS / "text_encoder" / "config.json")
    config |= architecture.text_config({key: tuple(t.shape) for key, t in tensors.items()})
    model = CLIPTextModel(CLIPTextConfig(**config))
    # transformers 5 names the tensors without the "text_model." that earlier versions have
    names = {plain(key): key for key in model.state_dict() if not key.endswith("position_ids")}
    if names.keys() != tensors.keys():
        odd = sorted(names.keys() ^ tensors.keys())[0]
        raise ModelError(
            f"the text encoder in {checkpoint.path.name} is not CLIP's (see {odd}): the file is "
            "incomplete or of another architecture"
        )
    model.load_state_dict({names[key]: t.float() for key, t in tensors.items()}, strict=False)
    return model
