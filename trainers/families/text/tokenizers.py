"""Find the tokenizers of text encoders. Nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import (
    Qwen2Tokenizer,
    T5TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue] (an alias)
)

from ..errors import ModelError
from ..sd1.folder import load_tokenizer
from .header import TOKENIZERS, Kind

_T5_REPOSITORIES = (  # with the folder that T5's tokenizer is in
    ("google/t5-v1_1-xxl", ""),
    ("stabilityai/stable-diffusion-3.5-medium", "tokenizer_3/"),
    ("stabilityai/stable-diffusion-3.5-large", "tokenizer_3/"),
    ("stabilityai/stable-diffusion-3-medium-diffusers", "tokenizer_3/"),
    ("black-forest-labs/FLUX.1-dev", "tokenizer_2/"),
    ("black-forest-labs/FLUX.1-schnell", "tokenizer_2/"),
)
_QWEN_REPOSITORIES = (
    ("Qwen/Qwen3-4B", ""),
    ("Tongyi-MAI/Z-Image", "tokenizer/"),
    ("Tongyi-MAI/Z-Image-Turbo", "tokenizer/"),
    ("black-forest-labs/FLUX.2-klein-base-4B", "tokenizer/"),
    ("black-forest-labs/FLUX.2-klein-4B", "tokenizer/"),
)


def clip_tokenizer(kind: Kind, folder: Path | None = None) -> Any:
    """CLIP's tokenizer, padding as the encoder was trained with.

    Args:
        kind: "clip_l" pads with the end token, "clip_g" with token 0.
        folder: the model's tokenizer folder, which defines its own padding; if it is None or does
            not exist, the shipped tokenizer is used.
    """
    tokenizer = load_tokenizer(folder)
    if kind == "clip_g" and (folder is None or not folder.is_dir()):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def t5_tokenizer(*folders: Path | None) -> Any:
    """T5's tokenizer: from the first folder that has one, else from the hub's cache.

    `ModelError` if it is nowhere, or cannot be read.
    """
    folder_of_t5 = _first(folders, TOKENIZERS["t5"].names) or t5_in_hub_cache()
    if folder_of_t5 is None:
        raise ModelError(
            "T5's tokenizer was not found: give the folder of a model in diffusers format, a "
            "folder that holds T5's tokenizer.json (t5_tokenizer; ComfyUI has one in "
            "comfy/text_encoders/t5_tokenizer), or download google/t5-v1_1-xxl from the Hugging "
            "Face hub to its cache"
        )
    try:
        return T5TokenizerFast.from_pretrained(folder_of_t5, local_files_only=True)
    except Exception as error:  # a missing or broken library tells of itself in a dozen ways
        raise ModelError(
            f"T5's tokenizer in {folder_of_t5} cannot be read ({error}): give a folder with its "
            "tokenizer.json"
        ) from error


def qwen_tokenizer(*folders: Path | None) -> Any:
    """Qwen3's tokenizer: from the first folder that has one, else from the hub's cache.

    `ModelError` if it is nowhere, or cannot be read.
    """
    folder = _first(folders, TOKENIZERS["qwen3_4b"].names) or qwen_in_hub_cache()
    if folder is None:
        raise ModelError(
            "Qwen3's tokenizer was not found: give a folder that holds its vocab.json and "
            "merges.txt, or its tokenizer.json (qwen_tokenizer; ComfyUI has one in "
            "comfy/text_encoders/qwen25_tokenizer), or download Qwen/Qwen3-4B's from the Hugging "
            "Face hub to its cache"
        )
    try:
        return Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise ModelError(
            f"Qwen3's tokenizer in {folder} cannot be read ({error}): give a folder with its "
            "vocab.json and merges.txt, or its tokenizer.json"
        ) from error


def _first(folders: Sequence[Path | None], names: Sequence[str]) -> Path | None:
    """The first folder with a file of one of these names."""
    for folder in folders:
        if folder is not None and any(os.path.isfile(folder / name) for name in names):
            return folder
    return None


def t5_in_hub_cache() -> Path | None:
    """The folder of T5's tokenizer in the Hugging Face hub's cache, if it is there."""
    return _in_hub_cache(_T5_REPOSITORIES, TOKENIZERS["t5"].names)


def qwen_in_hub_cache() -> Path | None:
    """The folder of Qwen3's tokenizer in the Hugging Face hub's cache, if it is there."""
    return _in_hub_cache(_QWEN_REPOSITORIES, TOKENIZERS["qwen3_4b"].names)


def _in_hub_cache(repositories: Sequence[tuple[str, str]], names: Sequence[str]) -> Path | None:
    for repository, folder in repositories:
        for name in names:
            path = try_to_load_from_cache(repository, folder + name)
            if isinstance(path, str):
                return Path(path).parent
    return None
