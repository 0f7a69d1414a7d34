"""The error of every model that is refused."""

from ..errors import UserError


class ModelError(UserError, ValueError):
    """A model or LoRA file that cannot be used: what it is, and what to do."""
