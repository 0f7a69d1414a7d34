"""Safetensors files, written completely or not at all, and always with the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ...pcpo.finite import first_not_finite
from ..finite import NotFiniteError
from ..job.files import replace_file


def write_safetensors(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write a safetensors file so that a reader sees the old one or the new one, never a part.

    Args:
        path: the file; its folder is created if it is missing.
        metadata: entries of the header; values that are no text are written as JSON.

    Raises:
        NotFiniteError: if a number is not finite; nothing is written.
    """
    path = Path(path)
    notes = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}
    plain = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    if (name := first_not_finite(plain)) is not None:
        dtype = str(plain[name].dtype).removeprefix("torch.")
        raise NotFiniteError(
            f"{path} is not written: {name} is not finite in {dtype}; write float32, or, where "
            "training diverged, take an earlier iteration"
        )
    with replace_file(path) as fresh:
        save_file(plain, fresh, metadata=notes)
        _sort_notes(fresh)
    return path


def _sort_notes(path: Path) -> None:
    """Sort the header's metadata by name: safetensors writes them in random order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # always, unless json comes to escape more than safetensors does
            file.seek(8)
            file.write(text.ljust(size))
