"""The known traps of these rewards: each is stepped into on purpose, and parity notices.

A test first shows that the score is the reference's, then that it would not be with the mistake;
so a mistake made in earnest cannot pass the tests of parity.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import rewards_fixture as fixture
import torch
import transformers
from comfyui_pcpo.pcpo.pictures.tensors import pixels_of
from comfyui_pcpo.pcpo.pretrained import clip as towers
from comfyui_pcpo.pcpo.pretrained import layouts, preprocess, shapes, tokenizers
from comfyui_pcpo.pcpo.pretrained import network as pretrained_network
from comfyui_pcpo.pcpo.pretrained import read as stored
from comfyui_pcpo.pcpo.pretrained.network import _BUILT
from comfyui_pcpo.pcpo.pretrained.preprocess import Cropped, Padded, normalise
from comfyui_pcpo.pcpo.pretrained.tokenizers import bert_tokenizer
from comfyui_pcpo.pcpo.rewards import aesthetic, hps, load_reward
from comfyui_pcpo.pcpo.rewards.base import BatchReward, on_device
from rewards_files_fixture import CLIP_H, CLIP_L, NAMES, make_small, write
from torch.nn import functional

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "rewards.json").read_text())
PICTURES = fixture.pictures()
PROMPTS = list(fixture.PROMPTS)
EQUAL = 1e-6
SEEN = 1e-5  # ten times what parity allows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write(tmp_path_factory.mktemp("reward_models"))


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    make_small(monkeypatch)


OPTIONS = {"pick_score": {"normalise": "/26"}}


def off(name, files, picture="landscape", reward=None):
    """How far a reward is from its reference."""
    reward = reward or load_reward(name, folders=[str(files)], **OPTIONS.get(name, {}))
    golden = GOLDEN["hps" if name.startswith("hps") else name][picture]
    golden = torch.tensor([golden] if isinstance(golden, float) else golden)
    found = reward.score([PICTURES[picture]] * len(golden), PROMPTS[: len(golden)]).values
    return (found - golden).abs().max().item()


@pytest.fixture
def right(files):
    """Parity as it is."""
    for name in ("aesthetic", "pick_score", "hps_v2_1", "image_reward"):
        assert off(name, files) <= EQUAL


@pytest.mark.usefixtures("right")
@pytest.mark.parametrize(
    "key, spec, name",
    [
        ("clip_l_vision", replace(CLIP_L, activation="gelu"), "aesthetic"),
        ("hps_v2_1", replace(CLIP_H, activation="quick_gelu"), "hps_v2_1"),
        ("pick_score", replace(CLIP_H, activation="quick_gelu"), "pick_score"),
    ],
)
def test_the_other_gelu(files, monkeypatch, key, spec, name):
    monkeypatch.setitem(shapes.CLIPS, key, spec)
    assert off(name, files) > SEEN


def test_towers_of_other_gelus_are_not_shared(files, monkeypatch):
    one = load_reward("hps_v2", folders=[str(files)])
    one.modules()
    monkeypatch.setitem(shapes.CLIPS, "hps_v2_1", replace(CLIP_H, activation="quick_gelu"))
    other = load_reward("hps_v2_1", folders=[str(files)])
    assert not set(map(id, one.modules())) & set(map(id, other.modules()))


def test_image_rewards_norms_have_timms_epsilon(files):
    """Which moves its small network's score too little to be seen there."""
    prepared = Cropped(corner="even")(pixels_of(PICTURES["landscape"]))
    golden = torch.tensor(GOLDEN["image_reward_vision"])
    network = load_reward("image_reward", folders=[str(files)])._vision
    assert (network(prepared).last_hidden_state.flatten()[::13] - golden).abs().max() < SEEN
    for part in network.modules():
        if isinstance(part, torch.nn.LayerNorm):
            assert part.eps == 1e-6
            part.eps = 1e-5  # transformers' default
    assert (network(prepared).last_hidden_state.flatten()[::13] - golden).abs().max() > 5 * SEEN


@pytest.mark.usefixtures("right")
def test_image_reward_reads_in_both_directions(files, monkeypatch):
    reward = load_reward("image_reward", folders=[str(files)])
    forward = reward._text.forward
    monkeypatch.setattr(
        reward._text, "forward", lambda **given: forward(**{**given, "is_decoder": True})
    )
    assert off("image_reward", files, reward=reward) > SEEN


@pytest.mark.usefixtures("right")
def test_image_reward_masks_what_fills_up_a_prompt(files, monkeypatch):
    reward = load_reward("image_reward", folders=[str(files)])
    forward = reward._text.forward
    monkeypatch.setattr(
        reward._text, "forward", lambda **given: forward(**{**given, "attention_mask": None})
    )
    assert off("image_reward", files, reward=reward) > SEEN


@pytest.mark.parametrize("name", NAMES)
def test_networks_are_frozen_and_evaluate(files, name):
    reward = load_reward(name, folders=[str(files)])
    for module in reward.modules():
        assert not any(part.training for part in module.modules() if part is not module)
        assert not any(p.requires_grad for p in module.parameters())
    if name != "clip_score":
        for module in reward.modules():
            module.train()  # by somebody else: there is nothing at random in it
        assert (
            off(
                name, files, reward=load_reward(name, folders=[str(files)], **OPTIONS.get(name, {}))
            )
            <= EQUAL
        )


def test_dropout_would_be_seen(files):
    """The reference's heads have it, and are not evaluated unless asked to."""
    state = {
        f"{n}": t for n, t in aesthetic.load(files / "sac+logos+ava1-l14-linearMSE.pth").items()
    }
    layers, embeds = (0, 2, 4, 6, 7), towers.unit(fixture.numbers("embeds", (4, 768)))
    parts = []
    for layer, wide, narrow in zip(layers, shapes.HEAD, (768, *shapes.HEAD), strict=False):
        linear = torch.nn.Linear(narrow, wide)
        linear.weight.data = state[f"layers.{layer}.weight"]
        linear.bias.data = state[f"layers.{layer}.bias"]
        parts += [linear, torch.nn.Dropout(0.2)] if layer < 6 else [linear]
    written_out = torch.nn.Sequential(*parts)
    ours = towers.AffineHead(state)(embeds)
    torch.manual_seed(0)
    with torch.no_grad():
        assert (written_out.train()(embeds)[:, 0] - ours).abs().max() > SEEN
        assert (written_out.eval()(embeds)[:, 0] - ours).abs().max() <= EQUAL


def test_a_tokenizer_without_its_vocabulary_is_noticed(files, monkeypatch):
    words = files / "bert-base-uncased" / "vocab.txt"
    made = transformers.BertTokenizerFast
    ids = bert_tokenizer("image_reward", words, 35)(["a red cube"]).ids[0].tolist()
    assert ids == [2, 5, 6, 7, 3]
    assert len(made(vocab_file=str(words))) < len(fixture.WORDS)  # transformers 5's silent trap
    begin = made.__init__
    monkeypatch.setattr(made, "__init__", lambda self, _, **more: begin(self, **more))
    with pytest.raises(RuntimeError, match=r"the tokenizer read 5 tokens of \d+"):
        bert_tokenizer("image_reward", words, 35)


@pytest.mark.parametrize("name", ["aesthetic", "pick_score", "hps_v2_1", "image_reward"])
def test_the_callers_mixed_precision_changes_nothing(files, name):
    with torch.autocast("cpu", torch.bfloat16):
        assert off(name, files) <= EQUAL


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_follows_a_tower_is_float32(files, name, dtype):
    """A final stage in half precision gives values on its own coarse grid."""
    reward = load_reward(name, folders=[str(files)], dtype=dtype)
    exact = load_reward(name, folders=[str(files)])
    images = [PICTURES[name] for name in ("square", "landscape", "portrait", "tiny")]
    found = reward.score(images, PROMPTS)
    assert found.values.dtype == torch.float32
    on_grid = found.values.to(getattr(torch, dtype)).float() == found.values
    assert on_grid.sum() <= 1
    far = (found.values - exact.score(images, PROMPTS).values).abs().max()
    assert 0 < far < (3 if name == "pick_score" else 0.1)


@pytest.mark.usefixtures("right")
def test_a_bfloat16_product_would_be_seen(files, monkeypatch):
    monkeypatch.setattr(hps, "cosines", lambda a, b: (a.bfloat16() * b.bfloat16()).sum(-1).float())
    assert off("hps_v2_1", files) > SEEN


def test_the_logit_scale_is_pick_scores_alone(files):
    pictures = [PICTURES["large"]] * 4

    def values(name, **options):
        return load_reward(name, folders=[str(files)], **options).score(pictures, PROMPTS).values

    cosine = values("pick_score", normalise="cosine")
    torch.testing.assert_close(values("pick_score"), 100 * cosine, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(values("pick_score", normalise="/26"), 100 / 26 * cosine)
    assert cosine.abs().max() < 1
    for name in ("hps_v2", "hps_v2_1", "clip_score"):
        assert values(name).abs().max() < 1


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_scored_by_its_own_prompt(files, name):
    """The diagonal and not a row or a column of all by all."""
    reward = load_reward(name, folders=[str(files)])
    pictures = [PICTURES["square"], PICTURES["large"], PICTURES["square"]]
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    found = reward.score(pictures, prompts).values
    assert found.shape == (3,)
    swapped = reward.score(pictures[::-1], prompts[::-1]).values.flip(0)
    torch.testing.assert_close(found, swapped, rtol=0, atol=2e-5)
    assert (found[0] != found[2]) == reward.needs_prompt


@pytest.mark.usefixtures("right")
@pytest.mark.parametrize("preparation", [Padded(antialias=False), Cropped()])
def test_hps_has_a_preparation_of_its_own(files, monkeypatch, preparation):
    monkeypatch.setattr(hps._Hps, "preparation", preparation)
    assert off("hps_v2_1", files) > SEEN


def test_the_old_resizing_is_there_where_it_is_asked_for(files):
    images = pixels_of(PICTURES["landscape"])
    inside = functional.interpolate(
        images.float() / 255, (135, 224), mode="bicubic", align_corners=False, antialias=False
    )
    expected = normalise(functional.pad(inside, (0, 0, 44, 45)))
    reward = load_reward("hps_v2", folders=[str(files)], legacy_no_antialias=True)
    assert torch.equal(reward.preparation(images), expected)
    assert (Padded()(images) - expected).abs().mean() > 0.02
    assert reward.fingerprint()["preparation"] != Padded().id


def test_a_picture_that_fits_one_way_is_padded_too(files):
    """HPSv2's own code leaves it as it is, and its network cannot take it then."""
    images = pixels_of(PICTURES["fits"])
    black = normalise(torch.zeros(1, 3, 1, 1))
    prepared = Padded()(images)
    assert prepared.shape == (1, 3, 224, 224)
    assert torch.equal(prepared[..., 32:-32], normalise(images.float() / 255))
    assert torch.equal(prepared[..., :32], black.expand(1, 3, 224, 32))


@pytest.mark.usefixtures("right")
def test_torchvision_crops_elsewhere_than_transformers(files, monkeypatch):
    """Where an odd number of columns is too many, they begin one apart."""
    odd = pixels_of(PICTURES["landscape"])  # 200 x 331: 370 wide then, 146 too many
    assert torch.equal(Cropped()(odd), Cropped(corner="even")(odd))
    odd = pixels_of(PICTURES["landscape"].convert("RGB").crop((0, 0, 303, 200)))  # 339: 115
    assert not torch.equal(Cropped()(odd), Cropped(corner="even")(odd))


def test_hps_reads_a_cleaned_prompt_and_pick_score_does_not(files, monkeypatch):
    curly = "an astronaut’s “glove” &amp; more"
    plain = 'an astronaut\'s "glove" & more'
    picture = [PICTURES["large"]]
    for name, is_equal in (("hps_v2_1", True), ("pick_score", False), ("clip_score", False)):
        reward = load_reward(name, folders=[str(files)])
        values = [reward.score(picture, [prompt]).values.item() for prompt in (curly, plain)]
        assert (values[0] == values[1]) == is_equal
    assert hps.clean_prompt(curly) == plain


def test_prompts_can_be_cleaned_without_ftfy(files, monkeypatch, caplog):
    monkeypatch.setattr(tokenizers, "find_spec", lambda _: None)
    reward = load_reward("hps_v2_1", folders=[str(files)])
    reward.score([PICTURES["large"]] * 2, ["a &amp; b", "c"])
    assert caplog.text.count("ftfy` brings it") == 1
    assert tokenizers.clean_prompt("a “cat” &amp;amp; \n dog") == "a “cat” & dog"


def test_an_open_clip_file_is_turned_the_right_way(files, monkeypatch):
    """Queries, keys and values lie in this order, and projections as their transposes."""
    read = layouts._open_clip

    def swapped(name):
        turned = str.maketrans("qk", "kq")
        return {
            re.sub("([qk])_proj", lambda m: m[0].translate(turned), ours): piece
            for ours, piece in read(name).items()
        }

    assert off("hps_v2_1", files) <= EQUAL
    monkeypatch.setattr(layouts, "_open_clip", swapped)
    monkeypatch.setattr(stored, "_SEEN", {})
    assert off("hps_v2_1", files) > SEEN


# What holds for all


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_loaded_before_it_is_needed(files, name, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(pretrained_network, "build_frozen", refuse)
    reward = load_reward(name, folders=[str(files)])
    assert isinstance(reward, BatchReward)
    assert reward.complaints(["a cube", " "])[0] is None
    print_of = reward.fingerprint()
    assert json.loads(json.dumps(print_of)) == print_of
    assert all(len(file["sha256"]) == 64 for file in print_of["weights"].values())
    with pytest.raises(AssertionError, match="a network was loaded"):
        reward.modules()


def test_equal_towers_are_in_memory_once(files):
    aesthetic_one = load_reward("aesthetic", folders=[str(files)])
    clip_one = load_reward("clip_score", folders=[str(files)])
    assert aesthetic_one.modules()[0] is clip_one.modules()[0]
    two, two_one = (load_reward(name, folders=[str(files)]) for name in ("hps_v2", "hps_v2_1"))
    assert two.modules()[0] is two_one.modules()[0]
    assert two.modules()[1] is two_one.modules()[1]
    half = load_reward("aesthetic", folders=[str(files)], dtype="bfloat16")
    assert half.modules()[0] is not aesthetic_one.modules()[0]
    pick = load_reward("pick_score", folders=[str(files)])
    assert pick.modules()[0] is not two.modules()[0]
    before = len(_BUILT)
    del aesthetic_one, clip_one, half
    assert len(_BUILT) == before - 3


@pytest.mark.parametrize("name", NAMES)
def test_networks_can_be_lent_elsewhere_between_scores(files, name):
    reward = load_reward(name, folders=[str(files)], **OPTIONS.get(name, {}))
    pictures, prompts = [PICTURES["large"]] * 2, PROMPTS[:2]
    expected = reward.score(pictures, prompts).values
    with on_device(reward.modules(), torch.device("cpu")):
        for tensor in {t for m in reward.modules() for t in (*m.parameters(), *m.buffers())}:
            tensor.data = tensor.data.clone()  # as on another device
        assert torch.equal(reward.score(pictures, prompts).values, expected)
        for module in reward.modules():
            for parameter in module.parameters():
                parameter.data.zero_()
        assert not torch.equal(reward.score(pictures, ["other", "ones"]).values, expected)
    assert torch.equal(reward.score(pictures, prompts).values, expected)
    reward.modules()[0].to("meta")
    assert reward.device.type == "meta"


def test_a_prompt_is_embedded_once(files, monkeypatch):
    monkeypatch.setattr(towers, "_PROMPTS_KEPT", 2)
    reward = load_reward("pick_score", folders=[str(files)])
    asked = []
    embed = reward._text._embed
    monkeypatch.setattr(reward._text, "_embed", lambda p: asked.append(list(p)) or embed(p))
    picture = PICTURES["square"]
    values = [reward.score([picture] * len(p), p).values for p in (["a", "b", "a"], ["b"], ["a"])]
    assert asked == [["a", "b"]]
    torch.testing.assert_close(values[0][1:], torch.cat(values[1:]), rtol=1e-6, atol=0)
    reward.score([picture] * 3, ["c", "d", "e"])
    reward.score([picture], ["a"])
    assert asked == [["a", "b"], ["c", "d", "e"], ["a"]]
    assert len(reward._text._kept) == 2


@pytest.mark.parametrize("name", NAMES)
def test_the_path_of_other_devices_is_near(files, monkeypatch, name):
    """What a GPU would do, done here: torch resizes, within one step of 255."""
    reward = load_reward(name, folders=[str(files)])
    pictures, prompts = [PICTURES["landscape"], PICTURES["tiny"]], PROMPTS[:2]
    exact = reward.score(pictures, prompts).values
    monkeypatch.setattr(preprocess, "resize", preprocess.resized_by_torch)
    near = reward.score(pictures, prompts).values
    assert (exact - near).abs().max() < (0.1 if name == "pick_score" else 2e-3)
