"""Numbers that are not finite (NaN, infinities), caught where they arise, before they spread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import UserError


class NotFiniteError(UserError, ValueError):
    """Numbers that are not finite came out of a model: what, where, and what to do."""


@contextmanager
def during(what: str) -> Iterator[None]:
    """Within it `NotFiniteError` says what was being done.

    Raises:
        NotFiniteError: beginning with it.
    """
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{what}: {error}") from error
