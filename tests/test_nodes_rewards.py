"""The reward nodes without ComfyUI: schemas, what is checked, what is computed and drawn."""

from __future__ import annotations

import sys
import types

import comfy_api_fixture
import numpy as np
import pytest
import torch
from comfyui_pcpo.nodes import rewards, rewards_make, rewards_score
from comfyui_pcpo.nodes.errors import NodeError
from comfyui_pcpo.pcpo.rewards import REWARDS, Scores, WeightedSum, load_reward
from comfyui_pcpo.pcpo.rewards.base import pixels_of
from comfyui_pcpo.pcpo.rewards.contact_sheet import BEST, grid_of
from PIL import Image

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(20, 12, 16, 3, generator=generator) * 1.2 - 0.1


@pytest.fixture
def add_reward(monkeypatch):
    """Put a class into the table of rewards."""

    def add(cls):
        module = f"{rewards_make.rewards.__name__}.made_up"
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(Made=cls))
        monkeypatch.setitem(REWARDS, "made_up", ("made_up", "Made"))

    return add


class Brightness:
    """A reward that counts its calls and the images of each."""

    name, needs_prompt, bounds = "brightness", False, (0.0, 255.0)

    def __init__(self):
        self.calls = []

    def score(self, images, prompts):
        self.calls.append((len(images), list(prompts)))
        return Scores(images.float().mean((1, 2, 3)))


def quiet(done):
    """A tick that does nothing."""


# --- schemas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", rewards.NODES)
def test_schema(node):
    schema = comfy_api_fixture.schema_of(node)
    assert schema.node_id == node.__name__
    assert schema.display_name.startswith("PCPO ")
    assert schema.category == "PCPO/rewards"
    assert schema.description and schema.search_aliases
    assert all(i.tooltip for found in schema.inputs for i in found.nested())
    assert all(o.tooltip and o.display_name for o in schema.outputs)


def test_every_reward_is_offered():
    inputs = {i.id: i for i in comfy_api_fixture.schema_of(rewards.PCPOReward).inputs}
    assert inputs["reward"].options == list(REWARDS)
    assert inputs["reward"].default in REWARDS
    assert inputs["weights"].options == [rewards_make.AUTOMATIC]  # no ComfyUI, no folders


def test_reward_nodes_without_loading():
    made = comfy_api_fixture.run(
        rewards.PCPOReward, reward="jpeg_incompressibility", options='{"quality": 50}'
    )[0]
    assert "made" not in vars(made)
    scene = comfy_api_fixture.run(rewards.PCPOReward, reward="scene", options="")[0]
    total = comfy_api_fixture.run(
        rewards.PCPOCombineRewards, rewards={"reward_0": made, "reward_1": scene}, weights="1, -2"
    )[0]
    assert total == WeightedSum((made, scene), (1.0, -2.0))
    assert "made" not in vars(made)


# --- rewards -------------------------------------------------------------------------------------


def test_a_lazy_reward_is_the_reward(images):
    options = '{"quality": 50, "divisor": 2.0}'
    lazy = rewards_make.lazy_reward("jpeg_incompressibility", "automatic", options)
    plain = load_reward("jpeg_incompressibility", quality=50, divisor=2.0)
    pixels = rewards_score.to_pixels(images)
    assert lazy.score(pixels, [""] * 20).values.equal(plain.score(pixels, [""] * 20).values)
    assert (lazy.needs_prompt, lazy.bounds) == (plain.needs_prompt, plain.bounds)
    assert lazy.made is lazy.made
    turned = '{"divisor": 2.0, "quality":50}'
    again = rewards_make.lazy_reward("jpeg_incompressibility", "automatic", turned)
    assert lazy == again
    assert hash(lazy) == hash(again)
    assert lazy != rewards_make.lazy_reward("jpeg_incompressibility", "automatic", "")


@pytest.mark.parametrize(
    ("name", "weights", "options", "said"),
    [
        ("scene", "automatic", '{"quality": 50}', "'scene' has no option 'quality'; it has none"),
        ("jpeg_compressibility", "automatic", '{"q": 1}', "no option 'q'; it has quality, divisor"),
        ("scene", "automatic", "[1]", r"the options '\[1\]' are no JSON object; leave them empty"),
        ("scene", "x.pt", "", "'scene' reads no weights, and 'x.pt' is chosen; set the weights to"),
    ],
)
def test_widgets_that_do_not_fit_the_reward(name, weights, options, said):
    with pytest.raises(NodeError, match=said):
        rewards_make.lazy_reward(name, weights, options)


def test_an_option_of_a_wrong_kind_is_told_when_it_shows(images):
    lazy = rewards_make.lazy_reward("jpeg_compressibility", "automatic", '{"divisor": "two"}')
    with pytest.raises(NodeError, match="the reward 'jpeg_compressibility' failed: "):
        lazy.score(rewards_score.to_pixels(images), [""] * 20)


def test_weights_and_folders_go_to_a_reward_that_has_them(add_reward, monkeypatch):
    class Network(Brightness):
        def __init__(self, weights=None, folders=()):
            super().__init__()
            self.given = (weights, folders)

    add_reward(Network)
    monkeypatch.setattr(rewards_make, "weight_folders", lambda: ["/models/pcpo_rewards"])
    monkeypatch.setattr(rewards_make, "weights_path", lambda file: f"/models/{file}")
    assert rewards_make.lazy_reward("made_up", "a.pt", "").made.given == (
        "/models/a.pt",
        ["/models/pcpo_rewards"],
    )


@pytest.mark.parametrize(
    ("package", "said"),
    [
        ("tensorboard.compat", r"'tensorboard', .* the extra 'tensorboard' \(tensorboard\)"),
        ("beartype", r"'beartype', which is not installed; install the extra 'test' \(pytest "),
        ("nobody_has_it", "'nobody_has_it', which is not installed; install it into ComfyUI's"),
    ],
)
def test_a_missing_package_is_told_when_the_reward_is_needed(add_reward, images, package, said):
    class Needy(Brightness):
        def __init__(self):
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    add_reward(Needy)
    lazy = rewards_make.lazy_reward("made_up", "automatic", "")
    with pytest.raises(NodeError, match=f"the reward 'made_up' needs the package {said}"):
        lazy.score(rewards_score.to_pixels(images), [""] * 20)


def test_missing_weights_are_told_with_their_folder_and_source(add_reward, images):
    class Missing(FileNotFoundError):
        source = "example.org/taste"

    class Network(Brightness):
        def __init__(self):
            raise Missing(2, "not there", "/somewhere/taste.safetensors")

    add_reward(Network)
    with pytest.raises(NodeError) as caught:
        rewards_make.lazy_reward("made_up", "automatic", "").score(
            rewards_score.to_pixels(images), [""] * 20
        )
    assert str(caught.value) == (
        "the reward 'made_up' needs the file taste.safetensors in models/pcpo_rewards; "
        "download it from example.org/taste"
    )


def test_weights_of_a_sum():
    assert rewards_make.parse_weights("1.0, -0.5,2e3", 3) == (1.0, -0.5, 2000.0)
    assert rewards_make.parse_weights(" 0.5 ", 3) == (0.5, 0.5, 0.5)
    with pytest.raises(NodeError, match="of weights is 2 and that of rewards is 3; give one for"):
        rewards_make.parse_weights("1, 2", 3)
    for wrong in ("", "1, x", "nan", "1, inf", "1,"):
        with pytest.raises(NodeError, match="is no number; write them like"):
            rewards_make.parse_weights(wrong, 2)


# --- scoring -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pixels_are_those_of_the_saved_file(images, tmp_path, dtype):
    images = images.to(dtype)
    for image, pixels in zip(images, rewards_score.to_pixels(images), strict=True):
        # as Save Image writes it and `pcpo score` reads it
        array = np.clip(255.0 * image.numpy(), 0, 255).astype(np.uint8)
        Image.fromarray(array).save(tmp_path / "a.png")
        assert pixels.equal(pixels_of(Image.open(tmp_path / "a.png"))[0])


def test_pixels_of_other_types(images):
    half = (images * 255).floor().clamp(0, 255) / 256
    assert rewards_score.to_pixels(half.bfloat16()).equal(rewards_score.to_pixels(half))
    rgba = torch.cat([images, torch.zeros(20, 12, 16, 1)], dim=-1)
    assert rewards_score.to_pixels(rgba).equal(rewards_score.to_pixels(images))


def test_images_that_cannot_be_scored(images):
    with pytest.raises(NodeError, match="the batch is empty"):
        rewards_score.to_pixels(images[:0])
    with pytest.raises(NodeError, match="number of channels of the images is 2, and rewards read"):
        rewards_score.to_pixels(images[..., :2])
    for value in ("nan", "inf"):
        broken = images.clone()
        broken[3, 1, 2, 0] = float(value)
        with pytest.raises(NodeError, match="image 3 of 20 holds NaN or infinity"):
            rewards_score.to_pixels(broken)


def test_prompts_are_one_for_all_or_one_each():
    assert rewards_score.split_prompts("a red circle\n", 3) == ["a red circle"] * 3
    assert rewards_score.split_prompts(" a \n\nb\r\nc", 3) == ["a", "b", "c"]
    assert rewards_score.split_prompts("  \n", 2) == ["", ""]
    with pytest.raises(NodeError, match=r"there are 2 prompts \(lines\) for 3 images; give one"):
        rewards_score.split_prompts("a\nb", 3)


def test_a_batch_is_scored_in_chunks(images):
    pixels, prompts = rewards_score.to_pixels(images), [str(i) for i in range(20)]
    ticks, reward = [], Brightness()
    scores = rewards_score.score(reward, pixels, prompts, ticks.append)
    assert ticks == [0, 8, 16, 20]
    assert reward.calls == [(8, prompts[:8]), (8, prompts[8:16]), (4, prompts[16:])]
    assert scores.values.equal(pixels.float().mean((1, 2, 3)))


def test_an_interrupt_ends_between_chunks(images):
    class Interrupted(Exception):
        """What ComfyUI raises."""

    def tick(done):
        if done == 8:
            raise Interrupted

    reward = Brightness()
    with pytest.raises(Interrupted):
        rewards_score.score(reward, rewards_score.to_pixels(images), [""] * 20, tick)
    assert len(reward.calls) == 1


def test_a_prompt_that_cannot_be_judged(images):
    pixels = rewards_score.to_pixels(images)
    prompts = ["a red circle"] * 20
    scene = load_reward("scene")
    with pytest.raises(NodeError, match="the reward 'scene' judges images by their prompt"):
        rewards_score.score(scene, pixels, [""] * 20, quiet)
    prompts[11] = "a cat"
    said = "the reward 'scene' cannot score image 11 with the prompt 'a cat': cannot read 'a cat'"
    with pytest.raises(NodeError, match=said):
        rewards_score.score(scene, pixels, prompts, quiet)


def test_no_number_is_no_score(images):
    class Broken(Brightness):
        def score(self, images, prompts):
            return Scores(torch.full((len(images),), float("nan")))

    with pytest.raises(NodeError, match="cannot score image 0 with the prompt '': it gives nan"):
        rewards_score.score(Broken(), rewards_score.to_pixels(images), [""] * 20, quiet)


def test_ranks_keep_the_order_of_equals():
    assert rewards_score.ranked(torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0])) == [1, 3, 4, 0, 2]


def test_table():
    details = ({"score": 0.5, "colour": 1.0}, {"score": 12.25, "colour": 0.0})
    scores = Scores(torch.tensor([0.5, 12.25]), details)
    assert rewards_score.table(scores, PROMPTS, [1, 0]).splitlines() == [
        "rank  image    score  colour  prompt",
        "   1      1  12.2500  0.0000  a blue square",
        "   2      0   0.5000  1.0000  a red circle",
    ]


def test_latents_are_kept_in_step():
    samples = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 4, 2, 2)
    plain = rewards_score.pick_latents({"samples": samples, "type": "kept"}, [2, 0], 4)
    assert plain["samples"][:, 0, 0, 0].tolist() == [2, 0]
    assert plain["batch_index"] == [2, 0]
    assert plain["type"] == "kept"
    assert "noise_mask" not in plain
    full = {"samples": samples, "noise_mask": samples[:, :1], "batch_index": [7, 7, 9, 8]}
    picked = rewards_score.pick_latents(full, [3, 1], 4)
    assert picked["noise_mask"].flatten(1)[:, 0].tolist() == [3, 1]
    assert picked["batch_index"] == [8, 7]
    assert full["batch_index"] == [7, 7, 9, 8]
    shared = {"samples": samples, "noise_mask": samples[:1, :1]}  # one mask for all
    assert len(rewards_score.pick_latents(shared, [3, 1], 4)["noise_mask"]) == 1
    fewer = {"samples": samples, "noise_mask": samples[:2, :1]}  # repeated, as ComfyUI does
    found = rewards_score.pick_latents(fewer, [3, 2], 4)["noise_mask"]
    assert found.flatten(1)[:, 0].tolist() == [1, 0]
    with pytest.raises(NodeError, match="there are 4 latents for 3 images"):
        rewards_score.pick_latents({"samples": samples}, [0], 3)


# --- contact sheet -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "width", "height", "columns", "rows"),
    [
        (1, 64, 64, 1, 1),
        (2, 64, 64, 2, 1),
        (3, 64, 64, 3, 1),
        (4, 64, 64, 2, 2),
        (9, 512, 512, 3, 3),
        (16, 512, 512, 4, 4),
        (4, 512, 1024, 4, 1),
        (6, 1024, 256, 2, 3),
        (1, 4096, 16, 1, 1),
    ],
)
def test_grid(count, width, height, columns, rows):
    grid = grid_of(count, width, height)
    assert (grid.columns, grid.rows) == (columns, rows)


@pytest.mark.parametrize("count", [1, 2, 5, 7, 24, 64])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (512, 768), (1280, 720), (64, 1024)])
def test_places_do_not_overlap(count, width, height):
    grid = grid_of(count, width, height)
    corners = [grid.corner(place) for place in range(count)]
    assert len(set(corners)) == count <= grid.columns * grid.rows
    assert grid.cell >= grid.shown[0]
    for x, y in corners:
        assert (x - grid.gap) % (grid.cell + grid.gap) == 0
        assert grid.gap <= x <= grid.size[0] - grid.cell - grid.gap
        assert grid.gap <= y <= grid.size[1] - grid.shown[1] - grid.band - grid.gap


def test_contact_sheet_shows_the_images_best_first():
    colours = torch.tensor([[200, 0, 0], [0, 200, 0], [0, 0, 200]], dtype=torch.uint8)
    pixels = colours[:, :, None, None].expand(3, 3, 32, 48)
    sheet = rewards_score.sheet(pixels, [0.1, 0.3, 0.2], [1, 2, 0])
    grid = grid_of(3, 48, 32)
    assert sheet.shape == (1, grid.size[1], grid.size[0], 3)
    assert sheet.dtype == torch.float32
    assert 0 <= sheet.min() <= sheet.max() <= 1
    for place, i in enumerate([1, 2, 0]):
        x, y = grid.corner(place)
        seen = sheet[0, y + grid.shown[1] // 2, x + grid.cell // 2]
        assert (seen * 255).round().tolist() == colours[i].tolist()
        caption = sheet[0, y + grid.shown[1] + 4 : y + grid.shown[1] + grid.band, x : x + grid.cell]
        assert caption.flatten(0, 1).unique(dim=0).shape[0] > 10  # letters
    framed = (
        (sheet[0] * 255).round().eq(torch.tensor([int(BEST[i : i + 2], 16) for i in (1, 3, 5)]))
    )
    columns = framed.all(-1).any(0).nonzero().flatten()
    x = grid.corner(0)[0]
    assert columns.min() == x - 4
    assert columns.max() == x + grid.cell + 3
