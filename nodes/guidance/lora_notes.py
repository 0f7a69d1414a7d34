"""What is to be said of a LoRA file that ComfyUI loads: what it leaves out, or reads otherwise."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

_TEXT = re.compile(r"(?:base_model\.model\.)?(?:lora_te|text_encoder|clip_[lg]\.|t5xxl\.)")


@contextmanager
def left_out() -> Iterator[list[str]]:
    """Within it the keys of a LoRA that ComfyUI logs as not loaded are collected."""
    keys: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said, _, key = record.getMessage().partition("lora key not loaded: ")
            keys.extend([key] if key and not said else [])

    collector = Collector(logging.WARNING)
    logging.getLogger().addHandler(collector)
    try:
        yield keys
    finally:
        logging.getLogger().removeHandler(collector)


def notes_on(
    weights: Mapping[str, Any], metadata: Mapping[str, str], keys: Sequence[str]
) -> list[str]:
    """What a LoRA says that a MODEL patched with it does not do, to follow its name.

    Returns:
        One sentence each, without its subject.
    """
    return [*_on_keys(keys), *_on_scale(weights, metadata)]


def _on_keys(keys: Sequence[str]) -> Iterator[str]:
    text = [key for key in keys if _TEXT.match(key)]
    other = [key for key in keys if not _TEXT.match(key)]
    if text:
        yield (
            f"also changes the text encoder ({len(text)} tensors), which is left out here: load it "
            "with Load LoRA, encode the prompt with that CLIP, and give both to PCPO Tuned Model"
        )
    if other:
        yield (
            f"has {len(other)} tensors that fit nothing in this MODEL and are left out, such as "
            f"{other[0]}"
        )


def _on_scale(weights: Mapping[str, Any], metadata: Mapping[str, str]) -> Iterator[str]:
    """What diffusers reads of a file's scale, and ComfyUI does not."""
    try:
        noted = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return
    if not isinstance(noted, dict) or any(key.endswith(".alpha") for key in weights):
        return
    own = {k.rpartition(".")[2]: v for k, v in noted.items() if not k.startswith("text_encoder")}
    is_one = own.get("lora_alpha", 8) == own.get("r", 8) and not own.get("use_rslora")  # peft's 8
    if not is_one or own.get("alpha_pattern"):
        yield (
            "states its scale in metadata that ComfyUI does not read: here, as in Load LoRA, it "
            "is applied at 1; diffusers and the command sample apply it as stated"
        )
