"""PCPO Compare Models without ComfyUI: its numbers by hand, its grid, and what it refuses."""

from __future__ import annotations

import math
import types

import comfy_api_fixture
import pytest
import torch
from comfyui_pcpo.nodes.compare import draw as compare_draw
from comfyui_pcpo.nodes.compare import nodes as compare
from comfyui_pcpo.nodes.compare import numbers as compare_numbers
from comfyui_pcpo.nodes.compare import sides as compare_sides
from comfyui_pcpo.nodes.errors import NodeError
from comfyui_pcpo.pcpo.pictures.contact_sheet import BEST, MAX_WIDTH, MIN_TILE
from comfyui_pcpo.pcpo.rewards import BatchReward, Scores, WeightedSum
from comfyui_pcpo.pcpo.statistics import bootstrap, win_rate
from PIL import ImageColor

NAN = math.nan


class Brightness(BatchReward):
    """The mean level of the pixels; it cannot judge by one of the prompts."""

    name, needs_prompt = "brightness", True

    def measure(self, images, prompts):
        return Scores(images.float().mean((1, 2, 3)))

    def complaints(self, prompts):
        return ["it is too dark" if prompt == "night" else None for prompt in prompts]


# --- numbers -------------------------------------------------------------------------------------


def test_prompts_are_what_the_bootstrap_draws():
    one = torch.tensor([[1.0, 3.0], [5.0, 5.0], [0.0, 2.0]])
    other = torch.tensor([[2.0, 3.0], [4.0, 8.0], [4.0, 3.0]])
    line = compare_numbers.compare("score", torch.stack([one, other]))
    assert line.means == pytest.approx((16 / 6, 24 / 6)) and line.difference == pytest.approx(8 / 6)
    assert line.interval == pytest.approx(bootstrap([0.5, 1.0, 2.5]))  # of prompts, not of pairs
    assert (line.wins.won, line.wins.lost, line.wins.tied) == (4, 1, 1)
    assert line.wins.rate == win_rate(4, 1, 1)


def test_of_one_prompt_it_draws_seeds():
    line = compare_numbers.compare("score", torch.tensor([[[1.0, 2.0, 3.0]], [[2.0, 2.0, 7.0]]]))
    assert line.interval == pytest.approx(bootstrap([1.0, 0.0, 4.0]))
    only = compare_numbers.compare("score", torch.tensor([[[1.0]], [[2.0]]]))
    assert only.interval is None and only.means == (1.0, 2.0)


def test_an_image_without_a_score_takes_its_partner_along():
    one = torch.tensor([[1.0, NAN], [NAN, NAN], [2.0, 4.0]])
    other = torch.tensor([[2.0, 9.0], [1.0, 1.0], [2.0, NAN]])
    line = compare_numbers.compare("score", torch.stack([one, other]))
    assert line.means == (1.5, 2.0) and line.interval == pytest.approx(bootstrap([1.0, 0.0]))
    assert (line.wins.won, line.wins.lost, line.wins.tied) == (1, 0, 1)
    assert compare_numbers.compare("score", torch.full((2, 1, 3), NAN)) is None


def test_diversity_is_of_images_that_both_sides_have():
    pixels = torch.zeros(2, 2, 3, 3, 16, 16, dtype=torch.uint8)
    pixels[1, :, 1] = 51  # B's second image is 0.2 lighter; its pairs are 0.2, 0 and 0.2 apart
    known = torch.ones(2, 2, 3, dtype=torch.bool)
    by_pixels, by_ssim = compare_numbers.diversities(pixels, known)
    assert by_pixels.means == pytest.approx((0.0, 0.4 / 3)) and by_pixels.wins is None
    assert by_ssim.means[0] == pytest.approx(0) and by_ssim.difference > 0
    known[0, :, 1] = False
    assert compare_numbers.diversities(pixels, known)[0].means == pytest.approx((0.0, 0.0))
    known[0, :, 2] = False
    assert compare_numbers.diversities(pixels, known) == []


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ([3.0, 4.0, 6.0], "B (tuned) scores higher than A (base): B - A in score is +2.333 (95%: "),
        ([0.0, 1.0, 0.5], "A (base) scores higher than B (tuned): B - A in score is -1.5 (95%: "),
        (
            [0.0, 4.0, 3.0],
            "B (tuned) and A (base) cannot be told apart: B - A in score",
        ),
    ],
)
def test_the_verdict_follows_the_interval(other, words):
    values = torch.tensor([[[1.0], [2.0], [3.0]], [[x] for x in other]])
    lines = [compare_numbers.compare("score", values)]
    said = compare_numbers.verdict(lines, ("base", "tuned"))
    assert said.startswith(words)
    for low, high, told in ((-2.0, -1.0, "less diverse"), (1.0, 2.0, "more diverse")):
        line = compare_numbers.Line("pixel diversity", (0.5, 0.2), (low, high))
        assert f" B is {told}: " in compare_numbers.verdict([*lines, line], ("base", "tuned"))
    line = compare_numbers.Line("pixel diversity", (0.5, 0.2), (-1.0, 1.0))
    assert compare_numbers.verdict([*lines, line], ("base", "tuned")) == said


def test_one_pair_is_no_verdict():
    line = compare_numbers.compare("score", torch.tensor([[[1.0]], [[2.0]]]))
    said = compare_numbers.verdict([line], ("base", "tuned"))
    expected = "B - A in score is +1, and one pair tells nothing yet. B wins 1 of 1 pairs"
    assert said.startswith(expected)


def test_the_table_has_all_of_it_as_markdown():
    scores = torch.tensor([[[1.0, 2.0], [3.0, NAN]], [[2.0, 2.0], [4.0, 5.0]]])
    lines = [compare_numbers.compare("score", scores)]
    errors = (None, None, None, "it is black", None, None, None, None)
    told = compare_numbers.table(("base", "lora"), lines, ("a | b", "c"), scores, errors)
    overall, by_prompt = (part.splitlines() for part in told.split("\n\n")[1:3])
    assert {len(line) for line in overall} == {len(overall[0])}  # aligned
    assert [cell.strip() for cell in overall[0].split("|")[2:5]] == ["A: base", "B: lora", "B - A"]
    assert [cell.strip() for cell in overall[2].split("|")[1:5]] == ["score", "2.25", "3", "+0.75"]
    assert by_prompt[2].startswith(r"| a \| b |") and "1 of 2 pairs, 1 being equal" in by_prompt[2]
    assert "1 of 8 images have no score" in told and "#1 of prompt 2 of A: it is black" in told
    assert compare_numbers.NO_DIVERSITY in told


# --- the grid ------------------------------------------------------------------------------------


def colour_at(page, x, y):
    return tuple((page[y, x] * 255).round().int().tolist())


def test_the_better_image_of_each_pair_is_framed():
    pixels = torch.zeros(2, 1, 4, 3, 32, 64, dtype=torch.uint8)
    scores = torch.tensor([[[1.0, 3.0, 2.0, NAN]], [[2.0, 1.0, 2.0, 1.0]]])
    (page,) = compare_draw.grid(pixels, scores, ["a shape"], ["base", "tuned"])
    layout = compare_draw.layout_of(1, 4, 64, 32)
    assert layout.shown[0] == 2 * layout.shown[1] and layout.across * layout.lines >= 4
    framed = []
    for seed in range(4):
        for side in range(2):
            x, y = layout.corner(0, seed, side)
            if colour_at(page, x - 2, y + 5) == ImageColor.getrgb(BEST):
                framed.append((seed, side))
    assert framed == [(0, 1), (1, 0)]  # a tie and a missing score have none


@pytest.mark.parametrize("seeds", [1, 4, 16, 64])
def test_a_page_is_no_wider_than_it_may_be(seeds):
    layout = compare_draw.layout_of(3, seeds, 512, 768)
    assert layout.size[0] <= MAX_WIDTH and max(layout.shown) >= MIN_TILE
    assert layout.across * layout.lines >= seeds > layout.across * (layout.lines - 1)
    last = layout.corner(layout.prompts - 1, seeds - 1, 1)
    assert last[0] + layout.cell <= layout.size[0]
    assert last[1] + layout.shown[1] + layout.band <= layout.size[1]


def test_many_prompts_take_several_pages_of_one_size():
    pixels = torch.zeros(2, 24, 1, 3, 16, 16, dtype=torch.uint8)
    pages = compare_draw.grid(pixels, torch.rand(2, 24, 1), ["a long prompt " * 99] * 24, ["", ""])
    assert len(pages) > 1 and pages.shape[1] <= compare_draw.MAX_HEIGHT
    assert pages.min() >= 0 and pages.max() <= 1


# --- the node ------------------------------------------------------------------------------------


def part(kind):
    return types.SimpleNamespace(model=kind)


GIVEN = {
    **{"model_a": part(1), "clip": object(), "vae": None, "reward": Brightness(), "sampler": None},
    **{"sigmas": torch.tensor([1.0, 0.5, 0.0]), "prompts": "day\n\n evening \n", "width": 16},
    **{"height": 16, "images_per_prompt": 2, "model_b": part(2)},
}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"prompts": " \n"}, "prompts is empty"),
        ({"sigmas": torch.ones(1)}, "SIGMAS hold 1 values, which make no step"),
        ({"prompts": "day\nnight"}, "cannot judge by the prompt 'night': it is too dark"),
        ({"model_b": None}, "both sides are the same MODEL; connect another one to model_b"),
        ({"clip": None}, "clip is empty: its checkpoint holds no text encoder"),
        ({"model_b": part("")}, "model_a is a int and model_b a str"),
        ({"lora_b": "gone.safetensors"}, "the LoRA 'gone.safetensors' is not in models/loras"),
    ],
)
def test_refused_before_anything_is_drawn(monkeypatch, changed, words):
    monkeypatch.setattr(compare_sides, "images_of", lambda *_: pytest.fail("it was drawn"))
    with pytest.raises(NodeError, match=words.replace("(", r"\(")) as told:
        comfy_api_fixture.run(compare.PCPOCompareModels, **GIVEN | changed)
    assert "\n" not in str(told.value)


def test_a_side_of_its_own_text_encoder_is_another_side():
    model, clip = part(1), object()
    one, other = compare_sides.sides_of((model, None), (clip, object()), ("none", "none"))
    assert one.model is other.model and one.clip is clip and other.clip is not clip


def test_seeds_go_on_from_the_first():
    assert compare_sides.seeds_from(7, 3) == (7, 8, 9)


@pytest.mark.parametrize("is_sum", [False, True])
def test_images_become_a_grid_a_table_and_a_sentence(monkeypatch, is_sum):
    levels = torch.tensor([[[10, 20], [30, 40]], [[20, 40], [60, 80]]])  # by side, prompt, seed
    pixels = levels.to(torch.uint8).view(8, 1, 1, 1).expand(8, 3, 16, 16)
    told, ticks, plans = [], [], []

    def drawn(sides, plan, vae, tick):
        plans.append(plan)
        tick(2 * 4 * (2 + 1))
        return pixels, [None] * 8

    def progress(total):
        return lambda done: ticks.append(done / total)

    monkeypatch.setattr(compare_sides, "images_of", drawn)
    monkeypatch.setattr(compare.show, "progress", progress)
    monkeypatch.setattr(compare.show, "show_text", lambda text, node: told.append(text))
    monkeypatch.setattr(compare.rewards_device, "lend", compare.rewards_score.nothing_lent)
    both = WeightedSum((Brightness(), Brightness()), (1.0, -0.5), labels=("light", "again"))
    reward = both if is_sum else Brightness()
    output = comfy_api_fixture.run(
        compare.PCPOCompareModels, **GIVEN | {"reward": reward, "seed": 2**64 - 1}
    )
    (plan,) = plans
    assert plan.prompts == ("day", "evening") and plan.seeds == (2**64 - 1, 0)
    grid, table = output.result
    assert grid.shape[0] == 1 and grid.shape[3] == 3
    factor = 0.5 if is_sum else 1
    assert told[0].startswith("B (model_b) scores higher than A (model_a): ")
    assert f"is {25 * factor:+.4g} (95%: {15 * factor:+.4g} to {35 * factor:+.4g})" in told[0]
    assert "B wins 4 of 4 pairs (100%; 95%: 51% to 100%)" in told[0] and told[0] in table
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    parts = ["light", "again"] if is_sum else []
    expected = [reward.name, *parts, "pixel diversity", "SSIM diversity"]
    assert rows[2 : 2 + len(expected)] == expected and rows[-2:] == ["day", "evening"]
    assert ticks[-1] == 1 and ticks == sorted(ticks)
    assert set(output.ui) == {"PreviewImage", "PreviewText"}


@pytest.mark.parametrize(
    ("after", "is_shown"),
    [
        ({"class_type": "PreviewImage", "inputs": {"images": ["7", 0]}}, False),
        ({"class_type": "SaveImage", "inputs": {"images": ["7", 0]}}, False),
        ({"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}}, True),
        ({"class_type": "PreviewImage", "inputs": {"images": ["7", 1]}}, True),
        ({"class_type": "ImageScale", "inputs": {"image": ["7", 0]}}, True),
        ("no node", True),
    ],
)
def test_a_sheet_is_not_shown_twice(after, is_shown):
    hidden = types.SimpleNamespace(
        unique_id="7", prompt={"7": {"class_type": "A", "inputs": {}}, "8": after}
    )
    shown = compare._picture(torch.zeros(1, 8, 8, 3), types.SimpleNamespace(hidden=hidden))
    assert bool(shown) == is_shown


# --- many prompts --------------------------------------------------------------------------------

DRAWN = {name: GIVEN[name] for name in GIVEN if name not in ("model_a", "reward", "model_b")}


def test_many_prompts_become_one_batch_with_a_line_for_each_image(monkeypatch):
    plans = []

    def drawn(sides, plan, vae, tick):
        plans.append((sides, plan))
        tick(4 * (2 + 1))
        return torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 16, 24), [None] * 4

    monkeypatch.setattr(compare_sides, "images_of", drawn)
    monkeypatch.setattr(compare.show, "progress", lambda total: lambda done: None)
    model = part(1)
    images, prompts = comfy_api_fixture.run(
        compare.PCPODrawPrompts, **DRAWN | {"model": model, "seed": 5}
    ).result
    (((side,), plan),) = plans
    assert side.model is model and plan.seeds == (5, 6)
    assert prompts == "day\nday\nevening\nevening"  # as PCPO Rate Images takes it
    assert images.shape == (4, 16, 24, 3) and (images[:, 0, 0, 0] * 255).tolist() == [0, 1, 2, 3]
    with pytest.raises(NodeError, match="clip is empty"):
        comfy_api_fixture.run(compare.PCPODrawPrompts, **DRAWN | {"model": model, "clip": None})
    with pytest.raises(NodeError, match="prompts is empty"):
        comfy_api_fixture.run(compare.PCPODrawPrompts, **DRAWN | {"model": model, "prompts": ""})
