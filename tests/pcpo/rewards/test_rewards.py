"""The table of rewards, the JPEG rewards and weighted sums; the scene judge has its own tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comfyui_pcpo.pcpo.rewards import REWARDS, WeightedSum, load_reward, reward_class
from PIL import Image
from torch.testing import assert_close

torch.set_num_threads(1)

PROMPTS = ["noise", "flat"]


@pytest.fixture
def images():
    noise = torch.randint(0, 256, (3, 48, 64), generator=torch.Generator().manual_seed(0))
    return torch.stack([noise, torch.full((3, 48, 64), 128)]).to(torch.uint8)


def kilobytes_on_disk(image, folder, quality):
    path = folder / "image.jpg"
    Image.fromarray(np.moveaxis(image.numpy(), 0, -1)).save(path, quality=quality)
    return path.stat().st_size / 1000


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_is_named_as_in_the_table(name):
    reward = reward_class(name)
    assert reward.name == name
    if isinstance(reward.bounds, tuple):  # else it is an option's
        assert reward.bounds[0] < reward.bounds[1]
    assert isinstance(reward.needs_prompt, bool | property)


def test_an_unknown_reward_is_refused():
    with pytest.raises(ValueError, match="no reward 'beauty'; choose one of aesthetic, "):
        load_reward("beauty")


@pytest.mark.parametrize("quality", [95, 40])
def test_jpeg_reward_is_the_size_of_the_file(images, tmp_path, quality):
    expected = torch.tensor([kilobytes_on_disk(image, tmp_path, quality) for image in images])
    assert expected[0] > 2 * expected[1]
    large = load_reward("jpeg_incompressibility", quality=quality).score(images, PROMPTS)
    small = load_reward("jpeg_compressibility", quality=quality).score(images, PROMPTS)
    assert_close(large.values, expected)
    assert_close(small.values, -expected)
    assert large.values.dtype == torch.float32


def test_jpeg_quality_is_ddpos(images, tmp_path):
    found = load_reward("jpeg_incompressibility").score(images[:1], PROMPTS[:1])
    assert found.values.item() == pytest.approx(kilobytes_on_disk(images[0], tmp_path, 95))


def test_jpeg_reward_in_flow_grpos_unit(images):
    ddpo = load_reward("jpeg_compressibility").score(images, PROMPTS).values
    flow_grpo = load_reward("jpeg_compressibility", divisor=500.0).score(images, PROMPTS).values
    assert_close(flow_grpo, ddpo / 500)


def test_weighted_sum(images):
    parts = (load_reward("jpeg_incompressibility"), load_reward("jpeg_compressibility", quality=50))
    total = WeightedSum(parts, (2.0, 0.5)).score(images, PROMPTS)
    first, second = (part.score(images, PROMPTS).values for part in parts)
    assert_close(total.values, 2 * first + 0.5 * second)
    assert [set(d) for d in total.details] == [
        {"jpeg_incompressibility", "jpeg_compressibility"}
    ] * 2
    assert total.details[1]["jpeg_compressibility"] == second[1].item()
    assert total.details[0]["jpeg_incompressibility"] == first[0].item()


def test_bounds_of_a_weighted_sum():
    scene = load_reward("scene")
    low, high = scene.bounds
    assert WeightedSum((scene, scene), (2.0, -1.0)).bounds == (2 * low - high, 2 * high - low)
    unbounded = WeightedSum((scene, load_reward("jpeg_incompressibility")), (1.0, -0.1))
    assert unbounded.bounds == (-float("inf"), high)


def test_pixels_that_are_not_8_bit_are_refused(images):
    with pytest.raises(ValueError, match=r"the images are torch.float32, .* multiply those of 0"):
        load_reward("jpeg_compressibility").score(images / 255, PROMPTS)
