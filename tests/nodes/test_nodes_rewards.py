"""The reward nodes without ComfyUI: schemas, what is checked, what is computed and drawn."""

from __future__ import annotations

import inspect
import json
import sys
import types
from contextlib import contextmanager

import comfy_api_fixture
import numpy as np
import pytest
import torch
from comfyui_pcpo.nodes.errors import NodeError
from comfyui_pcpo.nodes.rewards import device as rewards_device
from comfyui_pcpo.nodes.rewards import make as rewards_make
from comfyui_pcpo.nodes.rewards import nodes as rewards
from comfyui_pcpo.nodes.rewards import score as rewards_score
from comfyui_pcpo.nodes.rewards import show as rewards_show
from comfyui_pcpo.nodes.rewards import sum as rewards_sum
from comfyui_pcpo.pcpo.pictures.contact_sheet import BEST, grid_of
from comfyui_pcpo.pcpo.pictures.tensors import pixels_of
from comfyui_pcpo.pcpo.rewards import (
    REWARDS,
    BatchReward,
    RewardUnavailable,
    Scores,
    WeightedSum,
    load_reward,
    reward_class,
)
from comfyui_pcpo.pcpo.rewards.combine import Affine, ZScore
from comfyui_pcpo.registry import RewardEntry
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
        monkeypatch.setitem(sys.modules, "made_up", types.SimpleNamespace(Made=cls))
        monkeypatch.setitem(REWARDS.entries, "made_up", RewardEntry("made_up:Made"))

    return add


class Mean(BatchReward):
    """A reward that counts its calls and the images of each."""

    name, needs_prompt, bounds = "mean", False, (0.0, 255.0)

    def __init__(self):
        self.calls = []

    def score(self, images, prompts):
        self.calls.append((len(images), list(prompts)))
        return Scores(images.float().mean((1, 2, 3)))


def named(reward, options="", weights="automatic", dtype="automatic"):
    return rewards_make.named_reward(reward, weights, dtype, options)


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
    assert inputs["reward"].options == [name for name in REWARDS if name != "taste"]
    assert inputs["reward"].default in REWARDS
    assert inputs["weights"].options == [rewards_make.AUTOMATIC]  # no ComfyUI, no folders


def test_the_nodes_make_what_the_widgets_say():
    made = comfy_api_fixture.run(
        rewards.PCPOReward, reward="jpeg_incompressibility", options='{"quality": 50}'
    )[0]
    assert made.made == load_reward("jpeg_incompressibility", quality=50)
    scene = comfy_api_fixture.run(rewards.PCPOReward, reward="scene", options="")[0]
    total = comfy_api_fixture.run(
        rewards.PCPOCombineRewards, rewards={"reward_0": made, "reward_1": scene}, weights="1, -2"
    )[0]
    assert total == WeightedSum((made, scene), (1.0, -2.0))


# --- rewards -------------------------------------------------------------------------------------


def test_a_named_reward_is_the_reward(images):
    ours = named("jpeg_incompressibility", '{"quality": 50, "divisor": 2.0}')
    plain = load_reward("jpeg_incompressibility", quality=50, divisor=2.0)
    pixels = rewards_score.to_pixels(images)
    assert ours.score(pixels, [""] * 20).values.equal(plain.score(pixels, [""] * 20).values)
    assert (ours.needs_prompt, ours.bounds) == (plain.needs_prompt, plain.bounds)
    assert (ours.modules(), ours.fingerprint()) == ([], plain.fingerprint())
    assert named("scene").complaints(["a cat", "a red circle"])[1] is None
    again = named("jpeg_incompressibility", '{"divisor": 2.0, "quality":50}')
    assert ours == again
    assert hash(ours) == hash(again)
    assert ours != named("jpeg_incompressibility")


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("scene", {"options": '{"quality": 50}'}, "'scene' has no option 'quality'; it has none"),
        ("jpeg_compressibility", {"options": '{"q": 1}'}, "no option 'q'; it has quality, divisor"),
        ("scene", {"options": "[" * 100_000}, "the text of the options is nested too deep"),
        ("scene", {"options": '{"x": ' + "9" * 5000 + "}"}, "more than 20 digits"),
        ("scene", {"options": '{"x": NaN}'}, "a number that is not finite"),
        ("scene", {"options": r'{"x": "\ud800"}'}, "half a character"),
        ("vlm_judge", {"options": '{"highest": 1e400}'}, "a number that is not finite"),
        (
            "scene",
            {"options": "[1]"},
            r"the options '\[1\]' are not a JSON object; leave them empty",
        ),
        ("scene", {"weights": "x.pt"}, "'scene' reads no weights, and weights is 'x.pt'; set it"),
        ("scene", {"dtype": "float16"}, "'scene' reads no weights, and dtype is 'float16'; set it"),
        (
            "jpeg_compressibility",
            {"options": '{"quality": 500}'},
            "the reward 'jpeg_compressibility' failed: quality is 500; a JPEG's is a whole number",
        ),
        (
            "jpeg_compressibility",
            {"options": '{"divisor": "two"}'},
            "the reward 'jpeg_compressibility' failed: ",
        ),
    ],
)
def test_widgets_that_do_not_fit_the_reward(name, given, said):
    with pytest.raises(NodeError, match=said):
        named(name, **given)


def test_files_folders_and_dtype_go_to_a_reward_that_has_them(add_reward, monkeypatch):
    class Network(Mean):
        def __init__(self, weights=None, folders=(), dtype="float32"):
            super().__init__()
            self.given = (weights, folders, dtype)

    add_reward(Network)
    monkeypatch.setattr(rewards_make, "weight_folders", lambda: ["/models/reward_models"])
    monkeypatch.setattr(rewards_make, "weights_path", lambda file: f"/models/{file}")
    given = named("made_up", "", "a.pt", "bfloat16").made.given
    assert given == ("/models/a.pt", ["/models/reward_models"], "bfloat16")
    given = named("made_up").made.given
    assert given == (None, ["/models/reward_models"], "float32")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("aesthetic", {"clip": "/etc/passwd"}),
        ("image_reward", {"vocab": "/etc/passwd"}),
        ("hps_v2_1", {"weights": "/etc/passwd"}),
        ("hps_v2_1", {"folders": ["/etc"]}),
    ],
)
def test_a_graph_names_no_path(name, options):
    option = next(iter(options))
    with pytest.raises(NodeError, match=f"the option '{option}' .* is a path, which a graph may"):
        named(name, json.dumps(options))


def test_every_option_that_is_a_path_is_known():
    paths = [
        option
        for name in REWARDS
        for line in (inspect.getdoc(reward_class(name)) or "").splitlines()
        for option, _, told in [line.strip().partition(": ")]
        if " path of " in f" {told}" or "folder of " in told or "searched first" in told
    ]
    assert set(paths) == set(rewards_make.PATHS)


FOLDERS = {
    "reward_models": {"HPS.pt": "/a/HPS.pt", "x/README.md": "/a/x/README.md"},
    "clip_vision": {"clip_l.safetensors": "/b/clip_l.safetensors"},
}


@pytest.fixture
def models(monkeypatch):
    """ComfyUI's folders, with two files of weights."""
    fake = types.SimpleNamespace(
        models_dir="/models",
        add_model_folder_path=lambda name, path: None,
        get_folder_paths=lambda name: [f"/models/{name}"],
        get_filename_list=lambda name: list(FOLDERS[name]),
        get_full_path=lambda name, file: FOLDERS[name].get(file),
    )
    monkeypatch.setitem(sys.modules, "folder_paths", fake)


def test_files_of_both_folders_are_offered(models):
    assert rewards_make.weight_folders() == ["/models/reward_models", "/models/clip_vision"]
    files = rewards_make.weight_files()
    assert files == ["automatic", "HPS.pt", "clip_vision/clip_l.safetensors"]
    found = [rewards_make.weights_path(file) for file in files[1:]]
    assert found == ["/a/HPS.pt", "/b/clip_l.safetensors"]
    with pytest.raises(NodeError, match=r"'gone\.pt' are not in models/reward_models; put them"):
        rewards_make.weights_path("gone.pt")


SAID = "the reward 'made_up' needs a.pt, which is nowhere; run `pcpo rewards get made_up`"


def test_what_is_missing_is_told_by_the_node_itself(add_reward):
    class Missing(Mean):
        def __init__(self):
            raise RewardUnavailable(SAID)

    add_reward(Missing)
    with pytest.raises(NodeError) as caught:
        named("made_up")
    assert str(caught.value) == SAID


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RewardUnavailable(SAID), SAID),
        (ModuleNotFoundError("No module named 'x'"), "the reward 'made_up' failed: No module nam"),
        (OSError("the disk is gone"), "the reward 'made_up' failed: the disk is gone"),
    ],
)
def test_what_goes_wrong_later_is_one_sentence_too(add_reward, error, said):
    class Failing(Mean):
        def fail(self, *given):
            raise error

        score = complaints = modules = fingerprint = fail

    add_reward(Failing)
    made = named("made_up")
    for asked, given in (
        (made.score, (None, [])),
        (made.complaints, ([],)),
        (made.modules, ()),
        (made.fingerprint, ()),
    ):
        with pytest.raises(NodeError) as caught:
            asked(*given)
        assert str(caught.value).startswith(said)


# --- sums ----------------------------------------------------------------------------------------

SCENE, JPEG = named("scene"), named("jpeg_compressibility")


def test_sums_of_sums_are_taken_apart():
    inner = rewards_sum.combine((SCENE, JPEG), (0.5, 2.0))
    assert inner == WeightedSum((SCENE, JPEG), (0.5, 2.0))
    assert rewards_sum.combine((inner, JPEG), (2.0, -1.0)) == WeightedSum(
        (SCENE, JPEG, JPEG), (1.0, 4.0, -1.0)
    )


def test_a_normalised_reward_in_a_sum_keeps_its_scale(images):
    scaled = comfy_api_fixture.run(
        rewards.PCPONormaliseReward,
        reward=JPEG,
        normalise={"normalise": "affine", "scale": 0.5, "shift": 1.0},
    )[0]
    assert scaled == WeightedSum((JPEG,), (1.0,), (Affine(0.5, 1.0),))
    inner = rewards_sum.combine((scaled, SCENE), (3.0, 1.0))
    whole = rewards_sum.combine((inner,), (2.0,))
    assert whole == WeightedSum((JPEG, SCENE), (6.0, 2.0), (Affine(0.5, 1.0), Affine()))
    pixels = rewards_score.to_pixels(images)
    jpeg = JPEG.score(pixels, [""] * 20).values
    scene = SCENE.score(pixels, ["a red circle"] * 20).values
    found = rewards_score.score(whole, pixels, ["a red circle"] * 20, quiet)
    torch.testing.assert_close(found.values, 6 * (0.5 * jpeg + 1) + 2 * scene)
    assert rewards_show.part_names(found) == [
        *("jpeg_compressibility", "jpeg_compressibility (affine)", "scene")
    ]


def test_a_running_scale_sees_a_batch_once_and_whole(images):
    scaled = comfy_api_fixture.run(
        rewards.PCPONormaliseReward, reward=JPEG, normalise={"normalise": "z_score"}
    )[0]
    whole = rewards_sum.combine((scaled,), (2.0,))
    pixels = rewards_score.to_pixels(images)
    found = rewards_score.score(whole, pixels, [""] * 20, quiet)
    jpeg = JPEG.score(pixels, [""] * 20).values
    expected = 2 * (jpeg - jpeg.mean()) / jpeg.std(correction=0)
    torch.testing.assert_close(found.values, expected, atol=1e-4, rtol=1e-4)
    assert whole.scales[0] is scaled.scales[0]
    assert scaled.scales[0].count == 20
    rewards_score.score(whole, pixels[:4], [""] * 4, quiet)
    assert scaled.scales[0].count == 24


def test_a_scale_over_a_sum_scores(images):
    summed = rewards_sum.combine((JPEG, SCENE), (1.0, 1.0))
    scaled = rewards_sum.normalise(summed, {"normalise": "affine", "scale": 2.0, "shift": 0.0})
    outer = rewards_sum.combine((scaled, scaled), (1.0, 1.0))
    assert [type(part) for part in outer.rewards] == [WeightedSum, WeightedSum]
    pixels, prompts = rewards_score.to_pixels(images), ["a red circle"] * 20
    ticks = []
    found = rewards_score.score(outer, pixels, prompts, ticks.append)
    torch.testing.assert_close(found.values, 4 * summed.score(pixels, prompts).values)
    assert ticks == sorted(ticks)
    assert (ticks[0], ticks[-1]) == (0, 20)


def test_a_scale_that_is_none():
    with pytest.raises(NodeError, match="scale is 0, and has to be above 0; make a penalty"):
        rewards_sum.normalise(JPEG, {"normalise": "affine", "scale": 0, "shift": 0})
    assert rewards_sum.normalise(JPEG, {"normalise": "z_score"}).scales == (ZScore(),)


def test_weights_of_a_sum():
    assert rewards_make.parse_weights("1.0, -0.5,2e3", 3) == (1.0, -0.5, 2000.0)
    assert rewards_make.parse_weights(" 0.5 ", 3) == (0.5, 0.5, 0.5)
    with pytest.raises(NodeError, match="of weights is 2 and the number of rewards is 3; give"):
        rewards_make.parse_weights("1, 2", 3)
    for wrong in ("", "1, x", "nan", "1, inf", "1,"):
        with pytest.raises(NodeError, match="is not a number; write them like"):
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


def test_prompts_are_one_for_all_or_one_each():
    assert rewards_score.split_prompts("a red circle\n", 3) == ["a red circle"] * 3
    assert rewards_score.split_prompts(" a \n\nb\r\nc", 3) == ["a", "b", "c"]
    assert rewards_score.split_prompts("  \n", 2) == ["", ""]
    with pytest.raises(NodeError, match=r"there are 2 prompts \(lines\) for 3 images; give one"):
        rewards_score.split_prompts("a\nb", 3)


def test_a_batch_is_scored_in_chunks(images):
    pixels, prompts = rewards_score.to_pixels(images), [str(i) for i in range(20)]
    ticks, reward = [], Mean()
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

    reward = Mean()
    with pytest.raises(Interrupted):
        rewards_score.score(reward, rewards_score.to_pixels(images), [""] * 20, tick)
    assert len(reward.calls) == 1


def test_a_prompt_that_cannot_be_judged(images):
    pixels = rewards_score.to_pixels(images)
    scene = rewards_sum.combine((load_reward("scene"),), (1.0,))
    with pytest.raises(NodeError, match="the reward 'scene' judges images by their prompt"):
        rewards_score.score(scene, pixels, [""] * 20, quiet)
    said = (
        "cannot score image 0 with the prompt 'a cat', nor any other of the 20: "
        "scene: cannot read 'a cat'"
    )
    with pytest.raises(NodeError, match=said):
        rewards_score.score(scene, pixels, ["a cat"] * 20, quiet)
    with pytest.raises(NodeError, match="image 0 with the prompt 'a cat': cannot read 'a cat'"):
        rewards_score.score(load_reward("scene"), pixels[:1], ["a cat"], quiet)


def test_an_image_that_fails_alone_does_not_lose_the_others(images):
    broken = images.clone()
    broken[3, 1, 2, 0], broken[17, 0, 0, 1] = float("nan"), float("inf")
    prompts = ["a red circle"] * 20
    prompts[11] = "a cat"
    total = rewards_sum.combine((load_reward("scene"), JPEG), (1.0, 0.001))
    pixels = rewards_score.to_pixels(broken)
    scores = rewards_score.score(total, pixels, prompts, quiet, rewards_score.faults(broken))
    bad = [3, 11, 17]
    assert [i for i, value in enumerate(scores.values) if value.isnan()] == bad
    assert [i for i, why in enumerate(scores.errors) if why] == bad
    assert scores.errors[3].startswith("it holds NaN or infinity instead of colours; decode it")
    assert scores.errors[11].startswith("scene: cannot read 'a cat'")
    rest = [i for i in range(20) if i not in bad]
    alone = rewards_score.score(total, pixels[rest], ["a red circle"] * 17, quiet)
    assert scores.values[rest].equal(alone.values)
    order = rewards_score.rank(scores.values)
    assert order[-3:] == bad
    lines = rewards_show.table(scores, prompts, order).splitlines()
    assert lines[0].split() == [
        *("rank", "image", "score", "scene", "jpeg_compressibility", "prompt", "error")
    ]
    assert lines[-2].split()[:3] == ["19", "11", "-"]
    assert "a cat         scene: cannot read 'a cat'" in lines[-2]
    assert lines[1].endswith("a red circle")
    with pytest.raises(NodeError, match=r"best 18 images cannot be kept, as 17 of 20 have a score"):
        rewards_score.check_kept(scores, 18)
    rewards_score.check_kept(scores, 17)


def test_no_number_is_no_score(images):
    class Broken(Mean):
        def score(self, images, prompts):
            return Scores(torch.full((len(images),), float("inf")))

    said = "image 0 with the prompt '', nor any other of the 20: it gives inf"
    with pytest.raises(NodeError, match=said):
        rewards_score.score(Broken(), rewards_score.to_pixels(images), [""] * 20, quiet)
    none = [rewards_score.NO_COLOURS] * 2
    with pytest.raises(NodeError, match="it holds NaN or infinity instead of colours"):
        rewards_score.score(Mean(), rewards_score.to_pixels(images[:2]), [""] * 2, quiet, none)


def test_networks_are_lent_the_device_one_reward_after_another(images):
    log = []

    class Network(Mean):
        def score(self, images, prompts):
            made = torch.nn.Linear(1, 1)  # as a network that is loaded now
            log.append(("score", made.weight.is_inference(), torch.is_grad_enabled()))
            return super().score(images, prompts)

    @contextmanager
    def lend(reward):
        log.append(("lent", reward.name))
        try:
            yield
        finally:
            log.append(("back", reward.name))

    first, second = Network(), Mean()
    total = rewards_sum.combine((first, second), (1.0, 1.0))
    with torch.inference_mode():  # as ComfyUI runs nodes
        pixels = rewards_score.to_pixels(images[:9])
        rewards_score.score(total, pixels, [""] * 9, quiet, lend=lend)
    scored = ("score", False, False)
    lent, back = ("lent", "mean"), ("back", "mean")
    assert log == [lent, scored, scored, back, lent, back]


@pytest.fixture
def memory(monkeypatch):
    """ComfyUI's memory, whose device is one that takes anything."""
    freed = []
    found = types.SimpleNamespace(
        device=torch.device("cpu"),
        freed=freed,
        get_torch_device=lambda: found.device,
        free_memory=lambda size, device: freed.append((size, device)),
        minimum_inference_memory=lambda: 1000,
    )
    monkeypatch.setitem(sys.modules, "comfy", types.SimpleNamespace(model_management=found))
    monkeypatch.setitem(sys.modules, "comfy.model_management", found)
    return found


class WithNetwork(Mean):
    """A reward with a network of 4 numbers and a part that it shares."""

    def modules(self):
        self.asked = True
        first = torch.nn.Linear(3, 1)
        return [first, torch.nn.Sequential(first)]


def test_a_network_gets_its_bytes_on_the_device(memory, monkeypatch):
    lent = []

    @contextmanager
    def taking(modules, device):
        lent.append((len(modules), device))
        yield

    monkeypatch.setattr(rewards_device, "on_device", taking)
    reward = WithNetwork()
    with rewards_device.lend(reward):
        assert not hasattr(reward, "asked")  # a CPU has it already
    memory.device = torch.device("cuda:0")
    with rewards_device.lend(Mean()):
        pass
    assert not memory.freed
    with rewards_device.lend(reward):
        pass
    assert memory.freed == [(4 * 4 + 1000, memory.device)]
    assert lent == [(2, memory.device)]


def test_ranks_keep_the_order_of_equals():
    assert rewards_score.rank(torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0])) == [1, 3, 4, 0, 2]
    values = torch.tensor([1.0, float("nan"), -5.0, float("nan"), 2.0])
    assert rewards_score.rank(values) == [4, 0, 2, 1, 3]


def test_table():
    details = ({"score": 0.5, "colour": 1.0}, {"score": 12.25, "colour": 0.0})
    scores = Scores(torch.tensor([0.5, 12.25]), details)
    assert rewards_show.table(scores, PROMPTS, [1, 0]).splitlines() == [
        "rank  image    score  colour  prompt",
        "   1      1  12.2500  0.0000  a blue square",
        "   2      0   0.5000  1.0000  a red circle",
    ]


@pytest.mark.parametrize(
    ("name", "verb"),
    [("hps_v2_1", "needs"), ("pick_score", "lacks"), ("aesthetic", "lacks")],  # is it offered?
)
def test_missing_weights_say_which_reward_needs_them(name, verb):
    with pytest.raises(NodeError, match=f"^the reward '{name}' {verb} "):
        rewards_make.named_reward(name, "automatic", "automatic", "")


def test_scores_in_one_line():
    scores = Scores(torch.tensor([0.5, 12.25, float("nan")]), (), (None, None, "broken"))
    line = rewards_show.summary(scores, [1, 0, 2])
    assert line == "best: image 1 with 12.2500; mean 6.3750 of 2 images; 1 could not be scored"
    assert rewards_show.summary(Scores(torch.tensor([0.5])), [0]) == "score 0.5000"


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
    scores = Scores(torch.tensor([0.1, 0.3, 0.2]))
    sheet = rewards_show.sheet(pixels, scores, [1, 2, 0])
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


def test_contact_sheet_shows_the_parts_of_a_sum():
    pixels = torch.zeros(2, 3, 32, 48, dtype=torch.uint8)
    nan = float("nan")
    details = ({"scene": 1.0, "a part whose name is far too long": 0.5}, {"scene": nan})
    scores = Scores(torch.tensor([0.1, nan]), details, (None, "why"))
    plain = rewards_show.sheet(pixels, scores, [0, 1])
    sheet = rewards_show.sheet(pixels, scores, [0, 1], rewards_show.part_names(scores))
    grid = grid_of(2, 48, 32)
    more = sheet.shape[1] - plain.shape[1]
    assert more == 2 * grid.step > 0
    assert sheet.shape[2] == plain.shape[2]
    above = grid.corner(0)[1] + grid.shown[1] + grid.band
    assert sheet[0, :above].equal(plain[0, :above])
    for place in range(2):  # a line each below both, within their places
        x = grid.corner(place)[0]
        shown = sheet[0, above : above + more, x : x + grid.cell]
        assert shown[: grid.step].flatten(0, 1).unique(dim=0).shape[0] > 5
        assert sheet[0, above : above + more, x - grid.gap : x].flatten(0, 1).unique(
            dim=0
        ).shape == (1, 3)
