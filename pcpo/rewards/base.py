"""What all rewards share: images of any size in; per image, one number or one reason out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from math import isfinite
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from ...remedies import install
from ..errors import RewardUnavailable, versions_of
from ..pictures.files import BadPicture, eight_bit
from ..pictures.tensors import Images, Pictures, pixels_of
from ..scores import Scores

NO_PROMPT = "the prompt is empty, and this reward judges an image by it"


class BatchReward:
    """A reward computed over batches of one size; `score` takes images of any size.

    A subclass gives `measure`, and overrides what differs.

    Attributes:
        name: its key in `REWARDS`.
        needs_prompt: whether the score depends on the prompt.
        differentiable: whether `value` gives it with its gradient to the pixels.
        bounds: the smallest and largest possible value, infinite where there is none.
        unit: of a value, in a word or two.
        at_once: most images that `measure` is given.
        is_elsewhere: whether a server computes it.
        server: prefix of the environment variables about that server.
    """

    name: ClassVar[str]
    needs_prompt: ClassVar[bool] = False
    differentiable: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (float("-inf"), float("inf"))
    unit: ClassVar[str] = ""
    at_once: ClassVar[int] = 16
    is_elsewhere: ClassVar[bool] = False
    server: ClassVar[str] = ""

    def measure(self, images: Images, prompts: Sequence[str]) -> Scores:
        """Score images of one size, on any device, whose prompts have no complaint."""
        raise NotImplementedError

    def value(self, pixels: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Tensor:
        """The reward of pixels in 0 to 1 with its gradient, (b,), where it is differentiable."""
        raise NotImplementedError(f"the reward {self.name!r} has no gradient")

    def complaints(self, prompts: Sequence[str]) -> list[str | None]:
        """Why each prompt cannot be scored, None if it can."""
        wanted = self.needs_prompt
        return [NO_PROMPT if wanted and not prompt.strip() else None for prompt in prompts]

    def modules(self) -> list[nn.Module]:
        """The networks, loaded if they are not yet; empty if it computes without one."""
        return []

    def fingerprint(self) -> dict[str, Any]:
        """What its numbers depend on."""
        return {"reward": self.name, "versions": versions_of("torch", "pillow")}

    def score(self, images: Pictures, prompts: Sequence[str]) -> Scores:
        """Score each image against its own prompt.

        Args:
            images: a batch of one size, or pictures of any size and mode; alpha is dropped.
            prompts: one per image.

        Returns:
            One value per image; NaN with the reason if it has none.

        Raises:
            ValueError: if images and prompts differ in number, or pixels are not 8-bit.
        """
        if len(images) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts for {len(images)} images")
        if isinstance(images, Tensor) and images.dtype != torch.uint8:
            raise ValueError(
                f"the images are {images.dtype}, and a reward scores 8-bit pixels: multiply those "
                "of 0 to 1 by 255, round them, and make them torch.uint8"
            )
        collected = _Collected(len(prompts))
        for i, why in enumerate(self.complaints(prompts)):
            collected.refuse(i, why)
        for i, image in enumerate(images):
            collected.refuse(i, _fault(image))
        for rows, batch in _batches(images, collected.open(), self.at_once):
            collected.add(rows, self.measure(batch, [prompts[i] for i in rows]))
        return collected.scores()


class _Collected:
    """Collects the scores of a batch part by part."""

    def __init__(self, count: int) -> None:
        self.values = torch.full((count,), float("nan"))
        self.details: list[Mapping[str, float]] = [{} for _ in range(count)]
        self.errors: list[str | None] = [None] * count

    def refuse(self, row: int, why: str | None) -> None:
        self.errors[row] = self.errors[row] or why

    def open(self) -> list[int]:
        return [i for i, why in enumerate(self.errors) if why is None]

    def add(self, rows: Sequence[int], part: Scores) -> None:
        for at, row in enumerate(rows):
            value = float(part.values[at].float())
            why = part.errors[at] if part.errors else None
            if why is None and not isfinite(value):
                why = "it gives no number (NaN)" if value != value else f"it gives {value}"
            self.values[row], self.errors[row] = (float("nan") if why else value), why
            if part.details:
                self.details[row] = part.details[at]

    def scores(self) -> Scores:
        details = tuple(self.details) if any(self.details) else ()
        return Scores(self.values, details, tuple(self.errors) if any(self.errors) else ())


def _fault(image: Tensor | Image.Image) -> str | None:
    """Why this is not a usable image, None if it is."""
    size = image.size if isinstance(image, Image.Image) else tuple(image.shape[:0:-1])
    if 0 in size:
        return f"the image has no pixels ({size[0]}x{size[1]})"
    if isinstance(image, Image.Image) and image.mode in ("I", "F"):  # which may have no scale
        try:
            eight_bit(image)
        except BadPicture as error:
            return f"the image cannot be scored: {error}"
    return None


def _batches(
    images: Pictures, rows: Sequence[int], at_once: int
) -> Iterator[tuple[list[int], Images]]:
    """Group the given rows by image size, at most `at_once` in a batch."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        image = images[row]
        shape = image.size if isinstance(image, Image.Image) else tuple(image.shape[1:])
        by_size.setdefault((shape[0], shape[1]), []).append(row)
    for group in by_size.values():
        for start in range(0, len(group), at_once):
            part = group[start : start + at_once]
            if isinstance(images, Tensor):
                yield part, images if len(part) == len(images) else images[part]
            else:
                yield part, torch.cat([pixels_of(images[row]) for row in part])


def require(packages: Sequence[str], reward: str) -> None:
    """Refuse a reward whose packages are not installed; nothing is imported.

    Raises:
        RewardUnavailable: naming the missing packages.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise RewardUnavailable(
            f"the reward {reward!r} needs the package {missing[0]!r}, which is not installed; run "
            f"{install(*missing)} and start again"
        )


@contextmanager
def on_device(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Move frozen modules to a device within it, and afterwards put back their tensors in main
    memory.

    Nothing is copied back: the modules must not be trained.
    """
    held = dict.fromkeys(t for m in modules for t in (*m.parameters(), *m.buffers()))
    homes = [(tensor, tensor.data) for tensor in held]
    try:
        for tensor, home in homes:
            tensor.data = home.to(device, non_blocking=True)
        yield
    finally:
        for tensor, home in homes:
            tensor.data = home
