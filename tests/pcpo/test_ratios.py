"""Log ratios and KL against torch.distributions, for every sampler and prediction type."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from comfyui_pcpo.pcpo import KLS, RATIOS, TRANSITIONS
from comfyui_pcpo.pcpo.credit import Exact, Native, ObjectiveOnly, Proportionate, Relative
from comfyui_pcpo.pcpo.plan import plan_diffusion, plan_flow
from comfyui_pcpo.pcpo.ratios import (
    StepBatch,
    gaussian_log_prob,
    kl_divergence,
    weighted_log_ratio,
)
from comfyui_pcpo.pcpo.schedules import (
    ddim_grid,
    flow_grid,
    scaled_linear_alpha_bars,
    zero_terminal_snr,
)
from comfyui_pcpo.pcpo.transitions import Cps, DanceSde, Ddim, FlowSde
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal
from torch.distributions import kl_divergence as kl_oracle
from torch.testing import assert_close

torch.set_num_threads(1)

# a difference of two log-densities cancels: 1e-12 of their size, which is around 10
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
DIFFUSION_PREDICTIONS = ("epsilon", "sample", "v_prediction")
DIFFUSION = [(Ddim(eta), kind) for eta in (0.3, 1.0) for kind in DIFFUSION_PREDICTIONS]
FLOW = [(t, "velocity") for t in (DanceSde(), FlowSde(), Cps())]
SHAPES = [(4, 2, 3), (6, 5)]  # (c, h, w) of SD, (tokens, c) of FLUX


def make_plan(transition, prediction_type, credit):
    if prediction_type == "velocity":
        return plan_flow(flow_grid(10), transition, credit)
    return plan_diffusion(ddim_grid(20), transition, credit, prediction_type=prediction_type)


def random_batch(plan, i, shape, images=3):
    """A step of the plan with random contents, and a new prediction near the old one."""
    x, old, noise, change = torch.randn(4, images, *shape, dtype=torch.float64).unbind()
    names = ("mean_x", "mean_p", "std", "credit")
    rows = {name: getattr(plan, name)[i].expand(images) for name in names}
    return StepBatch(x=x, old=old, noise=noise, **rows), old + 0.1 * change


def densities(plan, i, step, new):
    """The two Gaussians of a step and the point that was sampled."""
    mean_old = plan.mean_x[i] * step.x + plan.mean_p[i] * step.old
    mean_new = plan.mean_x[i] * step.x + plan.mean_p[i] * new
    x_next = mean_old + plan.std[i] * step.noise
    return Normal(mean_new, plan.std[i]), Normal(mean_old, plan.std[i]), x_next


def steps_with_policy(plan):
    return plan.trained.nonzero().flatten().tolist()


def test_every_transition_is_tested():
    assert {type(t) for t, _ in DIFFUSION + FLOW} == set(TRANSITIONS.values())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("transition", "prediction_type"), DIFFUSION + FLOW)
def test_matching_is_the_difference_of_two_log_densities(transition, prediction_type, shape):
    plan = make_plan(transition, prediction_type, Native())
    for i in steps_with_policy(plan):
        step, new = random_batch(plan, i, shape)
        p_new, p_old, x_next = densities(plan, i, step, new)
        expected = (p_new.log_prob(x_next) - p_old.log_prob(x_next)).flatten(1).mean(1)
        weight = plan.weight[i].expand(3)
        assert_close(weighted_log_ratio(new, step.old, step.noise, weight), expected, **TIGHT)
        assert_close(RATIOS["epsilon_matching"](new, step), expected, **TIGHT)
        assert_close(RATIOS["density"](new, step), expected, **TIGHT)


@pytest.mark.parametrize("prediction_type", DIFFUSION_PREDICTIONS)
def test_matching_is_exact_where_the_noise_was_solved_for(prediction_type):
    plan = make_plan(Ddim(1.0), prediction_type, Exact())
    for i in range(17):  # 17 to 19 of 20 are projected
        step, new = random_batch(plan, i, (4, 2, 2))
        p_new, p_old, x_next = densities(plan, i, step, new)
        expected = (p_new.log_prob(x_next) - p_old.log_prob(x_next)).flatten(1).mean(1)
        assert_close(RATIOS["epsilon_matching"](new, step), expected, rtol=1e-10, atol=1e-12)
    step, new = random_batch(plan, 19, (4, 2, 2))
    density = RATIOS["density"](new, step)
    assert not torch.allclose(RATIOS["epsilon_matching"](new, step), density, rtol=1e-2)


@pytest.mark.parametrize("ratio", ["epsilon_matching", "density"])
@pytest.mark.parametrize(("transition", "prediction_type"), DIFFUSION + FLOW)
def test_the_relative_policys_ratio_is_that_of_its_densities(transition, prediction_type, ratio):
    # METHOD M3, reading 4: the Gaussian of eps = eps_ref + lambda (eps_theta - eps_ref)
    plan = make_plan(transition, prediction_type, Relative())
    native = make_plan(transition, prediction_type, Native())
    share = plan.credit * plan.scale
    for i in steps_with_policy(plan):
        step, network = random_batch(plan, i, (4, 2, 2))
        old_network, reference = step.old, torch.randn_like(step.old)
        step = replace(step, old=plan.policy(i, old_network, reference))
        new = plan.policy(i, network, reference)
        p_new, p_old, x_next = densities(plan, i, step, new)
        expected = (p_new.log_prob(x_next) - p_old.log_prob(x_next)).flatten(1).mean(1)
        assert_close(RATIOS[ratio](new, step), expected, rtol=1e-9, atol=1e-12)
        # what the network's own difference weighs: the same at every even step
        by_network = weighted_log_ratio(network, old_network, step.noise, share[i].expand(3))
        assert_close(by_network, expected, rtol=1e-9, atol=1e-12)
        rows = torch.full((3,), i)
        assert_close(plan.policy(rows, network, reference), new, rtol=0, atol=0)
    natural = native.credit[plan.trained] / plan.weight[plan.trained]
    assert_close(natural, torch.ones_like(natural), rtol=1e-10, atol=0)


def test_a_relative_policy_needs_its_reference():
    plan = make_plan(Ddim(1.0), "epsilon", Relative())
    with pytest.raises(ValueError, match="give its predictions as the reference"):
        plan.policy(0, torch.zeros(1, 4), None)


def test_matching_at_pure_noise_takes_the_v_form():
    alpha_bars = zero_terminal_snr(scaled_linear_alpha_bars())
    grid = ddim_grid(20, alpha_bars, spacing="trailing")
    plan = plan_diffusion(grid, Ddim(1.0), ObjectiveOnly(), prediction_type="v_prediction")
    assert grid.alpha_bar[0] == 0
    step, new = random_batch(plan, 0, (4, 2, 2))
    p_new, p_old, x_next = densities(plan, 0, step, new)
    expected = (p_new.log_prob(x_next) - p_old.log_prob(x_next)).flatten(1).mean(1)
    assert_close(RATIOS["epsilon_matching"](new, step), expected, **TIGHT)


@pytest.mark.parametrize("transition", [DanceSde(), FlowSde(), Cps()])
def test_matching_with_proportionate_credit_replaces_the_weight_in_both_terms(transition):
    plan = make_plan(transition, "velocity", Proportionate())
    for i in steps_with_policy(plan):
        step, new = random_batch(plan, i, (5,))
        moved = plan.credit[i] * (new - step.old)
        expected = -(moved * step.noise).mean(1) - (moved**2).mean(1) / 2
        assert_close(RATIOS["epsilon_matching"](new, step), expected, **TIGHT)


@pytest.mark.parametrize(("transition", "prediction_type"), [(Cps(), "velocity"), *DIFFUSION])
def test_squared_error_is_the_log_ratio_times_twice_the_variance(transition, prediction_type):
    plan = make_plan(transition, prediction_type, Native())
    for i in steps_with_policy(plan):
        step, new = random_batch(plan, i, (4, 2, 2))
        p_new, p_old, x_next = densities(plan, i, step, new)
        log_ratio = (p_new.log_prob(x_next) - p_old.log_prob(x_next)).flatten(1).mean(1)
        expected = 2 * plan.std[i] ** 2 * log_ratio
        assert_close(RATIOS["squared_error"](new, step), expected, **TIGHT)


@pytest.mark.parametrize("shape", SHAPES)
def test_guard_is_grpo_guards_normalised_ratio(shape):
    """BASELINES B6, in numpy: from both densities, the step's std_dev sqrt(-dt) and the means."""
    plan = make_plan(FlowSde(0.7), "velocity", Native())
    sigmas = flow_grid(10).sigmas.numpy()
    for i in steps_with_policy(plan):
        step, new = random_batch(plan, i, shape)
        x, old, noise, now = (t.numpy() for t in (step.x, step.old, step.noise, new))
        sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
        std_dev = 0.7 * math.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma)))

        def mean(v, x=x, sigma=sigma, dt=dt, std_dev=std_dev):
            pull = std_dev**2 / (2 * sigma) * dt
            return x * (1 + pull) + v * (dt + pull * (1 - sigma))

        scale = std_dev * math.sqrt(-dt)
        old_mean, new_mean = mean(old), mean(now)
        x_next, over = old_mean + scale * noise, tuple(range(1, x.ndim))

        def log_prob(mean, x_next=x_next, scale=scale, over=over):
            density = -((x_next - mean) ** 2) / (2 * scale**2) - math.log(scale)
            return (density - 0.5 * math.log(2 * math.pi)).mean(axis=over)

        bias = ((new_mean - old_mean) ** 2).mean(axis=over) / (2 * scale)
        expected = np.exp((log_prob(new_mean) - log_prob(old_mean)) * scale + bias)
        found = RATIOS["guard"](new, step).exp()
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)
        assert np.abs(expected - 1).max() > 1e-6


def test_the_mean_of_guard_over_the_noise_is_zero():
    """What it is for: a density's log ratio is below 0 on average, by the KL."""
    plan = make_plan(FlowSde(), "velocity", Native())
    step, new = random_batch(plan, 4, (4, 2, 2))
    other = replace(step, noise=-step.noise)
    assert_close(RATIOS["guard"](new, step), -RATIOS["guard"](new, other), **TIGHT)
    assert (RATIOS["density"](new, step) + RATIOS["density"](new, other) < -1e-5).all()


def test_gaussian_log_prob_is_the_mean_of_the_log_density():
    x, mean = torch.randn(2, 3, 4, 5, dtype=torch.float64).unbind()
    std = torch.tensor([0.02, 0.5, 3.0]).double()
    expected = Normal(mean, std[:, None, None]).log_prob(x).mean(dim=(1, 2))
    assert_close(gaussian_log_prob(x, mean, std), expected, rtol=1e-12, atol=0)


# --- KL ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("transition", "prediction_type"), DIFFUSION + FLOW)
def test_kl_is_that_of_two_gaussians(transition, prediction_type):
    plan = make_plan(transition, prediction_type, Proportionate())
    for i in steps_with_policy(plan):
        step, new = random_batch(plan, i, (4, 2, 2))
        p_new, p_reference, _ = densities(plan, i, step, new)
        expected = kl_oracle(p_new, p_reference).flatten(1).mean(1)
        weight, interval = plan.weight[i].expand(3), plan.interval[i].expand(3)
        assert_close(kl_divergence(new, step.old, weight), expected, **TIGHT)
        assert_close(KLS["exact"](new, step.old, weight, interval), expected, **TIGHT)
        without = KLS["without_interval"](new, step.old, weight, interval)
        assert_close(without, plan.interval[i] * expected, **TIGHT)


def test_kl_reaches_the_prediction_alone():
    new = torch.ones(2, 3, requires_grad=True)
    kl_divergence(new, torch.zeros(2, 3), torch.tensor([1.0, 2.0])).sum().backward()
    # d/dp of 1/2 mean (w p)^2 is w^2 p / 3
    assert_close(new.grad, torch.tensor([[1.0], [4.0]]).expand(2, 3) / 3)


# --- identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", RATIOS.values())
def test_on_policy_the_log_ratio_is_exactly_zero(ratio, dtype):
    plan = make_plan(FlowSde(), "velocity", Native())
    step, _ = random_batch(plan, 3, (4, 5, 5))
    old = step.old.to(dtype)
    rows = {
        k: getattr(step, k).float() for k in ("x", "noise", "mean_x", "mean_p", "std", "credit")
    }
    assert (ratio(old.clone(), StepBatch(old=old, **rows)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_are_subtracted_in_float32(dtype):
    new, old, noise = torch.randn(3, 2, 50).unbind()
    new, old = new.to(dtype), old.to(dtype)
    weight = torch.tensor([0.3, 2.0])
    found = weighted_log_ratio(new, old, noise, weight)
    assert found.dtype == torch.float32
    assert_close(found, weighted_log_ratio(new.float(), old.float(), noise, weight), rtol=0, atol=0)
    assert kl_divergence(new, old, weight).dtype == torch.float32


numbers = st.floats(-10, 10, width=32)


@st.composite
def predictions(draw):
    """New, old, noise and weights of one to three images, of any shape of two to four axes."""
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    size = math.prod(shape)
    values = draw(st.lists(numbers, min_size=3 * size, max_size=3 * size))
    weight = draw(st.lists(numbers, min_size=shape[0], max_size=shape[0]))
    new, old, noise = torch.tensor(values, dtype=torch.float64).reshape(3, *shape).unbind()
    return new, old, noise, torch.tensor(weight, dtype=torch.float64)


@given(predictions())
def test_matching_for_any_shape_and_value(case):
    new, old, noise, weight = case
    expected = []
    for n, o, z, w in zip(*(t.numpy() for t in case), strict=True):
        moved = w * (n - o)
        expected.append(-(moved * z).mean() - (moved**2).mean() / 2)
    found = weighted_log_ratio(new, old, noise, weight)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-11, atol=1e-11)
    assert (weighted_log_ratio(old, old, noise, weight) == 0).all()
    # a mean over elements, not a sum: the same latent twice over changes nothing
    twice = [torch.cat([t, t], dim=1) for t in (new, old, noise)]
    assert_close(weighted_log_ratio(*twice, weight), found, rtol=1e-11, atol=1e-11)


@given(predictions())
def test_kl_is_never_negative_and_the_mean_gap_of_the_log_ratio(case):
    # E_old[log rho] = -KL: over noise z and -z the linear term of log rho cancels exactly
    new, old, noise, weight = case
    kl = kl_divergence(new, old, weight)
    both = [weighted_log_ratio(new, old, sign * noise, weight) for sign in (1, -1)]
    assert (kl >= 0).all()
    assert_close(-(both[0] + both[1]) / 2, kl, rtol=1e-9, atol=1e-9)
