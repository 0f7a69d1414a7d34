"""The judge of scenes against pictures whose content is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comfyui_pcpo.pcpo import scenes
from comfyui_pcpo.pcpo.rewards import load_reward
from comfyui_pcpo.pcpo.rewards.scene import SceneReward, Seen, judge, look
from comfyui_pcpo.pcpo.scenes import RELATIONS, Scene, parse
from hypothesis import given
from hypothesis import strategies as st
from scenes_fixture import canonical
from torch import Tensor

MIDDLES = np.arange(64) + 0.5
LEFT, RIGHT, TOP = (16.0, 32.0), (48.0, 32.0), (32.0, 13.0)
PROMPT = "a red circle left of a blue square"

Painted = tuple[str, str, tuple[float, float], float]  # colour, shape, centre and size in px


def paint(*things: Painted, ground: int = 235) -> np.ndarray:
    picture = np.full((64, 64, 3), float(ground))
    for colour, shape, centre, size in things:
        alpha = scenes.coverage(shape, centre, size, MIDDLES, MIDDLES)[..., None]
        picture += alpha * (np.array(scenes.COLOURS[colour]) - picture)
    return np.rint(picture).astype(np.uint8)


def batch(*pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def score_of(picture: np.ndarray, prompt: str) -> dict[str, float]:
    scores = SceneReward().score(batch(picture), [prompt])
    assert scores.values.item() == pytest.approx(scores.details[0]["score"])
    return dict(scores.details[0])


@pytest.fixture(scope="module")
def drawings() -> tuple[Tensor, list[str]]:
    """600 clean drawings, every thing alone among them, in all words of the grammar."""
    rng = np.random.default_rng(11)
    single, double = scenes.all_scenes()[:24], scenes.all_scenes()[24:]
    chosen = [*single * 3, *(double[i] for i in rng.permutation(len(double))[:528])]
    prompts = [scenes.describe(scenes.either_way(scene, rng), rng) for scene in chosen]
    return batch(*(scenes.draw(scene, rng) for scene in chosen)), prompts


def exactly_right(images: Tensor, prompts: list[str]) -> float:
    return (SceneReward().score(images, prompts).values > 0.9999).float().mean().item()


# --- drawings ------------------------------------------------------------------------------------


def test_clean_drawings_are_exactly_right(drawings):
    assert exactly_right(*drawings) >= 0.99


def test_drawings_of_something_else_are_not(drawings):
    images, prompts = drawings
    others = prompts[1:] + prompts[:1]
    same = [
        canonical(parse(a)) == canonical(parse(b)) for a, b in zip(prompts, others, strict=True)
    ]
    scores = SceneReward().score(images[::4], others[::4])
    assert ((scores.values > 0.9999) == torch.tensor(same[::4])).float().mean() >= 0.99


def test_blurred_drawings_are_still_right(drawings):
    images, prompts = drawings[0][::3], drawings[1][::3]
    kernel = torch.exp(-(torch.arange(-5.0, 6.0) ** 2) / (2 * 1.5**2))  # sigma 1.5 px
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1, 1)
    blurred = F.pad(images.float(), (5,) * 4, mode="replicate")
    blurred = F.conv2d(F.conv2d(blurred, kernel, groups=3), kernel.mT, groups=3)
    assert exactly_right(blurred.round().clamp(0, 255).byte(), prompts) >= 0.97


def test_pure_noise_scores_nothing():
    rng = np.random.default_rng(5)
    uniform = rng.integers(0, 256, (60, 3, 64, 64))
    normal = (128 + 50 * rng.standard_normal((60, 3, 64, 64))).clip(0, 255)
    prompts = list(scenes.split().held_out[:60])
    for noise in (uniform, normal):
        values = SceneReward().score(torch.from_numpy(noise.astype(np.uint8)), prompts).values
        assert values.mean() < 0.05


@pytest.mark.parametrize("grey", [0, 30, 128, 235, 255])
def test_an_empty_canvas_scores_nothing(grey):
    expected = {"score": 0, "colour": 0, "shape": 0, "relation": 0, "count": 0}
    assert score_of(paint(ground=grey), PROMPT) == expected
    assert score_of(paint(ground=grey), "a red circle") == expected


# --- what is wrong costs what it should ----------------------------------------------------------

CIRCLE: Painted = ("red", "circle", LEFT, 9)
SQUARE: Painted = ("blue", "square", RIGHT, 9)


@pytest.mark.parametrize("ground", [20, 235])
@pytest.mark.parametrize(
    ("things", "score", "colour", "shape", "relation"),
    [
        pytest.param([CIRCLE, SQUARE], 1, 1, 1, 1, id="right"),
        pytest.param([("green", *CIRCLE[1:]), SQUARE], 0.75, 0.5, 1, 1, id="one wrong colour"),
        pytest.param([("red", "cross", LEFT, 9), SQUARE], 0.75, 1, 0.5, 1, id="one wrong shape"),
        pytest.param(
            [("red", "cross", LEFT, 9), ("blue", "triangle", RIGHT, 9)], 0.5, 1, 0, 1,
            id="both shapes wrong",
        ),
        pytest.param(
            [("green", "circle", LEFT, 9), ("cyan", "square", RIGHT, 9)], 0.5, 0, 1, 1,
            id="both colours wrong",
        ),
        pytest.param(
            [("blue", "circle", LEFT, 9), ("red", "square", RIGHT, 9)], 0.5, 0, 1, 1,
            id="colours exchanged",
        ),
        pytest.param(
            [("red", "circle", RIGHT, 9), ("blue", "square", LEFT, 9)], 0.7, 1, 1, 0,
            id="relation swapped",
        ),
        pytest.param(
            [("red", "circle", TOP, 9), ("blue", "square", (32, 50), 9)], 0.7, 1, 1, 0,
            id="above instead of left",
        ),
        pytest.param(
            [("green", "circle", RIGHT, 9), ("blue", "square", LEFT, 9)], 0.525, 0.5, 1, 0,
            id="relation swapped and one wrong colour",
        ),
        pytest.param([CIRCLE], 0.35, 0.5, 0.5, 0, id="second missing"),
        pytest.param([SQUARE], 0.35, 0.5, 0.5, 0, id="first missing"),
        pytest.param(
            [CIRCLE, SQUARE, ("green", "cross", TOP, 8)], 2 / 3, 1, 1, 1, id="one too many"
        ),
        pytest.param(
            [CIRCLE, SQUARE, ("green", "cross", TOP, 8), ("cyan", "circle", (32, 52), 8)],
            0.5, 1, 1, 1, id="two too many",
        ),
        pytest.param([("green", "cross", TOP, 9)], 0, 0, 0, 0, id="something else"),
    ],
)  # fmt: skip
def test_two_things(things, score, colour, shape, relation, ground):
    parts = score_of(paint(*things, ground=ground), PROMPT)
    assert parts.pop("score") == pytest.approx(score)
    assert parts == {"colour": colour, "shape": shape, "relation": relation, "count": len(things)}


@pytest.mark.parametrize(
    ("things", "score", "colour", "shape"),
    [
        pytest.param([CIRCLE], 1, 1, 1, id="right"),
        pytest.param([("green", *CIRCLE[1:])], 0.5, 0, 1, id="wrong colour"),
        pytest.param([("red", "square", LEFT, 9)], 0.5, 1, 0, id="wrong shape"),
        pytest.param([SQUARE], 0, 0, 0, id="something else"),
        pytest.param([CIRCLE, SQUARE], 0.5, 1, 1, id="one too many"),
        pytest.param([CIRCLE, ("red", "circle", RIGHT, 9)], 0.5, 1, 0, id="two red blobs"),
    ],
)
def test_one_thing(things, score, colour, shape):
    parts = score_of(paint(*things), "a red circle")
    assert (parts["score"], parts["colour"], parts["shape"]) == (score, colour, shape)
    assert parts["relation"] == 0 and parts["count"] == len({colour for colour, *_ in things})


@pytest.mark.parametrize("relation", list(RELATIONS))
def test_each_relation_is_told_from_the_others(relation):
    offset = 16 * np.array(RELATIONS[relation])
    first, second = ((float(32 + s * offset[0]), float(32 + s * offset[1])) for s in (1, -1))
    picture = paint(("red", "circle", first, 8), ("blue", "square", second, 8))
    for asked in RELATIONS:
        words = scenes.RELATION_WORDS[asked][0]
        parts = score_of(picture, f"a red circle {words} a blue square")
        assert parts["score"] == pytest.approx(1 if asked == relation else 0.7)
        assert parts["relation"] == (asked == relation)


def seen_of(scene: Scene) -> list[Seen]:
    direction = RELATIONS[scene.relation] if scene.relation else (0, 0)
    centres = [(32 + s * 15 * direction[0], 32 + s * 15 * direction[1]) for s in (1, -1)]
    return [
        Seen(thing.colour, thing.shape, centre, 250)
        for thing, centre in zip(scene.things, centres, strict=False)
    ]


some_scene = st.sampled_from(scenes.all_scenes())


@given(some_scene, some_scene, st.booleans())
def test_only_the_right_content_is_worth_one(asked, shown, backwards):
    seen = seen_of(shown)[:: -1 if backwards else 1]
    parts = judge(asked, seen)
    assert (parts["score"] > 0.9999) == (asked == shown)
    assert 0 <= parts["score"] <= 1
    assert judge(shown, seen)["score"] == 1


@given(
    some_scene,
    st.lists(
        st.builds(
            Seen,
            st.sampled_from(list(scenes.COLOURS)),
            st.sampled_from([*scenes.SHAPES, None]),
            st.tuples(st.floats(0, 64), st.floats(0, 64)),
            st.integers(60, 4096),
        ),
        max_size=4,
    ),
)
def test_score_is_bounded_and_made_of_its_parts(scene, seen):
    parts = judge(scene, seen)
    assert set(parts) == {"score", "colour", "shape", "relation", "count"}
    share = (parts["colour"] + parts["shape"]) / 2
    if scene.relation:
        share *= 0.7 + 0.3 * parts["relation"]
    share *= min(1, len(scene.things) / max(1, len(seen)))
    low, high = SceneReward.bounds
    assert low <= parts["score"] <= high
    assert parts["score"] == pytest.approx(share) and parts["count"] == len(seen)


# --- looking -------------------------------------------------------------------------------------


def test_look_finds_colours_shapes_and_places():
    things = [("red", "circle", (17.3, 20.6), 9.5), ("cyan", "triangle", (45.2, 41.0), 10.0)]
    (seen,) = look(paint(*things)[None])
    found = {s.colour: s for s in seen}
    assert set(found) == {"red", "cyan"}
    for colour, shape, centre, size in things:
        assert found[colour].shape == shape
        assert found[colour].centre == pytest.approx(centre, abs=0.3)
        assert found[colour].area == pytest.approx(math.pi * size**2, rel=0.1)


def test_specks_and_thin_lines_are_not_things():
    right = paint(CIRCLE, SQUARE, ("green", "circle", TOP, 4))  # 50 px
    assert score_of(right, PROMPT)["score"] == 1
    lines = paint(CIRCLE, SQUARE)
    lines[2:4], lines[60:62] = scenes.COLOURS["green"], scenes.COLOURS["yellow"]
    assert score_of(lines, PROMPT) == score_of(paint(CIRCLE, SQUARE), PROMPT)
    larger = paint(CIRCLE, SQUARE, ("green", "circle", TOP, 5))  # 79 px
    assert score_of(larger, PROMPT)["count"] == 3


def test_a_blob_without_a_shape_has_a_colour_only():
    picture = paint()
    picture[30:36, 6:58] = scenes.COLOURS["red"]  # a bar
    for shape in scenes.SHAPES:
        parts = score_of(picture, f"a red {shape}")
        assert (parts["score"], parts["colour"], parts["shape"]) == (0.5, 1, 0)


# --- a batch -------------------------------------------------------------------------------------


def test_each_picture_is_judged_by_its_own_prompt(drawings):
    images, prompts = drawings[0][60:84], drawings[1][60:84]
    mixed = [prompts[i] if i % 3 else prompts[i - 1] for i in range(24)]
    whole = SceneReward().score(images, mixed)
    assert len(whole.values.unique()) > 2
    backwards = SceneReward().score(images.flip(0), mixed[::-1])
    torch.testing.assert_close(backwards.values.flip(0), whole.values)
    alone = [SceneReward().score(images[i : i + 1], mixed[i : i + 1]) for i in range(24)]
    torch.testing.assert_close(torch.cat([a.values for a in alone]), whole.values)
    assert [dict(a.details[0]) for a in alone] == [dict(d) for d in whole.details]


def test_a_prompt_outside_the_grammar_gives_nan_and_the_reason():
    picture = paint(CIRCLE, SQUARE)
    prompts = [PROMPT, "a photo of a cat", "a red circle left of a crimson box", PROMPT.upper()]
    scores = SceneReward().score(batch(*[picture] * 4), prompts)
    assert scores.values.isnan().tolist() == [False, True, True, False]
    assert scores.values[[0, 3]].tolist() == [1, 1]
    assert scores.errors[0] is None and scores.errors[3] is None
    assert "'a photo of a cat'" in str(scores.errors[1]) and "a COLOUR SHAPE" in scores.errors[1]
    assert "give them two colours" in str(scores.errors[2])
    assert ["score" in d for d in scores.details] == [True, False, False, True]


def test_reward_is_what_the_table_promises():
    reward = load_reward("scene")
    assert isinstance(reward, SceneReward)
    assert (reward.name, reward.needs_prompt, reward.bounds) == ("scene", True, (0.0, 1.0))
    images = batch(paint(CIRCLE, SQUARE))
    before = images.clone()
    values = reward.score(images, [PROMPT]).values
    assert values.dtype == torch.float32 and values.shape == (1,) and values.device.type == "cpu"
    assert (images == before).all()
    with pytest.raises(ValueError):
        reward.score(images, [PROMPT, PROMPT])
