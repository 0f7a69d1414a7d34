"""From images to a network's input: resizing, cropping or padding, CLIP's normalisation.

On the CPU Pillow resizes, exactly as in the references. On another device, and for pixels with a
gradient, torch does: for 8-bit images within one step of 255 of Pillow's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Float, Float32
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ..pictures.tensors import Images, pictures_of, pixels_of

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's deviation of red, green and blue, from 0 to 1."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of ImageNet's red, green and blue, from 0 to 1."""

Colour = tuple[float, float, float]

WIDEST = 64
"""Largest aspect ratio of an image; beyond it the resized image would be gigantic."""

Prepared = Float32[Tensor, "b 3 s s"]
Pixels = Float[Tensor, "b 3 h w"]


class Preparation(Protocol):
    """The steps between images and a network."""

    @property
    def id(self) -> str:
        """A description for a fingerprint."""
        ...

    def __call__(self, images: Images) -> Prepared:
        """Prepare 8-bit images, on the device they are on."""
        ...

    def with_gradient(self, pixels: Pixels) -> Prepared:
        """Prepare pixels of 0 to 1, with the gradient."""
        ...


def sides(images: Tensor) -> tuple[int, int]:
    """Height and width of images, (..., h, w)."""
    return images.shape[-2], images.shape[-1]


def too_long(height: int, width: int) -> str | None:
    """Why an image cannot be resized for a network, None if it can."""
    if max(height, width) > WIDEST * min(height, width):
        return f"the image's sides ({width}x{height}) are more than {WIDEST}:1"
    return None


def normalise(
    pixels: Float[Tensor, "b 3 s s"], mean: Colour = MEAN, deviation: Colour = DEVIATION
) -> Prepared:
    """Subtract a mean, by default CLIP's, from pixels of 0 to 1, and divide by a deviation."""
    pixels = pixels.float()
    centre, scale = (pixels.new_tensor(c).view(3, 1, 1) for c in (mean, deviation))
    return (pixels - centre) / scale


def shortest_to(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with a shorter side of `size`; the longer one is rounded down.

    >>> shortest_to(600, 801, 224), shortest_to(10, 10, 224)
    ((224, 299), (224, 224))
    """
    longer = int(size * max(height, width) / min(height, width))
    return (size, longer) if height <= width else (longer, size)


def longest_to(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with a longer side of `size`; the shorter one is rounded to nearest.

    >>> longest_to(600, 801, 224), longest_to(10, 10, 224)
    ((168, 224), (224, 224))
    """
    scale = size / float(max(height, width))
    return round(height * scale), round(width * scale)


def resize(images: Images, height: int, width: int) -> Images:
    """Resize 8-bit images bicubically: by Pillow on the CPU, else by torch in Pillow's manner."""
    if images.shape[-2:] == (height, width):
        return images
    if images.device.type == "cpu":
        kept = [p.resize((width, height), Image.Resampling.BICUBIC) for p in pictures_of(images)]
        return torch.cat([pixels_of(picture) for picture in kept])
    return resized_by_torch(images, height, width)


def resized_by_torch(images: Images, height: int, width: int) -> Images:
    """Resize 8-bit images bicubically as Pillow does, within one step of 255.

    Pillow resizes along the rows first, then rounds and clips to 8 bits before the columns; so does
    this.
    """
    for shape in ((images.shape[-2], width), (height, width)):
        if images.shape[-2:] != shape:
            images = interpolate(images.float(), *shape).round_().clamp_(0, 255).to(torch.uint8)
    return images


def interpolate(
    pixels: Pixels,
    height: int,
    width: int,
    mode: Literal["bicubic", "bilinear"] = "bicubic",
    antialias: bool = True,
) -> Pixels:
    """Resize pixels by torch in floating point, with the gradient."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    return functional.interpolate(
        pixels, (height, width), mode=mode, align_corners=False, antialias=antialias
    )


@dataclass(frozen=True, slots=True)
class Cropped:
    """CLIP's own: the shorter side becomes `size`, the middle square is cut out.

    Attributes:
        size: side of the square, in pixels.
        corner: where the square begins if the number of surplus rows or columns is odd:
            "down" half of them rounded down (transformers), "even" to the nearest even number
            (torchvision).
        resampling: "bilinear" is done in floating point, as DiffusionNFT does.
    """

    size: int = 224
    corner: Literal["down", "even"] = "down"
    resampling: Literal["bicubic", "bilinear"] = "bicubic"

    @property
    def id(self) -> str:
        return f"shortest-{self.size}-{self.resampling}-crop-{self.corner}"

    def __call__(self, images: Images) -> Prepared:
        if self.resampling != "bicubic":
            return self.with_gradient(images.float() / 255)
        images = resize(images, *shortest_to(*sides(images), self.size))
        return normalise(self._crop(images).float() / 255)

    def with_gradient(self, pixels: Pixels) -> Prepared:
        height, width = shortest_to(*sides(pixels), self.size)
        return normalise(self._crop(interpolate(pixels.float(), height, width, self.resampling)))

    def _crop(self, pixels: Tensor) -> Tensor:
        top, left = (self._start(side) for side in pixels.shape[-2:])
        return pixels[..., top : top + self.size, left : left + self.size]

    def _start(self, side: int) -> int:
        too_many = side - self.size
        return too_many // 2 if self.corner == "down" else round(too_many / 2)


@dataclass(frozen=True, slots=True)
class Padded:
    """HPSv2's: the longer side becomes `size`, in floating point; the rest is black.

    A picture whose longer side already is `size` is padded too; the reference leaves it as it is,
    and its network then cannot take it.

    Attributes:
        size: side of the square, in pixels.
        antialias: if off, resize as torchvision below 0.17 did, with which HPSv2's published
            numbers were made.
    """

    size: int = 224
    antialias: bool = True

    @property
    def id(self) -> str:
        return f"longest-{self.size}-bicubic-{'antialias' if self.antialias else 'alias'}-pad"

    def __call__(self, images: Images) -> Prepared:
        return self.with_gradient(images.float() / 255)

    def with_gradient(self, pixels: Pixels) -> Prepared:
        height, width = longest_to(*sides(pixels), self.size)
        pixels = interpolate(pixels.float(), height, width, antialias=self.antialias)
        top, left = (self.size - height) // 2, (self.size - width) // 2
        around = (left, self.size - width - left, top, self.size - height - top)
        return normalise(functional.pad(pixels, around))


@dataclass(frozen=True, slots=True)
class Stretched:
    """SigLIP's: both sides become `size`, whatever the aspect ratio.

    Attributes:
        size: side of the square, in pixels.
        mean: of red, green and blue, from 0 to 1.
        deviation: of them.
    """

    size: int
    mean: Colour = (0.5, 0.5, 0.5)
    deviation: Colour = (0.5, 0.5, 0.5)

    @property
    def id(self) -> str:
        return f"{self.size}x{self.size}-bicubic-{self.mean}-{self.deviation}"

    def __call__(self, images: Images) -> Prepared:
        pixels = resize(images, self.size, self.size).float() / 255
        return normalise(pixels, self.mean, self.deviation)

    def with_gradient(self, pixels: Pixels) -> Prepared:
        pixels = interpolate(pixels.float(), self.size, self.size)
        return normalise(pixels, self.mean, self.deviation)
