"""The errors meant for the user: what, which value, what to do."""


class UserError(Exception):
    """Something the user can put right. The command line shows its text without a traceback."""


class ConfigError(UserError, ValueError):
    """A setting that cannot be used, with its field, its value and the remedy."""
