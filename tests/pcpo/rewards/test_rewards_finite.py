"""A reward's numbers are finite, from its options to the sum; anything else has its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from comfyui_pcpo.nodes.errors import NodeError
from comfyui_pcpo.nodes.rewards.make import AUTOMATIC, named_reward
from comfyui_pcpo.pcpo.rewards import Scores, WeightedSum, load_reward
from comfyui_pcpo.pcpo.rewards.base import BatchReward
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config.train_config import ConfigError, TrainConfig
from comfyui_pcpo.trainers.run.rewards import RewardError, RewardSet

NAN, INF = float("nan"), float("inf")
IMAGES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)


@dataclass(frozen=True)
class Said(BatchReward):
    """Gives what it is told to."""

    name: ClassVar[str] = "said"
    values: torch.Tensor

    def measure(self, images, prompts):
        return Scores(self.values)


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e300])
def test_a_score_that_is_not_finite_in_float32_is_none(value):
    values = torch.tensor([1.0, value], dtype=torch.float64)
    found = Said(values).score(IMAGES, ["", ""])
    assert found.values[0] == 1 and found.values.isnan().tolist() == [False, True]
    assert found.errors[0] is None and found.errors[1].startswith("it gives")
    judges = RewardSet(("mine",), (1.0,), [Said(values)], [])
    with pytest.raises(RewardError, match="'mine' failed: it gives"):
        judges.score(IMAGES, ["", ""])


def test_a_sum_that_is_not_finite_has_its_reason():
    large = Said(torch.tensor([1.0, 3e38]))
    found = WeightedSum((large, large), (1.0, 1.0)).score(IMAGES, ["", ""])
    assert found.values[0] == 2 and found.values[1].isnan()
    assert found.errors == (None, "the weighted sum is inf")


@pytest.mark.parametrize("value", [NAN, INF, 10**400, [1, -INF]])
@pytest.mark.parametrize(
    ("name", "option"), [("vlm_judge", "lowest"), ("jpeg_compressibility", "divisor")]
)
def test_an_option_has_to_be_finite(name, option, value):
    with pytest.raises(ValueError, match=f"option '{option}' .* finite") as error:
        load_reward(name, **{option: value})
    assert len(str(error.value)) < 200


def test_an_option_has_to_be_finite_in_a_config_and_on_the_command_line(tmp_path, capsys):
    large = {"scene": {"name": "vlm_judge", "options": {"lowest": 10**400}}}
    with pytest.raises(ConfigError, match="'lowest'"):
        RewardSet.from_config(TrainConfig.model_validate({"rewards": large}))
    for value in ("NaN", "1e999", "9" * 400):
        options = ("--rewards", "vlm_judge", "1", "--reward-options", f"vlm_judge.lowest={value}")
        assert main(["train", "--preset", "demo", "--out", str(tmp_path / "run"), *options]) == 2
        said = capsys.readouterr().err
        assert "lowest" in said and len(said) < 400, said
        assert "finite" in said or "more than 20 digits" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["NaN", "-1e999", "9" * 400, "9" * 5000])
def test_an_option_has_to_be_finite_in_a_node(value):
    with pytest.raises(NodeError, match=r"finite|more than 20 digits") as error:
        named_reward("vlm_judge", AUTOMATIC, AUTOMATIC, f'{{"lowest": {value}}}')
    assert len(str(error.value)) < 300
