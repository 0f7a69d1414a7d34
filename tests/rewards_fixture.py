"""Small networks, images and prompts for the network rewards: equal wherever they are made.

`golden/make_golden.py` imports this in an environment of its own, without this package: so only
numpy, torch and Pillow here. Numbers come from numpy's legacy generator, whose stream is frozen.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from PIL import Image

VISION = {"width": 32, "layers": 2, "heads": 4, "inner": 64}
TEXT = {"width": 24, "layers": 2, "heads": 2, "inner": 96}
PATCH = 56  # of images of 224 x 224: 16 patches

SIZES = {  # height, width
    "square": (224, 224),
    "large": (300, 300),
    "landscape": (200, 331),
    "portrait": (341, 187),
    "fits": (224, 160),
    "tiny": (7, 9),
}

PROMPTS = (
    "a red cube on a blue table",
    "Two cats & a DOG, 1990s photograph!",
    "an astronaut’s “glove” &amp; caf\u00c3\u00a9 \u2014 zero-g   ",
    "word " * 120,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cube", "cats", "two", "##s"]
WORDS += [*"bcdefghijklmnopqrstuvwxyz0123456789!&,.-\u2014’“”;"]
WORDS += [f"##{letter}" for letter in "abcdefghijklmnopqrtuvwxyz0123456789"]
"""A vocabulary of BERT's kind."""


def numbers(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Normal numbers that depend on the name alone."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(random.standard_normal(shape).astype(np.float32))


def weight(name: str, shape: tuple[int, ...], salt: str = "") -> torch.Tensor:
    """A weight of a size that keeps a network's activations near 1."""
    if name.endswith("logit_scale"):
        return torch.tensor(100.0).log()
    found = numbers(salt + name, shape)
    if len(shape) > 1:
        return found / np.prod(shape[1:]) ** 0.5
    return 0.1 * found + (1.0 if name.endswith("weight") else 0.0)


def weights(shapes: dict[str, tuple[int, ...]], salt: str = "") -> dict[str, torch.Tensor]:
    """A state of a network by the shapes of its parts."""
    return {name: weight(name, tuple(shape), salt) for name, shape in shapes.items()}


def pixels(name: str) -> np.ndarray:
    """A picture with shades, edges and noise, (h, w, 3) of 8 bits."""
    height, width = SIZES[name]
    y, x = np.mgrid[:height, :width]
    random = np.random.RandomState(zlib.crc32(name.encode()))
    shades = np.stack([x * 255 // width, y * 255 // height, (x // 5 + y // 3) % 2 * 200], -1)
    return ((shades + random.randint(0, 60, shades.shape)) % 256).astype(np.uint8)


def pictures() -> dict[str, Image.Image]:
    """Pictures of all sizes, and of other modes."""
    found = {name: Image.fromarray(pixels(name)) for name in SIZES}
    found["grey"] = Image.fromarray(pixels("landscape")[..., 0])
    alpha = np.full((*SIZES["portrait"], 1), 255, np.uint8)
    found["rgba"] = Image.fromarray(np.concatenate([pixels("portrait"), alpha], -1))
    return found
