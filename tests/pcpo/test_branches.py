"""Trees of images against images that each have a path of their own, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comfyui_pcpo.pcpo import KLS
from comfyui_pcpo.pcpo.branches import UNBRANCHED, Branches, mean_over_leaves
from comfyui_pcpo.pcpo.credit import Proportionate
from comfyui_pcpo.pcpo.plan import plan_flow
from comfyui_pcpo.pcpo.ratios import epsilon_matching
from comfyui_pcpo.pcpo.rollout import noise_streams, rollout
from comfyui_pcpo.pcpo.schedules import flow_grid
from comfyui_pcpo.pcpo.transitions import FlowSde
from torch.testing import assert_close

TREES, SHAPE, STEPS = 2, (3,), 6
CASES = [Branches((2,), 3), Branches((1, 4), 2), Branches((0, 3), 2), Branches((5,), 4)]


def plan_of(branches: Branches):
    compiled = plan_flow(flow_grid(STEPS), FlowSde(0.7), Proportionate(), drop_last=1)
    return replace(compiled, branches=branches)


def network(weights):
    return lambda x, t: torch.tanh(x @ weights.T) * (1 + t / 1000)


class Tree:
    """Every segment's rollout, and for each image all the noise of its path."""

    def __init__(self, branches: Branches, weights: torch.Tensor) -> None:
        self.plan, self.parts, latents = plan_of(branches), [], None
        images = TREES * branches.leaves[0]
        keys, noises = [branches.path(image) for image in range(images)], []
        for depth, segment in enumerate(self.plan.segments):
            own = [key[: depth + 1] for key in keys[:: segment.leaves]]
            noise = noise_streams(own, len(segment.plan), SHAPE).double()
            if latents is not None:
                noise[:, 0] = latents.repeat_interleave(branches.children, dim=0)
            part = rollout(network(weights), segment.plan, noise, storage=torch.float64)
            latents = part.final
            self.parts.append((segment, part))
            noises.append(noise[:, (depth > 0) :].repeat_interleave(segment.leaves, dim=0))
        self.noise, self.final = torch.cat(noises, dim=1), latents


def log_ratios(plan, part, weights):
    """(path, kept step), with a graph."""
    columns = []
    for column, row in enumerate(part.step.tolist()):
        batch = plan.step_batch(
            row, part.x[:, column], part.prediction[:, column], part.noise[:, column]
        )
        columns.append(epsilon_matching(network(weights)(batch.x, plan.timesteps[row]), batch))
    return torch.stack(columns, dim=1) if columns else torch.zeros(len(part), 0)


def divergences(plan, part, weights, base):
    columns = []
    for column, row in enumerate(part.step.tolist()):
        x, time = part.x[:, column], plan.timesteps[row]
        rows = (values[row].expand(len(x)) for values in (plan.weight, plan.interval))
        columns.append(KLS["exact"](network(weights)(x, time), network(base)(x, time), *rows))
    return torch.stack(columns, dim=1) if columns else torch.zeros(len(part), 0)


@pytest.mark.parametrize("branches", CASES, ids=str)
def test_a_tree_is_what_each_of_its_images_would_be_alone(branches):
    """The same latents to the bit, the same gradient of objective and KL."""
    generator = torch.Generator().manual_seed(0)
    weights, base = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    weights.requires_grad_(True)
    tree = Tree(branches, weights.detach())
    policy, plan = network(weights.detach()), plan_of(UNBRANCHED)
    alone = rollout(policy, plan, tree.noise, storage=torch.float64)
    assert torch.equal(alone.final, tree.final)
    images = len(alone)
    advantages = torch.randn(images, generator=generator, dtype=torch.float64)

    each = advantages[:, None] * log_ratios(plan, alone, weights)
    want = each.sum() + 0.1 * divergences(plan, alone, weights, base).sum()
    found = torch.zeros((), dtype=torch.float64)
    for segment, part in tree.parts:
        own = mean_over_leaves(advantages, segment.leaves)[:, None]
        terms = own * log_ratios(segment.plan, part, weights)
        terms = terms + 0.1 * divergences(segment.plan, part, weights, base)
        found = found + segment.leaves * terms.sum()
    assert_close(
        *(torch.autograd.grad(loss, weights)[0] for loss in (found, want)), rtol=1e-12, atol=0
    )
    computed = sum(len(part) * len(segment.plan) for segment, part in tree.parts)
    assert computed < images * STEPS or branches.at[0] == 0


def test_one_child_is_the_image_itself():
    plan = plan_of(UNBRANCHED)
    (segment,) = plan.segments
    assert segment.plan is plan and segment.leaves == 1
    assert UNBRANCHED.path(7) == (7,)
    assert UNBRANCHED.siblings(0, ["a", "b"]) == ["a", "b"]


def test_the_segments_are_the_plan():
    plan = plan_of(Branches((2, 5), 2))
    parts = plan.segments
    assert [len(part.plan) for part in parts] == [2, 3, 1]
    assert [part.kept for part in parts] == [range(2), range(2, 5), range(5, 5)]
    for name in ("timesteps", "mean_x", "std", "credit", "trained"):
        joined = torch.cat([getattr(part.plan, name) for part in parts])
        assert torch.equal(joined, getattr(plan, name))
    assert all(part.plan.branches is UNBRANCHED for part in parts)


def test_siblings_have_one_parent():
    branches = Branches((2, 5), 2)
    prompts = ["a"] * 8 + ["b"] * 4
    assert branches.siblings(0, prompts) == ["a", "a", "b"]
    assert branches.siblings(1, prompts) == ["0", "0", "1", "1", "2", "2"]
    assert branches.siblings(2, prompts) == [str(i // 2) for i in range(12)]
