"""Files of prompts: text, JSON and tables. No torch.

A prompt is one line of words. What breaks a line or moves a cursor (newline, tab, U+2028) becomes a
space; other control characters and lone surrogates are refused when the file is read, because
nothing later could draw or encode them.
"""

from __future__ import annotations

import csv
import io
import os
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..reading import json_or_text, parse_json, read_text, shown

LARGEST = 256 << 20
"""Most bytes of a prompt file."""
LONGEST = 10_000
"""Most characters of a prompt; no text encoder here takes more than 512 tokens."""
BLANKS = dict.fromkeys(map(ord, "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029"), " ")

Found = Iterator[tuple[str, str]]
"""The place of a prompt, and the prompt."""


def plain(prompt: str, where: str) -> str:
    r"""A prompt on one line.

    >>> plain(" a red\ncircle ", "line 1")
    'a red circle'

    Args:
        where: they stand, for an error.

    Returns:
        The prompt; its spaces are otherwise as they were.

    Raises:
        ConfigError: where a character is no part of a text, or there are far too many.
    """
    text = prompt.replace("\r\n", " ").translate(BLANKS).strip()
    if len(text) > LONGEST:
        raise ConfigError(
            f"{where} has a prompt of {len(text):,} characters, {shown(text, 40)}; write at most "
            f"{LONGEST:,}"
        )
    odd = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs")), None)
    if odd is not None:
        raise ConfigError(
            f"{where} has U+{ord(odd):04X} in the prompt {shown(text, 40)}, which is no character "
            "of a text; take it out"
        )
    return text


def read_prompt_file(file: Path, name: str) -> tuple[str, ...]:
    """The prompts of a file, in order.

    Args:
        file: .txt (one prompt per line), .csv or .tsv (a column "prompt"), .json (a list), .jsonl
            or .ndjson (one per line); other endings are read like .txt.
        name: of the file in an error.

    Raises:
        ConfigError: if it cannot be read or holds no prompt.
    """
    suffix = file.suffix.lower()
    if suffix in OTHERS:
        raise ConfigError(f"{name} is a {suffix} file, which is not read; {AS}")
    placed = READERS.get(suffix, _lines)(read_text(file, name, LARGEST), file)
    prompts = tuple(plain(prompt, where) for where, prompt in placed)
    if not prompts:
        raise ConfigError(f"{name} holds no prompt; write one per line")
    return prompts


# --- one reader a format -------------------------------------------------------------------------


def _lines(text: str, file: Path) -> Found:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{file.name}, line {number}", line


def _json_lines(text: str, file: Path) -> Found:
    for where, line in _lines(text, file):
        yield where, _prompt_of(json_or_text(line, where), where, line)


def _json_list(text: str, file: Path) -> Found:
    value = parse_json(text or "[]", file.name)
    if not isinstance(value, list):
        raise ConfigError(f'{file.name} is no list; write ["a red circle", ...]')
    for number, entry in enumerate(value, 1):
        where = f"{file.name}, entry {number}"
        entry = {"prompt": entry} if isinstance(entry, str) else entry
        yield where, _prompt_of(entry, where, entry)


def _prompt_of(value: Any, where: str, line: Any) -> str:
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError(
            f'{where} has no "prompt": {shown(line)}; it must be like {{"prompt": "a red circle"}}'
        )
    return prompt


def _table(text: str, file: Path) -> Found:
    head = text.partition("\n")[0]
    for delimiter in ",;\t":
        names = [name.strip().lower() for name in next(csv.reader([head], delimiter=delimiter), [])]
        if "prompt" in names:
            break
    else:
        raise ConfigError(
            f'{file.name} has no column "prompt" in its first line, {shown(head)}; name one so, or '
            "save one prompt per line as .txt"
        )
    column = names.index("prompt")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in rows:
            where = f"{file.name}, line {rows.line_num}"
            if rows.line_num > 1 and len(row) > column and row[column].strip():
                yield where, row[column]
    except csv.Error as error:
        raise ConfigError(f"{file.name}, line {rows.line_num} cannot be read: {error}") from error


READERS: dict[str, Callable[[str, Path], Found]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _table,
    ".tsv": _table,
}
SUFFIXES = (".txt", *READERS)
AS = 'save one prompt per line as .txt, or a table as .csv with a column "prompt"'
OTHERS = frozenset(
    f".{ending}"
    for ending in (
        *("xlsx", "xls", "ods", "numbers", "docx", "doc", "odt", "rtf", "pdf", "parquet", "arrow"),
        *("feather", "yaml", "yml", "toml", "xml", "html", "htm", "zip", "gz", "7z", "tar", "png"),
        *("jpg", "jpeg", "webp", "gif", "bmp", "safetensors", "sft", "ckpt", "pt", "pth", "bin"),
        *("gguf", "pkl", "npy", "npz", "py"),
    )
)
"""Endings of files that are no lines of prompts."""


def looks_like_file(text: str) -> bool:
    """Whether words are meant as a file of prompts, which may be missing.

    >>> [looks_like_file(t) for t in ("a cat", "my/prompts.txt", "prompts.csv", "a sign: a.txt")]
    [False, True, True, False]
    """
    has_ending = Path(text).suffix.lower() in {*SUFFIXES, *OTHERS}
    has_folder = "/" in text or "\\" in text
    return (has_ending and (has_folder or len(text.split()) == 1)) or (
        has_folder and os.path.lexists(text)
    )
