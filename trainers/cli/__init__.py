"""The command `pcpo`, and its short subcommands, one file each."""

from .command import main

__all__ = ["main"]
