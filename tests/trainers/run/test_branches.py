"""Images that share their path, in a run: what is sampled, trained, kept apart and refused."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_pcpo.pcpo.branches import UNBRANCHED
from comfyui_pcpo.pcpo.rollout import noise_streams, rollout
from comfyui_pcpo.trainers.bench.iteration import one_iteration
from comfyui_pcpo.trainers.config.train_config import ConfigError, TrainConfig, validate
from comfyui_pcpo.trainers.distributed.processes import Processes
from comfyui_pcpo.trainers.estimate.count import Watch
from comfyui_pcpo.trainers.run.iteration import order_of, requests_of
from comfyui_pcpo.trainers.run.sampler import Policy
from comfyui_pcpo.trainers.run.setup import Setup, prepare
from comfyui_pcpo.trainers.run.update.two_pass import Batch, Pairs, accumulate

FLOW = {
    "model": {"source": "demo-flow"},
    "sampler": {"transition": "flow_sde", "noise_level": 0.7, "steps": 6, "drop_last": 1},
    "prompts": {"source": "scenes", "per_iteration": 2, "images_per_prompt": 4},
    "advantage": {"kind": "group"},
    "optimizer": {"updates": 1},
    "trainable": {"rank": 2},
    "run": {"micro_batch": 4, "eval_prompts": 0, "device": "cpu"},
}
"""Eight images; with two splits in two, a prompt's four are one tree."""


def config_of(**changes: Any) -> TrainConfig:
    values = {name: dict(section) for name, section in FLOW.items()}
    for name, value in changes.items():
        section, field = name.split("__")
        values.setdefault(section, {})[field] = value
    return validate(values, "test")


def moved(setup: Setup) -> Setup:
    """With adapters that do something."""
    generator = torch.Generator().manual_seed(5)
    for parameter in setup.learner.parameters:
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return setup


def whole_noise(setup: Setup, plan: Any, requests: list[Any]) -> torch.Tensor:
    """All the noise on the way to each image, from the keys of its paths."""
    rows = []
    for request in requests:
        parts = []
        for depth, segment in enumerate(plan.segments):
            splits = len(plan.branches.at) - depth
            noise = noise_streams(
                [request.ancestor(splits).key], len(segment.plan), setup.sampler.shape
            )
            parts.append(noise[0, (depth > 0) :])
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def tree() -> Setup:
    return moved(prepare(config_of(sampler__branches=2, sampler__branch_at=[2, 4])))


def test_images_and_gradient_are_those_of_images_with_whole_paths(tree):
    """Eight images, each sampled and trained from noise to picture with the noise of its path."""
    plan = tree.plans.at(0)
    requests = requests_of(tree.config, len(tree.prompts), 0, plan.branches)
    assert [request.key[2:] for request in requests[:5]] == [
        *((0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 1, 1), (1, 0, 0, 0))
    ]
    sampled = tree.sampler.under(plan)(requests)
    assert [part.x.shape[:2] for part in sampled.trajectories] == [(2, 2), (4, 2), (8, 1)]

    alone, noise = replace(plan, branches=UNBRANCHED), whole_noise(tree, plan, requests)
    parts = []
    for first in (0, 4):
        given = tree.sampler.inputs(requests[first : first + 4])
        parts.append(rollout(given.denoiser, alone, noise[first : first + 4]))
    whole = torch.cat([part.final for part in parts])
    assert torch.equal(whole, sampled.trajectories[-1].final)

    advantages = torch.randn(8, generator=torch.Generator().manual_seed(1))
    want = gradient(
        tree,
        [
            batch_of(tree, part, requests[f : f + 4], advantages[f : f + 4], alone)
            for f, part in zip((0, 4), parts, strict=True)
        ],
    )
    batches = []
    for segment, part in zip(plan.segments, sampled.trajectories, strict=True):
        own = advantages.view(-1, segment.leaves).mean(1)
        batch = batch_of(tree, part, requests[:: segment.leaves], own, segment.plan)
        batches.append(replace(batch, leaves=segment.leaves))
    found = gradient(tree, batches)
    assert (found - want).norm() <= 1e-5 * want.norm() > 0


def batch_of(setup: Setup, part: Any, requests: list[Any], advantages: Any, plan: Any) -> Batch:
    return Batch(part, setup.sampler.embeds[[r.prompt for r in requests]], advantages, plan)


def gradient(setup: Setup, batches: list[Batch]) -> torch.Tensor:
    total = sum(b.leaves * len(b.trajectory) * len(b.trajectory.step) for b in batches)
    assert total == 8 * 5
    for batch in batches:
        kept = [
            (i, s) for i in range(len(batch.trajectory)) for s in range(len(batch.trajectory.step))
        ]
        pairs = Pairs.of(kept, 4, torch.device("cpu"))
        accumulate(setup.objective, batch, pairs, total, 4, lambda loss: loss.backward())
    taken = torch.cat([p.grad.flatten() for p in setup.learner.parameters])
    for parameter in setup.learner.parameters:
        parameter.grad = None
    return taken


@pytest.mark.parametrize("update", ["two_pass", "one_pass"])
def test_what_is_shared_is_computed_once(monkeypatch, update):
    """Steps 0 to 3 for two paths, 4 and 5 for eight: 24 rows instead of 48, and as many trained."""
    config = config_of(
        sampler__branches=4, sampler__branch_at=[4], method__update=update, run__micro_batch=2
    )
    setup, rows = prepare(config), {False: 0, True: 0}
    call = Policy.__call__

    def counted(policy: Policy, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows[torch.is_grad_enabled()] += len(x)
        return call(policy, x, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Policy, "__call__", counted)
        patched.setattr("comfyui_pcpo.trainers.run.loop.update", without_check(patched))
        one_iteration(setup)
    sampled, trained = 2 * 4 + 8 * 2, 2 * 4 + 8  # the last step is not trained
    want = {False: sampled, True: trained} if update == "two_pass" else {False: 8, True: trained}
    assert rows == want


def without_check(patched: pytest.MonkeyPatch) -> Any:
    from comfyui_pcpo.trainers.run.update import two_pass

    patched.setattr(two_pass, "check_on_policy", lambda *_: 0.0)
    return two_pass.update


@pytest.mark.parametrize(
    ("update", "part"),
    [("two_pass", 1), ("one_pass", 1.02)],  # which keeps a gradient for each path that is shared
)
def test_it_needs_no_more_memory_than_images_with_whole_paths(update, part):
    peaks = []
    for splits in ({}, {"sampler__branches": 2, "sampler__branch_at": [2, 4]}):
        setup = prepare(config_of(method__update=update, **splits))
        one_iteration(setup, 0)  # what is made once is there
        gc.collect()
        with Watch(set()) as watch:
            one_iteration(setup, 1)
        peaks.append(watch.peak)
    assert peaks[1] <= part * peaks[0]


@pytest.mark.parametrize("among", ["prompt", "siblings"])
def test_with_whom_a_path_is_compared(among):
    setup = prepare(
        config_of(sampler__branches=2, sampler__branch_at=[2, 4], advantage__among=among)
    )
    branches = setup.plans.at(0).branches
    rewards = torch.tensor([[1.0, 3, 2, 2, 5, 7, 9, 3]])
    trees, pairs, images = setup.advantages.of_paths(rewards, ["a"] * 8, branches)
    if among == "prompt":
        want = (rewards[0] - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
        assert torch.allclose(images, want)
        assert torch.allclose(pairs, want.view(4, 2).mean(1))
        assert torch.allclose(trees, want.view(2, 4).mean(1))
    else:  # means 2 and 6; 2 and 2, 6 and 6; then images by pairs
        assert torch.allclose(trees, torch.tensor([-1.0, 1.0]), atol=1e-4)
        assert torch.allclose(pairs, torch.zeros(4), atol=1e-4)
        assert torch.allclose(images, torch.tensor([-1.0, 1, 0, 0, -1, 1, 1, -1]), atol=1e-4)


def test_a_window_is_where_images_part():
    """Wherever it is; what comes before carries no noise and is not trained."""
    setup = prepare(
        config_of(
            **{"method__selection": "sliding_window", "method__window": 2},
            **{"method__window_every": 1, "sampler__branches": 4},
        )
    )
    for iteration, first in enumerate((0, 1, 2, 3, 0)):
        plan = setup.plans.at(iteration)
        assert plan.branches.at == (first,)
        before, after = plan.segments
        assert not before.plan.trained.any() and not before.plan.std.any()
        assert after.plan.trained.nonzero().flatten().tolist() == [0, 1]
    assert one_iteration(moved(setup), 2)["log_ratio_max"] == 0


def test_a_tree_stays_in_one_process_and_one_update():
    config = config_of(sampler__branches=2, sampler__branch_at=[3])
    order = order_of(config, 0, 2)
    assert sorted(order) == list(range(8))
    assert all(a % 2 == 0 and b == a + 1 for a, b in zip(order[::2], order[1::2], strict=True))
    two: Any = [
        Processes(SimpleNamespace(num_processes=2, process_index=rank))  # type: ignore[arg-type]
        for rank in range(2)
    ]
    shares = [processes.share(order, tree=2) for processes in two]
    assert sorted([*shares[0], *shares[1]]) == list(range(8))
    assert all(share[::2] == [i - 1 for i in share[1::2]] for share in shares)
    assert two[0].pad([4, 5], 8, 2) == [4, 5, 4, 5] and two[0].pad([], 4, 2) == [0, 1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"branches": 2}, "sampler.branch_at names no step at which images part"),
        ({"branches": 2, "branch_at": [3, 2]}, "sampler.branch_at is [3, 2]; its steps ascend"),
        ({"branches": 2, "branch_at": [0]}, "from 1 to 5"),
        ({"branches": 2, "branch_at": [6]}, "from 1 to 5"),
        ({"branches": 3, "branch_at": [2]}, "images_per_prompt is 4, but 3 branches at each of 1"),
        ({"branches": 2, "branch_at": [1, 2, 3]}, "make trees of 8 images"),
    ],
)
def test_trees_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ConfigError) as caught:
        config_of(**{f"sampler__{name}": value for name, value in changes.items()})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method__selection": "sliding_window", "method__window": 2}, "leave branch_at out"),
        ({"optimizer__updates": 3}, "2 trees of 4 (sampler.branches)"),
        ({"advantage__kind": "batch", "advantage__among": "siblings"}, "set kind to 'group'"),
    ],
)
def test_what_does_not_go_with_trees_is_refused(changes, said):
    with pytest.raises(ConfigError) as caught:
        config_of(sampler__branches=4, sampler__branch_at=[2], **changes)
    assert said in str(caught.value)


def test_a_split_without_noise_after_it_is_refused():
    config = config_of(
        **{"method__selection": "sliding_window", "method__window": 2, "method__window_start": 1},
        **{"method__window_move": "fixed", "sampler__branches": 2, "sampler__branch_at": [1, 3]},
    )
    with pytest.raises(ConfigError, match="branch_at has 3, but no step from there to 5 carries"):
        prepare(config)
