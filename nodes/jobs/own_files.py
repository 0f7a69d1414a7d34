"""Contents of a job's folder that are sent as they are: its own files alone.

A folder may come from elsewhere, and a link in it may lead anywhere.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

MAX_IMAGE = 64 << 20
"""Bytes."""
PNG = b"\x89PNG\r\n\x1a\n"
CAREFUL = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""No link is followed, and no pipe waited for."""


def is_own(root: Path, file: Path) -> bool:
    """Whether a file is a regular one of a folder: no link, and beyond none, nor the folder one."""
    try:
        place = root.parent.resolve() / root.name / file.relative_to(root)
        return file.resolve(strict=True) == place and stat.S_ISREG(file.lstat().st_mode)
    except (OSError, RuntimeError, ValueError):  # RuntimeError: links in a circle
        return False


def image(root: Path, file: Path) -> bytes | None:
    """A PNG file of a folder.

    Returns:
        Its contents; None where it is not there, not the folder's own, or no PNG.
    """
    if not is_own(root, file):
        return None
    try:
        with open(file, "rb", opener=lambda path, flags: os.open(path, flags | CAREFUL)) as stream:
            is_file = stat.S_ISREG(os.fstat(stream.fileno()).st_mode)  # for it may be another now
            found = stream.read(MAX_IMAGE + 1) if is_file else b""
    except OSError:
        return None
    return found if found.startswith(PNG) and len(found) <= MAX_IMAGE else None
