"""Pictures from files and over the wire: opened in one way wherever they come from.

As ComfyUI's Load Image has them: turned as their EXIF says, 16 bits brought to 8 by their scale,
alpha dropped, the colour profile and the gamma not applied. What differs: of an animation the
first picture counts, and a file that is cut off is refused instead of filled with black.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""That are read; Pillow knows dozens, and hands some, such as EPS, to other programs."""

MAX_PIXELS = 1 << 27
"""Of one picture."""

ORIENTATION = 0x0112
"""EXIF's number for how a picture is to be turned."""


class BadPicture(ValueError):
    """What cannot be read as an image; the text says why, and does not name the file."""


def open_picture(
    file: Path | BinaryIO, formats: Sequence[str] = FORMATS, most: int = MAX_PIXELS
) -> Image.Image:
    """Read a picture to its end.

    Args:
        file: its path, or its bytes.
        formats: Pillow's names of those that it may have.
        most: pixels that it may have.

    Returns:
        The picture, 8-bit RGB, upright; `BadPicture` where it cannot be read.
    """
    with _opened(file, formats, most) as opened:
        with suppress(Exception):  # broken EXIF turns nothing; broken pixels are met again below
            ImageOps.exif_transpose(opened, in_place=True)
        return eight_bit(opened)


def picture_size(
    file: Path | BinaryIO, formats: Sequence[str] = FORMATS, most: int = MAX_PIXELS
) -> tuple[int, int]:
    """Width and height of a picture, upright, from its header alone.

    Args:
        file: its path, or its bytes.
        formats: Pillow's names of those that it may have.
        most: pixels that it may have.

    Returns:
        They, in px; `BadPicture` where there is no such header.
    """
    with _opened(file, formats, most) as opened:
        width, height = opened.size
        with suppress(Exception):
            is_turned = opened.format == "TIFF"  # whose reader has done it
            exif = Image.Image.getexif(opened)  # a PNG's own would decode its pixels
            if not is_turned and exif.get(ORIENTATION, 1) > 4:
                return height, width
        return width, height


@contextmanager
def _opened(file: Path | BinaryIO, formats: Sequence[str], most: int) -> Iterator[Image.Image]:
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
    """A picture as 8-bit RGB; alpha is dropped, grey becomes three channels.

    Args:
        picture: of any mode; 16 bits by their scale of 65535, floats by theirs of 0 to 1.

    Returns:
        The picture.

    Raises:
        BadPicture: where its numbers have no scale.
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
