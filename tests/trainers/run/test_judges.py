"""The rewards of a run: options, scales and their statistics, what is refused, what resumes."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_pcpo.pcpo.rewards import Scores, WeightedSum, load_reward
from comfyui_pcpo.pcpo.rewards.combine import Affine, ZScore
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config.train_config import ConfigError, TrainConfig
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.run import start
from comfyui_pcpo.trainers.run.rewards import RewardError, RewardSet
from safetensors.torch import load_file
from torch.testing import assert_close

torch.set_num_threads(1)

SCALED = {
    "scene": {"weight": 2.0, "normalise": "z_score"},
    "small": {
        "name": "jpeg_compressibility",
        "weight": 0.5,
        "normalise": "affine",
        "scale": 0.1,
        "shift": 1.0,
        "options": {"quality": 50},
    },
}
DEMO = ("demo", "--model", "tiny-sd")
SMALL = [
    *("--run.micro-batch", "8", "--run.eval-prompts", "3", "--run.eval-steps", "2"),
    *("--sampler.steps", "2", "--prompts.per-iteration", "2", "--prompts.images-per-prompt", "4"),
    *("--advantage.min-count", "4", "--run.device", "cpu", "--run.save-every", "2"),
]


def judges_of(rewards) -> RewardSet:
    return RewardSet.from_config(TrainConfig.model_validate({"rewards": rewards}))


# --- running statistics --------------------------------------------------------------------------


def test_z_score_is_that_of_all_values_seen():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = 1e4 + 3 * values  # far from 0, where a sum of squares loses its digits
    scale = ZScore()
    for part in values.split([1, 7, 500, 492]):
        scale.see(part)
    assert scale.count == 1000
    assert scale.mean == pytest.approx(values.mean().item(), rel=1e-14)
    assert scale.deviation == pytest.approx(values.std(correction=0).item(), rel=1e-12)
    assert_close(scale(values), (values - values.mean()) / values.std(correction=0))


def test_z_score_of_what_has_no_spread_is_its_distance():
    scale = ZScore()
    assert scale(torch.tensor([3.0])).tolist() == [3.0]
    scale.see(torch.tensor([0.1, 0.1, 0.1]))
    assert scale.deviation == 1.0
    assert_close(scale(torch.tensor([0.1, 1.1])), torch.tensor([0.0, 1.0]))


def test_what_is_no_number_is_not_seen():
    scale = ZScore()
    scale.see(torch.tensor([1.0, float("nan"), 3.0, float("inf")]))
    assert (scale.count, scale.mean, scale.deviation) == (2, 2.0, 1.0)
    scale.see(torch.tensor([float("nan")]))
    assert scale.count == 2


# --- a weighted sum ------------------------------------------------------------------------------


class Fixed:
    needs_prompt, bounds, name = False, (0.0, 10.0), "fixed"

    def __init__(self, values):
        self.values = torch.tensor(values)

    def score(self, images, prompts):
        return Scores(self.values[: len(prompts)])


def test_a_sum_shows_each_part_as_it_was_and_as_it_counts():
    parts = (Fixed([1.0, 3.0]), Fixed([10.0, 10.0]))
    total = WeightedSum(parts, (1.0, -1.0), (ZScore(), Affine(0.5, 1.0)))
    assert total.bounds == (float("-inf"), float("inf"))
    scores = total.score(torch.zeros(2, 3, 1, 1, dtype=torch.uint8), ["", ""])
    assert scores.values.tolist() == [-7.0, -5.0]
    assert scores.details[0] == {
        "fixed": 1.0,
        "fixed (z_score)": -1.0,
        "fixed 2": 10.0,
        "fixed 2 (affine)": 6.0,
    }
    plain = WeightedSum(parts, (1.0, -1.0), (Affine(2.0), Affine(0.5, 1.0)))
    assert plain.bounds == (0.0 - 6.0, 20.0 - 1.0)


# --- in a run ------------------------------------------------------------------------------------


def test_a_config_names_rewards_by_label_with_scale_and_options():
    judges = judges_of(SCALED)
    assert judges.labels == ("scene", "small") and judges.weights == (2.0, 0.5)
    assert judges.rewards[1] == load_reward("jpeg_compressibility", quality=50)
    rewards = torch.tensor([[0.0, 1.0], [-10.0, -30.0]])
    assert judges.scale_for_training(rewards).tolist() == [[-1.0, 1.0], [0.0, -2.0]]
    assert judges.weighted_sum(judges.scale_for_training(rewards)).tolist() == [-2.0, 1.0]


def test_what_is_shown_keeps_the_scale_of_the_first_rewards():
    judges = judges_of({"scene": {"normalise": "z_score"}})
    assert judges.scale_for_display(torch.tensor([[0.0, 1.0]])).tolist() == [-1.0, 1.0]
    assert judges.scale_for_display(torch.tensor([[1.5, 2.5]])).tolist() == [2.0, 4.0]
    judges.scale_for_training(torch.tensor([[10.0, 20.0]]))
    assert judges.scale_for_display(torch.tensor([[1.5, 2.5]])).tolist() == [2.0, 4.0]
    assert judges.scales[0].count == 2 and judges.shown_scales[0].count == 2
    again = judges_of({"scene": {"normalise": "z_score"}})
    again.load_state_dict(json.loads(json.dumps(judges.state_dict())))
    assert again.scales == judges.scales and again.shown_scales == judges.shown_scales


def test_a_failing_reward_says_why_by_its_label():
    judges = judges_of({"mine": {"name": "scene"}})
    with pytest.raises(RewardError, match=r"'mine' failed: cannot read 'a cat'"):
        judges.score(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ["a cat"])
    assert judges.score(torch.zeros(0, 3, 64, 64, dtype=torch.uint8), []).shape == (0, 1)


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ({"scene": {"options": {"size": 3}}}, "rewards.scene: .* no option 'size'; it has none"),
        (
            {"jpeg_compressibility": {"options": {"quality": 500}}},
            "rewards.jpeg_compressibility: quality is 500; .* from 1 to 100",
        ),
    ],
)
def test_options_that_a_reward_has_not_are_refused(rewards, said):
    with pytest.raises(ConfigError, match=said):
        judges_of(rewards)


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ({"scene": {"weight": 0}}, "'scene' the weight 0; leave it out"),
        ({"scene": {"scale": 2}}, "rewards.scene has a scale .* 'raw'; set it to 'affine'"),
        ({"scene": {"normalise": "z_score", "shift": 1}}, "'z_score'; set it to 'affine'"),
        ({"scene": {"normalise": "affine", "scale": 0}}, "greater than 0"),
        ({"scene": {"wait": 1}}, "wait"),
        ({}, "at least 1"),
    ],
)
def test_rewards_that_cannot_be_are_refused(rewards, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig.model_validate({"rewards": rewards})


def test_a_composite_trains_and_goes_on_to_the_same_bytes(tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(
        'extends = "demo"\n[rewards.scene]\nweight = 2.0\nnormalise = "z_score"\n'
        '[rewards.small]\nname = "jpeg_compressibility"\nnormalise = "affine"\nscale = 0.1\n'
    )
    words = ["train", str(config), *SMALL, "--run.iterations"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert main([*words, "4", "--out", str(straight)]) == 0
    assert main([*words, "2", "--out", str(broken)]) == 0
    start.resume(broken, iterations=4)
    loras = [load_file(folder / "lora" / "pcpo_00004.safetensors") for folder in (straight, broken)]
    assert all(loras[0][key].equal(value) for key, value in loras[1].items())
    lines, again = (JobFolder(folder).metrics() for folder in (straight, broken))
    assert [line["reward"] for line in lines] == [line["reward"] for line in again]
    assert {"reward_scene", "reward_small"} <= lines[0].keys()
    shown = JobFolder(straight).read_list("samples/00000/scores.json")
    assert sum(entry["reward"] for entry in shown) != 0
    assert set(shown[0]["parts"]) == {"scene", "small"}
    job = JobFolder(straight).job()
    assert job["inputs"]["rewards"]["small"]["reward"] == "jpeg_compressibility"


def test_other_rewards_than_at_the_start_are_refused(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert main([*DEMO, "--out", str(run), *SMALL, "--run.iterations", "2"]) == 0
    other = {"scene": {"reward": "scene", "weights": "abc", "versions": {}}}
    monkeypatch.setattr(RewardSet, "fingerprints", lambda judges: other)
    assert main(["resume", str(run), "--iterations", "3"]) == 2
    assert "'scene' is not the one" in capsys.readouterr().err


def test_other_versions_than_at_the_start_are_said(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert main([*DEMO, "--out", str(run), *SMALL, "--run.iterations", "2"]) == 0
    known = RewardSet.fingerprints

    def newer(judges):
        return {label: f | {"versions": {"torch": "99"}} for label, f in known(judges).items()}

    monkeypatch.setattr(RewardSet, "fingerprints", newer)
    assert main(["resume", str(run), "--iterations", "3"]) == 0
    assert "'scene' has other versions" in capsys.readouterr().out


# --- on the command line -------------------------------------------------------------------------


def test_options_on_the_command_line(tmp_path):
    out = tmp_path / "run"
    words = ["--rewards", "jpeg_compressibility", "0.5", "--reward-options"]
    options = ["jpeg_compressibility.quality=50", "jpeg_compressibility.normalise=z_score"]
    given = [*DEMO, *SMALL, "--run.iterations", "1", *words, *options, "--out", str(out)]
    assert main(given) == 0
    found = JobFolder(out).job()["config"]["rewards"]["jpeg_compressibility"]
    assert (found["weight"], found["normalise"]) == (0.5, "z_score")
    assert found["options"] == {"quality": 50}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["scene"], "'scene' is no option; write NAME.OPTION=VALUE"),
        (["beauty.x=1"], "an option of 'beauty', but the rewards are scene"),
        (["scene.size=1"], "no option 'size'"),
        (["scene.weight=heavy"], "rewards.scene"),
    ],
)
def test_options_that_cannot_be_read_are_refused(tmp_path, capsys, options, said):
    given = [*DEMO, *SMALL, "--out", str(tmp_path / "run"), "--reward-options", *options]
    assert main(given) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
