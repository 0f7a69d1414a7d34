"""The demo's world: pictures of one or two coloured shapes, and the sentences that describe them.

A picture is 64x64 RGB, 8 bits per channel, shape (h, w, 3); x runs right and y runs down, in px.
All randomness comes from a `numpy.random.Generator`, so a seed fixes a drawing. A sentence reads

    a COLOUR SHAPE                                  "a red circle"
    a COLOUR SHAPE RELATION a COLOUR SHAPE          "a red circle to the left of an azure box"

where colours, shapes and relations have synonyms. The two things of a scene differ in colour, so
that they can be told apart even if a model paints them touching.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import pi, sqrt

import numpy as np
from numpy.typing import NDArray

SIZE = 64
"""Width and height of a picture in px."""

Field = NDArray[np.float64]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (160, 50, 190),
    "cyan": (40, 200, 210),
}
RELATIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
"""Where the first thing lies, seen from the second: (x, y)."""

OPPOSITES = {"left": "right", "right": "left", "above": "below", "below": "above"}

COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson", "scarlet"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "yellow": ("yellow", "golden"),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
}
SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle", "pyramid"),
    "cross": ("cross", "plus"),
}
RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}


@dataclass(frozen=True, slots=True)
class Thing:
    """One coloured shape: keys of `SHAPES` and of `COLOURS`."""

    shape: str
    colour: str

    def __post_init__(self) -> None:
        if self.shape not in SHAPES or self.colour not in COLOURS:
            raise ValueError(
                f"there is no {self.colour} {self.shape}; colours are {', '.join(COLOURS)}, "
                f"shapes are {', '.join(SHAPES)}"
            )


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of a picture.

    Attributes:
        things: one thing, or two of different colours.
        relation: where the first of two things lies, a key of `RELATIONS`; None with one thing.
    """

    things: tuple[Thing, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        if len(self.things) not in (1, 2):
            raise ValueError(f"a scene has one or two things, not {len(self.things)}")
        if (len(self.things) == 2) != (self.relation is not None):
            raise ValueError("two things need a relation, and one thing has none")
        if self.relation is not None and self.relation not in RELATIONS:
            raise ValueError(f"no relation {self.relation!r}; choose of {', '.join(RELATIONS)}")
        if len({thing.colour for thing in self.things}) < len(self.things):
            raise ValueError(f"both things are {self.things[0].colour}; give them two colours")


# --- sentences ------------------------------------------------------------------------------


def _meanings(words: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {word: meaning for meaning, synonyms in words.items() for word in synonyms}


@cache
def _grammar() -> re.Pattern[str]:
    def either(words: dict[str, tuple[str, ...]]) -> str:
        return "(" + "|".join(re.escape(word) for word in _meanings(words)) + ")"

    thing = rf"an? {either(COLOUR_WORDS)} {either(SHAPE_WORDS)}"
    return re.compile(rf"{thing}(?: {either(RELATION_WORDS)} {thing})?")


def parse(prompt: str) -> Scene:
    """The scene that a sentence of the grammar describes, in the sentence's own order.

    Args:
        prompt: the sentence; capitals, outer blanks and a final full stop do not matter.

    Raises:
        ValueError: if the sentence is not of the grammar.

    >>> parse("a crimson ball on top of an azure box").relation
    'above'
    """
    match = _grammar().fullmatch(" ".join(prompt.lower().rstrip(" .").split()))
    if not match:
        raise ValueError(
            f"cannot read {prompt!r}; write 'a COLOUR SHAPE' or 'a COLOUR SHAPE RELATION a COLOUR "
            f"SHAPE' with colours {', '.join(_meanings(COLOUR_WORDS))}; shapes "
            f"{', '.join(_meanings(SHAPE_WORDS))}; relations {', '.join(_meanings(RELATION_WORDS))}"
        )
    colour, shape, relation, colour_2, shape_2 = match.groups()
    things = [Thing(_meanings(SHAPE_WORDS)[shape], _meanings(COLOUR_WORDS)[colour])]
    if relation is None:
        return Scene(tuple(things))
    things.append(Thing(_meanings(SHAPE_WORDS)[shape_2], _meanings(COLOUR_WORDS)[colour_2]))
    return Scene(tuple(things), _meanings(RELATION_WORDS)[relation])


def describe(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """A sentence for a scene.

    Args:
        scene: what to describe, in its own order.
        rng: chooses among the synonyms; without it the plainest words are taken.

    Returns:
        A sentence that `parse` reads back as the same scene.

    >>> describe(parse("a scarlet disc under a golden plus"))
    'a red circle below a yellow cross'
    """

    def word(synonyms: tuple[str, ...]) -> str:
        return synonyms[rng.integers(len(synonyms)) if rng else 0]

    def phrase(thing: Thing) -> str:
        colour = word(COLOUR_WORDS[thing.colour])
        article = "an" if colour[0] in "aeiou" else "a"
        return f"{article} {colour} {word(SHAPE_WORDS[thing.shape])}"

    if scene.relation is None:
        return phrase(scene.things[0])
    first, second = map(phrase, scene.things)
    return f"{first} {word(RELATION_WORDS[scene.relation])} {second}"


def words() -> tuple[str, ...]:
    """Every word that a sentence of the grammar can hold, sorted."""
    tables = (COLOUR_WORDS, SHAPE_WORDS, RELATION_WORDS)
    phrases = [phrase for table in tables for phrase in _meanings(table)]
    return tuple(sorted({"a", "an"}.union(*(phrase.split() for phrase in phrases))))


# --- pictures -------------------------------------------------------------------------------
# A shape's `size` is the radius of the disc that covers the same area, so that shapes of one size
# differ in outline only. Each function gives the distance in px to the outline, negative inside
# (exact along the sides, an underestimate at corners), of points relative to the centroid.


def _circle(x: Field, y: Field, size: float) -> Field:
    return np.sqrt(x * x + y * y) - size


def _square(x: Field, y: Field, size: float) -> Field:
    return np.maximum(abs(x), abs(y)) - size * sqrt(pi) / 2


def _triangle(x: Field, y: Field, size: float) -> Field:
    inradius = size * sqrt(pi / sqrt(27))
    return np.maximum(sqrt(0.75) * abs(x) - 0.5 * y, y) - inradius


def _cross(x: Field, y: Field, size: float) -> Field:
    half_width = size * sqrt(pi / 20)  # arms three times as long as half their width
    x, y = abs(x), abs(y)
    along, across = np.maximum(x, y) - 3 * half_width, np.minimum(x, y) - half_width
    return np.maximum(along, across)


SHAPES: dict[str, Callable[[Field, Field, float], Field]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}
# How far a shape of size 1 reaches from its centroid: left and right, up, down.
_REACH = {
    "circle": (1.0, 1.0, 1.0),
    "square": (0.887, 0.887, 0.887),
    "triangle": (1.347, 1.556, 0.778),
    "cross": (1.189, 1.189, 1.189),
}


def coverage(
    shape: str, centre: tuple[float, float], size: float, x: Field, y: Field
) -> NDArray[np.float64]:
    """How much of each pixel a shape covers, from 0 to 1.

    Args:
        shape: a key of `SHAPES`.
        centre: its centroid (x, y) in px; the first pixel's middle is (0.5, 0.5).
        size: radius in px of the disc with the same area.
        x: the pixels' middles from left to right in px, shape (w,).
        y: the pixels' middles from top to bottom in px, shape (h,).

    Returns:
        The coverage, shape (h, w), antialiased over one px.
    """
    distance = SHAPES[shape](x[None, :] - centre[0], y[:, None] - centre[1], size)
    return np.clip(0.5 - distance, 0.0, 1.0)


def _place(scene: Scene, rng: np.random.Generator) -> tuple[list[tuple[float, float]], list[float]]:
    """Centres and sizes in px that show the relation and stay one px inside the picture."""
    if scene.relation is None:
        sizes = [rng.uniform(10, 15)]
        centres = [rng.uniform(22, 42, size=2)]
    else:
        sizes = list(rng.uniform(8, 10.5, size=2))
        direction = np.array(RELATIONS[scene.relation])
        offset = direction * rng.uniform(30, 34) + direction[::-1] * rng.uniform(-8, 8)
        middle = rng.uniform(28, 36, size=2)
        centres = [middle + offset / 2, middle - offset / 2]
    for i, (thing, size) in enumerate(zip(scene.things, sizes, strict=True)):
        side, up, down = (reach * size + 1 for reach in _REACH[thing.shape])
        low, high = (side, up), (SIZE - side, SIZE - down)
        centres[i] = np.clip(centres[i], low, high)
    return [(float(x), float(y)) for x, y in centres], sizes


def draw(
    scene: Scene, rng: np.random.Generator, *, is_light: bool | None = None
) -> NDArray[np.uint8]:
    """Draw a scene, antialiased, on a plain light or dark ground.

    Args:
        scene: what to draw.
        rng: chooses the ground, the places, the sizes and slight changes of the colours.
        is_light: whether the ground is light; random if None.

    Returns:
        The picture, 8-bit RGB, shape (64, 64, 3).
    """
    chosen = rng.random() < 0.5
    is_light = chosen if is_light is None else is_light
    grey = rng.uniform(220, 248) if is_light else rng.uniform(12, 40)
    picture = np.broadcast_to(grey + rng.uniform(-6, 6, size=3), (SIZE, SIZE, 3))
    middles: Field = np.arange(SIZE, dtype=np.float64) + 0.5
    centres, sizes = _place(scene, rng)
    for thing, centre, size in zip(scene.things, centres, sizes, strict=True):
        paint = np.array(COLOURS[thing.colour]) + rng.uniform(-10, 10, size=3)
        alpha = coverage(thing.shape, centre, size, middles, middles)[..., None]
        picture = picture + alpha * (paint - picture)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


# --- the split ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Split:
    """The scenes for each purpose; no sentence of one part describes a picture of another.

    Attributes:
        training: the scenes that the base model learns from, in canonical form.
        reinforcement: prompts to align the model with.
        held_out: prompts to measure with, seen neither in training nor in alignment.
    """

    training: tuple[Scene, ...]
    reinforcement: tuple[str, ...]
    held_out: tuple[str, ...]


def all_scenes() -> tuple[Scene, ...]:
    """Every distinct picture content in canonical form: 24 of one thing, then 960 of two."""
    things = [Thing(shape, colour) for shape in SHAPES for colour in COLOURS]
    single = [Scene((thing,)) for thing in things]
    double = [
        Scene((a, b), relation)
        for a, b in itertools.product(things, things)
        if a.colour != b.colour
        for relation in ("left", "above")
    ]
    return tuple(single + double)


@cache
def split() -> Split:
    """The fixed split: 64 held-out prompts, 128 for reinforcement, all other scenes for training.

    All scenes of one thing are in training: a model must have seen every shape and colour.
    """
    rng = np.random.default_rng(20260)
    scenes = all_scenes()
    single = [scene for scene in scenes if scene.relation is None]
    double = [scene for scene in scenes if scene.relation is not None]
    double = [double[i] for i in rng.permutation(len(double))]
    prompts = tuple(describe(either_way(scene, rng), rng) for scene in double[:192])
    return Split((*single, *double[192:]), prompts[64:], prompts[:64])


def either_way(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene, or in half of the cases the same picture described from its other thing."""
    if scene.relation is None or rng.random() < 0.5:
        return scene
    return Scene(scene.things[::-1], OPPOSITES[scene.relation])
