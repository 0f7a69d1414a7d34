"""Messages that the families log while they load a model, as notes for the user."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from .. import families, lora


class _Collector(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.INFO)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()) not in self.said:
            self.said.append(text)


@contextmanager
def heard() -> Iterator[list[str]]:
    """Collect the families' messages within it, each once, instead of writing them to stderr."""
    said: list[str] = []
    collector = _Collector(said)
    logs = [logging.getLogger(package.__name__) for package in (families, lora)]
    levels = [log.level for log in logs]
    for log in logs:
        log.addHandler(collector)
        log.setLevel(logging.INFO)
    try:
        yield said
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
            log.removeHandler(collector)
