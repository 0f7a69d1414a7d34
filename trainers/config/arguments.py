"""Command lines of pydantic models: argparse splits the words, pydantic checks the values."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
from types import NoneType
from typing import Annotated, Any, NoReturn, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from ...remedies import command
from ..reading import nearest_hint, shown
from .train_config import ConfigError, explain

POSITIONAL, REPEATED = "positional", "repeated"
"""Marks of a field whose words come without an option, or whose option takes one word and may be
repeated; a mark that begins with -- is the option's name, if that is not the field's."""

Word = Annotated[str, POSITIONAL]
Words = Annotated[list[str], POSITIONAL]
Repeated = Annotated[list[str], REPEATED]
NEGATIVE = re.compile(r"^-((\d+\.?\d*|\.\d+)(e[-+]?\d+)?|inf)$", re.IGNORECASE)
"""Words that are values and not options; argparse itself does not know -1e-3."""


class Arguments(BaseModel):
    """A command's arguments, checked like a config."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> Self:
        """The values that the help shows, after the words that are given."""
        return cls.model_construct()


Model = TypeVar("Model", bound=Arguments)


class _Parser(argparse.ArgumentParser):
    """A parser that raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        words = command(*self.prog.split()[1:], "--help")
        raise ConfigError(f"{message}; {words} lists the options")


class _Flag(argparse.Action):
    """An option without a value, whose second name is its opposite."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, option == self.option_strings[0])


def parse(
    model: type[Model], arguments: Sequence[str], prog: str, description: str | None = None
) -> Model:
    """Read a model from a command line; `--help` prints and exits.

    Args:
        model: its fields are the options, `--SECTION.FIELD` those of a model within it.
        arguments: the words after the command.
        prog: the command's name in the help.
        description: first paragraph of the help; the model's docstring if None.

    Raises:
        ConfigError: naming the option, the value and what is allowed.
    """
    about = description or model.__doc__
    parser = _Parser(prog, description=about, add_help=False, allow_abbrev=False)
    parser._negative_number_matcher = NEGATIVE
    parser.add_argument("-h", "--help", action="store_true", help="show this and exit")
    actions = list(_add_fields(parser, model))
    words = [f"[{action.metavar}]" for action in actions if not action.option_strings]
    parser.usage = " ".join([prog, *words, "[options]"])
    found, strange = parser.parse_known_intermixed_args([_with_dashes(word) for word in arguments])
    given: dict[str, Any] = {}
    for dest, value in vars(found).items():
        section, _, name = dest.rpartition(".")
        (given.setdefault(section, {}) if section else given)[name] = value
    if given.pop("help"):
        start = model.defaults(given)
        for action in actions:
            with suppress(AttributeError):  # of what has no default
                value = str(attrgetter(action.dest)(start)).replace("%", "%%")
                action.help = f"{action.help} (default: {value})"
        print(parser.format_help(), end="")  # print_help hides that nobody reads it
        raise SystemExit(0)
    if strange:
        options = [option for action in actions for option in action.option_strings]
        parser.error(f"there is no option {shown(strange[0])}{nearest_hint(strange[0], options)}")
    try:
        return model.model_validate(given)
    except ValidationError as error:
        names = {a.dest: a.option_strings[0] for a in actions if a.option_strings}
        raise ConfigError(explain(error, names)) from error


def _add_fields(
    group: argparse._ActionsContainer, model: type[BaseModel], section: str = ""
) -> Iterator[argparse.Action]:
    """Add a model's fields as options, those of a model within it as a group."""
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        if hasattr(kind, "model_fields"):
            yield from _add_fields(group.add_argument_group(name, kind.__doc__), kind, f"{name}.")
        else:
            yield _option(group, section, name, field)


def _option(
    group: argparse._ActionsContainer, section: str, name: str, field: FieldInfo
) -> argparse.Action:
    leaves = list(_leaves(field.annotation))
    types = {int: "INT", float: "FLOAT", str: "TEXT", NoneType: "None"}
    constants = {str(leaf): leaf for leaf in leaves if leaf not in types}
    constants |= {"None": None} if NoneType in leaves else {}
    kinds = (field.annotation, *get_args(field.annotation))
    is_list = any(get_origin(kind) in (list, tuple) for kind in kinds)
    shared: dict[str, Any] = {
        "dest": f"{section}{name}",
        "help": (field.description or "").replace("%", "%%"),
        "default": [] if is_list and field.is_required() else argparse.SUPPRESS,
    }
    option = next((mark for mark in field.metadata if str(mark).startswith("--")), None)
    option = option or _with_dashes(f"--{section}{name}")
    if leaves == [bool]:
        opposite = _with_dashes(f"--{section}no-{name}")
        return group.add_argument(option, opposite, action=_Flag, nargs=0, **shared)
    shared["type"] = lambda word: constants.get(word, word)
    shared["metavar"] = "|".join(types.get(leaf, str(leaf)) for leaf in leaves)
    if REPEATED in field.metadata:
        return group.add_argument(option, action="append", **shared)
    if POSITIONAL in field.metadata:
        shared["metavar"] = "|".join(key for key in constants if key != "None") or name.upper()
        return group.add_argument(nargs="*" if is_list else "?", **shared)
    return group.add_argument(option, nargs="*" if is_list else None, **shared)


def _leaves(kind: Any) -> Iterator[Any]:
    """The simple types and the constants that a type consists of."""
    parts = [part for part in get_args(kind) if part is not ...]
    for part in parts[:1] if get_origin(kind) is Annotated else parts:
        yield from _leaves(part)
    if not parts:
        yield kind


def _with_dashes(word: str) -> str:
    """An option's name with dashes, whichever way it is written."""
    option, equals, value = word.partition("=")
    return option.replace("_", "-") + equals + value if word.startswith("--") else word
