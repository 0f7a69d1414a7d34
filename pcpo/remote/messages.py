"""The messages of the protocol as pydantic models, which say what is wrong with one, and where."""

from __future__ import annotations

import reprlib
from math import nan
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..scores import Scores
from .protocol import PIXELS, WireError

LARGEST = torch.finfo(torch.float32).max
"""Largest score."""

MOST = Field(max_length=1 << 16)  # each wrong entry costs memory, so they are limited

Number = Annotated[float | None, Field(ge=-LARGEST, le=LARGEST)]
"""None if not finite. JSON reads 1e999 as infinite, and integers have any length."""

Size = Annotated[int, Field(gt=0)]
Reason = Annotated[str | None, BeforeValidator(lambda said: said and str(said)[:1000])]
Reasons = Annotated[list[Reason], MOST]


class Message(BaseModel):
    """A JSON object of the protocol."""

    model_config = ConfigDict(strict=True, frozen=True)
    refusal: ClassVar[str] = "{}"

    @classmethod
    def read(cls, said: Any, count: int | None = None) -> Self:
        """Check a message.

        Args:
            said: its parsed JSON.
            count: entries of each of its lists; one that need not be there may be empty.

        Raises:
            WireError: naming the field, its value and what is wrong.
        """
        try:
            message = cls.model_validate(said)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"])) or "the message"
            value = "" if fault["type"] == "missing" else f" is {reprlib.repr(fault['input'])}"
            raise WireError(cls.refusal.format(f"{where}{value}: {fault['msg']}")) from None
        for key, entries in message if count is not None else ():
            if len(entries) != count and (entries or cls.model_fields[key].is_required()):
                raise WireError(f"{key} has {len(entries)} entries for {count} images or prompts")
        return message


class Limits(Message):
    """How much a server takes in a request: images, bytes, and pixels of all images together."""

    batch: Size
    request_bytes: Size
    pixels: Size = PIXELS


class Health(Message):
    """The rewards that a server offers, and its limits."""

    refusal = (
        "what answers there is no reward server of this version ({}); use the same version of "
        "this pack at both ends"
    )
    version: Literal[1]
    rewards: list[str] = Field(min_length=1, max_length=1 << 16)
    limits: Limits


class Description(Message):
    """A reward on a server."""

    name: str = ""
    needs_prompt: bool
    bounds: tuple[Number, Number] = Field(strict=False)
    unit: str = ""
    fingerprint: dict[str, Any]


class Complaints(Message):
    """Why each prompt cannot be scored; None if it can."""

    complaints: Reasons


class Answer(Message):
    """The scores of a request's images."""

    values: Annotated[list[Number], MOST]
    details: Annotated[list[Annotated[dict[str, Number], MOST]], MOST] = []
    errors: Reasons = []

    def scores(self) -> Scores:
        values = torch.tensor([_or_nan(value) for value in self.values])
        details = tuple({key: _or_nan(n) for key, n in part.items()} for part in self.details)
        return Scores(values, details, tuple(self.errors))


def _or_nan(value: float | None) -> float:
    return nan if value is None else value


class Prompts(Message):
    """A request for complaints."""

    prompts: Annotated[list[str], MOST]


class Question(Prompts):
    """A request for scores. An image that is no text is an error of its own."""

    images: Annotated[list[Any], MOST]
