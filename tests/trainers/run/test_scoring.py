"""Rewards of a server are asked while the next images are sampled: earlier, and the same."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from comfyui_pcpo.pcpo.rewards import Scores, load_reward
from comfyui_pcpo.pcpo.rewards.base import BatchReward
from comfyui_pcpo.trainers.bench.iteration import one_iteration
from comfyui_pcpo.trainers.config.train_config import read_preset, validate
from comfyui_pcpo.trainers.run.rewards import RewardError
from comfyui_pcpo.trainers.run.sampler import Sampler
from comfyui_pcpo.trainers.run.setup import prepare
from torch.testing import assert_close

torch.set_num_threads(1)


def config_of(update, **changes):
    """Two groups of four images, a micro-batch each."""
    values = read_preset("demo").model_dump(mode="json")
    values["method"] |= {"update": update, "selection": "all"}
    values["sampler"]["steps"] = 2
    values["prompts"] |= {"per_iteration": 3, "images_per_prompt": 4}
    values["optimizer"]["updates"] = 1
    values["advantage"] |= {"kind": "group", "global_std": False}
    values["run"] |= {"eval_prompts": 0, "micro_batch": 4, "device": "cpu"}
    return validate(values | {"rewards": {"brightness": 1.0, "scene": 1.0}} | changes, "the test")


def learnt(setup):
    line = one_iteration(setup)
    return line, [parameter.detach().clone() for parameter in setup.learner.parameters]


class Served(BatchReward):
    """Brightness, as from a server: told what is asked, it may wait or fail."""

    name, is_elsewhere = "brightness", True

    def __init__(self, answer=lambda: None):
        self.answer, self.here, self.asked = answer, load_reward("brightness"), []

    def measure(self, images, prompts):
        self.asked.append((len(images), threading.current_thread() is threading.main_thread()))
        self.answer()
        return self.here.measure(images, prompts)


def served(setup, reward):
    """The run with brightness as from a server."""
    setup.reward_set.rewards[0] = reward
    setup.reward_set.place(torch.device("cpu"), is_lent=False)
    assert setup.reward_set.ahead == (0,) and setup.reward_set.is_elsewhere
    return setup


@pytest.mark.parametrize("update", ["one_pass", "two_pass"])
def test_it_is_asked_while_the_next_images_are_sampled(update, monkeypatch):
    plain = learnt(prepare(config_of(update)))
    begun, drawn = threading.Event(), threading.Event()
    images, seen = Sampler.images, []

    def drawing(sampler, *latents):
        seen.append(len(latents[0]))
        if len(seen) == 2:  # the first group waits for its answer until here
            assert begun.wait(60)
            drawn.set()
        return images(sampler, *latents)

    def answer():
        begun.set()
        assert drawn.wait(60), "the second group was not sampled meanwhile"

    monkeypatch.setattr(Sampler, "images", drawing)
    reward = Served(answer)
    found = learnt(served(prepare(config_of(update)), reward))
    assert seen == [4, 4, 4] and reward.asked == [(4, False)] * 3
    for key in ("reward", "reward_brightness", "reward_scene", "reward_std", "grad_norms"):
        assert_close(found[0][key], plain[0][key], rtol=1e-6, atol=0)
    assert all(mine.equal(theirs) for mine, theirs in zip(found[1], plain[1], strict=True))


@pytest.mark.parametrize("update", ["one_pass", "two_pass"])
def test_its_failure_is_the_runs(update):
    def answer():
        raise ConnectionError("nobody is there")

    setup = served(prepare(config_of(update)), Served(answer))
    before = [parameter.detach().clone() for parameter in setup.learner.parameters]
    with pytest.raises(RewardError, match="'brightness' failed: ConnectionError: nobody is there"):
        learnt(setup)
    after = setup.learner.parameters
    assert all(mine.equal(theirs) for mine, theirs in zip(before, after, strict=True))


def test_two_groups_of_gradients_wait_at_most(monkeypatch):
    from comfyui_pcpo.trainers.run.update.one_pass import _Work

    sample, learn, waiting, most = _Work.sample, _Work.learn, [], []

    def sampling(work, unit):
        waiting.append(unit)
        most.append(len(waiting))
        return sample(work, unit)

    def learning(work, unit):
        waiting.remove(unit.images)
        found = learn(work, unit)
        assert not unit.held
        return found

    monkeypatch.setattr(_Work, "sample", sampling)
    monkeypatch.setattr(_Work, "learn", learning)
    learnt(served(prepare(config_of("one_pass")), Served()))
    assert most == [1, 2, 2]
    most.clear()
    learnt(prepare(config_of("one_pass")))
    assert most == [1, 1, 1]


@pytest.mark.parametrize("update", ["one_pass", "two_pass"])
def test_no_two_threads_ask_at_once(update):
    inside, most = [], []

    def answer():
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.5)
        inside.pop()

    learnt(served(prepare(config_of(update)), Served(answer)))
    assert most == [1, 1, 1]


def test_nothing_else_is_asked_ahead_on_a_cpu():
    setup = prepare(config_of("two_pass"))
    assert setup.reward_set.ahead == () and not setup.reward_set.is_elsewhere


def test_beside_a_gpu_so_is_what_needs_no_network():
    judges = prepare(config_of("two_pass")).reward_set
    networked = SimpleNamespace(is_elsewhere=False, modules=lambda: [torch.nn.Linear(1, 1)])
    judges.rewards.append(networked)
    judges.place(torch.device("meta"), is_lent=False)
    assert judges.ahead == (0, 1) and not judges.is_elsewhere


def test_scores_in_parts_are_scores_in_one():
    reward = load_reward("brightness")
    images = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8)
    parts = Scores.concatenate([reward.score(part, [""] * len(part)) for part in images.split(4)])
    assert parts.values.equal(reward.score(images, [""] * 6).values)
