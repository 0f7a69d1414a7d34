"""Command lines without a model of their own: `argparse`, its errors on one line. No torch."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from ..errors import ConfigError

NEGATIVE = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
"""Words that are values and not options; argparse itself does not know -1e-3."""


class Parser(argparse.ArgumentParser):
    """A parser that takes options by their full names, and raises instead of ending the process."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})  # type: ignore[arg-type]
        self._negative_number_matcher = NEGATIVE

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` lists the options")
