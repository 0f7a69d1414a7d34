"""One step of each sampler: against diffusers, and against what its SDE promises."""

from __future__ import annotations

import math

import pytest
import torch
from comfyui_pcpo.pcpo import TRANSITIONS
from comfyui_pcpo.pcpo.credit import Native
from comfyui_pcpo.pcpo.plan import deterministic, plan_diffusion, plan_flow
from comfyui_pcpo.pcpo.predictions import PREDICTIONS
from comfyui_pcpo.pcpo.rollout import rollout
from comfyui_pcpo.pcpo.schedules import FlowGrid, ddim_grid, flow_grid, scaled_linear_alpha_bars
from comfyui_pcpo.pcpo.transitions import Cps, DanceSde, Ddim, FlowSde, Steps
from diffusers import DDIMScheduler
from torch.testing import assert_close

torch.set_num_threads(1)

DIFFUSION_PREDICTIONS = ("epsilon", "sample", "v_prediction")
FLOWS = (DanceSde(0.3), DanceSde(0.7), FlowSde(0.7), FlowSde(0.3))


def one_step(plan, i, x, prediction, noise):
    return plan.mean_x[i] * x + plan.mean_p[i] * prediction + plan.std[i] * noise


def diffusers_ddim(prediction_type, spacing, num_steps, final_one):
    scheduler = DDIMScheduler(
        prediction_type=prediction_type,
        clip_sample=False,
        steps_offset=1,
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(num_steps)
    # diffusers keeps its tables in float32; ours are put in, so that float64 can be compared
    scheduler.alphas_cumprod = scaled_linear_alpha_bars()
    first = scheduler.alphas_cumprod[0]
    scheduler.final_alpha_cumprod = torch.ones_like(first) if final_one else first
    return scheduler


@pytest.mark.parametrize("final_one", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction_type", DIFFUSION_PREDICTIONS)
def test_a_ddim_step_is_that_of_diffusers(prediction_type, spacing, eta, final_one):
    # 20 steps: diffusers' own previous time t - 1000 // 20 is the grid's next one
    grid = ddim_grid(20, spacing=spacing, final_alpha_bar=1.0 if final_one else None)
    plan = plan_diffusion(grid, Ddim(1.0), Native(), prediction_type=prediction_type)
    if eta == 0:
        plan = deterministic(plan, grid, Ddim(1.0), prediction_type)
    else:
        plan = plan_diffusion(grid, Ddim(eta), Native(), prediction_type=prediction_type)
    scheduler = diffusers_ddim(prediction_type, spacing, 20, final_one)
    for i, t in enumerate(scheduler.timesteps):
        x, prediction, noise = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64).unbind()
        step = scheduler.step(prediction, int(t), x, eta=eta, variance_noise=noise)
        ours = one_step(plan, i, x, prediction, noise)
        assert_close(ours, step.prev_sample, rtol=1e-12, atol=1e-12)
        clean = plan.x0_x[i] * x + plan.x0_p[i] * prediction
        assert_close(clean, step.pred_original_sample, rtol=1e-12, atol=1e-12)


def test_the_prediction_types_say_the_same():
    # one x0 and eps, told to the sampler in three ways
    grid = ddim_grid(10)
    x0, eps, noise = torch.randn(3, 5, dtype=torch.float64).unbind()
    plans = {
        kind: plan_diffusion(grid, Ddim(1.0), Native(), prediction_type=kind)
        for kind in DIFFUSION_PREDICTIONS
    }
    for i, a in enumerate(grid.alpha_bar):
        x = a.sqrt() * x0 + (1 - a).sqrt() * eps
        told = {"epsilon": eps, "sample": x0, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * x0}
        nexts = [one_step(plans[k], i, x, told[k], noise) for k in DIFFUSION_PREDICTIONS]
        assert_close(nexts[0], nexts[1], rtol=1e-11, atol=1e-11)
        assert_close(nexts[0], nexts[2], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("transition", [Cps(0.8), Cps(0.3), Cps(1.0)])
def test_cps_keeps_the_noise_level_exactly(transition):
    # given the true x0 and eps, x_next has signal 1 - sigma_next and noise sigma_next, exactly
    grid = flow_grid(10)
    steps = transition(grid)
    assert_close(steps.m_eps**2 + steps.std**2, grid.sigma_next**2, rtol=1e-14, atol=1e-16)
    assert_close(steps.m_x0, 1 - grid.sigma_next, rtol=0, atol=0)
    assert (steps.m_x == 0).all()
    expected = grid.sigma_next * math.sin(transition.noise_level * math.pi / 2)
    assert_close(steps.std, expected)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_keeps_the_noise_level_exactly(eta):
    grid = ddim_grid(50)
    steps = Ddim(eta)(grid)
    assert_close(steps.m_eps**2 + steps.std**2, 1 - grid.alpha_bar_next, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize(
    ("silent", "loud"), [(DanceSde(0.0), DanceSde()), (FlowSde(0.0), FlowSde()), (Cps(0.0), Cps())]
)
def test_a_flow_without_noise_is_the_ode(silent, loud):
    # the Euler step by hand: x - v Delta
    grid = flow_grid(10)
    x, v = torch.randn(2, 7, dtype=torch.float64).unbind()
    plan = deterministic(plan_flow(grid, loud, Native()), grid, loud)
    assert (plan.std == 0).all()
    assert not plan.trained.any()
    for steps in (silent(grid), loud.deterministic(grid)):
        assert (steps.std == 0).all()
        for i in range(10):
            s = grid.sigmas[i]
            mean = steps.m_x[i] * x + steps.m_x0[i] * (x - s * v)
            mean = mean + steps.m_eps[i] * (x + (1 - s) * v)
            euler = x - v * (grid.sigmas[i] - grid.sigmas[i + 1])
            assert_close(mean, euler, rtol=1e-13, atol=1e-13)
            assert_close(one_step(plan, i, x, v, v), euler, rtol=1e-13, atol=1e-13)


def test_a_diffusion_without_noise_is_ddim_at_eta_0():
    grid = ddim_grid(20)
    off, zero = Ddim(1.0).deterministic(grid), Ddim(0.0)(grid)
    for name in ("m_x", "m_x0", "m_eps", "std"):
        assert_close(getattr(off, name), getattr(zero, name), rtol=0, atol=0)
    assert (off.std == 0).all()


def test_noise_grows_with_its_level():
    diffusion, flow = ddim_grid(10), flow_grid(10)
    assert_close(Ddim(0.5)(diffusion).std * 2, Ddim(1.0)(diffusion).std)
    assert_close(DanceSde(0.6)(flow).std, 2 * DanceSde(0.3)(flow).std)
    assert_close(FlowSde(1.4)(flow).std, 2 * FlowSde(0.7)(flow).std)


@pytest.mark.parametrize("name", TRANSITIONS)
def test_every_transition_has_noise_by_default(name):
    kind = TRANSITIONS[name]
    grid = flow_grid(5) if TRANSITIONS.entries[name].is_flow else ddim_grid(5)
    assert (kind()(grid).std[:-1] > 0).all()


def test_the_names_of_the_transitions():
    assert {"ddim": Ddim, "dance_sde": DanceSde, "flow_sde": FlowSde, "cps": Cps} == TRANSITIONS


def test_an_estimate_that_is_not_used_may_be_undefined():
    # a network of the clean sample cannot say what the noise is where there is none
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    estimates = PREDICTIONS["sample"](one, zero)
    assert estimates.eps_x.isinf()
    steps = Steps(m_x=0.25 * one, m_x0=0.5 * one, m_eps=zero, std=zero)
    mean_x, mean_p = steps.in_terms_of(estimates)
    assert (mean_x.item(), mean_p.item()) == (0.25, 0.5)


# --- the marginals, for Gaussian data with its exact velocity ------------------------------------

MEAN, VARIANCE = 1.5, 0.25  # of the data


def marginal(sigma: float) -> tuple[float, float]:
    return (1 - sigma) * MEAN, (1 - sigma) ** 2 * VARIANCE + sigma**2


def exact_velocity(sigma: float) -> tuple[float, float]:
    """E[eps - x0 | x] = slope x + offset: the regression of eps - x0 on x."""
    mean, variance = marginal(sigma)
    slope = (sigma - (1 - sigma) * VARIANCE) / variance
    return slope, -MEAN - slope * mean


def propagate(plan, grid: FlowGrid, start: tuple[float, float]) -> tuple[float, float]:
    """Mean and variance after the last step, exactly: every step is linear and Gaussian."""
    mean, variance = start
    for i, sigma in enumerate(grid.timesteps.tolist()):
        slope, offset = exact_velocity(sigma)
        gain = float(plan.mean_x[i] + plan.mean_p[i] * slope)
        mean = gain * mean + float(plan.mean_p[i]) * offset
        variance = gain**2 * variance + float(plan.std[i]) ** 2
    return mean, variance


def marginal_error(transition, num_steps: int) -> float:
    # away from sigma = 1, where FlowSde's coefficient diverges, and from 0
    grid = FlowGrid(torch.linspace(0.9, 0.1, num_steps + 1, dtype=torch.float64))
    plan = plan_flow(grid, transition, Native())
    mean, variance = propagate(plan, grid, marginal(0.9))
    wanted_mean, wanted = marginal(0.1)
    assert mean == pytest.approx(wanted_mean, rel=1e-9)
    return variance / wanted - 1


@pytest.mark.parametrize("transition", FLOWS)
def test_a_flow_sde_keeps_the_marginals_of_its_ode(transition):
    # Euler-Maruyama is of first order: what is left at 2000 steps is small and halves at 4000,
    # so that it would vanish; a wrong drift leaves an error that does not
    coarse, fine = marginal_error(transition, 2000), marginal_error(transition, 4000)
    assert abs(coarse) < 1e-3
    assert abs(2 * fine - coarse) < 1e-5


@pytest.mark.parametrize("transition", [DanceSde(0.3), FlowSde(0.7), Cps(0.8)])
def test_samples_have_the_moments_that_the_steps_promise(transition):
    # 20,000 samples against exact propagation over the same grid, so without discretisation
    # error; the sample mean's standard error is s / sqrt(n), the variance's s^2 sqrt(2 / n), and
    # 4.5 of them are exceeded once in 150,000 runs (the seed is fixed besides)
    count, grid = 20_000, flow_grid(10)
    plan = plan_flow(grid, transition, Native())
    expected_mean, expected = propagate(plan, grid, (0.0, 1.0))

    def denoiser(x, sigma):
        slope, offset = exact_velocity(float(sigma))
        return slope * x + offset

    noise = torch.randn(count, 11, 1, generator=torch.Generator().manual_seed(3))
    final = rollout(denoiser, plan.to("cpu"), noise).final.double()
    assert abs(final.mean() - expected_mean) < 4.5 * (expected / count) ** 0.5
    assert abs(final.var() - expected) < 4.5 * expected * (2 / count) ** 0.5
