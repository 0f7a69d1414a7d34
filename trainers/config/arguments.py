"""Command lines made from pydantic models, with errors of one line."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from typing import Annotated, Any, TypeVar

import tyro
from annotated_types import BaseMetadata
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from ..reading import cut, shown
from .train_config import ConfigError, explain

LONGEST = 20_000
"""Most characters of a word: tyro compares a longer one with every option for minutes."""


class Arguments(BaseModel):
    """A command's arguments, checked like a config."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)


def parse(
    model: type[Model],
    arguments: Sequence[str],
    prog: str,
    default: Mapping[str, Any] | None = None,
    description: str | None = None,
) -> Model:
    """Read a model from a command line; `--help` prints and exits.

    Args:
        model: its fields are the options, its docstrings the help.
        arguments: the words after the command.
        prog: the command's name in the help.
        default: values of options that are not given; the model's own if None.
        description: first paragraph of the help; the model's docstring if None.

    Raises:
        ConfigError: naming the option, the value and what is allowed.
    """
    if long := next((word for word in arguments if len(word) > LONGEST), None):
        raise ConfigError(f"{shown(long)} has {len(long):,} characters; write at most {LONGEST:,}")
    plain = _unconstrained(model)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            start = {} if default is None else {"default": plain.model_validate(default)}
            parsed = tyro.cli(plain, args=arguments, prog=prog, description=description, **start)
    except SystemExit as exit_:
        if exit_.code:
            raise ConfigError(cut(_one_line(said.getvalue()), 600)) from exit_
        raise
    try:
        return model.model_validate(parsed.model_dump())
    except ValidationError as error:
        raise ConfigError(explain(error)) from error


def _unconstrained(model: type[BaseModel]) -> type[Any]:
    """The same options without their ranges, which tyro would report in its own way."""
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind, default = field.annotation, field.get_default(call_default_factory=True)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = _unconstrained(kind)
            default = kind.model_validate(default.model_dump())
        marks = [mark for mark in field.metadata if not isinstance(mark, BaseMetadata)]
        for mark in marks:
            kind = Annotated[kind, mark]
        if field.is_required():
            default = ...
        fields[name] = (kind, Field(default, description=field.description))
    return create_model(model.__name__, __doc__=model.__doc__, **fields)


def _one_line(said: str) -> str:
    """tyro's message without the box, its title and the option's help."""
    lines = [line for line in said.splitlines() if not line.startswith("\u256d")]
    words = " ".join(re.sub(r"[\u2500-\u257f]+|-{5,}", " ", " ".join(lines)).split())
    return re.split(" For full helptext| Argument helptext", words)[0]
