"""PCPO Rate Images and PCPO Taste without ComfyUI: queues, fits, caching, refusals, jobs."""

from __future__ import annotations

import json

import comfy_api_fixture
import pytest
import torch
from comfyui_pcpo.nodes import show
from comfyui_pcpo.nodes.errors import NodeError
from comfyui_pcpo.nodes.rewards import make as rewards_make
from comfyui_pcpo.nodes.rewards import nodes as rewards
from comfyui_pcpo.nodes.taste import nodes as taste
from comfyui_pcpo.nodes.taste import places, rate
from comfyui_pcpo.nodes.training import rewards as training_rewards
from comfyui_pcpo.pcpo.pictures.tensors import pixels_of
from comfyui_pcpo.trainers.taste.store import Store
from PIL import Image
from taste_fixture import pictures, redness


@pytest.fixture(autouse=True)
def said(tmp_path, monkeypatch):
    """The texts that the nodes show; ComfyUI's user folder is a fresh one."""
    texts = []
    monkeypatch.setattr(show, "show_text", lambda text, node: texts.append(text))
    monkeypatch.setattr(places, "folder", lambda: tmp_path / "tastes")
    monkeypatch.setattr(rate, "folder", places.folder)
    return texts


def batch(count=8, seed=0):
    """An IMAGE."""
    found = torch.cat([pixels_of(picture) for picture in pictures(count, seed)])
    return found.permute(0, 2, 3, 1).float() / 255


def rated(images=None, name="mine", prompt="", pairs=20):
    images = batch() if images is None else images
    node = taste.PCPORateImages
    return comfy_api_fixture.run(node, images=images, taste=name, prompt=prompt, pairs=pairs)


def vote(name="mine", count=None, choose=None):
    """Vote for the redder picture of pairs that wait, or as told."""
    store = places.open_taste(name)
    for pair in store.waiting()[:count]:
        values = []
        for digest in (pair.left, pair.right):
            with Image.open(store.image_file(digest)) as picture:
                values.append(redness(picture))
        store.vote(pair, choose or ("left" if values[0] > values[1] else "right"))
    return store


def reward(name="mine"):
    return comfy_api_fixture.run(taste.PCPOTaste, taste=name).result


def refused(function, *given, **named):
    """One sentence with a remedy."""
    with pytest.raises(NodeError) as caught:
        function(*given, **named)
    text = str(caught.value)
    assert "\n" not in text and not text.endswith(".") and ";" in text
    return text


@pytest.mark.parametrize("node", taste.NODES)
def test_schema(node):
    schema = comfy_api_fixture.schema_of(node)
    assert (schema.node_id, schema.category) == (node.__name__, "PCPO/rewards")
    assert schema.display_name.startswith("PCPO ") and schema.description
    assert all(i.tooltip for i in schema.inputs) and all(o.tooltip for o in schema.outputs)


# --- rate ----------------------------------------------------------------------------------------


def test_images_become_pairs_of_a_new_taste_and_are_passed_on(said):
    images = batch()
    passed, waiting, text = rated(images, pairs=6).result
    assert passed is images and waiting == 6 and said == [text]
    assert text.splitlines()[0] == (
        "6 new pairs; 6 wait: open the PCPO tab in the sidebar, page Taste, choose 'mine', and vote"
    )
    store = places.open_taste("mine")
    pairs = store.waiting()
    assert all(pair.random and pair.source == "PCPO Rate Images" for pair in pairs)
    assert len({frozenset((pair.left, pair.right)) for pair in pairs}) == 6
    with Image.open(store.image_file(store.offers()[0].image)) as kept:
        assert (pixels_of(kept)[0].permute(1, 2, 0).float() / 255).equal(images[0])


def test_the_same_images_twice_are_not_asked_twice():
    rated(pairs=6)
    _, waiting, text = rated(pairs=6).result
    assert waiting == 6 and text.startswith("these images were here before, so no pair is new; 6")
    vote()
    assert rated(pairs=6).result[1] == 0
    more = torch.cat([batch(), batch(4, seed=1)])
    _, waiting, _ = rated(more, pairs=50).result
    fresh = {o.image for o in places.open_taste("mine").offers()[8:]}
    pairs = places.open_taste("mine").waiting()
    assert waiting == len(pairs) == 6  # all pairs of the four that are new
    assert all({pair.left, pair.right} <= fresh for pair in pairs)


def test_one_new_image_is_compared_with_those_of_before():
    rated(batch(3), pairs=3)
    vote()
    rated(batch(4), pairs=9)
    assert len(places.open_taste("mine").waiting()) == 3


def test_one_image_alone_makes_no_pair():
    _, waiting, text = rated(batch(1)).result
    assert waiting == 0 and text.startswith("one image makes no pair, connect several; 0 wait")


def test_images_of_one_prompt_are_compared():
    rated(batch(6), prompt="a\na\nb\nb\nc\nc", pairs=9)
    assert sorted(pair.prompt for pair in places.open_taste("mine").waiting()) == ["a", "b", "c"]


def test_half_of_the_pairs_are_the_heads_once_there_is_one():
    rated(batch(16), pairs=30)
    vote()
    reward()
    rated(batch(16, seed=1), pairs=8)
    asked = [pair.random for pair in places.open_taste("mine").waiting()]
    assert sorted(asked) == [False] * 4 + [True] * 4
    store = places.open_taste("mine")
    (store.root / "head.safetensors").write_bytes(b"damaged")
    assert rated(batch(8, seed=2), pairs=4).result[1] == 12  # at random then


def test_an_image_without_colours_is_left_out():
    images = batch(3)
    images[1, 0, 0, 0] = torch.nan
    text = rated(images).result[2]
    assert text.splitlines()[-1] == "1 images are left out: they hold no colours"
    assert len(places.open_taste("mine").offers()) == 2
    images[:] = torch.nan
    assert "no image can be voted on: it holds NaN" in refused(rated, images, "other")
    assert places.names() == ["mine"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"name": "a/b"}, "the taste name 'a/b' has / in it"),
        ({"name": " "}, "the taste name '' cannot be a file's"),
        ({"images": torch.zeros(2, 4, 16, 3)}, "the image is 16x4; a taste needs 8x8"),
        ({"images": torch.zeros(0, 16, 16, 3)}, "the batch is empty"),
        ({"prompt": "a\nb"}, "there are 2 prompts (lines) for 8 images"),
    ],
)
def test_rating_is_refused_before_anything_is_made(given, words):
    assert words in refused(rated, **given)
    assert places.names() == []


def test_a_deleted_taste_is_filled_again_when_queued_again():
    fingerprint = taste.PCPORateImages.fingerprint_inputs
    assert fingerprint(taste="mine", images=None) == ""
    rated()
    made = fingerprint(taste="mine", images=None)
    vote(count=3)
    assert made == fingerprint(taste="mine", images=None) != ""  # so images behind it stay cached
    places.open_taste("mine").delete()
    assert fingerprint(taste="mine", images=None) == ""
    assert rated().result[1] == 20


# --- the reward ----------------------------------------------------------------------------------


def test_a_taste_scores_by_the_votes(said):
    rated(batch(16), pairs=40)
    vote()
    made, text = reward()
    assert said[-1] == text and text.startswith(
        "taste 'mine'\nfitted to 40 votes, 40 of them on random"
    )
    red, green = torch.zeros(2, 1, 3, 16, 16, dtype=torch.uint8)
    red[:, 0], green[:, 1] = 150, 150
    better, worse = made.score(torch.cat([red, green]), ["", ""]).values.tolist()
    assert better > 0 > worse
    assert made.name == "taste"
    total = comfy_api_fixture.run(
        rewards.PCPOCombineRewards,
        rewards={"reward_0": made, "reward_1": rewards_make.remake("sharpness", "{}")},
        weights="1, 0.001",
    )[0]
    assert len(total.rewards) == 2


def test_new_votes_change_what_the_node_gives():
    """ComfyUI runs the node again if its fingerprint is another one."""
    sign = taste.PCPOTaste.fingerprint_inputs
    assert sign(taste="mine") == ""
    rated(batch(16), pairs=40)
    vote(count=30)
    before = sign(taste="mine")
    first, _ = reward()
    assert sign(taste="mine") == before  # its own fit is no news
    vote(count=2)
    assert sign(taste="mine") != before
    second, text = reward()
    assert first.fingerprint() != second.fingerprint() and "\nfitted to 32 votes" in text
    places.open_taste("mine").undo()
    third, text = reward()
    assert third.fingerprint() != second.fingerprint() and "\nfitted to 31 votes" in text


def test_what_is_fitted_already_is_not_fitted_again(monkeypatch):
    rated(pairs=10)
    vote()
    reward()
    monkeypatch.setattr("comfyui_pcpo.trainers.taste.learn.refit", lambda *_, **__: 1 / 0)
    reward()


def test_the_newest_taste_is_the_one_that_was_changed_last():
    assert "there is no taste yet; make one with PCPO Rate Images" in refused(reward, rate.NEWEST)
    for name in ("one", "other"):
        rated(name=name)
        vote(name)
    assert reward(rate.NEWEST)[1].startswith("taste 'other'")
    newest = taste.PCPOTaste.fingerprint_inputs(taste=rate.NEWEST)
    rated(batch(4, seed=5), name="one")
    assert reward(rate.NEWEST)[1].startswith("taste 'one'")
    assert taste.PCPOTaste.fingerprint_inputs(taste=rate.NEWEST) != newest


@pytest.mark.parametrize(
    ("choice", "words"),
    [(None, "it has no votes yet"), ("tie", "its 6 votes are all ties"), ("skip", "it has no vot")],
)
def test_votes_that_decide_nothing_make_no_reward(choice, words):
    rated(pairs=6)
    if choice:
        vote(choose=choice)
    text = refused(reward)
    assert text.startswith(f"the taste 'mine' knows nothing: {words}")
    assert text.endswith("open the PCPO tab in the sidebar, page Taste, choose 'mine', and vote")


def test_one_sided_votes_are_said_with_the_reward():
    rated(batch(16), pairs=40)
    vote(choose="left")
    assert "all 40 choices fell on the left picture" in reward()[1]


def test_a_taste_that_is_not_there_is_said():
    rated()
    assert refused(reward, "gone").startswith("there is no taste 'gone'; it may have been deleted")


def test_a_head_of_other_features_is_one_sentence():
    rated(batch(16), pairs=20)
    vote()
    reward()
    store = places.open_taste("mine")
    store.keep_result(store.result() | {"features": "other"})
    from comfyui_pcpo.pcpo.rewards import taste as reward_module

    head = reward_module.Head.load(store.root / "head.safetensors")
    from dataclasses import replace

    replace(head, features="other").save(store.root / "head.safetensors")
    words = "there are no features 'other'; choose one of grid, clip_l"
    assert words in refused(reward)
    rated(batch(4, seed=1))
    vote()
    assert words in refused(reward)
    assert len(store.votes()) == 26  # nothing is lost


# --- a job ---------------------------------------------------------------------------------------


def test_a_job_gets_the_folder_from_the_server():
    rated(batch(16), pairs=20)
    vote()
    made, _ = reward()
    (judge,) = training_rewards.judges_of(made)
    section = training_rewards.section_of([judge])
    assert section["taste"]["options"]["folder"] == str(places.folder() / "mine")
    assert training_rewards.doubts_of([judge]) == [
        "the taste does not know you yet: it has 20 votes; give it 30 or more"
    ]
    training_rewards.check_rewards([judge])
    Store(places.folder() / "mine").delete()  # after PCPO Taste ran, and before the job is queued
    said = refused(training_rewards.check_rewards, [judge])
    gone = places.folder() / "mine"
    assert said.startswith(f"there is no taste {gone}: it was moved or deleted, or never made; ")


@pytest.mark.parametrize("option", ["folder", "head"])
def test_a_graph_names_no_folder_of_a_taste(option):
    given = json.dumps({option: "/etc"})
    with pytest.raises(NodeError, match=f"the option '{option}' .* is a path, which a graph may"):
        rewards_make.named_reward("taste", "automatic", "automatic", given)
    inputs = comfy_api_fixture.schema_of(rewards.PCPOReward).inputs
    assert "taste" not in inputs[0].options


def test_users_have_tastes_of_their_own_and_no_paths(monkeypatch):
    rated(pairs=6)
    vote()
    reward()
    store = places.open_taste("mine")
    store.keep_result(store.result() | {"features": "other", "last": ""})
    monkeypatch.setattr("comfyui_pcpo.nodes.jobs.access.is_shared", lambda: True)
    with pytest.raises(NodeError) as caught:
        reward()
    assert str(store.root.parent) not in str(caught.value)
