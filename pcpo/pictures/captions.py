"""Words on a picture: any text in one line, cut off where it does not fit."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any


def one_line(text: str, font: Any, room: float) -> str:
    """Text that a font can draw in one line of `room` pixels; what does not fit is cut off.

    >>> from PIL import ImageFont
    >>> font = ImageFont.load_default(10)
    >>> one_line("a red\\ncircle", font, 500), one_line("a" * 50, font, 30)
    ('a red circle', 'aaaa…')

    What is no character is drawn as a question mark.
    """
    line = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    end = "…"
    if not hasattr(font, "path"):  # Pillow's own letters, which are Latin ones
        line, end = line.encode("latin-1", "replace").decode("latin-1"), "..."
    if font.getlength(line) <= room:
        return line
    lengths = range(1, len(line))
    fitting = bisect_right(lengths, room, key=lambda n: font.getlength(line[:n] + end))
    return line[:fitting] + end
