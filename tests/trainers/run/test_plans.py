"""The plan of an iteration: which steps have a KL term."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_pcpo.trainers.config.train_config import TrainConfig
from comfyui_pcpo.trainers.families.scheduler import SchedulerConfig
from comfyui_pcpo.trainers.run.plans import Plans, plans_of


def plans(**method) -> Plans:
    """Of five steps, of which four are trained."""
    config = TrainConfig(sampler={"steps": 5, "drop_last": 1}, method=method)  # pyright: ignore[reportArgumentType]
    family = SimpleNamespace(schedule=SchedulerConfig())
    return plans_of(config, family, (4, 8, 8))  # pyright: ignore[reportArgumentType]


def test_every_trained_step_is_compared_as_often():
    some = plans(kl_weight=0.1, kl_fraction=0.5)
    factors = torch.stack([some.at(iteration).kl for iteration in range(1000)])
    assert set(factors.flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(factors.sum(1), torch.full((1000,), 4.0, dtype=factors.dtype))
    # a mean of 1 of numbers that are 0 or 2: standard error 0.03
    assert (factors[:, :4].mean(0) - 1).abs().max() < 0.13 and not factors[:, 4].any()
    assert torch.equal(some.at(7).kl, plans(kl_weight=0.1, kl_fraction=0.5).at(7).kl)
    assert plans(kl_weight=0.1).at(7).kl is None


def test_a_window_compares_some_of_its_own_steps():
    window = {"selection": "sliding_window", "window": 2, "window_every": 1}
    some = plans(kl_weight=0.1, kl_fraction=0.1, **window)
    for iteration in range(6):
        plan = some.at(iteration)
        assert plan.compared.sum() == 1 and plan.trained[plan.compared].all()
        assert plan.kl.sum() == 2


@pytest.mark.parametrize("move", ["fixed", "random"])
def test_the_credit_of_a_window_is_a_mean_over_its_own_steps(move):
    window = {"selection": "sliding_window", "window": 2, "window_every": 1}
    some = plans(**window, window_move=move, window_start=2, credit="objective_only")
    for iteration in range(6):
        plan = some.at(iteration)
        assert plan.trained.sum() == 2 and not plan.trained[4]
        assert plan.std[~plan.trained].abs().max() == 0 < plan.std[plan.trained].min()
        mean = plan.weight[plan.trained].mean()
        torch.testing.assert_close(plan.credit[plan.trained], mean.expand(2))
    assert move == "random" or plan.trained.tolist() == [False, False, True, True, False]
