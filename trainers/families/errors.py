"""The error every refusal of a model raises."""

from ..errors import UserError


class ModelError(UserError, ValueError):
    """A model or LoRA file that cannot be used: what it is, and what to do."""
