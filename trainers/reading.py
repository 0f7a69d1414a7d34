"""Read paths, files and values from users, or refuse them in one line. No torch.

`Path.is_file` and its kin raise OSError for a name of more than 255 bytes; `os.path.isfile` and its
kin never do, so they check any text that may be a path.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .errors import ConfigError

LONGEST_NAME = 255
"""Bytes of a name in a path: ext4, APFS; NTFS allows as many UTF-16 units."""
LONGEST_PATH = 4000
"""Characters of a path: Linux takes 4095 bytes."""
DIGITS = 20
"""Digits of a whole number: 2^64 - 1 has as many."""


def shown(value: Any, most: int = 80) -> str:
    """A value in an error: quoted, on one line, its middle left out if it is long.

    >>> shown("a" * 200, 20), shown([[0]])
    ("'aaaaaaa...aaaaaaaa'", '[[0]]')
    """
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep, or a number of too many digits
        return f"a {type(value).__name__} too large to show"
    return shorten(text, most)


def named(path: str | Path, most: int = 120) -> str:
    """A path in an error: on one line, its middle left out if it is long.

    >>> named("a\\nb"), len(named("x" * 300))
    ('a\\\\nb', 120)
    """
    text = os.fspath(path)
    return shorten("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), most)


def printable(text: str, most: int = 1200) -> str:
    """An error's text for a terminal: without control characters, each line cut to `most`.

    >>> printable("a\\x1b[31m\\nb")
    'a\\\\x1b[31m\\nb'
    """
    plain = re.sub(r"[\x00-\t\v-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)
    return "\n".join(shorten(line, most) for line in plain.split("\n"))


def shorten(text: str, most: int) -> str:
    """A text with its middle left out if it is long."""
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-(most - 3 - half) :]}"


def nearest_hint(word: str, known: Iterable[str]) -> str:
    """A guess at what a word was meant to be, to follow it in an error.

    >>> nearest_hint("trian", ["train", "jobs"]), nearest_hint("x", ["train"])
    (", which is near 'train'", '')
    """
    matches = get_close_matches(word[:40], list(known), 1)
    return f", which is near {matches[0]!r}" if matches else ""


def no_file(path: str | Path) -> str | None:
    """Why there is no file to read at a path, to follow "which"; None if there is one.

    >>> no_file("x" * 300), no_file("."), no_file(__file__)
    ('has a name too long for a file', 'is a folder', None)
    """
    if os.path.isfile(path):
        return None if os.access(path, os.R_OK) else "may not be read; change its permissions"
    if os.path.isdir(path):
        return "is a folder"
    if os.path.islink(path):
        return "is a link to a file that is not there"
    if os.path.exists(path):
        return "is a device, not a file"
    return _unusable(path) or "is no file"


def _unusable(path: str | Path) -> str | None:
    """Why no file can have this path."""
    text = os.fspath(path)
    if not text.strip():
        return "is empty"
    if "\0" in text:
        return "holds a NUL character"
    try:
        names = [os.fsencode(name) for name in Path(text).parts]
    except UnicodeEncodeError:
        return "is not valid Unicode"
    is_long = any(len(name) > LONGEST_NAME for name in names) or len(text) > LONGEST_PATH
    return "has a name too long for a file" if is_long else None


def check_target(path: str | Path, option: str, *, is_folder: bool) -> None:
    """Refuse a path that cannot be written, before there is anything to write; it need not exist.

    `option` is named in the error.
    """
    kind = "folder" if is_folder else "file"
    if why := _unusable(path):
        raise ConfigError(f"{option} is {named(path)!r}, which {why}; give another {kind}")
    if os.path.isdir(path) and not is_folder:
        raise ConfigError(f"{option} is {path}, a folder; give a file")
    if is_folder and os.path.exists(Path(path) / "model_index.json"):
        raise ConfigError(f"{option} is {path}, the folder of a model; choose another folder")
    first = Path(path) if is_folder or os.path.lexists(path) else Path(path).absolute().parent
    there = next(p for p in (first, *first.absolute().parents) if os.path.lexists(p))
    is_right = os.path.isdir(there) or (there == Path(path) and not is_folder)
    mode = os.W_OK | (os.X_OK if os.path.isdir(there) else 0)
    if not is_right or not os.access(there, mode):
        why = "cannot be written to" if is_right else "is no folder"
        raise ConfigError(f"{option} is {path}, but {there} {why}; choose another {kind}")


def read_text(path: str | Path, name: str, most: int) -> str:
    """The text of a file, its line ends "\\n", without a byte order mark.

    Args:
        name: of the file in an error.
        most: bytes allowed.

    Raises:
        ConfigError: if there is no such file, or it is too large or no UTF-8 text.
    """
    if why := no_file(path):
        raise ConfigError(f"{name} {why}; give a text file")
    try:
        if (size := os.path.getsize(path)) > most:
            raise ConfigError(
                f"{name} has {size:,} bytes, more than the {most:,} that are read; give a smaller "
                "file"
            )
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror or error}") from error
    if "\0" in text:
        raise ConfigError(f"{name} is not UTF-8 text (it holds NUL); save it as UTF-8")
    return text


# --- values --------------------------------------------------------------------------------------


def parse_json(text: str, name: str) -> Any:
    """Parse a JSON text; `name` is its name in errors.

    Raises:
        ConfigError: if it is no JSON, repeats a name, is nested too deep, or holds what no other
            program could read: NaN, endless numbers, lone surrogates.
    """
    try:
        value = json.loads(text, parse_int=_parse_int, object_pairs_hook=_once)
    except RecursionError as error:
        raise ConfigError(f"{name} is nested too deep") from error
    except ValueError as error:
        raise ConfigError(f"{name} is not JSON: {error}") from error
    return _check_jsonable(value, name)


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """Parse a TOML text; `name` is its name in errors.

    Raises:
        ConfigError: if it is no TOML, nested too deep, or holds what JSON could not keep.
    """
    try:
        value = tomllib.loads(text)
    except RecursionError as error:
        raise ConfigError(f"{name} is nested too deep") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not TOML: {error}") from error
    except ValueError as error:  # of int()
        raise ConfigError(f"{name} holds a number of too many digits") from error
    return _check_jsonable(value, name)


def json_or_text(text: str, name: str = "the value") -> Any:
    """The value of a word of the command line: as JSON if it can be parsed, else the text.

    `ConfigError` if it is JSON that cannot be used, as in `parse_json`.

    >>> json_or_text("[1, 2]"), json_or_text("edit")
    ([1, 2], 'edit')
    """
    try:
        return parse_json(text, name)
    except ConfigError as error:
        if isinstance(error.__cause__, json.JSONDecodeError):
            return text
        raise


def _parse_int(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"the number {digits[:8]}... has more than {DIGITS} digits")
    return int(digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in table if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} is given twice")
    return table


def _check_jsonable(value: Any, name: str) -> Any:
    """Check that JSON can keep a value."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ConfigError(f"{name} holds {half!r}, half a character; write it whole") from error
    except TypeError as error:
        raise ConfigError(f"{name} holds a date or a time; write a text or a number") from error
    except RecursionError as error:
        raise ConfigError(f"{name} is nested too deep") from error
    except ValueError as error:
        raise ConfigError(f"{name} holds a number that is not finite; write a number") from error
    return value
