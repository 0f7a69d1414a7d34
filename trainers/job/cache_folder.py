"""Where prompt embeddings are kept between runs. No torch."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "PCPO_CACHE"


def cache_folder(asked: str | None) -> Path | None:
    """The folder for embeddings, which need not exist; None to keep none.

    `asked` is `run.cache`: a folder, "off", or None for the environment's PCPO_CACHE or the user's
    own cache folder.
    """
    if asked == "off":
        return None
    if asked or os.environ.get(VARIABLE):
        return Path(os.path.expanduser(asked or os.environ[VARIABLE]))
    base = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(base)) / "pcpo" / "prompts"


def cache_told() -> str:
    """Describe the folder that runs share and its contents."""
    folder = cache_folder(None)
    files = [*folder.rglob("*.safetensors")] if folder is not None else []
    size = sum(file.stat().st_size for file in files) / 2**20
    return f"{folder}: {len(files)} prompts, {size:.0f} MiB; it may be deleted at any time"
