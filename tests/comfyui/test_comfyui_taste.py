"""A person's taste in real ComfyUI: images rated, scored and trained on, asked about meanwhile.

What it needs is in comfyui_fixture.py. Votes are cast by the store's own functions: those on the
page are in test_comfyui_taste_page.py.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfyui_fixture import HOST, needs_host
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.taste.store import Pair, Store
from comfyui_server_fixture import Server
from PIL import Image

pytestmark = needs_host

Graph = dict[str, dict[str, Any]]
PROMPTS = "a red circle\na blue square\na green cross over a red box\na golden disc"


def node(kind: str, /, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def drawn(seed: int = 1) -> Graph:
    """Twelve pictures of the demo model, at node "draw"."""
    given = {"negative": "", "cfg": 1.0, "width": 64, "height": 64, "prompts": PROMPTS}
    wires = {"model": ["load", 0], "clip": ["load", 1], "vae": ["load", 2]}
    return {
        "load": node("PCPODemoModel", demo="tiny-sd"),
        "sigmas": node("PCPOScheduler", model=["load", 0], steps=4, grid="auto", denoise=1.0),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "draw": node(
            "PCPODrawPrompts",
            **wires,
            **given,
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            images_per_prompt=3,
            batch=12,
            seed=seed,
        ),
    }


def rated(name: str, pairs: int = 10, seed: int = 1) -> Graph:
    """These pictures put up for votes."""
    about = {"taste": name, "prompt": ["draw", 1], "pairs": pairs}
    return drawn(seed) | {"rate": node("PCPORateImages", images=["draw", 0], **about)}


def judged(name: str) -> Graph:
    """The pictures scored by a taste, alone and beside another reward, and the best kept."""
    return drawn() | {
        "taste": node("PCPOTaste", taste=name),
        "sharp": node("PCPOReward", reward="sharpness", weights="automatic", options=""),
        "sum": node(
            "PCPOCombineRewards",
            **{"rewards.reward_0": ["taste", 0], "rewards.reward_1": ["sharp", 0]},
            weights="1, 0.0001",
        ),
        "score": node("PCPOScoreImages", images=["draw", 0], reward=["sum", 0], prompt=["draw", 1]),
        "best": node(
            "PCPOBestOfN", images=["draw", 0], reward=["taste", 0], prompt=["draw", 1], n=2
        ),
        "kept": node("PreviewImage", images=["best", 0]),
        "told": node("PreviewAny", source=["taste", 1]),
    }


def trained(name: str, taste: str, **settings: Any) -> Graph:
    """A small training on a taste that asks after every iteration."""
    small = {
        **{"run_iterations": 4, "run_save_every": 2, "run_micro_batch": 16, "run_eval_prompts": 2},
        **{"run_eval_steps": 2, "prompts_per_iteration": 4, "prompts_images_per_prompt": 4},
        **{"sampler_steps": 4, "taste_ask_every": 1, "taste_pairs": 2},
    }
    chosen = {f"preset.{key}": value for key, value in (small | settings).items()}
    return {
        "load": node("PCPODemoModel", demo="tiny-sd"),
        "taste": node("PCPOTaste", taste=taste),
        "prompts": node("PCPOPrompts", source="scenes"),
        "settings": node("PCPOTrainingSettings", preset="demo-taste", **chosen),
        "train": node(
            "PCPOTrainInBackground",
            model=["load", 0],
            clip=["load", 1],
            vae=["load", 2],
            reward=["taste", 0],
            prompts=["prompts", 0],
            settings=["settings", 0],
            name=name,
            continue_from="none",
            on_server_exit="save_and_stop",
            pause_while_busy=False,
        ),
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with Server(HOST, tmp_path_factory.mktemp("comfyui")) as started:
        yield started
    for job in map(JobFolder, (started.folder / "user" / "__pcpo" / "jobs").glob("*")):
        if job.is_held():
            os.kill(job.read("status.json")["pid"], signal.SIGKILL)


def folder_of(server: Server, name: str) -> Path:
    return server.folder / "user" / "__pcpo" / "tastes" / name


def blueness(store: Store, digest: str) -> float:
    with Image.open(store.image_file(digest)) as picture:
        pixels = np.asarray(picture, dtype=float) / 255
    return float((pixels[..., 2] - pixels[..., 0]).mean())


def vote(store: Store, pairs: list[Pair]) -> None:
    """Vote for the bluer picture of each pair."""
    for pair in pairs:
        left, right = (blueness(store, digest) for digest in (pair.left, pair.right))
        store.vote(pair, "left" if left > right else "right")


def fault(server: Server, graph: Graph) -> tuple[str, str]:
    """The node that fails, and its one sentence."""
    status = server.history(graph)["status"]
    (error,) = (about for kind, about in status["messages"] if kind == "execution_error")
    said = error["exception_message"].strip()
    assert "\n" not in said
    return error["node_type"], said


def newest(server: Server) -> dict[str, Any]:
    return server.get("/pcpo/jobs")["jobs"][0]


def wait(server: Server, id: str, until: Any) -> dict[str, Any]:
    end = time.monotonic() + 300
    while not until(job := server.get(f"/pcpo/jobs/{id}")):
        assert time.monotonic() < end and job["state"] not in ("failed", "lost"), job
        time.sleep(0.1)
    return job


def test_pictures_are_rated_scored_and_kept_by_the_votes(server):
    outputs = server.run(rated("blue"))
    (text,) = outputs["rate"]["text"]
    assert text.startswith("10 new pairs; 10 wait: open the PCPO tab in the sidebar, page Taste, ")
    store = Store(folder_of(server, "blue"))
    assert len(store.waiting()) == 10 and len(store.offers()) == 12
    prompts = {offer.image: offer.prompt for offer in store.offers()}
    assert all(prompts[p.left] == prompts[p.right] == p.prompt for p in store.waiting())
    assert server.get("/pcpo/tastes")["tastes"][0]["waiting"] == 10

    kind, said = fault(server, judged("blue"))
    assert kind == "PCPOTaste" and "'blue' knows nothing: it has no votes yet; open the" in said
    vote(store, store.waiting())
    outputs = server.run(judged("blue"))
    assert "10 votes" in outputs["told"]["text"][0] and len(outputs["kept"]["images"]) == 2
    first = outputs["score"]["text"][0]
    assert "of 12 images" in first
    assert server.run(judged("blue"))["score"]["text"][0] == first

    server.run(rated("blue", seed=100))  # new pictures, new votes: another head
    vote(store, store.waiting())
    assert len(store.votes()) > 10
    outputs = server.run(judged("newest taste"))
    assert outputs["score"]["text"][0] != first
    assert f"{len(store.votes())} votes" in outputs["told"]["text"][0]


def test_what_cannot_be_used_is_one_sentence(server):
    kind, said = fault(server, judged("gone"))
    assert kind == "PCPOTaste" and said.startswith("there is no taste 'gone'; ")
    kind, said = fault(server, rated("a/b"))
    assert kind == "PCPORateImages" and said.startswith("the taste name 'a/b' has / in it; use")
    given = {"reward": "taste", "weights": "automatic", "options": '{"folder": "/etc"}'}
    graph = drawn() | {"reward": node("PCPOReward", **given)}
    graph["score"] = node("PCPOScoreImages", images=["draw", 0], reward=["reward", 0], prompt="")
    answer = server.post("/prompt", {"prompt": graph, "client_id": "tests"})
    assert answer["error"]["type"] == "prompt_outputs_failed_validation"


def test_a_job_asks_while_it_trains_and_learns_from_the_votes(server):
    server.run(rated("live", pairs=30))
    store = Store(folder_of(server, "live"))
    vote(store, store.waiting()[:8])
    said = server.run(trained("live_lora", "live"))["train"]["text"][0]
    assert "the taste does not know you yet: it has 8 votes" in said
    job = newest(server)
    config = JobFolder(server.folder / "user" / "__pcpo" / "jobs" / job["id"]).read("job.json")
    assert config["config"]["rewards"]["taste"]["options"]["folder"] == str(store.root)

    def asked() -> list[Pair]:
        return [pair for pair in store.waiting() if "iteration 1" in pair.source]

    wait(server, job["id"], lambda now: asked())
    assert store.waiting()[0].source.startswith(job["id"])  # the newest first
    shown = server.post("/pcpo/tastes/live/next", {"window": "tests"})
    assert "iteration" in shown["pair"]["source"]
    vote(store, asked())
    job = wait(server, job["id"], lambda now: now["state"] == "done")
    votes = [line["votes_taste"] for line in job["metrics"]]
    assert votes[0] == 8 and votes[-1] > 8
    assert all(line["distance_taste"] > 0 for line in job["metrics"])


def test_a_taste_that_is_deleted_while_a_job_uses_it_costs_a_sentence(server):
    server.run(rated("lost"))
    store = Store(folder_of(server, "lost"))
    vote(store, store.waiting())
    server.run(trained("lost_lora", "lost"))
    id = newest(server)["id"]
    wait(server, id, lambda now: now["iteration"] >= 1)
    server.post("/pcpo/tastes/lost/delete", {})
    job = wait(server, id, lambda now: now["state"] == "done")
    assert not store.root.exists() and job["iteration"] == 4
    assert "the run goes on with the head of 10 votes" in "\n".join(job["log"])


def test_a_taste_that_is_deleted_before_its_job_begins_is_said_by_the_job(server):
    for name in ("kept", "early"):
        server.run(rated(name))
        store = Store(folder_of(server, name))
        vote(store, store.waiting())
    server.run(trained("first", "kept", run_iterations=3))
    server.run(trained("second", "early"))  # waits for the first one
    first, second = (job["id"] for job in server.get("/pcpo/jobs")["jobs"][1::-1])
    server.post("/pcpo/tastes/early/delete", {})
    wait(server, first, lambda now: now["state"] == "done")
    end = time.monotonic() + 120
    while (job := server.get(f"/pcpo/jobs/{second}"))["state"] != "failed":
        assert time.monotonic() < end, job
        time.sleep(0.2)
    assert f"there is no taste {store.root}: it was moved or deleted" in job["message"]
    kind, said = fault(server, trained("third", "early"))
    assert kind == "PCPOTaste" and said.startswith("there is no taste 'early'; ")
