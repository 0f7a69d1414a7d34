"""The sizes of images that a family can draw. No torch here."""

from __future__ import annotations

MULTIPLES = {"sd3": 16, "flux": 16}
"""Pixels that the sides are multiples of: 8 of a latent point, 2 x 2 points a token."""


def check_sides(width: int, height: int, multiple: int) -> None:
    """Refuse an image that latents do not divide.

    Args:
        width: of the image, pixels.
        height: of the image, pixels.
        multiple: pixels that both sides are a multiple of.

    Raises:
        ValueError: naming the side and the nearest length.
    """
    for side, value in (("width", width), ("height", height)):
        if value < multiple or value % multiple:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise ValueError(
                f"{side} is {value}; it must be a multiple of {multiple}, for example {nearest}"
            )
