"""The image sizes that a family can draw. No torch here."""

from __future__ import annotations


def check_sides(width: int, height: int, multiple: int) -> None:
    """Refuse a width or height in pixels that is not a multiple, naming the nearest length."""
    for side, value in (("width", width), ("height", height)):
        if value < multiple or value % multiple:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise ValueError(
                f"{side} is {value}; it must be a multiple of {multiple}, for example {nearest}"
            )
