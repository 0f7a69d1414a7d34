"""Scores of a batch as a table and as a contact sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...pcpo.pictures.contact_sheet import contact_sheet
from ...pcpo.pictures.tensors import pictures_of
from ...pcpo.rewards import Images, Scores
from ...pcpo.statistics.tables import align_columns

NONE = "-"
"""In place of a number that there is not."""


def table(scores: Scores, prompts: Sequence[str], order: Sequence[int]) -> str:
    """The scores as text, one line an image: rank, image, score, its parts, prompt, error.

    Returns:
        Aligned columns, with a line of names above them; no column of errors where there are none.
    """
    parts = part_names(scores)
    errors = scores.errors if any(scores.errors) else ()
    rows = [["rank", "image", "score", *parts, "prompt", *(["error"] if errors else [])]]
    for rank, i in enumerate(order, 1):
        details = scores.details[i] if scores.details else {}
        numbers = [_number(details.get(part, math.nan)) for part in parts]
        why = [errors[i] or ""] if errors else []
        rows.append(
            [str(rank), str(i), _number(scores.values[i].item()), *numbers, prompts[i], *why]
        )
    return align_columns(rows, 3 + len(parts))


def summary(scores: Scores, order: Sequence[int]) -> str:
    """The scores in one line.

    Args:
        order: the images' numbers, best first.
    """
    known = scores.values[scores.values.isfinite()]
    count, best = len(scores.values), order[0]
    if count == 1:
        return f"score {_number(known[0].item())}"
    line = f"best: image {best} with {_number(scores.values[best].item())}; mean "
    line += f"{_number(known.mean().item())} of {len(known)} images"
    failed = count - len(known)
    return f"{line}; {failed} could not be scored" if failed else line


def part_names(scores: Scores) -> list[str]:
    """The names of a score's parts."""
    found = dict.fromkeys(name for detail in scores.details for name in detail)
    return [name for name in found if name != "score"]


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else NONE


def sheet(
    pixels: Images,
    scores: Scores,
    order: Sequence[int],
    parts: Sequence[str] = (),
) -> Float[Tensor, "1 height width 3"]:
    """A batch with its scores as one image, best first.

    Returns:
        The sheet, 0 to 1.
    """
    details = scores.details or ({},) * len(pixels)
    lines = [{part: detail.get(part, math.nan) for part in parts} for detail in details]
    drawn = contact_sheet(pictures_of(pixels), scores.values.tolist(), order, lines)
    return torch.from_numpy(np.asarray(drawn).astype(np.float32) / 255)[None]
