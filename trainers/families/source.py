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
from .header import SAFETENSORS, judge_start, read_header
from .registry import family_of_config, family_of_header

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.json", "*.txt", "*/diffusion_pytorch_model*.safetensors", "*/model*.safetensors")
_ENDS = 1 << 20
_CHECKPOINTS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True, slots=True)
class Source:
    """A model that can be used, as far as its header or configs show.

    Attributes:
        path: the folder or the file.
        family: the family's name; None for a pickle, whose header cannot be read without torch.
    """

    path: Path
    kind: Literal["folder", "safetensors", "pickle"]
    family: str | None = None


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
        return Source(path, "safetensors", family_of_header(read_header(path)))
    return Source(path, "pickle")


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
    is_transformer = (path / "transformer" / "config.json").is_file()
    config = read_config(path / ("transformer" if is_transformer else "unet") / "config.json")
    spec = family_of_config(config, str(path), path.name)
    for part in spec.folders:
        read_config(path / part / "config.json")
    read_config(path / "scheduler" / "scheduler_config.json")
    for part in spec.folders:
        weight_variant(path / part)
    return Source(path, "folder", spec.name)


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
