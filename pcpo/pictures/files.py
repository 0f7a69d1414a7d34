"""Pictures from files and over the wire, all opened in one way.

This follows ComfyUI's Load Image: turned as their EXIF says, 16 bits brought to 8 by their scale,
alpha dropped, colour profile and gamma not applied. Two things differ: of an animation the first
picture counts, and a truncated file is refused instead of filled with black.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Formats that are read; Pillow knows dozens, and hands some, such as EPS, to other programs."""

MAX_PIXELS = 1 << 27
"""Most pixels of one picture."""

ORIENTATION = 0x0112
"""EXIF's number for the orientation."""


class BadPicture(ValueError):
    """A file that cannot be read as an image; the text says why, and does not name the file."""


def open_picture(
    file: Path | BinaryIO, formats: Sequence[str] = FORMATS, most: int = MAX_PIXELS
) -> Image.Image:
    """Read a picture to its end, as upright 8-bit RGB.

    Args:
        file: its path, or its bytes.
        formats: Pillow's names of the formats allowed.
        most: pixels allowed; `BadPicture` for more, and for what cannot be read.
    """
    with _open_image(file, formats, most) as opened:
        with suppress(Exception):  # broken EXIF turns nothing; broken pixels are met again below
            ImageOps.exif_transpose(opened, in_place=True)
        return eight_bit(opened)


def picture_size(
    file: Path | BinaryIO, formats: Sequence[str] = FORMATS, most: int = MAX_PIXELS
) -> tuple[int, int]:
    """Width and height of a picture in px, upright, from its header alone.

    The arguments are those of `open_picture`, and so is its `BadPicture`.
    """
    with _open_image(file, formats, most) as opened:
        width, height = opened.size
        with suppress(Exception):
            is_turned = opened.format == "TIFF"  # whose reader has done it
            exif = Image.Image.getexif(opened)  # a PNG's own would decode its pixels
            if not is_turned and exif.get(ORIENTATION, 1) > 4:
                return height, width
        return width, height


@contextmanager
def _open_image(file: Path | BinaryIO, formats: Sequence[str], most: int) -> Iterator[Image.Image]:
    try:
        with Image.open(file, formats=tuple(formats)) as opened:
            width, height = opened.size
            if not 0 < width * height <= most:
                raise BadPicture(f"it has {width}x{height} pixels; from 1 to {most} can be read")
            yield opened
    except BadPicture:
        raise
    except UnidentifiedImageError as error:
        kinds = f"{', '.join(formats[:-1])} or {formats[-1]}" if formats[1:] else formats[0]
        raise BadPicture(f"it is no complete {kinds} file") from error
    except Exception as error:  # a damaged file makes Pillow's readers raise errors of any kind
        why = str(error)
        if "MAX_TEXT" in why:
            why = "its texts or its colour profile are too large; save it without them"
        raise BadPicture(why or type(error).__name__) from error


def eight_bit(picture: Image.Image) -> Image.Image:
    """Convert a picture to 8-bit RGB; alpha is dropped, grey becomes three channels.

    16-bit pixels are scaled from 65535, floats from 1.

    Raises:
        BadPicture: if its numbers have no scale.
    """
    mode = picture.mode
    if mode.startswith("I;16") or (mode == "I" and picture.format == "PNG"):
        return _grey((np.asarray(picture).astype(np.uint32) + 128) // 257)
    if mode == "I":
        raise BadPicture("its numbers have 32 bits and no scale; save it with 8 or 16 bits")
    if mode == "F":
        values = np.asarray(picture)
        if not ((values >= 0) & (values <= 1)).all():
            raise BadPicture("its floats are not all in 0 to 1; save it with 8 or 16 bits")
        return _grey(np.rint(values * 255))
    if mode in ("P", "PA", "RGBa"):  # whose alpha would be warned of, or stay multiplied in
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def _grey(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
