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
from collections.abc import Sequence
from math import isfinite, nan
from typing import Any

import torch
from PIL import Image

from ..pictures.files import BadPicture, open_picture, picture_size
from ..scores import Reward, Scores

PORT = 8765
BATCH = 64
"""Most images in one request."""

REQUEST_BYTES = 64 << 20
ANSWER_BYTES = 4 << 20
PIXELS = 1 << 24
"""Most pixels of all images in one request: 4096 x 4096."""


PROMPT_CHARACTERS = 1 << 16


class WireError(ValueError):
    """A message that breaks the protocol."""


class TooMuch(WireError):
    """A request that exceeds the server's limits."""


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


def failed_scores(errors: Sequence[str | None]) -> Scores:
    """Scores of images that all have an error; `put_scores` fills in those that have a score."""
    values = torch.full((len(errors),), nan)
    return Scores(values, tuple({} for _ in errors), tuple(errors))


def put_scores(whole: Scores, rows: Sequence[int], part: Scores) -> Scores:
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
