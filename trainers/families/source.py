"""Find a model and check whether it can be used, without torch or weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..reading import named
from .errors import ModelError
from .flux.header import is_flux, judge_flux, judge_flux_config
from .header import (
    SAFETENSORS,
    SUPPORTED,
    Header,
    judge_checkpoint,
    judge_lora,
    judge_start,
    read_header,
)
from .sd3.header import is_sd3, judge_sd3, judge_sd3_config

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.json", "*.txt", "*/diffusion_pytorch_model*.safetensors", "*/model*.safetensors")
_ENDS = 1 << 20
_PARTS = ("unet", "vae", "text_encoder")
_FLOW_PARTS = ("transformer", "vae")
_TRANSFORMERS = {
    "SD3Transformer2DModel": ("sd3", judge_sd3_config),
    "FluxTransformer2DModel": ("flux", judge_flux_config),
}
_CHECKPOINTS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True, slots=True)
class Source:
    """A model that can be used, as far as its header or configs show.

    Attributes:
        path: the folder or the file.
        kind: how it is stored.
        family: the family's name.
    """

    path: Path
    kind: Literal["folder", "safetensors", "pickle"]
    family: str = "sd1"


def inspect_source(source: str | Path, *, allow_download: bool = False) -> Source:
    """Find a model and refuse one that cannot be trained here, from headers and configs alone.

    A .ckpt has no header that can be read without torch: only the beginning of the file is checked
    here, the rest when it is loaded.

    Args:
        source: a diffusers folder, a .safetensors or .ckpt file, or "organisation/name".
        allow_download: download a hub name that is not in the local cache.

    Raises:
        ModelError: if nothing is there, or it is not a model that can be used.
    """
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return _judge_folder(path)
    if os.path.isfile(path):
        return _judge_file(path)
    name = str(source).replace("\\", "/")
    if _HUB_NAME.fullmatch(name) and path.suffix.lower() not in _CHECKPOINTS:
        return _judge_folder(_from_hub(name, allow_download))
    raise ModelError(f"there is no model at {named(source)}: check the path to the file or folder")


def _judge_file(path: Path) -> Source:
    if path.suffix.lower() not in (*_CHECKPOINTS, ".gguf"):
        raise ModelError(f"{path.name} is no model file: choose a .safetensors or .ckpt file")
    judge_start(path)
    if path.suffix.lower() in SAFETENSORS:
        return Source(path, "safetensors", judge_header(read_header(path)))
    return Source(path, "pickle")


def judge_header(header: Header) -> str:
    """The family of a checkpoint or a flow model's network; `ModelError` if it is unusable."""
    judge_lora(header)
    if is_flux(header):
        judge_flux(header)
        return "flux"
    if is_sd3(header):
        judge_sd3(header)
        return "sd3"
    judge_checkpoint(header)
    return "sd1"


def _from_hub(name: str, allow_download: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, allow_patterns=list(_HUB_FILES), local_files_only=not allow_download
            )
        )
    except Exception as error:  # the hub's client has a dozen kinds; all mean "not to be had"
        remedy = "check the name and the connection" if allow_download else "allow the download"
        raise ModelError(
            f"there is no file or folder {name}, and the model of that name on the Hugging Face "
            f"hub is not on this machine: check the path, or {remedy} ({type(error).__name__})"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON config of a model folder; `ModelError` if it is absent or no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent.name}/{path.name} is missing in {path.parent.parent}: give the folder "
            "that has model_index.json in it, complete"
        ) from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is no model config: download it again")
    return config


def fingerprint(source: str | Path) -> str:
    """SHA-256 that identifies a model by names, sizes and both ends of each file.

    Gigabytes stay unread; `source` as in `inspect_source`.
    """
    return fingerprint_of_files(inspect_source(source).path)


def fingerprint_of_files(path: Path) -> str:
    """The same for a file, or for all files in a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.relative_to(path.parent).as_posix()} {size}\n".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(_ENDS))
                stream.seek(max(0, size - _ENDS))
                digest.update(stream.read(_ENDS))
    return digest.hexdigest()


def _judge_folder(path: Path) -> Source:
    if (path / "transformer" / "config.json").is_file():
        return _judge_flow_folder(path)
    unet = read_config(path / "unet" / "config.json")
    if unet.get("addition_embed_type") == "text_time":
        raise ModelError(f"the model in {path} is SDXL, which is not supported. {SUPPORTED}")
    if unet.get("cross_attention_dim") == 1024:
        raise ModelError(f"the model in {path} is SD2.x, which is not supported. {SUPPORTED}")
    if unet.get("in_channels", 4) != unet.get("out_channels", 4):
        raise ModelError(
            f"the network in {path} takes {unet['in_channels']} channels: it is an inpainting or "
            "edit model, which cannot be trained here. Choose its text-to-image version"
        )
    for part in _PARTS:
        read_config(path / part / "config.json")
    read_config(path / "scheduler" / "scheduler_config.json")
    for part in _PARTS:
        weight_variant(path / part)
    return Source(path, "folder")


def _judge_flow_folder(path: Path) -> Source:
    config = read_config(path / "transformer" / "config.json")
    kind = config.get("_class_name", "a transformer")
    if kind not in _TRANSFORMERS:
        raise ModelError(f"the model in {path} is {kind}, which is not supported. {SUPPORTED}")
    family, judge = _TRANSFORMERS[kind]
    judge(config, path.name)
    for part in _FLOW_PARTS:
        read_config(path / part / "config.json")
        weight_variant(path / part)
    read_config(path / "scheduler" / "scheduler_config.json")
    return Source(path, "folder", family)


def weight_variant(part: Path) -> str | None:
    """The variant of a folder's weights to read, as diffusers names it: None if plain, or "fp16".

    `ModelError` if the part has no safetensors weights.
    """
    names = [file.name for file in part.glob("*.safetensors")]
    if any(".fp16" not in name for name in names):
        return None
    if names:
        return "fp16"
    raise ModelError(
        f"{part} holds no .safetensors weights: download them, or save the model again with "
        "safe_serialization"
    )
