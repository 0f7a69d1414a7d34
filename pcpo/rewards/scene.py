"""A programmatic judge of the demo's scenes: a GenEval in miniature.

It reads coloured shapes back from the pixels and compares them with the prompt. Each pixel belongs
to the nearest of the palette's colours and the ground; what is left of a colour after thin rims are
removed is a thing; its shape is the one whose own drawing, of the same area and at the same
centroid, overlaps it best.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from .. import scenes
from ..pictures.tensors import Images
from ..scenes import RELATIONS, Scene, Thing
from ..scores import Scores
from .base import BatchReward

PALETTE = np.array(list(scenes.COLOURS.values()), dtype=np.float32)
NAMES = tuple(scenes.COLOURS)

MIN_AREA = 60
"""Smallest thing in pixels; the grammar's smallest has about 200."""

MIN_OVERLAP = 0.7
"""Smallest intersection over union with a shape's own drawing at which it counts as that shape."""

RELATION_SHARE = 0.3
"""Share of a two-thing score that the relation decides."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A thing seen in a picture.

    Attributes:
        colour: of the palette.
        shape: None if it looks like none.
        centre: its centroid (x, y) in pixels.
        area: in pixels.
    """

    colour: str
    shape: str | None
    centre: tuple[float, float]
    area: int


def colour_masks(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Masks (b, colours, h, w) of the palette's colours in pictures (b, h, w, 3).

    Rims two pixels thin are removed.
    """
    rgb = pixels.astype(np.float32)
    rim = np.concatenate(
        [rgb[:, :2].reshape(len(rgb), -1, 3), rgb[:, -2:].reshape(len(rgb), -1, 3)], axis=1
    )
    ground = np.median(rim, axis=1)[:, None, None, :]
    to_ground = ((rgb - ground) ** 2).sum(-1)
    to_palette = ((rgb[:, None] - PALETTE[None, :, None, None, :]) ** 2).sum(-1)
    nearest = to_palette.argmin(axis=1)
    is_thing = to_palette.min(axis=1) < to_ground
    masks = (nearest[:, None] == np.arange(len(PALETTE))[:, None, None]) & is_thing[:, None]
    return masks & _dilate(_erode(masks))


def _shifts(masks: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The masks, and the masks moved by one pixel in all eight directions, with False coming in."""
    height, width = masks.shape[-2:]
    padded = np.pad(masks, [(0, 0)] * (masks.ndim - 2) + [(1, 1), (1, 1)])
    return [padded[..., y : y + height, x : x + width] for y in range(3) for x in range(3)]


def _erode(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.logical_and.reduce(_shifts(masks))


def _dilate(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.logical_or.reduce(_shifts(masks))


def _shape_of(mask: NDArray[np.bool_], centre: tuple[float, float], area: int) -> str | None:
    """The shape whose drawing overlaps the mask best, None if none does well enough."""
    height, width = mask.shape
    x, y, size = np.arange(width) + 0.5, np.arange(height) + 0.5, (area / np.pi) ** 0.5
    overlaps = {}
    for shape in scenes.SHAPES:
        drawn = scenes.coverage(shape, centre, size, x, y) > 0.5
        overlaps[shape] = (mask & drawn).sum() / (mask | drawn).sum()
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= MIN_OVERLAP else None


def look(pixels: NDArray[np.uint8]) -> list[list[Seen]]:
    """The things in each picture (b, h, w, 3), at most one per colour."""
    things: list[list[Seen]] = [[] for _ in pixels]
    masks = colour_masks(pixels)
    areas = masks.sum((-2, -1))
    for i, c in zip(*np.nonzero(areas >= MIN_AREA), strict=True):
        mask, area = masks[i, c], int(areas[i, c])
        rows, columns = np.nonzero(mask)
        centre = (float(columns.mean()) + 0.5, float(rows.mean()) + 0.5)
        things[i].append(Seen(NAMES[c], _shape_of(mask, centre, area), centre, area))
    return things


def _holds(relation: str, first: Seen, second: Seen) -> bool:
    """Whether the first lies where the relation says, more so than in any other direction."""
    x, y = first.centre[0] - second.centre[0], first.centre[1] - second.centre[1]
    along = {name: x * dx + y * dy for name, (dx, dy) in RELATIONS.items()}
    return max(along, key=along.__getitem__) == relation


def judge(scene: Scene, seen: Sequence[Seen]) -> dict[str, float]:
    """Compare a picture with its scene.

    The score is the share of right colours and shapes; with two things, 30% of that share is given
    only if the relation holds. Surplus things divide it down.

    Returns:
        "score" and its parts "colour", "shape", "relation" (each in [0, 1]) and "count".
    """
    count = len(scene.things)
    empty: list[Seen | None] = [None] * count
    best = {"score": 0.0, "colour": 0.0, "shape": 0.0, "relation": 0.0, "count": float(len(seen))}
    for pick in itertools.permutations([*seen, *empty], count):
        colour = sum(_same_colour(t, s) for t, s in zip(scene.things, pick, strict=True)) / count
        shape = sum(_same_shape(t, s) for t, s in zip(scene.things, pick, strict=True)) / count
        relation = 0.0
        if scene.relation is not None and pick[0] is not None and pick[1] is not None:
            relation = float(_holds(scene.relation, pick[0], pick[1]))
        share = (colour + shape) / 2
        if scene.relation is not None:
            share *= 1 - RELATION_SHARE + RELATION_SHARE * relation
        score = share * min(1.0, count / max(1, len(seen)))
        if score > best["score"]:
            best |= {"score": score, "colour": colour, "shape": shape, "relation": relation}
    return best


def _same_colour(thing: Thing, seen: Seen | None) -> bool:
    return seen is not None and seen.colour == thing.colour


def _same_shape(thing: Thing, seen: Seen | None) -> bool:
    return seen is not None and seen.shape == thing.shape


class SceneReward(BatchReward):
    """How far a picture shows what its prompt says, 0 (nothing of it) to 1 (all of it)."""

    name: ClassVar[str] = "scene"
    needs_prompt: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    unit: ClassVar[str] = "share"

    def complaints(self, prompts: Sequence[str]) -> list[str | None]:
        return [_complaint(prompt) for prompt in prompts]

    def measure(self, images: Images, prompts: Sequence[str]) -> Scores:
        seen = look(images.permute(0, 2, 3, 1).cpu().numpy())
        details = [judge(scenes.parse(p), s) for p, s in zip(prompts, seen, strict=True)]
        values = torch.tensor([detail["score"] for detail in details], dtype=torch.float32)
        return Scores(values, tuple(details))


def _complaint(prompt: str) -> str | None:
    try:
        scenes.parse(prompt)
    except ValueError as error:
        return str(error)
    return None
