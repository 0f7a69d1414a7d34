"""Names of files that nothing else has, and what a LoRA's file must not hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from ..pcpo.finite import first_not_finite
from ..trainers.config.train_config import current_name
from .errors import NodeError

FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
MAX_NAME = 80
"""Bytes."""


def file_name(text: str, what: str) -> str:
    """A name that is a file's on every system.

    Args:
        what: the name, in an error.

    >>> file_name(" my style ", "the name")
    'my style'
    """
    name = text.strip()
    odd = sorted(set(FORBIDDEN.findall(name)))
    if odd:
        shown = " ".join(odd) if all(c.isprintable() for c in odd) else "a control character"
        raise NodeError(f"{what} {name!r} has {shown} in it; use letters, digits, - and _")
    if not name or name[0] == "." or name[-1] == "." or RESERVED.fullmatch(name):
        raise NodeError(f"{what} {name!r} cannot be a file's; write one like my_style")
    if len(name.encode()) > MAX_NAME:
        raise NodeError(f"{what} has more than {MAX_NAME} bytes; shorten it")
    return name


def lora_file(folder: Path, name: str) -> Path:
    """The file of a LoRA."""
    return folder / f"{name}.safetensors"


def free_name(name: str, is_taken: Callable[[str], bool]) -> str:
    """A name that is not taken: NAME, NAME-2, NAME-3 ...

    >>> free_name("a", ["a", "a-2"].__contains__)
    'a-3'
    """
    others = (f"{name}-{number}" for number in count(2))
    return next(other for other in others if not is_taken(other)) if is_taken(name) else name


def checked_lora(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """A LoRA's tensors, as they were read."""
    if (broken := first_not_finite(tensors)) is not None:
        raise NodeError(
            f"the LoRA {name} has numbers that are not finite (NaN or infinite), first in "
            f"{broken}; its training diverged: choose another file, or an earlier iteration"
        )
    return tensors


NODE_ID = "PCPOTrainingSettings"


def with_current_names(sent: dict[str, Any]) -> dict[str, Any]:
    """What is sent to ComfyUI's queue, with today's names of its presets, in place.

    ComfyUI would refuse the former names, which graphs in API format may still have.
    """
    graph = sent.get("prompt")
    for node in graph.values() if isinstance(graph, dict) else ():
        if isinstance(node, dict) and node.get("class_type") == NODE_ID:
            inputs = node.get("inputs")
            if isinstance(inputs, dict) and "preset" in inputs:
                inputs["preset"] = current_name(inputs["preset"])
    return sent
