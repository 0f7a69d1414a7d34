"""Scoring a batch: what a node is given is checked, turned into 8-bit pixels, scored and ranked.

Images are ComfyUI's: float, shape (b, h, w, c), 0 to 1. They are counted from 0, as in
`Image From Batch`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from ..pcpo.rewards import Images, Reward, Scores
from ..pcpo.rewards.base import pictures_of
from ..pcpo.rewards.contact_sheet import contact_sheet
from .errors import NodeError

CHUNK = 8
"""Images scored at once; between chunks a run can be interrupted."""


def to_pixels(images: Float[Tensor, "b h w c"]) -> Images:
    """The pixels that Save Image would write, so that a reward sees what is in the file.

    An alpha channel is dropped, as it is when the file is read as RGB.

    Args:
        images: any float type.

    Returns:
        RGB, 0 to 255, rounded down.

    Raises:
        NodeError: where there is no image, or one cannot be shown.
    """
    if len(images) == 0:
        raise NodeError("there is no image to score: the batch is empty; connect at least one")
    if images.shape[-1] not in (3, 4):
        raise NodeError(
            f"the number of channels of the images is {images.shape[-1]}, and rewards read RGB; "
            "convert them to 3 channels"
        )
    bad = [i for i, image in enumerate(images) if not image.isfinite().all()]
    if bad:
        raise NodeError(
            f"image {bad[0]} of {len(images)} holds NaN or infinity instead of colours; "
            "decode it with a VAE in float32 or use another seed"
        )
    rgb = images[..., :3].cpu()
    floats = (rgb.float() if rgb.dtype == torch.bfloat16 else rgb).numpy()
    pixels = np.clip(255.0 * floats, 0, 255).astype(np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def split_prompts(text: str, count: int) -> list[str]:
    """The prompt of each image, from one line for all or one line for each.

    Args:
        text: lines; empty ones do not count.
        count: of images.

    Returns:
        One prompt an image, "" where there is no line.

    Raises:
        NodeError: where there are neither one nor `count` lines.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    if len(lines) not in (1, count):
        raise NodeError(
            f"there are {len(lines)} prompts (lines) for {count} images; "
            "give one line for all or one line for each image"
        )
    return lines if len(lines) == count else lines * count


def score(
    reward: Reward, pixels: Images, prompts: Sequence[str], tick: Callable[[int], None]
) -> Scores:
    """Score a batch in chunks.

    Args:
        reward: what scores.
        pixels: of the batch.
        prompts: one an image.
        tick: told how many images are scored, before each chunk and at the end; may raise.

    Returns:
        The scores of all, each a finite number.

    Raises:
        NodeError: where a prompt is missing, or an image has no score.
    """
    if reward.needs_prompt and not any(prompts):
        raise NodeError(f"the reward {reward.name!r} judges images by their prompt; write one")
    parts = []
    for start in range(0, len(pixels), CHUNK):
        tick(start)
        part = slice(start, start + CHUNK)
        parts.append(reward.score(pixels[part], prompts[part]))
        _check(reward.name, parts[-1], prompts[part], start)
    tick(len(pixels))
    values = torch.cat([part.values.float().cpu() for part in parts])
    return Scores(values, tuple(detail for part in parts for detail in part.details))


def _check(name: str, scores: Scores, prompts: Sequence[str], start: int) -> None:
    for i, (value, prompt) in enumerate(zip(scores.values.tolist(), prompts, strict=True)):
        why = scores.errors[i] if scores.errors else None
        if why or not np.isfinite(value):
            raise NodeError(
                f"the reward {name!r} cannot score image {start + i} with the prompt "
                f"{textwrap.shorten(prompt, 80)!r}: {why or f'it gives {value}'}"
            )


def ranked(values: Float32[Tensor, " b"]) -> list[int]:
    """The images' numbers, best first; equals keep their order."""
    return values.argsort(descending=True, stable=True).tolist()


def table(scores: Scores, prompts: Sequence[str], order: Sequence[int]) -> str:
    """The scores as text, one line an image: rank, image, score, its parts, prompt.

    Args:
        scores: of the batch.
        prompts: of the batch.
        order: the images' numbers in the order of the lines.

    Returns:
        Aligned columns, with a line of names above them.
    """
    parts = [name for name in (scores.details[0] if scores.details else ()) if name != "score"]
    rows = [("rank", "image", "score", *parts, "prompt")]
    for rank, i in enumerate(order, 1):
        details = [f"{scores.details[i][part]:.4f}" for part in parts]
        rows.append((str(rank), str(i), f"{scores.values[i]:.4f}", *details, prompts[i]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[c.rjust(w) for c, w in zip(row[:-1], widths, strict=False)] for row in rows]
    return "\n".join("  ".join([*line, row[-1]]) for line, row in zip(lines, rows, strict=True))


def sheet(
    pixels: Images, values: Sequence[float], order: Sequence[int]
) -> Float[Tensor, "1 height width 3"]:
    """A batch with its scores as one image, 0 to 1, best first."""
    drawn = contact_sheet(pictures_of(pixels), values, order)
    return torch.from_numpy(np.asarray(drawn).astype(np.float32) / 255)[None]


def pick_latents(latent: dict[str, Any], picked: Sequence[int], count: int) -> dict[str, Any]:
    """Take latents out of a batch together with their masks and their noise numbers.

    Args:
        latent: ComfyUI's LATENT: "samples" (b, ...), perhaps "noise_mask" (1 or b, ...) and
            "batch_index", the numbers that noise is drawn by.
        picked: which, in this order.
        count: of images, for there is one latent an image.

    Returns:
        A LATENT of `len(picked)`.

    Raises:
        NodeError: where there is not one latent an image.
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
