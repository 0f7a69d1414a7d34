"""Check by their headers whether the files of a model belong together. No torch here."""

from __future__ import annotations

import os
from pathlib import Path

from ..reading import named, no_file
from .errors import ModelError
from .files import Files
from .header import SAFETENSORS, Header, judge_start, read_header
from .precision import judge_precision
from .registry import FAMILIES
from .source import Source
from .text.header import TITLES, TOKENIZERS, Tokenizer, encoders_of_file


def judge_files(files: Files, model: Source) -> None:
    """Refuse files that are no model together, as far as headers show.

    The header of a pickle cannot be read without torch: it is checked when it is loaded.
    """
    given = [*files.text_encoders, *([] if files.vae is None else [files.vae])]
    spec = FAMILIES.get(model.family or "")
    judge_parts = None if spec is None else spec.judge_parts
    if spec is not None and judge_parts is None and files != Files(files.network):
        raise ModelError(
            f"{model.path.name} is an {spec.title} model, whose text encoder and VAE are in its "
            "own file; leave out text_encoders, vae and t5_tokenizer"
        )
    if model.kind == "folder" and given:
        raise ModelError(
            f"{model.path.name} is a folder, which has its own text encoders and VAE; leave out "
            "text_encoders and vae"
        )
    headers = [_header(path) for path in given]
    for tokenizer in TOKENIZERS.values():
        _check_tokenizer(tokenizer, getattr(files, tokenizer.field))
    known = [header for header in headers if header is not None]
    if model.kind != "safetensors" or judge_parts is None or len(known) < len(headers):
        return
    texts = known[: len(files.text_encoders)]
    vae = None if files.vae is None else known[-1]
    judge_parts(read_header(model.path), texts, vae)
    assert spec is not None
    for header in texts:
        for kind in encoders_of_file(header):
            if kind not in spec.comfyui.encoders:
                raise ModelError(
                    f"{header.name} holds {TITLES[kind]}, which {spec.title} does not take: leave "
                    "it out"
                )


def _header(path: Path) -> Header | None:
    """A part's header; None for a pickle."""
    if why := no_file(path):
        raise ModelError(f"{named(path)}, named as a part of the model, {why}: check the path")
    if path.suffix.lower() not in SAFETENSORS:
        judge_start(path)
        return None
    header = read_header(path)
    judge_precision(header)
    return header


def _check_tokenizer(its: Tokenizer, folder: Path | None) -> None:
    if folder is None or any(os.path.isfile(folder / name) for name in its.names):
        return
    raise ModelError(
        f"{its.field} is {named(folder)}, where there is no {' or '.join(its.names)}: give the "
        f"folder with {its.title}'s tokenizer (ComfyUI has one in "
        f"comfy/text_encoders/{its.in_comfyui})"
    )
