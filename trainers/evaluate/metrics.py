"""Measure the images of an evaluation, prompt after prompt, in constant memory.

For each prompt every side's images are read in small batches. Of features only moments are kept
(and, during a prompt, its own rows); of scores one number per image.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...pcpo.metrics import InceptionScore, Moments, frechet_distance, frechet_distance_of
from ...pcpo.metrics.inception import Inception
from ...pcpo.metrics.inception_score import SPLITS
from ...pcpo.metrics.lpips import Spread
from ...pcpo.metrics.similarity import TAPS, rms
from ...pcpo.pictures.files import BadPicture, open_picture
from ...pcpo.pictures.tensors import pixels_of
from ...pcpo.rewards.base import on_device
from .suite import Suite

AT_ONCE = 16
"""Images in a batch."""
DIVERSE = 45
"""Images of a prompt used for diversity: its first ones, nearly 1000 pairs."""
DRIFT = "drift_pixels"

Files = dict[str, list[Path]]
Say = Callable[[str], None]


@dataclass(slots=True)
class Measured:
    """The measurements of a side.

    Attributes:
        images: of each prompt, the number that could be read.
        scores: by metric, one per image (NaN if it has none), prompt after prompt.
        prompts: by metric, one per prompt.
        overall: by metric: "value" and "note".
        faults: of images: "file" and "why".
        moments: by encoder, of all images.
        inception: the Inception Score of all images, if its network is there.
    """

    files: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    scores: dict[str, array[float]] = field(default_factory=dict)
    prompts: dict[str, list[float]] = field(default_factory=dict)
    overall: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: list[dict[str, str]] = field(default_factory=list)
    moments: dict[str, Moments] = field(default_factory=dict)
    inception: InceptionScore | None = None

    def score(self, name: str, value: float) -> None:
        self.scores.setdefault(name, array("d")).append(value)

    def of_prompt(self, name: str, value: float) -> None:
        self.prompts.setdefault(name, []).append(value)


@dataclass(slots=True)
class _Seen:
    """What is kept of a prompt's images until all of them are seen."""

    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    spread: Spread = field(default_factory=Spread)
    pixels: list[Tensor] = field(default_factory=list)


def measure(
    sides: dict[str, Files],
    prompts: Sequence[str],
    suite: Suite,
    device: torch.device,
    say: Say,
    reference: Sequence[Path] = (),
) -> tuple[dict[str, Measured], dict[str, float]]:
    """Measure every side.

    Args:
        sides: each one's files by prompt, the base's first.
        reference: images to measure distances to, instead of the base's.

    Returns:
        The measurements of each side, and the seconds per image of each metric.
    """
    measured = {name: _open_scores(by_prompt, suite) for name, by_prompt in sides.items()}
    clock = Clock()
    with on_device(suite.modules(), device):
        moments = _reference_moments(reference, suite, device, clock)
        began = time.monotonic()
        for at, prompt in enumerate(prompts):
            files = {name: by_prompt[prompt] for name, by_prompt in sides.items()}
            _measure_prompt(files, prompt, suite, measured, device, clock)
            if time.monotonic() - began > 30:
                say(f"measured {at + 1} of {len(prompts)} prompts")
                began = time.monotonic()
    base = next(iter(measured.values()))
    for side in measured.values():
        _distances(side, base, moments, is_base=side is base and not reference)
    return measured, clock.per_image()


def _open_scores(files: Files, suite: Suite) -> Measured:
    total = sum(map(len, files.values()))
    has = any(isinstance(encoder, Inception) for encoder in suite.features.values())
    return Measured(inception=InceptionScore(total) if has and total >= SPLITS else None)


def _measure_prompt(
    files: Files,
    prompt: str,
    suite: Suite,
    measured: dict[str, Measured],
    device: torch.device,
    clock: Clock,
) -> None:
    """Take in one prompt's images of every side."""
    seen = {name: _Seen() for name in files}
    base = next(iter(files))
    counts = dict.fromkeys(files, 0)
    for start in range(0, max(map(len, files.values())), AT_ONCE):
        chunks = {name: some[start : start + AT_ONCE] for name, some in files.items()}
        of_base: list[Tensor | None] = []
        for name, some in chunks.items():
            pixels = _read(some, measured[name].faults)
            of_base = pixels if name == base else of_base
            good = [image for image in pixels if image is not None]
            counts[name] += len(good)
            _drift(measured[name], pixels, of_base, is_base=name == base)
            batch = torch.stack(good) if good else None
            _rewards(measured[name], batch, pixels, some, prompt, suite, clock)
            if batch is not None:
                first = sum(measured[name].files) + start
                numbers = [first + i for i, image in enumerate(pixels) if image is not None]
                _features(measured[name], seen[name], batch, numbers, suite, device, clock)
                kept = DIVERSE - sum(map(len, seen[name].pixels))
                seen[name].pixels += [batch[:kept]] if kept > 0 else []
    for name, one in seen.items():
        measured[name].files.append(len(files[name]))
        measured[name].images.append(counts[name])
        _of_prompt(measured[name], one, None if name == base else seen[base], suite, clock)


def _read(files: Sequence[Path], faults: list[dict[str, str]]) -> list[Tensor | None]:
    """Pixels of each file, None if it cannot be read; that is added to the faults."""
    pixels: list[Tensor | None] = []
    for file in files:
        try:
            pixels.append(pixels_of(open_picture(file))[0])
        except BadPicture as error:
            faults.append({"file": str(file), "why": f"cannot be read as an image: {error}"})
            pixels.append(None)
    return pixels


def _drift(
    side: Measured, pixels: list[Tensor | None], base: list[Tensor | None], *, is_base: bool
) -> None:
    """Distance of each image from the base's of the same prompt and seed."""
    if is_base:
        for image in pixels:
            side.score(DRIFT, math.nan if image is None else 0.0)
        return
    partners = [*base, *[None] * len(pixels)]
    for image, other in zip(pixels, partners, strict=False):
        if image is None or other is None or image.shape != other.shape:
            side.score(DRIFT, math.nan)
        else:
            side.score(DRIFT, rms(image[None], other[None]).item())


def _rewards(
    side: Measured,
    batch: Tensor | None,
    pixels: list[Tensor | None],
    files: Sequence[Path],
    prompt: str,
    suite: Suite,
    clock: Clock,
) -> None:
    for name, reward in suite.rewards.items():
        with clock(name, 0 if batch is None else len(batch)):
            scores = None if batch is None else reward.score(batch, [prompt] * len(batch))
        at = 0
        for image, file in zip(pixels, files, strict=True):
            if image is None or scores is None:
                side.score(name, math.nan)
                continue
            side.score(name, scores.values[at].item())
            why = scores.errors[at] if scores.errors else None
            side.faults += [{"file": str(file), "why": f"{name}: {why}"}] if why else []
            at += 1


def _features(
    side: Measured,
    seen: _Seen,
    batch: Tensor,
    numbers: Sequence[int],
    suite: Suite,
    device: torch.device,
    clock: Clock,
) -> None:
    """Add a batch to moments, Inception Score and LPIPS diversity; `numbers` are its images'."""
    for name, encoder in suite.features.items():
        with clock(name, len(batch)):
            if isinstance(encoder, Inception) and side.inception is not None:
                rows, logits = encoder.both(batch.to(device))
                side.inception.add(logits, numbers)
            else:
                rows = encoder(batch.to(device))
            side.moments.setdefault(name, Moments(rows.shape[1])).add(rows)
        seen.rows.setdefault(name, []).append(rows)
    for name, lpips in suite.lpips.items():
        with clock(name, len(batch)):
            seen.spread.add(lpips.embed(batch.to(device)))


def _of_prompt(side: Measured, seen: _Seen, base: _Seen | None, suite: Suite, clock: Clock) -> None:
    """The numbers of a prompt: diversity, and distances from the base's images of it."""
    pixels = torch.cat(seen.pixels) if seen.pixels else torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    for name, diversity in suite.diversities.items():
        with clock(name, len(pixels)):
            is_known = len(pixels) > 1 and (
                name != "ssim_diversity" or min(pixels.shape[2:]) >= TAPS
            )
            side.of_prompt(name, diversity(pixels) if is_known else math.nan)
    for name in suite.lpips:
        side.of_prompt(name, seen.spread.value if seen.spread.count > 1 else math.nan)
    for name in suite.features:
        rows = torch.cat(seen.rows[name]) if name in seen.rows else torch.zeros(0, 1)
        others = None if base is None else base.rows.get(name)
        if base is None:
            side.of_prompt(name, 0.0)
        elif others is None or min(len(rows), sum(map(len, others))) < 2:
            side.of_prompt(name, math.nan)
        else:
            side.of_prompt(name, frechet_distance_of(rows, torch.cat(others)).value)


def _reference_moments(
    files: Sequence[Path], suite: Suite, device: torch.device, clock: Clock
) -> dict[str, Moments]:
    """Moments of a folder of other images; empty without one."""
    side = Measured()
    for start in range(0, len(files), AT_ONCE):
        good = [p for p in _read(files[start : start + AT_ONCE], side.faults) if p is not None]
        if good:
            _features(side, _Seen(), torch.stack(good), [], suite, device, clock)
    return side.moments


def _distances(
    side: Measured, base: Measured, reference: dict[str, Moments], *, is_base: bool
) -> None:
    """Distances of all images of a side, from the base's or the reference's."""
    for name, mine in side.moments.items():
        others = reference.get(name) or base.moments.get(name)
        if is_base or others is None or min(mine.count, others.count) < 2:
            value = 0.0 if is_base else math.nan
            side.overall[name] = {"value": value, "note": None}
            continue
        distance = frechet_distance(mine, others)
        side.overall[name] = {"value": distance.value, "note": distance.note}
    if side.inception is not None:
        side.overall["inception_score"] = _inception(side.inception)


def _inception(score: InceptionScore) -> dict[str, Any]:
    try:
        result = score.result()
    except ValueError as error:
        return {"value": math.nan, "note": str(error)}
    return {"value": result.mean, "std": result.std, "note": result.note}


class Clock:
    """Seconds that each metric takes, and its number of images."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str, images: int) -> Iterator[None]:
        """A context whose time counts for a metric."""
        began = time.perf_counter()
        yield
        spent = self.spent.setdefault(name, [0.0, 0.0])
        spent[0] += time.perf_counter() - began
        spent[1] += images

    def per_image(self) -> dict[str, float]:
        return {name: s / images for name, (s, images) in self.spent.items() if images}
