"""Scenes: what a sentence says is what the drawing shows, and the split keeps its parts apart."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from math import pi, sqrt

import numpy as np
import pytest
from comfyui_pcpo.pcpo import scenes
from comfyui_pcpo.pcpo.scenes import OPPOSITES, RELATIONS, Scene, Thing, describe, parse
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes_fixture import canonical

things = st.builds(
    Thing, st.sampled_from(list(scenes.SHAPES)), st.sampled_from(list(scenes.COLOURS))
)
pairs = st.tuples(things, things).filter(lambda pair: pair[0].colour != pair[1].colour)
any_scene = st.one_of(
    st.builds(lambda thing: Scene((thing,)), things),
    st.builds(Scene, pairs, st.sampled_from(list(RELATIONS))),
)
generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)


def told_from_the_other(scene: Scene) -> Scene:
    return Scene(scene.things[::-1], OPPOSITES[scene.relation]) if scene.relation else scene


# --- sentences -----------------------------------------------------------------------------------


def test_every_scene_is_read_back():
    told = [told_from_the_other(scene) for scene in scenes.all_scenes()]
    sentences = [describe(scene) for scene in (*scenes.all_scenes(), *told[24:])]
    assert [parse(s) for s in sentences] == [*scenes.all_scenes(), *told[24:]]
    assert len(set(sentences)) == 24 + 4 * 480


@given(any_scene, generators)
def test_every_choice_of_synonyms_is_read_back(scene, rng):
    sentence = describe(scene, rng)
    assert parse(sentence) == scene
    assert set(sentence.split()) <= set(scenes.words())


@pytest.mark.parametrize(
    ("sentence", "first", "relation", "second"),
    [
        ("a crimson disc to the left of an azure box", "red circle", "left", "blue square"),
        ("a scarlet ball on the right of a golden plus", "red circle", "right", "yellow cross"),
        ("an emerald pyramid over a violet square", "green triangle", "above", "purple square"),
        ("a turquoise cross on top of a red circle", "cyan cross", "above", "red circle"),
        ("a green triangle beneath a blue disc", "green triangle", "below", "blue circle"),
        ("a purple box under a yellow ball", "purple square", "below", "yellow circle"),
        ("a cyan plus left of a crimson pyramid", "cyan cross", "left", "red triangle"),
        ("a blue circle right of a green box", "blue circle", "right", "green square"),
        ("a red circle above a cyan disc", "red circle", "above", "cyan circle"),
        ("a red circle below a cyan disc", "red circle", "below", "cyan circle"),
        ("a red box on the left of a cyan disc", "red square", "left", "cyan circle"),
        ("a red plus to the right of a cyan disc", "red cross", "right", "cyan circle"),
    ],
)
def test_synonyms_mean_what_they_say(sentence, first, relation, second):
    expected = [Thing(*reversed(phrase.split())) for phrase in (first, second)]
    assert parse(sentence) == Scene(tuple(expected), relation)


def test_no_phrase_has_two_meanings():
    for table in (scenes.COLOUR_WORDS, scenes.SHAPE_WORDS, scenes.RELATION_WORDS):
        phrases = [phrase for synonyms in table.values() for phrase in synonyms]
        assert len(set(phrases)) == len(phrases)
    assert set(scenes.COLOUR_WORDS) == set(scenes.COLOURS)
    assert set(scenes.SHAPE_WORDS) == set(scenes.SHAPES)
    assert set(scenes.RELATION_WORDS) == set(RELATIONS)


def test_descriptions_use_every_word_and_the_right_article():
    rng = np.random.default_rng(0)
    told = [describe(scenes.either_way(scene, rng), rng).split() for scene in scenes.all_scenes()]
    assert {word for sentence in told for word in sentence} == set(scenes.words())
    for sentence in told:
        for article, noun in pairwise(sentence):
            if article in ("a", "an"):
                assert (article == "an") == (noun[0] in "aeiou")
    assert len(scenes.words()) == 36 and list(scenes.words()) == sorted(scenes.words())


def test_description_without_a_generator_is_the_plainest():
    scene = Scene((Thing("circle", "red"), Thing("square", "blue")), "left")
    assert describe(scene) == "a red circle left of a blue square"
    assert describe(Scene((Thing("cross", "cyan"),))) == "a cyan cross"


@pytest.mark.parametrize(
    "sentence",
    ["A Red Circle", "  a red circle ", "a  red\tcircle", "a red circle.", "an red disc"],
)
def test_spelling_that_does_not_matter(sentence):
    assert parse(sentence) == Scene((Thing("circle", "red"),))


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "a",
        "red circle",
        "a red",
        "a circle",
        "a pink circle",
        "a red hexagon",
        "a red circles",
        "a circle red",
        "a red circle a blue square",
        "a red circle inside a blue square",
        "a red circle left a blue square",
        "a red circle left of blue square",
        "a red circle left of a blue square above a green cross",
        "a photo of a red circle",
        "a red circle, blurred",
    ],
)
def test_what_is_not_of_the_grammar_is_refused_with_the_grammar(sentence):
    with pytest.raises(ValueError) as refused:
        parse(sentence)
    message = str(refused.value)
    assert repr(sentence) in message and "a COLOUR SHAPE RELATION a COLOUR SHAPE" in message
    for table in (scenes.COLOUR_WORDS, scenes.SHAPE_WORDS, scenes.RELATION_WORDS):
        assert all(phrase in message for synonyms in table.values() for phrase in synonyms)


def test_scenes_that_cannot_be_drawn_are_refused():
    red, blue, green = (Thing("circle", colour) for colour in ("red", "blue", "green"))
    with pytest.raises(ValueError, match=r"no red hexagon; colours are red, .*shapes are circle"):
        Thing("hexagon", "red")
    with pytest.raises(ValueError, match="no pink circle"):
        Thing("circle", "pink")
    for several in ((), (red, blue, green)):
        with pytest.raises(ValueError, match=f"one or two things, not {len(several)}"):
            Scene(several)
    for few, relation in (((red, blue), None), ((red,), "left")):
        with pytest.raises(ValueError, match="two things need a relation, and one thing has none"):
            Scene(few, relation)
    with pytest.raises(ValueError, match="no relation 'inside'; choose of left, right"):
        Scene((red, blue), "inside")
    with pytest.raises(ValueError, match="both things are red; give them two colours"):
        parse("a red circle left of a crimson box")


@given(any_scene)
def test_canonical_is_the_same_picture(scene):
    plain = canonical(scene)
    assert plain.relation in (None, "left", "above")
    assert canonical(plain) == plain == canonical(told_from_the_other(scene))
    assert plain in (scene, told_from_the_other(scene))
    assert plain in set(scenes.all_scenes())


def test_either_way_tells_the_same_picture_both_ways():
    rng = np.random.default_rng(1)
    told = [scenes.either_way(scene, rng) for scene in scenes.all_scenes()]
    assert [canonical(scene) for scene in told] == list(scenes.all_scenes())
    kept = sum(a == b for a, b in zip(told[24:], scenes.all_scenes()[24:], strict=True))
    assert 420 < kept < 540  # of 960; +-4 standard deviations are 62


# --- the split -----------------------------------------------------------------------------------


def test_split_is_a_partition_of_all_pictures():
    split = scenes.split()
    assert (len(split.held_out), len(split.reinforcement), len(split.training)) == (64, 128, 792)
    parts = [
        split.training,
        [canonical(parse(prompt)) for prompt in split.reinforcement],
        [canonical(parse(prompt)) for prompt in split.held_out],
    ]
    everything = [scene for part in parts for scene in part]
    assert len(set(everything)) == len(everything) == 984
    assert set(everything) == set(scenes.all_scenes())
    assert all(scene == canonical(scene) for scene in split.training)


def test_split_trains_each_thing_alone_and_asks_for_all_of_them():
    split = scenes.split()
    assert sum(scene.relation is None for scene in split.training) == 24
    for prompts in (split.held_out, split.reinforcement):
        asked = [parse(prompt) for prompt in prompts]
        assert {scene.relation for scene in asked} == set(RELATIONS)
        assert {thing.colour for scene in asked for thing in scene.things} == set(scenes.COLOURS)
        assert {thing.shape for scene in asked for thing in scene.things} == set(scenes.SHAPES)


def test_split_is_the_one_that_the_shipped_model_was_trained_with():
    split = scenes.split()
    assert split == scenes.split.__wrapped__()  # not only cached: made the same again
    training = [describe(scene) for scene in split.training]
    text = "\n".join([*split.held_out, *split.reinforcement, *training])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "d5c12ffb2929a4f7"


# --- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", list(scenes.SHAPES))
@pytest.mark.parametrize("size", [8.0, 11.3, 15.0])
def test_shape_has_its_area_and_its_centroid(shape, size):
    middles = np.arange(64) + 0.5
    cover = scenes.coverage(shape, (31.7, 33.2), size, middles, middles)
    assert cover.shape == (64, 64) and cover.min() == 0 and cover.max() == 1
    assert cover.sum() == pytest.approx(pi * size**2, rel=0.01)
    assert (cover.sum(0) @ middles) / cover.sum() == pytest.approx(31.7, abs=0.05)
    assert (cover.sum(1) @ middles) / cover.sum() == pytest.approx(33.2, abs=0.05)
    left, up, down = (reach * size for reach in scenes._REACH[shape])
    columns, rows = np.nonzero(cover.sum(0))[0], np.nonzero(cover.sum(1))[0]
    assert 31.7 - columns[0] == pytest.approx(left, abs=1.5)
    assert columns[-1] + 1 - 31.7 == pytest.approx(left, abs=1.5)
    assert 33.2 - rows[0] == pytest.approx(up, abs=1.5)
    assert rows[-1] + 1 - 33.2 == pytest.approx(down, abs=1.5)


def test_shapes_look_like_their_names():
    middles = np.arange(64) + 0.5
    filled = {
        shape: scenes.coverage(shape, (32, 32), 12, middles, middles) > 0.5
        for shape in scenes.SHAPES
    }
    for shape, mask in filled.items():
        assert (mask == mask[:, ::-1]).all(), shape
        assert (mask == mask[::-1]).all() == (shape != "triangle")
    widths = {shape: mask.sum(1)[mask.any(1)] for shape, mask in filled.items()}
    assert len(set(widths["square"])) == 1
    assert (np.diff(widths["triangle"]) >= 0).all() and widths["triangle"][0] <= 2  # points up
    assert sorted(set(widths["cross"])) == [10, 28]  # 3.17 and 9.5 px to each side
    radii = np.hypot(*(np.argwhere(filled["circle"]) + 0.5 - 32).T)
    assert radii.max() < 12.5 and filled["circle"].sum() == pytest.approx(pi * 144, rel=0.01)


@dataclass
class Measured:
    """A drawn thing: its centroid in px and the radius of the disc of its area."""

    centre: np.ndarray
    size: float


def measure(picture: np.ndarray, scene: Scene) -> list[Measured]:
    """Measure a drawing without the code that drew it: its ground is known at its corner."""
    pixels, ground = picture.astype(float), picture[0, 0].astype(float)
    y, x = np.mgrid[:64, :64] + 0.5
    full = [(abs(pixels - scenes.COLOURS[thing.colour]).max(-1) <= 10.51) for thing in scene.things]
    middles = [np.array([x[mask].mean(), y[mask].mean()]) for mask in full]
    away = np.array([np.hypot(x - m[0], y - m[1]) for m in middles])
    found = []
    for i, mask in enumerate(full):
        paint = pixels[mask].mean(0) - ground
        alpha = np.clip((pixels - ground) @ paint / (paint @ paint), 0, 1)
        alpha = alpha * (away.argmin(0) == i)
        area = alpha.sum()
        centre = np.array([(alpha * x).sum(), (alpha * y).sum()]) / area
        found.append(Measured(centre, sqrt(area / pi)))
    return found


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Scene, np.ndarray, list[Measured]]]:
    rng = np.random.default_rng(7)
    single, double = scenes.all_scenes()[:24], scenes.all_scenes()[24:]
    chosen = [*single * 4, *(double[i] for i in rng.permutation(len(double))[:200])]
    chosen = [scenes.either_way(scene, rng) for scene in chosen]
    pictures = [scenes.draw(scene, rng) for scene in chosen]
    return [(s, p, measure(p, s)) for s, p in zip(chosen, pictures, strict=True)]


def test_a_seed_fixes_the_drawing():
    scene = parse("a red circle above a blue cross")
    first, again, other = (scenes.draw(scene, np.random.default_rng(s)) for s in (3, 3, 4))
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert (first == again).all() and (first != other).any()


def test_relation_is_visible(drawn):
    for scene, _, found in drawn:
        if scene.relation is None:
            continue
        apart = found[0].centre - found[1].centre
        direction = np.array(RELATIONS[scene.relation])
        along, across = apart @ direction, abs(apart @ direction[::-1])
        assert along > 25 and along > 2 * across, (scene, apart)


def test_sizes_are_the_documented_ones(drawn):
    alone = [m.size for scene, _, found in drawn for m in found if scene.relation is None]
    paired = [m.size for scene, _, found in drawn for m in found if scene.relation]
    for sizes, low, high in ((alone, 10, 15), (paired, 8, 10.5)):
        assert low - 0.15 < min(sizes) < low + 0.3 and high - 0.3 < max(sizes) < high + 0.15
        assert np.mean(sizes) == pytest.approx((low + high) / 2, abs=0.35)


def test_things_stay_inside_and_move_about(drawn):
    for scene, picture, _ in drawn:
        rim = np.concatenate([picture[[0, -1]].reshape(-1, 3), picture[:, [0, -1]].reshape(-1, 3)])
        painted = abs(rim - picture[0, 0].astype(float)).max()
        assert painted <= 60, scene  # less than a third: a tip's antialiasing, no outline
    centres = np.array([found[0].centre for scene, _, found in drawn if scene.relation is None])
    assert (centres > 21.8).all() and (centres < 42.2).all()
    assert (centres.std(0) > 4).all()  # uniform over 20 px has 5.8


def test_grounds_are_plain_light_or_dark(drawn):
    grounds = np.array([picture[0, 0] for _, picture, _ in drawn], dtype=float)
    light = grounds.mean(-1) > 127
    assert 0.35 < light.mean() < 0.65
    assert grounds[light].min() >= 214 and grounds[~light].max() <= 46
    assert np.ptp(grounds, axis=-1).max() <= 12


def test_ground_can_be_chosen():
    scene = parse("a red circle above a blue cross")
    for seed in range(6):
        free, light, dark = (
            scenes.draw(scene, np.random.default_rng(seed), is_light=is_light)
            for is_light in (None, True, False)
        )
        assert light[0, 0].min() >= 214 and dark[0, 0].max() <= 46
        assert (free == (light if free[0, 0, 0] > 127 else dark)).all()


@settings(max_examples=30, deadline=None)
@given(any_scene, generators)
def test_colours_keep_near_the_palette(scene, rng):
    picture = scenes.draw(scene, rng)
    for thing in scene.things:
        near = abs(picture.astype(float) - scenes.COLOURS[thing.colour]).max(-1) <= 10.51
        assert near.sum() > 0.5 * pi * 8**2  # the smallest thing's inside, without its outline
