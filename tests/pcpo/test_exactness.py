"""The method against independent forms: what every other result rests on."""

from __future__ import annotations

import math

import pytest
import torch
from comfyui_pcpo.pcpo import (
    PREDICTIONS,
    Cps,
    DanceSde,
    Ddim,
    FlowSde,
    ddim_grid,
    flow_grid,
    plan_diffusion,
    plan_flow,
    rollout,
    weighted_log_ratio,
)
from comfyui_pcpo.pcpo.credit import Exact, Native, ObjectiveOnly, Proportionate
from comfyui_pcpo.pcpo.objectives import ClipRange, Hinge, LogHinge, PpoClip
from comfyui_pcpo.pcpo.plan import deterministic
from comfyui_pcpo.pcpo.ratios import StepBatch, density, kl_divergence
from comfyui_pcpo.pcpo.schedules import scaled_linear_alpha_bars, zero_terminal_snr
from diffusers import DDIMScheduler
from torch.distributions import Normal
from torch.distributions import kl_divergence as normal_kl

DIFFUSION = [(t, p) for t in (Ddim(), Ddim(0.4)) for p in ("epsilon", "sample", "v_prediction")]
FLOW = [DanceSde(), FlowSde(), Cps()]
CREDITS = [Native(), Proportionate(), ObjectiveOnly()]


def plans():  # every transition with every prediction
    for transition, prediction in DIFFUSION:
        plan = plan_diffusion(ddim_grid(7), transition, Native(), prediction_type=prediction)
        yield pytest.param(plan, id=f"ddim {transition.eta} {prediction}")
    for prediction in ("epsilon", "sample", "v_prediction"):
        solved = plan_diffusion(ddim_grid(7), Ddim(), Proportionate(), prediction_type=prediction)
        yield pytest.param(solved, id=f"ddim solved {prediction}")
    zero = ddim_grid(7, zero_terminal_snr(scaled_linear_alpha_bars()), spacing="trailing")
    v_form = plan_diffusion(zero, Ddim(), Native(), prediction_type="v_prediction")
    yield pytest.param(v_form, id="ddim at alpha_bar 0, v")
    for transition in FLOW:
        yield pytest.param(plan_flow(flow_grid(7), transition, Native()), id=transition.name)


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("plan", list(plans()))
def test_matching_is_the_difference_of_log_densities(plan):
    for i in plan.trained.nonzero().flatten().tolist():
        x, old, new, noise = (normals(3, 4, 5, seed=10 * i + k) for k in range(4))
        new = old + 1e-2 * new
        mean_old = plan.mean_x[i] * x + plan.mean_p[i] * old
        mean_new = plan.mean_x[i] * x + plan.mean_p[i] * new
        x_next = mean_old + plan.std[i] * noise
        exact = Normal(mean_new, plan.std[i]).log_prob(x_next) - Normal(
            mean_old, plan.std[i]
        ).log_prob(x_next)
        exact = exact.flatten(1).mean(1)
        ours = weighted_log_ratio(new, old, noise, plan.weight[i].expand(3))
        torch.testing.assert_close(ours, exact, atol=1e-12, rtol=1e-9)
        rows = [c[i].expand(3) for c in (plan.mean_x, plan.mean_p, plan.std, plan.weight)]
        torch.testing.assert_close(
            density(new, StepBatch(x, old, noise, *rows)), exact, atol=1e-12, rtol=1e-9
        )
        kl = normal_kl(Normal(mean_new, plan.std[i]), Normal(mean_old, plan.std[i]))
        torch.testing.assert_close(
            kl_divergence(new, old, rows[-1]), kl.flatten(1).mean(1), atol=1e-12, rtol=1e-9
        )
        assert (weighted_log_ratio(old, old, noise, rows[-1]) == 0).all()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [20, 25, 30, 50])
def test_solved_noise_gives_the_wanted_weight(spacing, steps):
    grid = ddim_grid(steps, spacing=spacing)
    over = torch.ones(steps, dtype=torch.bool)
    native = Native()(grid, Ddim(), over)
    credited = Exact()(grid, Ddim(), over)
    wanted = credited.credit[credited.solved]
    torch.testing.assert_close(credited.weight[credited.solved], wanted, atol=1e-10, rtol=0)
    used = native.trained
    torch.testing.assert_close(
        credited.credit[used].sum(), native.weight[used].sum(), atol=1e-12, rtol=1e-12
    )
    # the smaller root, and a projected step's weight is the least that any noise gives
    for i in credited.policy.nonzero().flatten().tolist():
        a2 = grid.alpha_bar_next[i] * (1 - grid.alpha_bar[i]) / grid.alpha_bar[i]
        b2 = 1 - grid.alpha_bar_next[i]
        sigma = torch.linspace(1e-4, 1, 20001, dtype=torch.float64) * b2.sqrt()
        weights = (a2.sqrt() - (b2 - sigma**2).clamp(min=0).sqrt()) / sigma
        if credited.solved[i]:
            crossing = sigma[(weights <= credited.credit[i]).nonzero()[0]]
            torch.testing.assert_close(
                credited.steps.std[i : i + 1], crossing, atol=1e-4, rtol=1e-3
            )
        else:
            assert weights.min() > credited.credit[i] - 1e-9
            torch.testing.assert_close(credited.weight[i], weights.min(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_diffusers(kind, eta):
    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
        prediction_type=kind,
    )
    theirs.alphas_cumprod = scaled_linear_alpha_bars()
    theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
    theirs.set_timesteps(10)
    grid = ddim_grid(10)
    plan = plan_diffusion(grid, Ddim(eta or 1.0), Native(), prediction_type=kind)
    plan = deterministic(plan, grid, Ddim(), kind) if eta == 0 else plan
    x, prediction, noise = (normals(2, 4, 8, 8, seed=s) for s in range(3))
    for i, t in enumerate(theirs.timesteps):
        want = theirs.step(prediction, int(t), x, eta=eta, variance_noise=noise).prev_sample
        ours = plan.mean_x[i] * x + plan.mean_p[i] * prediction + plan.std[i] * noise
        torch.testing.assert_close(ours, want, atol=1e-12, rtol=1e-12)


def test_flow_without_noise_is_the_ode():
    grid = flow_grid(6)
    plan = plan_flow(grid, FlowSde(), Native())
    ode = deterministic(plan, grid, FlowSde())
    x, v = normals(2, 3), normals(2, 3, seed=1)
    for i in range(6):
        euler = x - v * (grid.sigmas[i] - grid.sigmas[i + 1])
        torch.testing.assert_close(ode.mean_x[i] * x + ode.mean_p[i] * v, euler)
        quiet = plan_flow(grid, DanceSde(1e-9), Native())
        torch.testing.assert_close(quiet.mean_x[i] * x + quiet.mean_p[i] * v, euler)


@pytest.mark.parametrize("transition", FLOW[:2], ids=lambda t: t.name)
def test_flow_sdes_keep_the_odes_marginals(transition):
    """Gaussian data of standard deviation 0.5, its exact velocity, 400 steps, 20,000 samples."""
    data = 0.5
    plan = plan_flow(flow_grid(400, kind="uniform", shift=1.0), transition, Native()).to("cpu")

    def velocity(x, sigma):
        variance = (1 - sigma) ** 2 * data**2 + sigma**2
        return (sigma - (1 - sigma) * data**2) / variance * x

    noise = torch.randn(20000, 401, 1, generator=torch.Generator().manual_seed(0))
    seen = {}
    rollout(velocity, plan, noise, callback=lambda i, x, clean: seen.update({i: x.std().item()}))
    for i in (99, 199, 299, 399):
        sigma = 1 - (i + 1) / 400
        want = math.sqrt((1 - sigma) ** 2 * data**2 + sigma**2)
        # 0.5% is the standard error of a deviation of 20,000; 3% allows for it and 400 steps
        assert seen[i] == pytest.approx(want, rel=0.03)


def test_cps_keeps_the_coefficients():
    """Not an SDE: its noise does not shrink with the step. What it keeps is signal and noise."""
    grid = flow_grid(9)
    steps = Cps(0.8)(grid)
    torch.testing.assert_close(steps.m_x0, 1 - grid.sigma_next)
    torch.testing.assert_close((steps.m_eps**2 + steps.std**2).sqrt(), grid.sigma_next)
    torch.testing.assert_close(steps.std, grid.sigma_next * math.sin(0.4 * math.pi))


# --- the baselines' conventions, from constants computed here -----------------------------------


def log_density(x, mean, std):
    return (-((x - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)).mean()


def test_ddpo_step():
    """DDPO: eta 1, full density, mean over elements (BASELINES B1)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    bars = torch.cumprod(1 - betas.double(), 0)
    a, b = bars[481].item(), bars[461].item()
    sigma = math.sqrt((1 - b) / (1 - a) * (1 - a / b))
    x, eps, noise = (normals(4, 8, 8, seed=s).float() for s in range(3))
    x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    mean = math.sqrt(b) * x0 + math.sqrt(1 - b - sigma**2) * eps
    want = log_density(mean + sigma * noise, mean, sigma)

    plan = plan_diffusion(ddim_grid(50), Ddim(), Native()).to("cpu")
    i = plan.timesteps.tolist().index(481)
    ours = plan.mean_x[i] * x + plan.mean_p[i] * eps
    torch.testing.assert_close(ours, mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(plan.std[i], torch.tensor(sigma), atol=1e-6, rtol=0)
    from comfyui_pcpo.pcpo.ratios import gaussian_log_prob

    got = gaussian_log_prob((ours + plan.std[i] * noise)[None], ours[None], plan.std[i : i + 1])
    torch.testing.assert_close(got[0], want, atol=1e-6, rtol=1e-6)


def test_ddpo_noise_levels():
    plan = plan_diffusion(ddim_grid(50), Ddim(), Native())
    assert plan.std[0].item() == pytest.approx(0.4545, abs=1e-4)
    assert plan.std[-1].item() == pytest.approx(0.0206, abs=1e-4)


def test_dance_step():
    """DanceGRPO on FLUX: shift 3, eta 0.3, drift with the clean estimate (BASELINES B3)."""
    sigmas = [3 * s / (1 + 2 * s) for s in (1 - i / 16 for i in range(17))]
    x, v = (normals(6, 4, seed=s).float() for s in range(2))
    plan = plan_flow(flow_grid(16, kind="uniform"), DanceSde(), Native(), drop_last=1).to("cpu")
    for i in range(15):
        s, d = sigmas[i], sigmas[i + 1] - sigmas[i]
        x0 = x - s * v
        mean = x + v * d + 0.5 * 0.3**2 * (x - (1 - s) * x0) / s**2 * d
        ours = plan.mean_x[i] * x + plan.mean_p[i] * v
        torch.testing.assert_close(ours, mean, atol=1e-6, rtol=1e-6)
        assert plan.std[i].item() == pytest.approx(0.3 * math.sqrt(-d), abs=1e-6)
    assert 0.0435 < plan.std[:15].min() < 0.045 and 0.1085 < plan.std[:15].max() < 0.111


def test_flow_grpo_step():
    """Flow-GRPO on SD3.5: a 0.7; sigma 1 takes the second sigma in the denominator (B4)."""
    grid = flow_grid(10)
    sigmas = grid.sigmas.tolist()
    x, v = (normals(6, 4, seed=s).float() for s in range(2))
    plan = plan_flow(grid, FlowSde(), Native(), drop_last=1).to("cpu")
    noises = []
    for i in range(10):
        s, d = sigmas[i], sigmas[i + 1] - sigmas[i]
        std = 0.7 * math.sqrt(s / (1 - (sigmas[1] if s == 1 else s)))
        mean = x * (1 + std**2 / (2 * s) * d) + v * (1 + std**2 * (1 - s) / (2 * s)) * d
        torch.testing.assert_close(
            plan.mean_x[i] * x + plan.mean_p[i] * v, mean, atol=1e-6, rtol=1e-6
        )
        noises.append(std * math.sqrt(-d))
        assert plan.std[i].item() == pytest.approx(noises[-1], abs=1e-6)
    assert noises[0] == pytest.approx(0.70, abs=5e-3) and noises[1] == pytest.approx(0.74, abs=5e-3)
    assert plan.trained.tolist() == [True] * 9 + [False]


# --- objectives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [ClipRange(), ClipRange(0.1, 0.3)])
def test_hinges_are_ppo(clip):
    log_ratio = (0.3 * normals(400)).requires_grad_()
    advantages = normals(400, seed=1)
    advantages[:20] = 0
    ppo, hinge, log_hinge = (o(clip) for o in (PpoClip, Hinge, LogHinge))
    xi = torch.where(advantages < 0, clip.low, clip.high).double()
    shifted = ppo(log_ratio, advantages).loss + advantages + xi * advantages.abs()
    torch.testing.assert_close(hinge(log_ratio, advantages).loss, shifted)
    gradient = {}
    for name, objective in (("ppo", ppo), ("hinge", hinge), ("log", log_hinge)):
        terms = objective(log_ratio, advantages)
        (gradient[name],) = torch.autograd.grad(terms.loss.sum(), log_ratio)
        still = (gradient[name] == 0) & (advantages != 0)
        assert torch.equal(terms.clipped, still)
    torch.testing.assert_close(gradient["hinge"], gradient["ppo"])
    inside = log_ratio.exp().sub(1).abs() < min(clip.low, clip.high) / 2
    torch.testing.assert_close(
        gradient["log"][inside] * log_ratio.exp()[inside], gradient["ppo"][inside]
    )


def test_on_policy_nothing_is_clipped_and_every_gradient_is_reinforce():
    log_ratio = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([-2.0, -1, 0, 1, 2], dtype=torch.float64)
    for objective in (PpoClip(), Hinge(), LogHinge()):
        terms = objective(log_ratio, advantages)
        assert not terms.clipped.any() and not terms.outside.any()
        (gradient,) = torch.autograd.grad(terms.loss.sum(), log_ratio)
        torch.testing.assert_close(gradient, -advantages)


@pytest.mark.parametrize("name", ["epsilon", "sample", "v_prediction", "velocity"])
def test_predictions_are_consistent(name):
    """A network that knows the truth gives it back, whatever it predicts."""
    noise = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    signal = 1 - noise if name == "velocity" else (1 - noise**2).sqrt()
    x0, eps = normals(3), normals(3, seed=1)
    x = signal * x0 + noise * eps
    truth = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": signal * eps - noise * x0,
        "velocity": eps - x0,
    }[name]
    e = PREDICTIONS[name](signal, noise)
    torch.testing.assert_close(e.x0_x * x + e.x0_p * truth, x0)
    torch.testing.assert_close(e.eps_x * x + e.eps_p * truth, eps)


def test_an_epsilon_network_is_refused_at_pure_noise():
    grid = ddim_grid(7, zero_terminal_snr(scaled_linear_alpha_bars()), spacing="trailing")
    with pytest.raises(ValueError, match="v_prediction"):
        plan_diffusion(grid, Ddim(), Native())


def test_a_sampler_without_noise_is_refused():
    with pytest.raises(ValueError, match="no step carries a policy"):
        plan_diffusion(ddim_grid(7), Ddim(0.0), Native())
