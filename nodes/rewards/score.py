"""Scoring a batch: what a node is given is checked, turned into 8-bit pixels, scored and ranked.

Images are ComfyUI's: float, shape (b, h, w, c), 0 to 1. They are counted from 0, as in
`Image From Batch`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from ...pcpo.rewards import Images, Reward, Scores, WeightedSum
from ...pcpo.rewards.combine import unique_names
from ...trainers.errors import ConfigError
from ...trainers.job.prompt_files import plain
from ..errors import NodeError

CHUNK = 8
"""Images scored at once; between chunks a run can be interrupted."""

NO_COLOURS = (
    "it holds NaN or infinity instead of colours; decode it with a VAE in float32 or use another "
    "seed"
)

Lend = Callable[[Reward], AbstractContextManager[None]]


def nothing_lent(reward: Reward) -> AbstractContextManager[None]:
    """Where a reward scores where it is."""
    return nullcontext()


def to_pixels(images: Float[Tensor, "b h w c"]) -> Images:
    """The pixels that Save Image would write, so that a reward sees what is in the file.

    An alpha channel is dropped, as it is when the file is read as RGB.

    Args:
        images: any float type; what is no number becomes black.

    Returns:
        RGB, 0 to 255, rounded down.
    """
    if len(images) == 0:
        raise NodeError("there is no image to score: the batch is empty; connect at least one")
    if images.shape[-1] not in (3, 4):
        raise NodeError(
            f"the number of channels of the images is {images.shape[-1]}, and rewards read RGB; "
            "convert them to 3 channels"
        )
    rgb = images[..., :3].cpu()
    floats = (rgb.float() if rgb.dtype == torch.bfloat16 else rgb).numpy()
    pixels = np.clip(255.0 * np.nan_to_num(floats, posinf=1, neginf=0), 0, 255).astype(np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def faults(images: Float[Tensor, "b h w c"]) -> list[str | None]:
    """Why an image cannot be scored by any reward, None where it can."""
    return [None if image.isfinite().all() else NO_COLOURS for image in images]


def lines_of(text: str) -> list[str]:
    """The lines of a text box, without those that are empty."""
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    try:
        return [plain(line, f"line {number}") for number, line in enumerate(lines, 1)]
    except ConfigError as error:
        raise NodeError(str(error)) from error


def split_prompts(text: str, count: int) -> list[str]:
    """The prompt of each image, from one line for all or one line for each.

    Args:
        text: lines; empty ones do not count.

    Returns:
        One prompt an image, "" where there is no line.
    """
    lines = lines_of(text) or [""]
    if len(lines) not in (1, count):
        raise NodeError(
            f"there are {len(lines)} prompts (lines) for {count} images; "
            "give one line for all or one line for each image"
        )
    return lines if len(lines) == count else lines * count


def check_texts(reward: Reward, texts: Sequence[str]) -> None:
    """Ask a reward about every prompt."""
    for text, why in zip(texts, reward.complaints(texts), strict=True):
        if why is not None:
            raise NodeError(
                f"the reward {reward.name!r} cannot judge by the prompt {text[:60]!r}: {why}; "
                "change the prompt or take another reward"
            )


# --- scoring -------------------------------------------------------------------------------------


def score(
    reward: Reward,
    pixels: Images,
    prompts: Sequence[str],
    tick: Callable[[int], None],
    why: Sequence[str | None] = (),
    lend: Lend = nothing_lent,
) -> Scores:
    """Score a batch, one part of a sum after the other, each in chunks.

    A sum is added up once, of the whole batch, so that running statistics see it once.

    Args:
        tick: told how many images are scored, before each chunk and at the end; may raise.
        why: an image is not to be scored; None where it is.

    Returns:
        The scores of all; NaN with an error where an image has none.
    """
    needing = next((part for part in leaves(reward) if part.needs_prompt), None)
    if needing is not None and not any(prompts):
        raise NodeError(f"the reward {needing.name!r} judges images by their prompt; write one")
    errors = list(why) or [None] * len(pixels)
    rows = [i for i, fault in enumerate(errors) if fault is None]
    run = _Run(pixels[rows], [prompts[i] for i in rows], tick, lend, len(list(leaves(reward))))
    with torch.inference_mode(False), torch.no_grad():  # networks loaded now are plain tensors
        found = _to_rows(run.of(reward), rows, errors) if rows else _none(errors)
    tick(len(pixels))
    _refuse_all_failed(reward.name, found, prompts)
    return found


def leaves(reward: Reward) -> Iterator[Reward]:
    """The rewards that a sum is made of; a single one is its own."""
    if isinstance(reward, WeightedSum):
        for part in reward.rewards:
            yield from leaves(part)
    else:
        yield reward


@dataclass
class _Run:
    """A batch that several rewards score.

    Attributes:
        tick: told how far it is, in images.
        lend: gives what a reward scores within.
        done: images times rewards that are scored.
    """

    pixels: Images
    prompts: Sequence[str]
    tick: Callable[[int], None]
    lend: Lend
    count: int
    done: int = 0

    def of(self, reward: Reward) -> Scores:
        if isinstance(reward, WeightedSum):
            labels = reward.labels or unique_names([part.name for part in reward.rewards])
            found = [self.of(part) for part in reward.rewards]
            named = [_with_label(part, label) for part, label in zip(found, labels, strict=True)]
            return reward.total(named)
        parts = []
        self.tick(self.done // self.count)
        with self.lend(reward):
            for start in range(0, len(self.pixels), CHUNK):
                if start:
                    self.tick(self.done // self.count)
                rows = slice(start, start + CHUNK)
                part = reward.score(self.pixels[rows], self.prompts[rows])
                parts.append(_finite(part))
                self.done += len(part.values)
        return Scores.concatenate(parts)


def _finite(part: Scores) -> Scores:
    """Scores on the CPU, each a finite number or NaN with its reason."""
    values, whys = part.values.float().cpu(), part.errors or (None,) * len(part.values)
    errors = tuple(
        why or (None if np.isfinite(value) else f"it gives {value}")
        for value, why in zip(values.tolist(), whys, strict=True)
    )
    is_bad = torch.tensor([error is not None for error in errors])
    return Scores(values.masked_fill(is_bad, float("nan")), part.details, errors)


def _with_label(part: Scores, label: str) -> Scores:
    """Scores whose errors say which reward of a sum they are of."""
    return replace(part, errors=tuple(why and f"{label}: {why}" for why in part.errors))


def _to_rows(part: Scores, rows: Sequence[int], errors: list[str | None]) -> Scores:
    """Scores of some images as those of the batch, the others having their errors."""
    found, whys, details = torch.full((len(errors),), float("nan")), list(errors), {}
    for at, row in enumerate(rows):
        found[row] = part.values[at]
        whys[row] = part.errors[at] if part.errors else None
        details[row] = part.details[at] if part.details else {}
    told = tuple(details.get(row, {}) for row in range(len(errors)))
    return Scores(found, told if any(told) else (), tuple(whys) if any(whys) else ())


def _none(errors: Sequence[str | None]) -> Scores:
    return Scores(torch.full((len(errors),), float("nan")), (), tuple(errors))


def _refuse_all_failed(name: str, scores: Scores, prompts: Sequence[str]) -> None:
    count = len(scores.values)
    if not scores.errors or not all(scores.errors):
        return
    others = f", nor any other of the {count}" if count > 1 else ""
    raise NodeError(
        f"the reward {name!r} cannot score image 0 with the prompt "
        f"{textwrap.shorten(prompts[0], 80)!r}{others}: {scores.errors[0]}"
    )


def rank(values: Float32[Tensor, " b"]) -> list[int]:
    """The images' numbers, best first; equals keep their order, those without a score are last."""
    known = values.masked_fill(values.isnan(), float("-inf"))
    return known.argsort(descending=True, stable=True).tolist()


def check_kept(scores: Scores, n: int) -> None:
    """Refuse to keep an image that has no score."""
    count = int(scores.values.isfinite().sum())
    if n > count:
        (i, why), *_ = ((i, why) for i, why in enumerate(scores.errors) if why)
        raise NodeError(
            f"the best {n} images cannot be kept, as {count} of {len(scores.values)} have a score "
            f"(image {i}: {why}); lower n to {count}"
        )


def pick_latents(latent: dict[str, Any], picked: Sequence[int], count: int) -> dict[str, Any]:
    """Take latents out of a batch together with their masks and their noise numbers.

    Args:
        latent: ComfyUI's LATENT: "samples" (b, ...), perhaps "noise_mask" (1 or b, ...) and
            "batch_index", the numbers that noise is drawn by.

    Returns:
        A LATENT of `len(picked)`.
    """
    samples, masks = latent["samples"], latent.get("noise_mask")
    if samples.shape[0] != count:
        raise NodeError(
            f"there are {samples.shape[0]} latents for {count} images; "
            "connect the latents that these images were decoded from"
        )
    taken = {**latent, "samples": samples[list(picked)]}
    if masks is not None and masks.shape[0] > 1:
        taken["noise_mask"] = masks[[i % masks.shape[0] for i in picked]]
    numbers = latent.get("batch_index") or range(count)
    taken["batch_index"] = [numbers[i] for i in picked]
    return taken
