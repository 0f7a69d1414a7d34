"""An SD1.x model from a diffusers folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from ..errors import ModelError
from ..scheduler import SchedulerConfig
from ..source import read_config, weight_variant
from ..weights import check_finite

BUNDLED_TOKENIZER = Path(__file__).parents[3] / "pcpo" / "pretrained" / "clip_tokenizer"

_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_M = TypeVar("_M", bound=nn.Module)
_VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


@dataclass(frozen=True)
class Parts:
    """The modules of an SD1.x model, on the CPU, in the dtypes asked for."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    text_encoder: CLIPTextModel | None
    tokenizer: CLIPTokenizer
    scheduler_config: SchedulerConfig


def load_parts(
    path: Path,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    prediction_type: str | None,
    zero_snr: bool | None,
    *,
    with_text: bool,
) -> Parts:
    """Read a folder's modules; its scheduler config says what the network predicts.

    `ModelError` if a part cannot be used, or the folder contradicts `prediction_type`.
    """
    scheduler = SchedulerConfig.of_folder(path, prediction_type, zero_snr)
    vae_class = read_config(path / "vae" / "config.json").get("_class_name")
    if vae_class not in _VAES:
        raise ModelError(f"the VAE is {vae_class}; it must be one of {', '.join(_VAES)}")
    text_encoder: Any = None
    if with_text:
        text_encoder = _from_folder(CLIPTextModel, path / "text_encoder", dtype=torch.float32)
    return Parts(
        unet=_from_folder(UNet2DConditionModel, path / "unet", torch_dtype=dtype),
        vae=_from_folder(_VAES[vae_class], path / "vae", torch_dtype=vae_dtype),
        text_encoder=text_encoder,
        tokenizer=load_tokenizer(path / "tokenizer"),
        scheduler_config=scheduler,
    )


def _from_folder(kind: Any, part: Path, **options: Any) -> Any:
    try:
        with _quiet():
            module = kind.from_pretrained(
                part,
                local_files_only=True,
                use_safetensors=True,
                variant=weight_variant(part),
                **options,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{part} cannot be loaded: {error}") from error
    check_finite(module.state_dict(), str(part))
    return module


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # diffusers warns about a field that it writes itself (AutoencoderTiny's block_out_channels),
    # transformers draws a progress bar for a second's work
    verbosity = diffusers_logging.get_verbosity()
    had_bar = transformers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        if had_bar:
            transformers_logging.enable_progress_bar()


def place(module: _M, **where: Any) -> _M:
    """Move or cast a module in place, by torch's own `to`.

    diffusers' own `to` warns about an empty list of modules at every cast.
    """
    nn.Module.to(module, **where)
    return module


def load_tokenizer(path: Path | None = None) -> CLIPTokenizer:
    """CLIP's tokenizer, from a model's folder or, if that does not exist, the shipped one."""
    path = path if path is not None and path.is_dir() else BUNDLED_TOKENIZER
    # Without its files transformers makes a tokenizer of a handful of tokens, and says nothing.
    if not any(all((path / name).is_file() for name in names) for names in _VOCABULARIES):
        raise ModelError(
            f"{path} holds no vocabulary (vocab.json and merges.txt): download it again"
        )
    return CLIPTokenizer.from_pretrained(path, local_files_only=True)
