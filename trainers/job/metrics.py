"""metrics.jsonl, one JSON object per iteration: read from its end, as it grows, and thinned.

A run may have 100,000 iterations, so nothing here holds all lines. Malformed lines (cut off by a
kill, no UTF-8, no object with an "iteration") are skipped. Standard library only.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import groupby, islice
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO, TypeGuard, TypeVar

from .files import replace_file

T = TypeVar("T")
Line = dict[str, Any]
"""One iteration's numbers, and lists of numbers, by name."""

LISTS = ("log_ratio_histogram", "grad_norms")
"""Names of the values that are lists."""
BLOCK = 1 << 16
"""Bytes read at a time."""
SLACK = 3
"""How many times more lines are held than stay, so that they are seldom thinned."""
SILENT = {
    *("iteration", "seconds", "seconds_rollout", "seconds_update", "loss", "log_ratio_histogram"),
    *("reward_min", "reward_max", "outside_fraction_on_policy", "log_ratio_max_on_policy"),
}
"""Values without a curve."""
LARGEST = 2**63
"""Larger integers are no measurements."""
WINDOW = 10
"""Iterations over which the variance of the gradient norm is taken."""
VARIANCE = "grad_norm_variance"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and -LARGEST < value < LARGEST


def parse_line(raw: bytes) -> Line | None:
    """A line's numbers and lists; None if it is malformed."""
    try:
        line = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not is_number(line.get("iteration")):
        return None
    return {key: v for key, v in line.items() if _is_kept(key, v)}


def _is_kept(name: str, value: Any) -> bool:
    kind = type(value)
    return kind is float or (name in LISTS if kind is list else is_number(value))


@contextmanager
def open_metrics(file: Path) -> Iterator[BinaryIO]:
    """Open a file to read; empty if it does not exist, and a pipe or a device is never opened."""
    try:
        stream: BinaryIO = file.open("rb") if file.is_file() else BytesIO()
    except OSError:
        stream = BytesIO()
    with stream:
        yield stream


# --- reading -------------------------------------------------------------------------------------


def lines_of(file: Path, name: str = "") -> Iterator[Line]:
    """The lines, one at a time, in order; none if the file does not exist.

    With `name`, only lines that have this value; no JSON of other lines is parsed.
    """
    quoted = b'"%s"' % name.encode()
    try:
        with open_metrics(file) as stream:
            for raw in stream:
                if name and quoted not in raw:
                    continue
                line = parse_line(raw)
                if line is not None and (not name or name in line):
                    yield line
    except OSError:
        return


def backwards(file: Path, since: int = 0) -> Iterator[tuple[int, bytes]]:
    """The lines from the last one on, read a block at a time, down to the byte `since`.

    Yields:
        Where a line begins, and the line with its line end; the last one may have none.
    """
    try:
        with open_metrics(file) as stream:
            end, rest = stream.seek(0, 2), b""
            while end > since:
                start = max(since, end - max(BLOCK, len(rest)))
                stream.seek(start)
                lines = (stream.read(end - start) + rest).splitlines(keepends=True)
                place = start + sum(map(len, lines))
                rest = lines.pop(0) if start > since else b""
                for line in reversed(lines):
                    place -= len(line)
                    yield place, line
                end = start
    except OSError:
        return


def last_lines(file: Path, count: int) -> list[Line]:
    """The last lines, in order, without reading the others."""
    backward_lines = (line for _, raw in backwards(file) if (line := parse_line(raw)) is not None)
    return list(islice(backward_lines, count))[::-1]


class Latest:
    """The latest values of some names, of which each call reads only what is new."""

    def __init__(self, file: Path, names: tuple[str, ...]) -> None:
        self.file, self.names = file, names
        self._values: Line = {}
        self._place = Place()

    def values(self) -> Line:
        """The values, as far as they exist; read from the end until all are found."""
        if self._place.is_other(self.file):
            self._values = {}
        values, end = {}, None
        for at, raw in backwards(self.file, self._place.read):
            if end is None and raw.endswith(b"\n"):
                end = at + len(raw)
            if end is not None and any(b'"%s"' % n.encode() in raw for n in self.names):
                values = {
                    k: v for k, v in (parse_line(raw) or {}).items() if k in self.names
                } | values
            if len(values) == len(self.names):
                break
        self._place.read = end or self._place.read
        self._values = self._values | values
        return self._values


class Place:
    """How far a growing file was read.

    Attributes:
        read: bytes.
    """

    def __init__(self) -> None:
        self.read, self._inode = 0, 0

    def is_other(self, file: Path) -> bool:
        """Whether the file was replaced or cut; then it is read from its start."""
        try:
            stat = file.stat()
            inode, size = stat.st_ino, stat.st_size
        except OSError:
            inode, size = 0, 0
        if inode == self._inode and size >= self.read:
            return False
        self.read, self._inode = 0, inode
        return True


def cut_after(file: Path, iteration: int) -> None:
    """Drop the lines after an iteration; those before it keep their bytes."""
    kept, ending = file.stat().st_size if file.exists() else 0, b""
    for at, raw in backwards(file):
        line = parse_line(raw)
        if line is not None and line["iteration"] <= iteration:
            ending = b"" if raw.endswith(b"\n") else b"\n"
            break
        kept = at
    with replace_file(file) as fresh, fresh.open("wb") as target:
        if kept:
            with file.open("rb") as source:
                while block := source.read(min(BLOCK, kept - source.tell())):
                    target.write(block)
        target.write(ending)


# --- thinning ------------------------------------------------------------------------------------


class Thinned:
    """A thinned sequence of lines that loses no peak.

    In every stretch of `width` iterations it keeps the last line and those where a value is
    smallest, largest or not finite; stretches get wider as a run goes on. Values that few lines
    have, such as held-out rewards, stay as long as they are few.

    Attributes:
        width: iterations of a stretch; 1 while every line stays.
    """

    def __init__(self, most: int) -> None:
        self.most, self.width = most, 1
        self._lines: list[Line] = []
        self._columns: dict[str, array[float]] = {}  # beside the lines; NaN is no number
        self._odd: set[int] = set()  # places of lines with a value that is not finite

    def add(self, line: Line) -> None:
        """Add the line of a later iteration."""
        place = len(self._lines)
        self._lines.append(line)
        for name, value in line.items():
            if name in SILENT:
                continue
            if not isinstance(value, list):
                self._note(place, name, value)
            elif numbers := [v for v in value if is_number(v)]:
                self._note(place, f"{name} low", min(numbers))
                self._note(place, f"{name} high", max(numbers))
        if len(self._lines) > SLACK * self.most:
            self._thin()

    def _note(self, place: int, name: str, value: float) -> None:
        if not math.isfinite(value):
            self._odd.add(place)
            return
        column = self._columns.setdefault(name, array("d"))
        if len(column) < place:
            column.extend([math.nan] * (place - len(column)))
        column.append(value)

    @property
    def lines(self) -> list[Line]:
        """The lines that stay, in order."""
        if len(self._lines) > self.most:
            self._thin()
        return self._lines

    def _thin(self) -> None:
        if self.width > 1:
            self._keep()
        while len(self._lines) > self.most and self.width < self._lines[-1]["iteration"]:
            self.width *= 2
            self._keep()

    def _keep(self) -> None:
        """Drop the lines that need not stay at the present width."""
        lines, count = self._lines, len(self._lines)
        places = groupby(range(count), lambda i: lines[i]["iteration"] // self.width)
        ends = [[*stretch][-1] + 1 for _, stretch in places]
        stretches = [*zip([0, *ends], ends, strict=False)]
        kept, rare = {0, *(end - 1 for end in ends)}, set()
        for column in self._columns.values():
            column.extend([math.nan] * (count - len(column)))
            known = [i for i, v in enumerate(column) if v == v]
            rare |= {*known} if len(known) <= self.most // 8 else set()
            kept |= _extremes(column, stretches)
        for start, end in stretches if self._odd else ():
            kept |= {*sorted(self._odd & {*range(start, end)})[:1]}
        order = sorted(kept | rare if len(rare) <= self.most // 2 else kept)
        self._lines = [lines[i] for i in order]
        self._odd = {new for new, old in enumerate(order) if old in self._odd}
        for name, column in self._columns.items():
            self._columns[name] = array("d", [column[i] for i in order])


def _extremes(column: array[float], stretches: Sequence[tuple[int, int]]) -> set[int]:
    """Indices of the smallest and the largest value of each stretch."""
    low = high = column
    if not all(map(math.isfinite, column)):
        low = array("d", [v if v == v else math.inf for v in column])
        high = array("d", [v if v == v else -math.inf for v in column])
    elif min(column) == max(column):
        return set()
    places: set[int] = set()
    for start, end in stretches:
        for side, extreme in ((low, min), (high, max)):
            peak = extreme(side[start:end])
            if math.isfinite(peak):
                places.add(side.index(peak, start, end))
    return places


def spread(
    items: Sequence[T], most: int, is_kept: Callable[[T], bool] = lambda item: False
) -> list[T]:
    """At most `most` items, evenly, including the first and the last; and those to keep.

    >>> spread(range(9), 3, lambda i: i == 5)
    [0, 4, 5, 8]
    """
    if len(items) <= most:
        return list(items)
    places = {round(i * (len(items) - 1) / (most - 1)) for i in range(most)}
    return [item for i, item in enumerate(items) if i in places or is_kept(item)]


# --- what a run came to so far -------------------------------------------------------------------


class Digest:
    """A summary of a run's metrics; each update reads only what is new.

    Args:
        most: lines that are held, thinned.

    Attributes:
        curves: those lines, each with the variance of the gradient norm up to it.
        seconds: of training, None if no line has them.
        held_out: the last value of the held-out prompts.
        best: their highest value, and its iteration.
    """

    def __init__(self, file: Path, most: int) -> None:
        self.file, self.most = file, most
        self._place = Place()
        self._begin()

    def _begin(self) -> None:
        self.curves, self.count = Thinned(self.most), 0
        self.seconds: float | None = None
        self.held_out: float | None = None
        self.best: tuple[float, int] | None = None
        self._variance, self._speeds = Variance(WINDOW), array("d")

    @property
    def images_per_second(self) -> float | None:
        """Their median over the iterations."""
        return median(self._speeds) if self._speeds else None

    def update(self) -> Digest:
        """Read what was added; all of it if the file was replaced."""
        if self._place.is_other(self.file):
            self._begin()
        try:
            with open_metrics(self.file) as stream:
                stream.seek(self._place.read)
                for raw in stream:
                    if not raw.endswith(b"\n"):
                        break  # it is being written
                    self._place.read += len(raw)
                    if (line := parse_line(raw)) is not None:
                        self._add(line)
        except OSError:
            pass
        return self

    def _add(self, line: Line) -> None:
        self.count += 1
        if is_number(seconds := line.get("seconds")):
            self.seconds = (self.seconds or 0.0) + seconds
        if is_number(speed := line.get("images_per_second")):
            self._speeds.append(speed)
        if is_number(reward := line.get("held_out")):
            self.held_out = reward
            if self.best is None or reward > self.best[0]:
                self.best = (reward, line["iteration"])
        variance = self._variance.after(line.get("grad_norms") or [line.get("grad_norm")])
        self.curves.add(line if variance is None else line | {VARIANCE: variance})


class Variance:
    """The variance of what the last `window` iterations measured."""

    def __init__(self, window: int) -> None:
        self._parts: deque[tuple[int, float, float]] = deque(maxlen=window)

    def after(self, values: Iterable[Any]) -> float | None:
        """The variance after one more iteration; None for fewer than two numbers.

        >>> variance = Variance(window=10)
        >>> variance.after([1.0, 3.0]), variance.after([5.0])  # of 1, 3 and 5 in the end: 8/3
        (1.0, 2.6666666666666665)
        """
        numbers = [float(v) for v in values if is_number(v)]
        if numbers:
            mean = math.fsum(numbers) / len(numbers)
            self._parts.append((len(numbers), mean, math.fsum((v - mean) ** 2 for v in numbers)))
        else:
            self._parts.append((0, 0.0, 0.0))
        count = sum(n for n, _, _ in self._parts)
        if count < 2:
            return None
        mean = sum(n * m for n, m, _ in self._parts) / count
        return sum(square + n * (m - mean) ** 2 for n, m, square in self._parts) / count
