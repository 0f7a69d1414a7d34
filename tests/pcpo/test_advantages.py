"""Advantages against the baselines' conventions, written here in numpy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from comfyui_pcpo.pcpo import ADVANTAGES
from comfyui_pcpo.pcpo.advantages import (
    BatchAdvantage,
    GroupAdvantage,
    RunningAdvantage,
    combine_advantages,
)
from torch.testing import assert_close

torch.set_num_threads(1)

PROMPTS = ["cat", "dog", "cat", "owl", "dog", "cat", "owl", "dog"]


def random_rewards(seed: int, count: int = 8):
    return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def indices_of(prompt):
    return [i for i, other in enumerate(PROMPTS) if other == prompt]


def test_batch_advantage_is_ddpos():
    rewards = random_rewards(0)
    r = rewards.numpy()
    expected = (r - np.mean(r)) / (np.std(r) + 1e-8)
    assert_close(BatchAdvantage()(rewards, PROMPTS), torch.from_numpy(expected))


def test_group_advantage_is_dance_grpos():
    rewards = random_rewards(1)
    expected = np.empty(8)
    for prompt in set(PROMPTS):
        r = rewards.numpy()[indices_of(prompt)]
        expected[indices_of(prompt)] = (r - r.mean()) / (r.std(ddof=1) + 1e-8)
    found = GroupAdvantage(offset=1e-8, ddof=1)(rewards, PROMPTS)
    assert_close(found, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("global_std", [True, False])
def test_group_advantage_is_flow_grpos(global_std):
    rewards = random_rewards(2)
    expected = np.empty(8)
    for prompt in set(PROMPTS):
        r = rewards.numpy()[indices_of(prompt)]
        std = np.std(rewards.numpy() if global_std else r)
        expected[indices_of(prompt)] = (r - np.mean(r)) / (std + 1e-4)
    kind = GroupAdvantage(offset=1e-4, ddof=0, global_std=global_std)
    assert_close(kind(rewards, PROMPTS), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def ddpo_tracker(memory, rewards, buffer_size, min_count):
    """DDPO's statistics of a prompt, or the iteration's where it was seen too seldom."""
    advantages = np.empty(len(rewards))
    for prompt in set(PROMPTS):
        mine = rewards[indices_of(prompt)]
        memory[prompt] = [*memory.get(prompt, []), *mine][-buffer_size:]
        known = memory[prompt] if len(memory[prompt]) >= min_count else rewards
        advantages[indices_of(prompt)] = (mine - np.mean(known)) / (np.std(known) + 1e-6)
    return advantages


def test_running_advantage_is_ddpos_over_iterations():
    # 3 cats, 3 dogs and 2 owls an iteration: cats reach 6 in the second iteration, owls in the
    # third, and from the third on the buffer of 7 drops the oldest
    kind, memory = RunningAdvantage(buffer_size=7, min_count=6), {}
    for iteration in range(5):
        rewards = random_rewards(iteration) + iteration
        expected = ddpo_tracker(memory, rewards.numpy(), 7, 6)
        found = kind(rewards, PROMPTS)
        assert_close(found, torch.from_numpy(expected), rtol=1e-10, atol=1e-10)


def test_running_advantage_falls_back_on_the_iteration():
    rewards = random_rewards(5)
    found = RunningAdvantage(min_count=16)(rewards, PROMPTS)
    assert_close(found, BatchAdvantage(offset=1e-6)(rewards, PROMPTS), rtol=1e-12, atol=1e-12)


def test_running_advantage_continues_from_a_checkpoint():
    straight, before = RunningAdvantage(7, 6), RunningAdvantage(7, 6)
    for kind in (straight, before):
        for iteration in range(3):
            kind(random_rewards(iteration), PROMPTS)
    after = RunningAdvantage(7, 6)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    for iteration in range(3, 6):
        rewards = random_rewards(iteration)
        assert_close(after(rewards, PROMPTS), straight(rewards, PROMPTS), rtol=0, atol=0)
    assert after.state_dict() == straight.state_dict()
    assert all(len(seen) == 7 for seen in after.state_dict().values())


@pytest.mark.parametrize(
    "kind", [BatchAdvantage(), GroupAdvantage(), GroupAdvantage(ddof=0), RunningAdvantage()]
)
def test_equal_rewards_have_no_advantage(kind):
    assert (kind(torch.full((8,), 0.75), PROMPTS) == 0).all()


@pytest.mark.parametrize("kind", ADVANTAGES.values())
def test_equal_rewards_have_no_advantage_in_float32(kind):
    # (r - mean) / (std + 1e-8) of pure rounding errors is near 1: the sums must be exact
    rewards = torch.tensor([0.1, 0.7, 1 / 3, -150.7, 22.3])
    for count in range(2, 65):
        for reward in rewards:
            assert (kind()(reward.expand(count), ["same"] * count) == 0).all()


def test_a_group_of_one_has_no_advantage():
    found = GroupAdvantage(ddof=1)(torch.tensor([1.0, 2.0, 5.0]), ["a", "b", "b"])
    assert found[0] == 0
    assert (found[1:] != 0).all()


@pytest.mark.parametrize("kind", ADVANTAGES.values())
def test_advantages_are_clipped(kind):
    rewards = torch.zeros(100)
    rewards[0], rewards[1] = 1000.0, -900.0
    found = kind()(rewards, ["same"] * 100)
    assert found[0] == 5
    assert found[1] == -5
    assert kind(limit=2.0)(rewards, ["same"] * 100).abs().max() == 2


def test_combined_advantages_are_normalised_one_by_one():
    first, second = random_rewards(7), 1000 * random_rewards(8)
    kind = GroupAdvantage()
    found = combine_advantages([kind, kind], [first, second], [0.25, 2.0], PROMPTS)
    expected = 0.25 * kind(first, PROMPTS) + 2.0 * kind(second, PROMPTS)
    assert_close(found, expected)
    # the other way, one advantage of the weighted sum, is drowned by the larger reward
    assert not torch.allclose(found, kind(0.25 * first + 2 * second, PROMPTS), atol=0.1)


def test_combine_advantages_refuses_unequal_numbers():
    with pytest.raises(ValueError, match="1 advantages, 2 rewards and 2 weights"):
        combine_advantages([GroupAdvantage()], [torch.zeros(2)] * 2, [1.0, 1.0], ["a", "a"])


def test_the_table_of_advantages():
    kinds = {"batch": BatchAdvantage, "per_prompt": RunningAdvantage, "group": GroupAdvantage}
    assert kinds == ADVANTAGES
