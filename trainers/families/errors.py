"""The one error a model file or folder can cause."""

from __future__ import annotations


class ModelError(ValueError):
    """A model cannot be used; the message says what was found and what to do about it."""
