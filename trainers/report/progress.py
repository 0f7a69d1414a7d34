"""A run's output for people: one line per iteration, a bar inside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm


class Progress:
    """Writes to a terminal or a log.

    Args:
        stream: to write to; None is silence.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.log: TextIO | None = None
        self.started = float("nan")  # when the first iteration of this process was
        self.skipped = 0  # iterations before that
        self._bar: Any = None

    @classmethod
    def silent(cls) -> Progress:
        return cls(None)

    def say(self, text: str) -> None:
        """Write a line of text."""
        self._close()
        if self.stream is not None:
            try:
                print(text, file=self.stream, flush=True)
            except BrokenPipeError:
                self.stream = None  # nobody reads it any more; the work goes on
        if self.log is not None:
            print(text, file=self.log, flush=True)

    @contextmanager
    def log_to(self, file: Path) -> Iterator[None]:
        """Append every line within it to a file as well."""
        with file.open("a", encoding="utf-8") as self.log:
            try:
                yield
            finally:
                self._close()
                self.log = None

    def bar(self, what: str, total: int) -> Callable[[int], None]:
        """A callback for the number done, which draws a bar on terminals."""
        self._close()
        if self.stream is None or not self.stream.isatty():
            return lambda done: None
        self._bar = bar = tqdm(total=total, desc=what, leave=False, file=self.stream)

        def advance(done: int) -> None:
            bar.update(done - bar.n)

        return advance

    def backward(self, backward: Callable[[Any], None], total: int) -> Callable[[Any], None]:
        """The same backward function, counting its calls on a bar."""
        advance, done = self.bar("updating", total), 0

        def counted(loss: Any) -> None:
            nonlocal done
            backward(loss)
            done += 1
            advance(done)

        return counted

    def iteration(self, line: dict[str, Any], of: int) -> float:
        """Show an iteration's line of metrics.jsonl, and return the seconds until the end."""
        now = time.monotonic()
        if self.started != self.started:
            self.started = now - line["seconds"]
            self.skipped = line["iteration"] - 1
        done = line["iteration"] - self.skipped
        eta = (now - self.started) / done * (of - line["iteration"])
        held_out = f"  held out {line['held_out']:.3f}" if "held_out" in line else ""
        self.say(
            f"iteration {line['iteration']:>{len(str(of))}}/{of}  reward {line['reward']:.3f} "
            f"+- {line['reward_std']:.3f}  clipped {line['clip_fraction']:.0%} "
            f"(on policy {line['clip_fraction_on_policy']:.0%})  "
            f"{line['images_per_second']:.1f} images/s  ETA {clock(eta)}{held_out}"
        )
        return eta

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss.

    >>> clock(65), clock(3700)
    ('1:05', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
