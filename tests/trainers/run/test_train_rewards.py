"""Runs on rewards other than the scenes: measures, a composite, and a server that dies."""

from __future__ import annotations

import time

import pytest
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.job.folder import JobFolder
from http_fixture import RewardServer
from safetensors.torch import load_file
from warm_fixture import pcpo

DEMO = ("demo", "--model", "tiny-sd")
SMALL = [
    *("--run.micro-batch", "32", "--run.eval-prompts", "16", "--run.eval-steps", "4"),
    *("--sampler.steps", "4", "--prompts.per-iteration", "4", "--prompts.images-per-prompt", "8"),
    *("--run.device", "cpu", "--run.save-every", "4", "--method.credit", "objective_only"),
    *("--method.selection", "sliding_window", "--method.window", "2"),
]


def held_out(folder):
    first = [line["reward"] for line in JobFolder(folder).read_list("samples/00000/scores.json")]
    return sum(first) / len(first), JobFolder(folder).metrics()[-1]["held_out"]


def lora_of(folder, iteration):
    return load_file(folder / "lora" / f"pcpo_{iteration:05}.safetensors")


def test_a_measure_rises(tmp_path):
    out = tmp_path / "run"
    words = ["--rewards", "brightness", "1", "--run.iterations", "4"]
    assert main([*DEMO, "--out", str(out), *SMALL, *words]) == 0
    before, after = held_out(out)
    assert after > before + 0.03


def test_a_composite_of_two_rises(tmp_path):
    out = tmp_path / "run"
    words = ["--rewards", "brightness", "1", "sharpness", "0.2", "--run.iterations", "4"]
    scales = ["brightness.normalise=z_score", "sharpness.normalise=z_score"]
    assert main([*DEMO, "--out", str(out), *SMALL, *words, "--reward-options", *scales]) == 0
    before, after = held_out(out)
    assert before == pytest.approx(0, abs=1e-5)  # the base is where the scale begins
    assert after > 0.2
    parts = JobFolder(out).read_list("samples/00004/scores.json")[0]["parts"]
    assert set(parts) == {"brightness", "sharpness"}


def test_a_server_that_dies_costs_an_iteration_at_most(tmp_path):
    """The run stops at its last checkpoint with one sentence, and goes on to the same bytes."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    with RewardServer("brightness", "sharpness") as server:
        options = ["remote.reward=brightness", f"remote.url={server.url}", "remote.retries=1"]
        words = [*DEMO, *SMALL, "--rewards", "remote", "1", "--run.iterations", "4"]
        words += ["--run.checkpoint-every", "1", "--reward-options", *options]
        assert main([*words, "--out", str(straight)]) == 0
        before, after = held_out(straight)
        assert after > before + 0.03
        running = pcpo(*words, "--out", str(broken))
        end = time.monotonic() + 300
        while len(JobFolder(broken).metrics()) < 2:
            assert running.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        server.kill()
        said = running.communicate(timeout=300)[1]
    assert running.returncode == 2
    assert "Traceback" not in said and said.count("\n") == 1
    assert f"the reward server at {server.url} cannot be used" in said
    status = JobFolder(broken).state()
    assert status["state"] == "failed" and server.url in status["message"]
    done = len(JobFolder(broken).metrics())
    assert 2 <= done < 4

    assert main(["resume", str(broken)]) == 2  # still down
    assert JobFolder(broken).state()["state"] == "failed"
    port = server.url.rsplit(":", 1)[1]
    with RewardServer("brightness", "sharpness", "--port", port):
        assert main(["resume", str(broken)]) == 0
    expected = lora_of(straight, 4)
    assert all(expected[key].equal(value) for key, value in lora_of(broken, 4).items())
