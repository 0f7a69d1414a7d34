"""The protocol of a reward server: JSON, with pictures as base64 PNG. No pickle.

    GET  /health                     {"version": 1, "rewards": [name], "limits": {...}}
    GET  /rewards/NAME               {"name", "needs_prompt", "bounds", "unit", "fingerprint"}
    POST /rewards/NAME/complaints    {"prompts": [text]} -> {"complaints": [text or null]}
    POST /rewards/NAME/score         {"images": [PNG], "prompts": [text]}
                                     -> {"values": [number or null], "details": [{name: number}],
                                         "errors": [text or null]}

A failure of the whole request is an HTTP status of 400 and above with {"error": text}. NaN and
infinities are null, because JSON has no word for them; the reason is in "errors".
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Any

import torch
from PIL import Image

from ..pictures.files import BadPicture, open_picture, picture_size
from ..scores import Reward, Scores

VERSION = 1
PORT = 8765
BATCH = 64
"""Most images in one request."""

REQUEST_BYTES = 64 << 20
ANSWER_BYTES = 4 << 20
PIXELS = 1 << 24
"""Most pixels of all images in one request: 4096 x 4096."""


PROMPT_CHARACTERS = 1 << 16

LARGEST = torch.finfo(torch.float32).max
"""Largest score."""


class WireError(ValueError):
    """A message that breaks the protocol."""


class TooMuch(WireError):
    """A request that exceeds the server's limits."""


@dataclass(frozen=True)
class Description:
    """What a reward on a server is.

    Attributes:
        name: its key in `REWARDS` there.
        needs_prompt: whether the score depends on the prompt.
        bounds: the smallest and largest possible value.
        unit: of a value.
        fingerprint: what its numbers depend on.
    """

    name: str
    needs_prompt: bool
    bounds: tuple[float, float]
    unit: str
    fingerprint: Mapping[str, Any]


@dataclass(frozen=True)
class Health:
    """What a server offers, and how much it takes at once.

    Attributes:
        rewards: names.
        batch: most images in one request.
        request_bytes: of the largest request.
        pixels: of all images of a request together.
    """

    rewards: tuple[str, ...]
    batch: int
    request_bytes: int
    pixels: int = PIXELS


# --- pictures --------------------------------------------------------------------------------


def encode_picture(picture: Image.Image) -> str:
    """Encode a picture as a PNG in base64; quick rather than small."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def decode_picture(text: Any, most: int = PIXELS) -> Image.Image:
    """Decode a PNG in base64 to 8-bit RGB; `WireError` if it is no such file, or has over `most`
    pixels.
    """
    try:
        return open_picture(_png(text), ["PNG"], most)
    except BadPicture as error:
        raise WireError(f"the image is no complete PNG file in base64: {error}") from error


def pixels_in(text: Any, most: int = PIXELS) -> int:
    """The number of pixels that `decode_picture` would decode, from the header; 0 if it would
    refuse.
    """
    try:
        width, height = picture_size(_png(text), ["PNG"], most)
    except (BadPicture, WireError):
        return 0
    return width * height


def _png(text: Any) -> io.BytesIO:
    if not isinstance(text, str):
        raise WireError("the image is no text in base64")
    try:
        return io.BytesIO(base64.b64decode(text, validate=True))
    except ValueError as error:
        raise WireError("the image is no complete PNG file in base64") from error


def too_long(prompt: str) -> str | None:
    """Why a prompt is too long to send, None if it is not."""
    if len(prompt) <= PROMPT_CHARACTERS:
        return None
    return f"the prompt has {len(prompt)} characters; a server takes at most {PROMPT_CHARACTERS}"


# --- answers ---------------------------------------------------------------------------------


def number(value: float) -> float | None:
    """The number for JSON, None if it is not finite."""
    return value if isfinite(value) else None


def health(
    rewards: Sequence[str], batch: int, request_bytes: int, pixels: int = PIXELS
) -> dict[str, Any]:
    """A server's description of itself."""
    limits = {"batch": batch, "request_bytes": request_bytes, "pixels": pixels}
    return {"version": VERSION, "rewards": list(rewards), "limits": limits}


def describe(name: str, reward: Reward) -> dict[str, Any]:
    """A server's description of a reward."""
    return {
        "name": name,
        "needs_prompt": bool(reward.needs_prompt),
        "bounds": [number(end) for end in reward.bounds],
        "unit": str(getattr(reward, "unit", "")),
        "fingerprint": reward.fingerprint(),
    }


def encode_scores(scores: Scores) -> dict[str, Any]:
    return {
        "values": [number(value) for value in scores.values.tolist()],
        "details": [{k: number(float(v)) for k, v in part.items()} for part in scores.details],
        "errors": list(scores.errors),
    }


def read_health(said: Any) -> Health:
    """Check a server's description of itself.

    Raises:
        WireError: if it is no reward server, or one of another version.
    """
    if not isinstance(said, dict) or "rewards" not in said or "limits" not in said:
        raise WireError("what answers there is no reward server")
    if said.get("version") != VERSION:
        raise WireError(
            f"its protocol is version {said.get('version')!r} and this one {VERSION}; use the same "
            "version of this pack at both ends"
        )
    names, limits = _texts(said["rewards"]), _object(said["limits"])
    sizes = [limits.get("batch"), limits.get("request_bytes"), limits.get("pixels", PIXELS)]
    if not names or not all(type(size) is int and size > 0 for size in sizes):
        raise WireError("its health says nothing of its rewards or its limits")
    return Health(tuple(names), *sizes)  # pyright: ignore[reportArgumentType]


def read_description(said: Any) -> Description:
    """Check a server's description of a reward; `WireError` if it is incomplete."""
    body = _object(said)
    needs, bounds = body.get("needs_prompt"), body.get("bounds")
    if type(needs) is not bool or not isinstance(bounds, list) or len(bounds) != 2:
        raise WireError("its description of the reward is not complete")
    ends = (_value(bounds[0], -inf), _value(bounds[1], inf))
    name, unit = str(body.get("name", "")), str(body.get("unit", ""))
    return Description(name, needs, ends, unit, _object(body.get("fingerprint")))


def read_complaints(said: Any, count: int) -> list[str | None]:
    """Read why prompts cannot be scored: one entry per prompt."""
    return _texts_or_none(_listed(_object(said), "complaints", count))


def read_scores(said: Any, count: int) -> Scores:
    """Read scores from a server's answer, for `count` images."""
    body = _object(said)
    values = torch.tensor([_value(v, nan) for v in _listed(body, "values", count)])
    details = _listed(body, "details", count) if body.get("details") else []
    parts = tuple({str(k): _value(v, nan) for k, v in _object(d).items()} for d in details)
    errors = _texts_or_none(_listed(body, "errors", count)) if body.get("errors") else []
    return Scores(values, parts, tuple(errors))


def refused(errors: Sequence[str | None]) -> Scores:
    """Scores of images that all have an error; `put` fills in those that have a score."""
    values = torch.full((len(errors),), nan)
    return Scores(values, tuple({} for _ in errors), tuple(errors))


def put(whole: Scores, rows: Sequence[int], part: Scores) -> Scores:
    """Replace the scores of some rows.

    Args:
        whole: with details and errors.
        rows: of the whole, one per entry of the part.
        part: the scores of these rows.
    """
    values, details, errors = whole.values.clone(), list(whole.details), list(whole.errors)
    for at, row in enumerate(rows):
        values[row] = part.values[at]
        details[row] = part.details[at] if part.details else {}
        errors[row] = part.errors[at] if part.errors else None
    return Scores(values, tuple(details), tuple(errors))


def listed(body: Any, key: str, most: int | None = None) -> list[Any]:
    """A list in a request, of at most `most` entries.

    Raises:
        WireError: if it is missing or too long.
    """
    entries = _object(body).get(key)
    if not isinstance(entries, list):
        raise WireError(f"the request has no list {key!r}")
    if most is not None and len(entries) > most:
        raise WireError(f"the request has {len(entries)} {key}; at most {most} go into one")
    return entries


def texts(entries: list[Any], key: str) -> list[str]:
    """Check that all entries of a list are text; `WireError` if not."""
    if not all(isinstance(text, str) for text in entries):
        raise WireError(f"an entry of {key!r} is no text")
    return entries


def _object(said: Any) -> dict[str, Any]:
    if not isinstance(said, dict):
        raise WireError("a JSON object was expected")
    return said


def _texts(said: Any) -> list[str]:
    return [text for text in said if isinstance(text, str)] if isinstance(said, list) else []


def _listed(body: dict[str, Any], key: str, count: int) -> list[Any]:
    entries = body.get(key)
    if not isinstance(entries, list) or len(entries) != count:
        raise WireError(f"its answer has not one of {key!r} for each of {count}")
    return entries


def _texts_or_none(entries: list[Any]) -> list[str | None]:
    return [None if text is None else str(text)[:1000] for text in entries]


def _value(said: Any, missing: float) -> float:
    if said is None:
        return missing
    if isinstance(said, bool) or not isinstance(said, int | float):
        raise WireError("a number was expected in its answer")
    if not abs(said) <= LARGEST:  # JSON reads 1e999 as infinite, and integers have any length
        raise WireError("a number in its answer is too large")
    return float(said)
