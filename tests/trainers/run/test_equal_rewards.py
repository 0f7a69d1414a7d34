"""Equal rewards teach nothing: the share of such groups is measured, and a run says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.pcpo.rewards import Scores
from comfyui_pcpo.pcpo.rewards.scene import SceneReward
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.run.iteration import equal_groups

SMALL = [
    *("--run.iterations", "2", "--prompts.per-iteration", "2", "--run.eval-prompts", "1"),
    *("--prompts.images-per-prompt", "2", "--sampler.steps", "2", "--run.eval-steps", "2"),
    *("--run.micro-batch", "4", "--method.selection", "all"),
]
GROUP = ("--advantage.kind", "group")


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def scored(monkeypatch, score) -> None:
    """Rewards by the number of the call and the prompt."""
    calls = iter(range(1000))

    def measure(self, images, prompts):
        call = next(calls)
        return Scores(torch.tensor([score(call, i) for i in range(len(prompts))]))

    monkeypatch.setattr(SceneReward, "measure", measure)


def run(root: Path, *options: str) -> JobFolder:
    assert main(["train", "--preset", "demo", "--out", str(root), *SMALL, *options]) == 0
    return JobFolder(root)


@pytest.mark.parametrize(
    "options",
    [(*GROUP, "--advantage.no-global-std"), (*GROUP, "--method.update", "one_pass"), ()],
    ids=["group", "one pass", "global deviation"],
)
def test_a_run_of_equal_rewards_says_that_nothing_can_be_learnt(
    tmp_path, monkeypatch, capsys, options
):
    scored(monkeypatch, lambda call, i: 0.1)
    folder = run(tmp_path / "run", *options)
    for line in folder.metrics():
        assert line["frac_reward_zero_std"] == line["frac_advantage_zero"] == 1
    said = capsys.readouterr().out
    assert said.count("equal rewards: it can learn nothing from them") == 2
    assert "iteration 1: all images that are compared have equal rewards" in said
    status = folder.read("status.json")
    assert status["state"] == "done"
    assert "nothing could be learnt in 2 of 2 iterations" in status["message"]
    assert "another reward" in status["message"]


def test_a_run_of_other_rewards_says_nothing_of_it(tmp_path, monkeypatch, capsys):
    scored(monkeypatch, lambda call, i: 0.1 * call + 0.01 * i)
    folder = run(tmp_path / "run", *GROUP)
    for line in folder.metrics():
        assert line["frac_reward_zero_std"] == line["frac_advantage_zero"] == 0
    assert "learn nothing" not in capsys.readouterr().out
    assert "learnt" not in folder.read("status.json")["message"]


def test_groups_go_by_the_text_and_need_two_images():
    prompts = ["a", "a", "b", "b", "c"]
    one = torch.tensor([[1.0, 1.0, 1.0, 2.0, 5.0]])
    assert equal_groups(one, prompts) == 0.5
    assert equal_groups(torch.cat([one, one.flip(1)]), prompts) == 0
    assert equal_groups(one, list("abcde")) is None
    assert equal_groups(torch.ones(2, 5), ["a"] * 5) == 1
