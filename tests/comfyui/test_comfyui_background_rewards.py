"""Training from the graph on several rewards, and on one that another process serves.

What it needs is in comfyui_fixture.py.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
from comfyui_fixture import needs_host
from comfyui_pcpo.tests.comfyui.test_comfyui_background import (
    Graph,
    error_of,
    jobs_of,
    node,
    server,
    started,
    training,
    wait,
)
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_server_fixture import Server
from http_fixture import RewardServer

__all__ = ["server"]
pytestmark = needs_host

JPEG = "jpeg_incompressibility"


def reward(name: str, options: str = "") -> dict[str, Any]:
    return node("PCPOReward", reward=name, weights="automatic", options=options)


def on(graph: Graph, found: Graph) -> Graph:
    """A training on node "reward" of other nodes."""
    return graph | found


def composite(weights: str = "2, -0.5, 1") -> Graph:
    """JPEG with options, sharpness by its running statistics, JPEG to a scale."""
    return {
        "first": reward(JPEG, '{"quality": 50}'),
        "sharp": reward("sharpness"),
        "z": node("PCPONormaliseReward", reward=["sharp", 0], normalise="z_score"),
        "plain": reward(JPEG),
        "scaled": node(
            "PCPONormaliseReward",
            reward=["plain", 0],
            normalise="affine",
            **{"normalise.scale": 0.5, "normalise.shift": 1.0},
        ),
        "inner": node("PCPOCombineRewards", weights="1", **{"rewards.reward_0": ["first", 0]}),
        "reward": node(
            "PCPOCombineRewards",
            weights=weights,
            **{
                "rewards.reward_0": ["inner", 0],
                "rewards.reward_1": ["z", 0],
                "rewards.reward_2": ["scaled", 0],
            },
        ),
    }


def test_a_composite_is_trained_on(server: Server):
    id = started(server, on(training("several", run_iterations=2), composite()))
    told = server.get(f"/pcpo/jobs/{id}")["config"]["rewards"]
    told = {label: {k: v for k, v in part.items() if v is not None} for label, part in told.items()}
    raw = {"normalise": "raw", "scale": 1.0, "shift": 0.0, "options": {}}
    assert told == {
        JPEG: raw | {"weight": 2.0, "options": {"quality": 50}},
        "sharpness": raw | {"weight": -0.5, "normalise": "z_score"},
        f"{JPEG}_2": raw
        | {"weight": 1.0, "name": JPEG, "normalise": "affine", "scale": 0.5, "shift": 1.0},
    }
    last = wait(server, id, "done")["metrics"][-1]
    assert {f"reward_{label}" for label in told} <= last.keys()
    assert 0 < last[f"reward_{JPEG}"] < last[f"reward_{JPEG}_2"]  # quality 50 and 95


def test_a_scale_over_a_sum_is_refused_by_the_training_alone(server: Server):
    graph = on(training("refused"), composite("1, 1, 1"))
    graph["sum"] = graph["reward"]
    graph["reward"] = node("PCPONormaliseReward", reward=["sum", 0], normalise="z_score")
    said = error_of(server, graph)
    assert said.startswith("PCPO Normalise Reward is behind PCPO Combine Rewards")
    graph.pop("train")
    graph |= {
        "images": node("EmptyImage", width=64, height=64, batch_size=2, color=255),
        "score": node(
            "PCPOScoreImages", images=["images", 0], reward=["reward", 0], prompt="a red circle"
        ),
    }
    table = server.run(graph)["score"]["text"][0]
    assert f"{JPEG} 2 (affine)" not in table and "weighted_sum (z_score)" in table


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("scene", "", "the reward 'scene' cannot judge by the prompt 'a cat': "),
        ("colour", "", "the reward 'colour' cannot judge by the prompt 'a cat': the prompt has"),
        ("remote", '{"url": "http://127.0.0.1:9"}', "the reward 'remote' is given the url 'http"),
        ("remote", '{"retries": 0}', "the reward server at http://127.0.0.1:8765 cannot be used"),
        ("hps_v2_1", "", "the reward 'hps_v2_1' needs HPS_v2.1_compressed.pt"),
    ],
)
def test_what_cannot_be_judged_is_said_before_the_job_is_there(server, name, options, said):
    graph = on(training("refused", text="a red circle\na cat"), {"reward": reward(name, options)})
    assert error_of(server, graph).startswith(said)


def test_a_reward_server_that_dies_ends_the_job_which_can_be_resumed(server: Server):
    with RewardServer("scene", "--port", "0") as judge:
        named = server.folder / "user" / "__pcpo" / "reward_servers.txt"
        named.parent.mkdir(parents=True, exist_ok=True)
        named.write_text(f"{judge.url}\n", encoding="utf-8")
        options = f'{{"url": "{judge.url}", "retries": 1}}'
        graph = training("served", run_iterations=6, run_checkpoint_every=1)
        id = started(server, on(graph, {"reward": reward("remote", options)}))
        folder, end = JobFolder(jobs_of(server) / id), time.monotonic() + 300
        while len(folder.metrics()) < 2:
            assert time.monotonic() < end and server.get(f"/pcpo/jobs/{id}")["state"] != "failed"
            time.sleep(0.05)
        judge.kill()
        job = ended(server, id)
    assert job["state"] == "failed"
    assert "\n" not in job["message"]
    assert job["message"].startswith(f"the reward server at {judge.url} cannot be used")
    assert "Traceback" not in "\n".join(job["log"])
    listed = next(one for one in server.get("/pcpo/jobs")["jobs"] if one["id"] == id)
    assert (listed["state"], listed["message"]) == ("failed", job["message"])
    port = judge.url.rsplit(":", 1)[1]
    with RewardServer("scene", "--port", port):
        assert "error" not in (server.post(f"/pcpo/jobs/{id}/resume", {}) or {})
        done = ended(server, id, "failed")
    assert (done["state"], done["iteration"]) == ("done", 6)
    assert [line["iteration"] for line in folder.metrics()] == [1, 2, 3, 4, 5, 6]
    assert (server.folder / "models" / "loras" / "served.safetensors").is_file()


def ended(server: Server, id: str, before: str = "") -> dict[str, Any]:
    """The job, once it has ended, good or bad; it may still be told to be as it was before."""
    end, moved = time.monotonic() + 300, not before
    while True:
        job = server.get(f"/pcpo/jobs/{id}")
        moved = moved or job["state"] != before
        if moved and job["state"] in ("done", "failed", "lost", "stopped"):
            return job
        assert time.monotonic() < end, job
        time.sleep(0.1)
