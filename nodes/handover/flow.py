"""The hand-over of models that are in one file or in several.

Each part that is still as in its file is handed over by it; the others are written to one copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...pcpo.pretrained.pickled import load_pickled
from ...trainers.errors import UserError
from ...trainers.families.header import Header, read_header
from ...trainers.families.source import inspect_source
from ...trainers.families.text.header import encoders_of_file, find_encoders
from .judge import encoders_of
from .state import layout_of
from .write import Tick, tensors_of, write_checkpoint

LOADERS = {
    *("load_checkpoint_guess_config", "load_checkpoint_clip_patcher", "load_diffusion_model"),
    *("load_checkpoint_vae_patcher", "load_clip_model_patcher", "load_vae_patcher"),
}
"""ComfyUI's functions whose first argument is the file, or the files, of a part."""

FP8 = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
"""The names that safetensors has for them."""

PICKLES = (".ckpt", ".pt", ".pth", ".bin")

Parts = tuple[Path | None, tuple[Path, ...] | None, Path | None]
"""Files of the network, of the text encoders, and of the autoencoder; None for what is copied."""


def files_of_parts(model: Any, clip: Any, vae: Any) -> Parts:
    """The files that hold the same numbers as the loaded parts of a model."""
    network, text = _network_file(model), _text_files(clip)
    if network is not None and text != (network,):
        # the trainer adds those that the network's file has and no other
        extra = find_encoders(header_of_file(network)).keys() - encoders_of(clip).keys()
        network = None if extra else network
    return network, text, _vae_file(vae)


def write_parts(parts: Parts, model: Any, clip: Any, vae: Any, copy: Path, tick: Tick) -> None:
    """Write the parts that have no file of their own.

    Args:
        parts: from `files_of_parts`.
    """
    network, text, decoder = parts
    tensors = tensors_of(
        model,
        clip if text is None else None,
        vae if decoder is None else None,
        with_network=network is None,
    )
    write_checkpoint(copy, tensors, tick)


def model_section(parts: Parts, copy: Path) -> dict[str, Any]:
    """The parts as the section `model` of a config names them.

    Args:
        parts: from `files_of_parts`.

    Returns:
        Its source, text_encoders and vae; what is in the network's own file is not named again.
    """
    source, decoder = parts[0] or copy, parts[2] or copy
    text = (copy,) if parts[1] is None else parts[1]
    return {
        "source": str(source),
        "text_encoders": [] if text == (source,) else [str(file) for file in text],
        "vae": None if decoder == source else str(decoder),
    }


def fp8_note(parts: Parts) -> str | None:
    """A note on fp8 weights in the files, which ComfyUI may have loaded in another dtype."""
    files = [file for file in (parts[0], *(parts[1] or ())) if file is not None]
    stored = [f.name for f in files if {*header_of_file(f).dtypes.values()} & {*FP8.values()}]
    if not stored:
        return None
    return f"the fp8 weights of {' and '.join(stored)} are read as the numbers they stand for"


# --- the files of a part -------------------------------------------------------------------------


def files_of(patcher: Any) -> tuple[Path, ...] | None:
    """The files that hold what a part is; None where they are unknown, or it was changed."""
    files = origin_of(patcher)
    return None if patcher.patches else files


def origin_of(patcher: Any) -> tuple[Path, ...] | None:
    """The files that a part was loaded from, changed or not; None where they are unknown."""
    loader, files = _loaded(patcher)
    is_known = loader in LOADERS and files and all(file.is_file() for file in files)
    return files if is_known else None


def loaded_files(*patchers: Any) -> list[Path]:
    """The files that some parts were loaded from, by whatever loader."""
    return [file for patcher in patchers for file in _loaded(patcher)[1]]


def _loaded(patcher: Any) -> tuple[str, tuple[Path, ...]]:
    """What ComfyUI remembers of how a part was loaded: the function's name, and the files."""
    loaded = getattr(patcher, "cached_patcher_init", None)
    if not loaded or not loaded[1]:
        return "", ()
    first = loaded[1][0]
    names = [first] if isinstance(first, str) else first
    return loaded[0].__name__, tuple(Path(name) for name in names if isinstance(name, str))


def _only(files: tuple[Path, ...] | None) -> Path | None:
    return files[0] if files and len(files) == 1 else None


def _network_file(model: Any) -> Path | None:
    file = _only(files_of(model))
    if file is None:
        return None
    try:
        inspect_source(file)
        header = header_of_file(file)
    except UserError:
        return None
    return file if _stores(model.model, [header]) else None


def _vae_file(vae: Any) -> Path | None:
    file = _only(files_of(vae.patcher))
    try:
        return None if file is None or not header_of_file(file).shapes else file
    except UserError:
        return None


def _text_files(clip: Any) -> tuple[Path, ...] | None:
    files = files_of(clip.patcher)
    if files is None:
        return None
    try:
        headers = [header_of_file(file) for file in files]
        kinds = [kind for header in headers for kind in encoders_of_file(header)]
    except UserError:
        return None
    # a kind that is in two files is refused by the trainer
    is_same = sorted(kinds) == sorted(encoders_of(clip))
    return files if is_same and _stores(clip.cond_stage_model, headers) else None


def _stores(module: torch.nn.Module, headers: Sequence[Header]) -> bool:
    """Whether files have as many fp8 weights as were loaded: else a loader has rounded to them."""
    weights = [w.dtype for w in module.parameters() if layout_of(w) is None and w.dtype in FP8]
    stored = Counter(dtype for header in headers for dtype in header.dtypes.values())
    return all(count <= stored[FP8[dtype]] for dtype, count in Counter(weights).items())


def header_of_file(file: Path) -> Header:
    """The names and shapes in a model file, without its weights.

    Returns:
        Names and shapes; no dtypes for a pickled file.
    """
    if file.suffix.lower() not in PICKLES:
        return read_header(file)
    try:  # the structure alone: tensors stay on the disk
        content = load_pickled(file, "meta", mapped=True)
    except Exception as error:  # whatever is wrong, ComfyUI has loaded it in its own way
        raise UserError(f"{file.name} cannot be read safely ({error})") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    return Header(file.name, {key: tuple(value.shape) for key, value in tensors.items()})
