"""Catch numbers that are not finite (NaN, infinities) where they arise, before they spread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import RunError, UserError


class NotFiniteError(UserError, ValueError):
    """A model gave numbers that are not finite: what, where, and what to do."""


@contextmanager
def naming_step(what: str) -> Iterator[None]:
    """Prefix any `NotFiniteError` within it with what was being done."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{what}: {error}") from error


class Diverged(RunError):
    """Training gave numbers that are not finite; nothing of them was saved."""
