"""The errors meant for the user: what, which value, what to do."""


class UserError(Exception):
    """Something the user can put right. The command line shows its text without a traceback."""


class ConfigError(UserError, ValueError):
    """A setting that cannot be used, with its field, its value and the remedy."""


class Stopped(UserError):
    """The run ends before its last iteration because it was asked to; it can be resumed.

    Attributes:
        is_midway: whether the open iteration has already changed weights. These belong to no
            iteration and are not saved: the run continues from its last checkpoint.
    """

    is_midway: bool = False


class RunError(UserError, RuntimeError):
    """The run cannot go on; its last good checkpoint is intact."""
