"""Ten mistakes of a user: each is refused before anything runs, in one sentence with a remedy.

What it needs is in comfyui_fixture.py; the browser needs playwright's client and a Chromium.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from comfyui_fixture import HOST, MODELS, needs_host, needs_models, write_lora
from comfyui_server_fixture import Server, choose
from test_comfyui_background import Graph, node, parts, training
from test_comfyui_workflows import APP, frontend

__all__ = ["frontend"]
FILES = ("checkpoints/tiny_sd15.safetensors", "checkpoints/tiny_sd35.safetensors")
pytestmark = [needs_host, needs_models(*FILES)]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("comfyui")
    for kind in ("checkpoints", "loras"):
        (folder / "models" / kind).mkdir(parents=True)
    for file in FILES:
        (folder / "models" / file).symlink_to(MODELS / file)
    write_lora(folder / "models" / "loras" / "of_sd15.safetensors", "sd15")
    choose(folder)
    with Server(HOST, folder) as started:
        yield started


def changed(graph: Graph, of: str, **inputs: Any) -> Graph:
    graph[of]["inputs"] |= inputs
    return graph


def reward(**options: Any) -> dict[str, Any]:
    return {"weights": "automatic", "options": "", **options}


MISTAKES = {
    "a checkpoint of another family": (
        lambda: training("x", parts("tiny_sd35.safetensors")),
        *("train", "is for SD1.x models and this MODEL is SD3.5; choose one of demo-flow"),
    ),
    "no prompts": (
        lambda: changed(training("x", text="a"), "prompts", **{"source.text": " \n"}),
        *("prompts", "the text holds no prompt; write one prompt per line"),
    ),
    "too few steps": (
        lambda: training("x", sampler_steps=1, sampler_drop_last=1),
        *("settings", "sampler.drop_last is 1 of 1 steps; at least one must be trained"),
    ),
    "weights that are not there": (
        lambda: changed(training("x"), "reward", **reward(reward="pick_score")),
        *("reward", "the reward 'pick_score' needs PickScore_v1/model.safetensors"),
    ),
    "a LoRA of another family": (
        lambda: changed(
            training("x", parts("tiny_sd35.safetensors"), preset="demo-flow"),
            *("train",),
            continue_from="of_sd15.safetensors",
        ),
        *("train", "of_sd15.safetensors is a LoRA for SD1.x, and this MODEL is SD3.5; choose"),
    ),
    "a full disk": (
        lambda: training("x", run_iterations=10**6, run_save_every=1, trainable_rank=1024),
        *("train", "free and this training writes about"),
    ),
    "a bad name": (
        lambda: training("a/b"),
        *("train", "the LoRA name 'a/b' has / in it; use letters, digits, - and _"),
    ),
    "one image per prompt": (
        lambda: training("x", prompts_images_per_prompt=1, advantage_kind="group"),
        *(
            "settings",
            "advantage.kind 'group' needs prompts.images_per_prompt of at least 2; it is 1",
        ),
    ),
    "an option that is misspelt": (
        lambda: changed(training("x"), "reward", **reward(options='{"qualty": 50}')),
        *("reward", "has no option 'qualty'; it has quality"),
    ),
    "weights of rewards that are not one each": (
        lambda: (
            training("x")
            | {
                "sum": node(
                    "PCPOCombineRewards", weights="1, 2", **{"rewards.reward_0": ["reward", 0]}
                ),
                "score": node(
                    "PCPOScoreImages", images=["decode", 0], reward=["sum", 0], prompt=""
                ),
                "decode": node("EmptyImage", width=64, height=64, batch_size=1, color=0),
            }
        ),
        *("sum", "the number of weights is 2 and the number of rewards is 1; give one"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_before_anything_runs(server, mistake):
    make, where, said = MISTAKES[mistake]
    answer = server.post("/prompt", {"prompt": make(), "client_id": "tests"})
    faults = answer["node_errors"]
    (fault,) = faults[where]["errors"]
    assert fault["type"] == "custom_validation_failed"
    _, _, sentence = fault["details"].partition(" - ")
    assert said in sentence and "\n" not in sentence and len(sentence) < 700  # with paths
    assert not [other for other in faults if other != where and faults[other]["errors"]]


QUEUED = f"""async (graph) => {{ {APP}
    await app.loadApiJson(graph, "mistake");
    app.queuePrompt(0, 1).catch(() => {{}});
}}"""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_read_on_the_page_without_a_click(frontend, mistake):
    make, _, said = MISTAKES[mistake]
    frontend.evaluate(QUEUED, make())
    notice = frontend.locator(".pcpo-notice", has_text=said)  # in either case
    notice.wait_for()
    assert notice.count() == 1
    notice.get_by_role("button").last.click()
    notice.wait_for(state="detached")


def test_what_is_right_passes(server):
    graph = training("fine", parts("tiny_sd15.safetensors"), "a cat\na dog")
    graph["train"]["inputs"] |= {"dry_run": True, "continue_from": "of_sd15.safetensors"}
    assert server.post("/prompt", {"prompt": graph, "client_id": "tests"})["node_errors"] == {}
