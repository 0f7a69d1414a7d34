"""The objectives' identities: PPO's clip as a hinge, and the hinge without the exponential."""

from __future__ import annotations

import pytest
import torch
from comfyui_pcpo.pcpo import OBJECTIVES
from comfyui_pcpo.pcpo.objectives import ClipRange, Hinge, LogHinge, PpoClip
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

torch.set_num_threads(1)

RANGES = [ClipRange(), ClipRange(0.2, 0.2), ClipRange(0.1, 0.3), ClipRange(3e-4, 1e-4)]


def samples(clip: ClipRange):
    """Log ratios on both sides of both ends of the range, with advantages of every sign."""
    generator = torch.Generator().manual_seed(0)
    scale = 3 * max(clip.low, clip.high)
    log_ratio = torch.empty(600, dtype=torch.float64).uniform_(-scale, scale, generator=generator)
    advantages = torch.randn(600, dtype=torch.float64, generator=generator)
    advantages[::7] = 0
    return log_ratio, advantages


def gradient(objective, log_ratio, advantages):
    leaf = log_ratio.detach().clone().requires_grad_()
    objective(leaf, advantages).loss.sum().backward()
    return leaf.grad


@pytest.mark.parametrize("clip", RANGES)
def test_ppo_is_the_textbook_form(clip):
    log_ratio, advantages = samples(clip)
    for row, (r, a) in enumerate(zip(log_ratio.exp().tolist(), advantages.tolist(), strict=True)):
        kept = min(max(r, 1 - clip.low), 1 + clip.high)
        found = PpoClip(clip)(log_ratio, advantages).loss[row].item()
        assert found == pytest.approx(max(-a * r, -a * kept), rel=1e-12)
        if row == 60:
            break


@pytest.mark.parametrize("objective", OBJECTIVES.values())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", RANGES)
def test_what_is_clipped_has_no_gradient_and_the_rest_has(clip, dtype, objective):
    generator = torch.Generator().manual_seed(0)
    near = 1 + 0.002 * (2 * torch.rand(20_000, generator=generator) - 1)  # 0.2% of the range
    advantages = torch.randn(20_000, generator=generator).to(dtype)
    log_ratio = (near * torch.where(advantages < 0, -clip.low, clip.high)).to(dtype)
    terms = objective(clip)(log_ratio, advantages)
    has_none = gradient(objective(clip), log_ratio, advantages) == 0
    assert torch.equal(terms.clipped, has_none)
    assert 0.2 < has_none.double().mean() < 0.8


@pytest.mark.parametrize("clip", RANGES)
def test_hinge_is_ppo_plus_constants(clip):
    log_ratio, advantages = samples(clip)
    xi = torch.tensor([clip.low if a < 0 else clip.high for a in advantages], dtype=torch.float64)
    expected = PpoClip(clip)(log_ratio, advantages).loss + advantages + xi * advantages.abs()
    assert_close(Hinge(clip)(log_ratio, advantages).loss, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("clip", RANGES)
def test_hinge_has_the_gradient_of_ppo(clip):
    log_ratio, advantages = samples(clip)
    expected = gradient(PpoClip(clip), log_ratio, advantages)
    assert_close(gradient(Hinge(clip), log_ratio, advantages), expected, rtol=1e-12, atol=0)
    assert 0.1 < (expected == 0).double().mean() < 0.9  # both sides of the clip are there


@pytest.mark.parametrize("clip", RANGES)
def test_log_hinge_has_the_gradient_of_ppo_divided_by_rho(clip):
    log_ratio, advantages = samples(clip)
    ppo, log_hinge = PpoClip(clip)(log_ratio, advantages), LogHinge(clip)(log_ratio, advantages)
    same = ppo.clipped == log_hinge.clipped  # the ends differ: log rho > xi, or rho - 1 > xi
    assert same.double().mean() > 0.9
    expected = gradient(PpoClip(clip), log_ratio, advantages) / log_ratio.exp()
    found = gradient(LogHinge(clip), log_ratio, advantages)
    assert_close(found[same], expected[same], rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", OBJECTIVES.values())
def test_on_policy_every_objective_pulls_with_the_advantage(kind):
    advantages = torch.tensor([-2.0, -0.1, 0.0, 0.5, 3.0], dtype=torch.float64)
    on_policy = torch.zeros(5, dtype=torch.float64)
    assert_close(gradient(kind(), on_policy, advantages), -advantages, rtol=0, atol=0)
    terms = kind()(on_policy, advantages)
    assert not terms.clipped.any()
    assert not terms.outside.any()


@pytest.mark.parametrize(
    ("kind", "moved"), [(PpoClip, "exp"), (Hinge, "expm1"), (LogHinge, "identity")]
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_at_the_boundary_itself_there_is_a_gradient(kind, moved, sign):
    # the range is set to where the sample stands, in the objective's own arithmetic
    log_ratio = torch.tensor([sign * 0.1], dtype=torch.float64)
    movement = {
        "exp": log_ratio.exp() - 1,
        "expm1": torch.expm1(log_ratio),
        "identity": log_ratio,
    }[moved].abs()
    advantages = torch.tensor([sign * 2.0], dtype=torch.float64)
    objective = kind(ClipRange(movement.item(), movement.item()))
    grad = gradient(objective, log_ratio, advantages)
    factor = 1 if kind is LogHinge else log_ratio.exp()
    assert_close(grad, -advantages * factor, rtol=1e-12, atol=0)
    inside = kind(ClipRange(movement.item() * 1.001, movement.item() * 1.001))
    beyond = kind(ClipRange(movement.item() * 0.999, movement.item() * 0.999))
    assert not inside(log_ratio, advantages).clipped
    assert beyond(log_ratio, advantages).clipped
    assert gradient(beyond, log_ratio, advantages) == 0


@pytest.mark.parametrize("clip", RANGES)
@pytest.mark.parametrize("kind", OBJECTIVES.values())
def test_clipped_is_where_a_pulling_sample_has_no_gradient(kind, clip):
    log_ratio, advantages = samples(clip)
    terms = kind(clip)(log_ratio, advantages)
    dead = (advantages != 0) & (gradient(kind(clip), log_ratio, advantages) == 0)
    assert torch.equal(terms.clipped, dead)
    assert terms.clipped.any()
    assert not terms.clipped[advantages == 0].any()


@pytest.mark.parametrize("clip", RANGES)
@pytest.mark.parametrize("kind", OBJECTIVES.values())
def test_outside_is_the_baselines_clip_fraction(kind, clip):
    log_ratio, advantages = samples(clip)
    ratio = log_ratio.exp()
    expected = (ratio > 1 + clip.high) | (ratio < 1 - clip.low)
    terms = kind(clip)(log_ratio, advantages)
    assert torch.equal(terms.outside, expected)
    assert not torch.equal(terms.outside, terms.clipped)
    assert torch.equal(terms.outside, kind(clip)(log_ratio, -advantages).outside)


@pytest.mark.parametrize("kind", OBJECTIVES.values())
def test_no_advantage_no_loss(kind):
    log_ratio = torch.tensor([-1.0, 0.0, 1.0])
    nothing = torch.zeros(3)
    assert (kind()(log_ratio, nothing).loss == 0).all()
    assert (gradient(kind(), log_ratio, nothing) == 0).all()


@pytest.mark.parametrize("kind", OBJECTIVES.values())
def test_the_range_of_each_sign(kind):
    # by hand: low 0.1 for A < 0, high 0.3 for A > 0; all stand 0.2 in the direction of A
    clip = kind(ClipRange(low=0.1, high=0.3))
    terms = clip(torch.tensor([0.2, -0.2]), torch.tensor([1.0, -1.0]))
    assert terms.clipped.tolist() == [False, True]


@given(
    st.lists(st.tuples(st.floats(-3, 3), st.floats(-5, 5)), min_size=1, max_size=20),
    st.floats(1e-5, 0.5),
)
def test_log_hinge_is_its_formula(pairs, xi):
    log_ratio, advantages = torch.tensor(pairs, dtype=torch.float64).unbind(dim=1)
    terms = LogHinge(ClipRange(xi, xi))(log_ratio, advantages)
    for loss, (r, a) in zip(terms.loss.tolist(), pairs, strict=True):
        sign = (a > 0) - (a < 0)
        assert loss == pytest.approx(abs(a) * max(0.0, xi - sign * r), rel=1e-12, abs=1e-15)


def test_log_hinge_is_finite_where_the_exponential_is_not():
    huge = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = LogHinge()(huge, torch.tensor([1.0, -1.0])).loss
    loss.sum().backward()
    assert loss.isfinite().all()
    assert huge.grad.tolist() == [-1.0, 1.0]


def test_the_table_of_objectives():
    assert {"ppo_clip": PpoClip, "hinge": Hinge, "log_hinge": LogHinge} == OBJECTIVES
