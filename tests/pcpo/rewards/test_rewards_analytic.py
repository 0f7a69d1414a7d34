"""The rewards that are one formula of the pixels: against closed forms, and their gradients."""

from __future__ import annotations

from math import cos, pi, sqrt

import numpy as np
import pytest
import torch
from comfyui_pcpo.pcpo.rewards import load_reward
from comfyui_pcpo.pcpo.rewards.colour import COLOURS
from PIL import Image
from torch.testing import assert_close

torch.set_num_threads(1)

NAMES = ["brightness", "colour", "colourfulness", "sharpness", "symmetry"]


def flat(*rgb, height=8, width=8):
    """A picture of one colour, 0 to 255, as a batch of one."""
    return torch.tensor(rgb, dtype=torch.uint8)[None, :, None, None].repeat(1, 1, height, width)


def noise(*shape, seed=0):
    drawn = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(torch.uint8)


def score(name, images, prompt="red"):
    return load_reward(name).score(images, [prompt] * len(images)).values


@pytest.mark.parametrize("name", NAMES)
def test_its_value_is_its_score(name):
    reward, images = load_reward(name), noise(3, 3, 12, 9)
    found = reward.score(images, ["red"] * 3)
    assert found.values.dtype == torch.float32
    assert not found.errors
    exact = reward.value(images.double() / 255, ["red"] * 3)
    assert_close(found.values.double(), exact, rtol=1e-5, atol=1e-6)  # float32 against float64
    assert len(set(found.values.tolist())) == 3


@pytest.mark.parametrize("name", NAMES)
def test_its_gradient_is_that_of_its_values(name):
    reward = load_reward(name)
    assert reward.differentiable
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, 3, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: reward.value(p, ["red", "blue"]), pixels)


@pytest.mark.parametrize("name", NAMES)
def test_a_flat_grey_picture_has_a_finite_gradient(name):
    pixels = torch.full((1, 3, 6, 6), 0.5, requires_grad=True)
    load_reward(name).value(pixels, ["red"]).sum().backward()
    assert pixels.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_no_picture_is_outside_its_bounds(name):
    reward = load_reward(name)
    low, high = reward.bounds
    dark, light = flat(0, 0, 0), flat(255, 255, 255)
    board = torch.where(torch.eye(2).bool().repeat(4, 4), dark, light)
    for image in (dark, light, flat(255, 0, 0), flat(0, 0, 255), board, noise(1, 3, 8, 8)):
        assert low <= reward.score(image, ["black"]).values.item() <= high


@pytest.mark.parametrize("name", NAMES)
def test_its_fingerprint_names_it(name):
    assert load_reward(name).fingerprint()["reward"] == name


def test_brightness_of_the_primary_colours_is_bt601():
    pictures = torch.cat([flat(255, 0, 0), flat(0, 255, 0), flat(0, 0, 255), flat(255, 255, 255)])
    assert_close(score("brightness", pictures), torch.tensor([0.299, 0.587, 0.114, 1.0]))


def test_brightness_is_pillows_grey():
    image = noise(1, 3, 32, 48)
    grey = Image.fromarray(image[0].permute(1, 2, 0).numpy()).convert("L")
    expected = np.asarray(grey).mean() / 255
    assert score("brightness", image).item() == pytest.approx(expected, abs=0.5 / 255)


def test_brightness_has_the_same_gradient_everywhere():
    pixels = torch.rand(1, 3, 4, 5, requires_grad=True)
    load_reward("brightness").value(pixels, [""]).sum().backward()
    expected = torch.tensor([0.299, 0.587, 0.114])[None, :, None, None].expand(1, 3, 4, 5) / 20
    assert_close(pixels.grad, expected)


def test_symmetry_of_a_mirrored_picture_and_of_its_opposite():
    half = noise(1, 3, 6, 5)
    assert score("symmetry", torch.cat([half, half.flip(-1)], dim=-1)).item() == 1
    assert score("symmetry", torch.cat([half, half[..., :1], half.flip(-1)], dim=-1)).item() == 1
    assert score("symmetry", torch.cat([half, half], dim=-1)).item() < 1
    opposite = torch.cat([flat(0, 0, 0), flat(255, 255, 255)], dim=-1)
    assert score("symmetry", opposite).item() == 0


def test_symmetry_ignores_above_and_below():
    picture = torch.cat([flat(0, 0, 0), flat(255, 255, 255)], dim=-2)
    assert score("symmetry", picture).item() == 1


def test_symmetry_of_one_wrong_pixel():
    picture = flat(100, 100, 100, height=4, width=6)
    picture[0, 1, 2, 0] = 151  # differs by 0.2 from its mirror, and its mirror from it
    expected = 1 - 2 * 0.2**2 / (3 * 4 * 6)
    assert score("symmetry", picture).item() == pytest.approx(expected)


def test_sharpness_of_a_board_is_the_largest():
    board = torch.where(torch.eye(2).bool().repeat(5, 5), flat(0, 0, 0, height=10, width=10), 255)
    assert score("sharpness", board).item() == pytest.approx((4 * 255) ** 2)
    assert load_reward("sharpness").bounds[1] == (4 * 255) ** 2


def test_sharpness_of_a_wave_is_its_variance_times_the_kernels_response():
    # along x, cos(k x) is an eigenvector of the Laplacian with eigenvalue 2 cos k - 2
    size, k = 34, 2 * pi / 8  # the 32 inner pixels are four whole waves
    wave = 0.5 + 0.25 * torch.cos(k * torch.arange(size, dtype=torch.float64))
    pixels = wave.expand(1, 3, 10, size)
    expected = (2 * cos(k) - 2) ** 2 * (0.25 * 255) ** 2 / 2
    assert load_reward("sharpness").value(pixels, [""]).item() == pytest.approx(expected)


def test_sharpness_of_a_slope_is_none():
    slope = torch.arange(0, 80, 5, dtype=torch.uint8).expand(1, 3, 16, 16)
    assert score("sharpness", slope).item() == pytest.approx(0, abs=1e-6)
    assert score("sharpness", noise(1, 3, 16, 16)).item() > 1000


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (9, 2)])
def test_sharpness_of_a_picture_without_inner_pixels_is_an_error(size):
    found = load_reward("sharpness").score(flat(9, 9, 9, height=size[0], width=size[1]), [""])
    assert found.values.isnan().all()
    expected = f"the image is {size[1]}x{size[0]}, and sharpness needs at least 3x3"
    assert found.errors == (expected,)


def test_colourfulness_of_flat_colours():
    # no spread; red is (rg, yb) = (255, 127.5) away from grey, yellow (0, 255)
    pictures = torch.cat([flat(77, 77, 77), flat(255, 0, 0), flat(255, 255, 0)])
    expected = torch.tensor([0.0, 0.3 * 255 * sqrt(1.25), 0.3 * 255])
    assert_close(score("colourfulness", pictures), expected)


def test_colourfulness_of_two_complementary_colours():
    # half red, half cyan: the mean is grey and each pixel r = 255 sqrt(1.25) away from it
    half = torch.cat([flat(255, 0, 0), flat(0, 255, 255)], dim=-1)
    assert score("colourfulness", half).item() == pytest.approx(255 * sqrt(1.25), rel=1e-6)


def test_colourfulness_reaches_its_bound():
    # a share (1 + m) / 2 of red has mean m r and spread r sqrt(1 - m^2); m = 0.3 / sqrt(1.09)
    share = (1 + 0.3 / sqrt(1.09)) / 2
    is_red = torch.arange(10_000) < round(share * 10_000)
    red, cyan = torch.tensor([255, 0, 0]), torch.tensor([0, 255, 255])
    picture = torch.where(is_red, red[:, None], cyan[:, None]).reshape(1, 3, 100, 100)
    bound = load_reward("colourfulness").bounds[1]
    assert score("colourfulness", picture.to(torch.uint8)).item() == pytest.approx(bound, rel=1e-6)


def test_colour_of_the_prompts_word():
    red = flat(*COLOURS["red"])
    reward = load_reward("colour")
    found = reward.score(red.repeat(4, 1, 1, 1), ["a red box", "Crimson", "a blue one", "a dog"])
    assert found.values[:2].tolist() == [1, 1]
    distance = sum(
        ((a - b) / 255) ** 2 for a, b in zip(COLOURS["red"], COLOURS["blue"], strict=True)
    )
    assert found.values[2].item() == pytest.approx(1 - distance / 3)
    assert found.values[3].isnan()
    assert "the prompt has none of the words red, crimson" in found.errors[3]


def test_colour_bounds_are_reached():
    reward = load_reward("colour")
    assert reward.score(flat(0, 0, 0), ["white"]).values.item() == 0
    assert reward.score(flat(0, 0, 0), ["black"]).values.item() == 1


def test_colour_has_the_gradient_of_a_squared_distance():
    pixels = torch.rand(1, 3, 4, 5, requires_grad=True)
    load_reward("colour").value(pixels, ["an orange cat"]).sum().backward()
    target = torch.tensor(COLOURS["orange"])[None, :, None, None] / 255
    assert_close(pixels.grad, -2 * (pixels.detach() - target) / 60)


@pytest.mark.parametrize("prompt", ["", "   ", "a coloured rainbow", "reddish", "bored"])
def test_a_prompt_without_a_colour_is_complained_of(prompt):
    assert load_reward("colour").complaints([prompt])[0] is not None


def test_the_first_colour_of_a_long_prompt_counts():
    prompt = "word " * 10_000 + "Gray, then pink"
    assert score("colour", flat(128, 128, 128), prompt).item() == 1
