"""Write files completely or not at all. Standard library only."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import stat
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .leftovers import temporary

PATIENCE_S = 2.0
"""How long to wait for a file that another process reads."""


@contextmanager
def replace_file(path: Path, *, is_new: bool = False) -> Iterator[Path]:
    """Write a file so that a reader sees the old one or the new one, never a part.

    Its mode is what the umask gives a new file, whoever writes it (safetensors gives its owner
    alone access) and whatever the old file's mode was.

    Args:
        path: the file; its folder is made where it is missing.
        is_new: raise `FileExistsError` where another process has made it meanwhile.

    Yields:
        A file beside it to write to, which takes its place in the end; after an error it is
        removed, and the old one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = temporary(path)
    try:
        fresh.touch()
        mode = fresh.stat().st_mode
        yield fresh
        if fresh.stat().st_mode != mode:
            fresh.chmod(stat.S_IMODE(mode))
        with fresh.open("rb+") as file:
            os.fsync(file.fileno())
        if is_new:
            _claim(fresh, path)
        _replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _claim(fresh: Path, path: Path) -> None:
    """Create a file; `FileExistsError` if it exists."""
    try:
        os.link(fresh, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if path.exists():
            raise FileExistsError(path) from None


def _replace(fresh: Path, path: Path) -> None:
    # On Windows a file that someone reads (ComfyUI, a virus scanner) cannot be replaced yet.
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return os.replace(fresh, path)
        except PermissionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def copy_folder(source: Path, target: Path, without: str = "") -> None:
    """Copy the files of a folder, creating the target; their modes are those of new files.

    Names that match the pattern `without` are left out.
    """
    for file in source.rglob("*"):
        if file.is_file() and not file.match(without or "/"):
            with replace_file(target / file.relative_to(source)) as fresh:
                shutil.copyfile(file, fresh)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    with replace_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int = 2) -> None:
    """Replace a JSON file in one step."""
    write_text(path, json_text(value, indent=indent, ensure_ascii=False) + "\n")


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Replace a CSV file in one step; the rows may come one by one."""
    with replace_file(path) as fresh, fresh.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def json_text(value: Any, **options: Any) -> str:
    """A value of plain types as JSON, with null for NaN and infinities, which JSON cannot express.

    >>> json_text({"a": [1.5, float("nan")]})
    '{"a": [1.5, null]}'
    """
    return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """The value with None for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def cell(value: Any) -> Any:
    """A value for a CSV file, with a quote before what a spreadsheet would run as a formula.

    >>> cell("=1+1"), cell("-0.5"), cell("a cat"), cell(2)
    ("'=1+1", '-0.5', 'a cat', 2)
    """
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def shortage(folder: Path, size: int, reserve: int) -> str | None:
    """The space that a disk lacks for a file: "needs ... but ...", without a subject; or None.

    Args:
        folder: on the disk; must exist.
        size: of the file, bytes.
        reserve: bytes that have to stay free beside it.
    """
    free = shutil.disk_usage(folder).free
    if free >= size + reserve:
        return None
    wanted, spare = (f"{math.ceil(value / 1e6):,} MB" for value in (size, reserve))
    return f"needs {wanted} and {spare} in reserve, but {folder} has {free // 10**6:,} MB free"
