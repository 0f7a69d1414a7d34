"""Bad options, images and prompts: one sentence each, and the others of a batch are scored."""

from __future__ import annotations

import logging
import math

import pytest
import rewards_fixture as fixture
import torch
from comfyui_pcpo.pcpo.pretrained.tokenizers import clip_tokenizer
from comfyui_pcpo.pcpo.rewards import load_reward
from PIL import Image
from rewards_files_fixture import NAMES, make_small, write

PICTURE = fixture.pictures()["large"]
PROMPTED = [name for name in NAMES if name != "aesthetic"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write(tmp_path_factory.mktemp("reward_models"))


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    make_small(monkeypatch)


def made(name, files, **options):
    return load_reward(name, folders=[str(files)], **options)


@pytest.mark.parametrize("name", NAMES)
def test_options_are_checked_at_once(files, name):
    with pytest.raises(ValueError, match="dtype is 'int8'; choose one of float32, float16, bfl"):
        made(name, files, dtype="int8")
    with pytest.raises(ValueError, match="folders is '/a'; give a list"):
        load_reward(name, folders="/a")
    with pytest.raises(ValueError, match="has no option 'weight'; it has weights, folders, dtype"):
        made(name, files, weight=1)


def test_named_choices_are_checked(files):
    with pytest.raises(ValueError, match="normalise is '26'; choose one of raw, /26, cosine"):
        made("pick_score", files, normalise="26")
    with pytest.raises(ValueError, match="variant is 'x'; choose one of cosine, "):
        made("clip_score", files, variant="x")


@pytest.mark.parametrize("name", NAMES)
def test_bounds_hold_what_is_scored(files, name):
    reward = made(name, files)
    low, high = reward.bounds
    values = reward.score([*fixture.pictures().values()], ["a cube"] * 8).values
    assert values.isfinite().all()
    assert low <= values.min() <= values.max() <= high


def test_bounds_follow_the_options(files):
    assert made("clip_score", files).bounds == (-1, 1)
    assert made("clip_score", files, variant="torchmetrics").bounds == (0, 100)
    assert made("clip_score", files, variant="hessel").bounds == (0, 2.5)
    assert made("pick_score", files, normalise="cosine").bounds == (-1, 1)
    assert made("pick_score", files).bounds == (-math.inf, math.inf)


@pytest.mark.parametrize("name", NAMES)
def test_images_of_any_size_and_one_bad_among_them(files, name):
    reward = made(name, files)
    sizes = [(1, 1), (0, 4), (300, 300), (650, 10), (640, 10), (3, 5), (1, 64), (1, 65)]
    images = [Image.new("RGB", size, (200, 30, 90)) for size in sizes]
    found = reward.score(images, ["a cube"] * len(images))
    for size, value, error in zip(sizes, found.values, found.errors, strict=True):
        if size == (0, 4):
            assert error == "the image has no pixels (0x4)"
        elif max(size) > 64 * min(size):
            assert error == f"the image's sides ({size[0]}x{size[1]}) are more than 64:1"
        else:
            assert error is None
        assert value.isnan() == (error is not None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_pictures_of_any_mode(files, name, mode):
    picture = PICTURE.convert("L").convert("I").convert(mode) if mode == "I;16" else None
    picture = picture or PICTURE.convert(mode)
    assert made(name, files).score([picture], ["a cube"]).values.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_transparency_is_dropped(files, name):
    faint = PICTURE.convert("RGBA")
    faint.putalpha(10)
    found = made(name, files).score([faint, PICTURE], ["a cube"] * 2).values
    assert found[0] == found[1]


@pytest.mark.parametrize("name", NAMES)
def test_pixels_that_are_no_numbers_spoil_their_own_image_alone(files, name):
    reward = made(name, files)
    good = torch.rand(3, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    bad = good.clone()
    bad[1, 0, 30, 20] = float("nan")
    prompts = ["a cube"] * 3
    found, expected = reward.value(bad, prompts), reward.value(good, prompts)
    assert found.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_prompt(files, name):
    reward = made(name, files)
    found = reward.score([PICTURE] * 3, ["a cube", "", " \n"])
    assert found.values.isnan().tolist() == [False, reward.needs_prompt, reward.needs_prompt]
    if reward.needs_prompt:
        assert (
            found.errors[1:] == ("the prompt is empty, and this reward judges an image by it",) * 2
        )


@pytest.mark.parametrize("name", PROMPTED)
def test_a_prompt_of_ten_thousand_tokens_is_cut_and_told_of_once(files, name, caplog):
    reward = made(name, files)
    places = 35 if name == "image_reward" else 77
    with caplog.at_level(logging.WARNING):
        first = reward.score([PICTURE], ["cube " * 10_000]).values
        again = reward.score([PICTURE], ["cube " * 20_000]).values
    assert torch.equal(first, again)
    assert len(caplog.records) == 1
    told = caplog.records[0].getMessage()
    assert f"{name!r} reads {places} tokens of a prompt at most" in told
    assert "has 10002" in told
    as_it_is_cut = reward.score([PICTURE], ["cube " * (places - 2)]).values
    assert torch.equal(first, as_it_is_cut)
    assert not torch.equal(first, reward.score([PICTURE], ["cube " * (places - 3)]).values)


def test_prompts_that_fit_are_not_told_of(files, caplog):
    with caplog.at_level(logging.WARNING):
        assert clip_tokenizer("clip_score")(["cube " * 75]).ids.shape == (1, 77)
    assert not caplog.records


@pytest.mark.parametrize("prompt", ["\x00", "🙂" * 50, "<|endoftext|> a", "ا" * 200, "[SEP] [PAD]"])
@pytest.mark.parametrize("name", PROMPTED)
def test_odd_prompts_are_scored(files, name, prompt):
    assert made(name, files).score([PICTURE], [prompt]).values.isfinite().all()


def test_as_many_prompts_as_images(files):
    with pytest.raises(ValueError, match="there are 1 prompts for 2 images"):
        made("clip_score", files).score([PICTURE] * 2, ["a"])


@pytest.mark.parametrize("name", NAMES)
def test_tensors_and_pictures_score_alike(files, name):
    reward = made(name, files)
    tensor = torch.from_numpy(fixture.pixels("large")).permute(2, 0, 1)[None]
    alike = torch.cat([tensor, tensor])
    values = reward.score(alike, ["a cube"] * 2).values
    assert torch.equal(values, reward.score([PICTURE] * 2, ["a cube"] * 2).values)
