"""The contents of a job folder's JSON files, checked when they are read. No torch.

A reader gets values of these shapes, or `Unreadable` with the file and the reason. Unknown fields
are kept: a later version may have added them.
"""

from __future__ import annotations

import json
import math
import re
import stat
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import UserError

MAX_BYTES, MAX_DEPTH, MAX_DIGITS = 16 << 20, 64, 25
"""Limits of a JSON file: its size, its nesting, and the digits of a whole number."""
LARGE = {
    name: 1 << 30
    for name in (
        "state.json",
        "training_prompts.json",
        "result.json",
        "evaluation.json",
        "key.json",
    )
}
"""Files that may be larger, because they hold an entry for every prompt."""
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
LAST_DATE = 8.64e12
"""Seconds since 1970 that browsers still accept as a date."""

State = Literal["queued", "preparing", "running", "paused", "done", "stopped", "failed"]
Number = Annotated[
    float | None,
    AfterValidator(lambda value: None if value is None or not math.isfinite(value) else value),
]
"""None if it is not finite: JSON has no word for that."""


class Unreadable(UserError):
    """A file that cannot be read, and why."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Run(_Part):
    iterations: int = Field(default=0, ge=0)
    publish: str | None = None


class _Reward(_Part):
    weight: float = 1.0
    name: str | None = None
    options: dict[str, Any] = {}


class _Config(_Part):
    __pydantic_extra__: dict[str, dict[str, Any]]  # pyright: ignore[reportIncompatibleVariableOverride]
    model: dict[str, Any] = {}
    method: dict[str, Any] = {}
    rewards: dict[str, int | float | _Reward] = {}
    run: _Run = _Run()


class _Inputs(_Part):
    base: str | None = None
    model: str | None = None
    rewards: dict[str, dict[str, Any]] = {}
    files: dict[str, str] = {}


class _Job(_Part):
    config: _Config
    name: str = ""
    created: float = Field(default=0.0, ge=0, le=LAST_DATE)
    device: str = "cpu"
    settings: dict[str, Any] = {}
    inputs: _Inputs = _Inputs()
    versions: dict[str, Any] = {}


class _Status(_Part):
    state: State
    iteration: int = Field(default=0, ge=0)
    of: int = Field(default=0, ge=0)
    eta_seconds: Number = None
    message: str | None = None
    pid: int | None = None


class _Control(_Part):
    request: Literal["pause", "continue", "stop", "stop_now", "sample"]


class _Published(_Part):
    checksums: list[int | None] = []


class _GuardValue(_Part):
    name: str
    start: float | None = None
    bound: Number = None


class _Guard(_Part):
    rule: str = ""
    said: str | None = None
    ended: bool = False
    best: int | None = None
    values: dict[str, _GuardValue] = {}


class _Score(_Part):
    prompt: str
    reward: Number
    parts: dict[str, Number] = {}


class _State(_Part):
    iteration: int = Field(ge=0)
    before: float | None
    best: tuple[float, int] | None
    strikes: int = 0
    advantages: list[dict[str, Any] | None]
    rewards: dict[str, list[dict[str, Any] | None]] = {}
    scaler: dict[str, Any] | None
    config: dict[str, Any]
    machine: dict[str, Any]
    checksum: int
    seal: int | None = None


class _Vary(_Part):
    fields: list[str]
    values: list[Any]


class _Measured(_Part):
    prompts: int = Field(ge=1)
    images: int = Field(ge=1)


class _Compare(_Part):
    config: dict[str, Any]
    methods: dict[str, Any]
    seeds: list[int]
    vary: _Vary
    measured: _Measured
    machines: list[dict[str, Any]]
    commands: list[str]


class _Plan(_Part):
    settings: dict[str, Any]
    sides: dict[str, Any]


class _Side(_Part):
    name: str
    kind: str = ""
    path: str | None = None


class _Result(_Part):
    sides: list[_Side] = []


class _Key(_Part):
    page: str
    sides: tuple[str, str]
    pairs: list[dict[str, Any]]


class _Prompts(_Part):
    prompts: list[str] = Field(min_length=1)
    held_out: list[str]


SHAPES: dict[str, TypeAdapter[Any]] = {
    "job.json": TypeAdapter(_Job),
    "status.json": TypeAdapter(_Status),
    "control.json": TypeAdapter(_Control),
    "published.json": TypeAdapter(_Published),
    "guard.json": TypeAdapter(_Guard),
    "scores.json": TypeAdapter(list[_Score]),
    "state.json": TypeAdapter(_State),
    "compare.json": TypeAdapter(_Compare),
    "evaluation.json": TypeAdapter(_Plan),
    "result.json": TypeAdapter(_Result),
    "key.json": TypeAdapter(_Key),
    "training_prompts.json": TypeAdapter(_Prompts),
}
"""By file name; other files may hold anything."""


def read_json(file: Path) -> Any:
    """Read a JSON file, checked against the shape for its name; None if it does not exist.

    A pipe, a device or a folder of that name is never opened.

    Raises:
        Unreadable: naming the file and the reason.
    """
    try:
        about = file.stat()
        if not stat.S_ISREG(about.st_mode):
            raise Unreadable(f"{file} cannot be read: it is no file")
        if about.st_size > LARGE.get(file.name, MAX_BYTES):
            raise Unreadable(f"{file} cannot be read: it has {about.st_size >> 20} MiB")
        return parse_shape(file.name, file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Unreadable(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise Unreadable(f"{file} cannot be read: {error}") from error


def parse_shape(name: str, text: bytes) -> Any:
    """Parse a JSON text and check it against the shape for a file's name.

    >>> parse_shape("status.json", b'{"state": "done", "iteration": "3", "more": [1]}')
    {'state': 'done', 'iteration': 3, 'more': [1]}

    Raises:
        ValueError: saying what is wrong with it.
    """
    value = parse_json(text)
    if (shape := SHAPES.get(name)) is None:
        return value
    try:
        return shape.dump_python(shape.validate_python(value), exclude_unset=True)
    except ValidationError as error:
        raise ValueError(_fault(error)) from error


def parse_json(text: bytes) -> Any:
    """Parse a UTF-8 JSON text that any reader can process and write again; never None.

    Raises:
        ValueError: if it is no JSON, nested too deeply, or has a number of too many digits or a
            character that cannot be written.
    """
    try:
        value = json.loads(text.decode("utf-8"), parse_int=_parse_int)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if value is None:
        raise ValueError("it is null")
    if _is_too_deep(value):
        raise ValueError("it is nested too deeply")
    if SURROGATE.search(text):  # half a character, if it is alone
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("it has half a character (a lone surrogate)") from error
    return value


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it has a number of {len(digits)} digits")
    return int(digits)


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            part
            for one in level
            if isinstance(one, dict | list)
            for part in (one.values() if isinstance(one, dict) else one)
        ]
    return bool(level)


def _fault(error: ValidationError) -> str:
    """The first fault, in a few words."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    given = "" if first["type"] == "missing" else f" is {repr(first['input'])[:40]}:"
    return f"{place or 'it'}{given} {first['msg']}"
