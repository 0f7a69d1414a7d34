"""The baselines' own conventions, from their formulas (BASELINES B1, B3, B4) in numpy.

The expected side is float64 arithmetic written here; ours is float32, as in training.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from comfyui_pcpo.pcpo import KLS, RATIOS
from comfyui_pcpo.pcpo.credit import Native
from comfyui_pcpo.pcpo.objectives import PpoClip
from comfyui_pcpo.pcpo.plan import plan_diffusion, plan_flow
from comfyui_pcpo.pcpo.ratios import StepBatch, gaussian_log_prob
from comfyui_pcpo.pcpo.rollout import rollout
from comfyui_pcpo.pcpo.schedules import ddim_grid, flow_grid
from comfyui_pcpo.pcpo.transitions import Cps, DanceSde, Ddim, FlowSde
from torch.testing import assert_close

torch.set_num_threads(1)

IMAGES, SHAPE = 2, (4, 16, 16)
FLOAT32 = {"rtol": 1e-6, "atol": 1e-6}


def random_latents(seed: int):
    """A latent, the old and the new prediction, noise: float32, and the same as float64 numpy."""
    generator = torch.Generator().manual_seed(seed)
    x, old, change, noise = torch.randn(4, IMAGES, *SHAPE, generator=generator).unbind()
    tensors = (x, old, old + 0.01 * change, noise)
    return tensors, tuple(t.double().numpy() for t in tensors)


def mean_of(values: np.ndarray) -> np.ndarray:
    return values.reshape(IMAGES, -1).mean(axis=1)


def log_prob(x: np.ndarray, mean: np.ndarray, std: float) -> np.ndarray:
    """The full Gaussian, averaged over the latent (B1, B3, B4)."""
    density = -((x - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return mean_of(density)


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).float()


def step_batch(plan, i, x, old, noise) -> StepBatch:
    names = ("mean_x", "mean_p", "std", "credit")
    rows = {name: getattr(plan, name)[i].expand(IMAGES) for name in names}
    return StepBatch(x=x, old=old, noise=noise, **rows)


def check_step(plan, i, tensors, x_next, old_mean, new_mean, std):
    """Sample, log-probability and log ratio of one step against the expected ones."""
    x, old, new, noise = tensors
    mean = plan.mean_x[i] * x + plan.mean_p[i] * old
    sampled = mean + plan.std[i] * noise
    assert_close(sampled, tensor(x_next), **FLOAT32)
    assert plan.std[i].item() == pytest.approx(std, rel=1e-6)
    expected = log_prob(x_next, old_mean, std)
    found = gaussian_log_prob(sampled, mean, plan.std[i].expand(IMAGES))
    assert_close(found, tensor(expected), **FLOAT32)
    log_ratio = log_prob(x_next, new_mean, std) - expected
    for ratio in (RATIOS["density"], RATIOS["epsilon_matching"]):
        assert_close(ratio(new, step_batch(plan, i, x, old, noise)), tensor(log_ratio), **FLOAT32)
    return log_ratio


# --- B1, B2: DDPO and DanceGRPO on SD ------------------------------------------------------------

ALPHA_BAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def ddpo_moments(i, x, eps):
    """Mean and standard deviation of DDPO's step i: eta 1, the previous time clamped at 0."""
    t = 981 - 20 * i
    now, after = ALPHA_BAR[t], ALPHA_BAR[max(t - 20, 0)]
    std = math.sqrt((1 - after) / (1 - now) * (1 - now / after))
    clean = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
    return math.sqrt(after) * clean + math.sqrt(1 - after - std**2) * eps, std


@pytest.mark.parametrize("i", [0, 1, 24, 27, 40, 48, 49])
def test_a_ddpo_step(i):
    plan = plan_diffusion(ddim_grid(50), Ddim(1.0), Native()).to("cpu")
    tensors, (x, old, new, noise) = random_latents(i)
    old_mean, std = ddpo_moments(i, x, old)
    new_mean, _ = ddpo_moments(i, x, new)
    log_ratio = check_step(plan, i, tensors, old_mean + std * noise, old_mean, new_mean, std)
    # DDPO's loss: mean of max(-A rho, -A clip(rho, 1 - 1e-4, 1 + 1e-4))
    advantages, rho = np.array([1.5, -0.5]), np.exp(log_ratio)
    loss = np.maximum(-advantages * rho, -advantages * np.clip(rho, 1 - 1e-4, 1 + 1e-4))
    found = PpoClip()(tensor(log_ratio), tensor(advantages)).loss
    assert_close(found, tensor(loss), **FLOAT32)


def test_ddpo_standard_deviations_and_steps():
    plan = plan_diffusion(ddim_grid(50), Ddim(1.0), Native())
    assert plan.timesteps.tolist() == list(range(981, 0, -20))
    assert round(plan.std.max().item(), 4) == round(plan.std[0].item(), 4) == 0.4545
    assert round(plan.std[48].item(), 4) == 0.0395
    assert round(plan.std[49].item(), 4) == 0.0206
    assert plan.trained.sum() == 50
    dance_grpo = plan_diffusion(ddim_grid(50), Ddim(1.0), Native(), drop_last=1)
    assert dance_grpo.trained.tolist() == [True] * 49 + [False]


# --- B3: DanceGRPO on FLUX -----------------------------------------------------------------------


def dance_sigmas(num_steps):
    even = np.linspace(1, 0, num_steps + 1)
    return 3 * even / (1 + 2 * even)


def dance_moments(i, sigmas, x, v, eta=0.3):
    s, step = sigmas[i], sigmas[i + 1] - sigmas[i]
    clean = x - s * v
    mean = x + v * step + 0.5 * eta**2 * (x - (1 - s) * clean) / s**2 * step
    return mean, eta * math.sqrt(abs(step))


@pytest.mark.parametrize(("num_steps", "i"), [(16, 0), (16, 7), (16, 14), (16, 15), (12, 3)])
def test_a_dance_grpo_step(num_steps, i):
    grid = flow_grid(num_steps, kind="uniform", shift=3.0)
    plan = plan_flow(grid, DanceSde(0.3), Native()).to("cpu")
    tensors, (x, old, new, noise) = random_latents(i)
    sigmas = dance_sigmas(num_steps)
    old_mean, std = dance_moments(i, sigmas, x, old)
    new_mean, _ = dance_moments(i, sigmas, x, new)
    check_step(plan, i, tensors, old_mean + std * noise, old_mean, new_mean, std)


def test_dance_grpo_standard_deviations_and_steps():
    grid = flow_grid(16, kind="uniform", shift=3.0)
    plan = plan_flow(grid, DanceSde(0.3), Native(), drop_last=1)
    assert plan.trained.tolist() == [True] * 15 + [False]
    trained = plan.std[plan.trained]
    assert (round(trained[0].item(), 3), round(trained[14].item(), 3)) == (0.044, 0.110)


def test_dance_grpo_decodes_the_last_clean_estimate():
    grid = flow_grid(16, kind="uniform", shift=3.0)
    plan = plan_flow(grid, DanceSde(0.3), Native()).to("cpu")
    noise = torch.randn(IMAGES, 17, *SHAPE, generator=torch.Generator().manual_seed(0))
    trajectory = rollout(lambda x, t: torch.sin(x), plan, noise)
    x = trajectory.x[:, -1]
    assert_close(trajectory.clean, x - float(dance_sigmas(16)[15]) * torch.sin(x), **FLOAT32)


# --- B4: Flow-GRPO on SD3.5 ----------------------------------------------------------------------


def flow_grpo_sigmas():
    """diffusers' grid: the smallest training sigma is shifted, and the points to it once more."""
    smallest = 3 * 0.001 / (1 + 2 * 0.001)
    even = np.linspace(1, smallest, 10)
    return np.append(3 * even / (1 + 2 * even), 0)


SIGMAS = flow_grpo_sigmas()


def flow_grpo_std_dev(i, level=0.7):
    """sigma = 1 is replaced by the second sigma, in the denominator alone."""
    s = SIGMAS[i]
    return level * math.sqrt(s / (1 - (SIGMAS[1] if s == 1 else s)))


def flow_grpo_moments(i, x, v, level=0.7):
    s, dt, std_dev = SIGMAS[i], SIGMAS[i + 1] - SIGMAS[i], flow_grpo_std_dev(i, level)
    pull = std_dev**2 / (2 * s) * dt
    mean = x * (1 + pull) + v * (dt + pull * (1 - s))
    return mean, std_dev * math.sqrt(-dt)


@pytest.mark.parametrize("i", [0, 1, 5, 8, 9])
def test_a_flow_grpo_step(i):
    plan = plan_flow(flow_grid(10), FlowSde(0.7), Native()).to("cpu")
    tensors, (x, old, new, noise) = random_latents(i)
    old_mean, std = flow_grpo_moments(i, x, old)
    new_mean, _ = flow_grpo_moments(i, x, new)
    check_step(plan, i, tensors, old_mean + std * noise, old_mean, new_mean, std)


def test_flow_grpo_standard_deviations_and_steps():
    printed = [0.70, 0.74, 0.54, 0.45, 0.39, 0.35, 0.32, 0.28, 0.225, 0.0063]
    plan = plan_flow(flow_grid(10), FlowSde(0.7), Native(), drop_last=1)
    assert_close(plan.std, torch.tensor(printed).double(), rtol=0, atol=5e-3)
    assert plan.std[8].item() == pytest.approx(0.225, abs=5e-4)
    assert plan.std[9].item() == pytest.approx(0.0063, abs=5e-5)
    assert plan.trained.tolist() == [True] * 9 + [False]


@pytest.mark.parametrize("i", [0, 4, 8])
def test_flow_grpo_kl_leaves_the_interval_out(i):
    plan = plan_flow(flow_grid(10), FlowSde(0.7), Native()).to("cpu")
    (_, reference, new, _), (x, reference64, new64, _) = random_latents(i)
    mean, _ = flow_grpo_moments(i, x, new64)
    mean_reference, _ = flow_grpo_moments(i, x, reference64)
    expected = mean_of((mean - mean_reference) ** 2) / (2 * flow_grpo_std_dev(i) ** 2)
    weight, interval = plan.weight[i].expand(IMAGES), plan.interval[i].expand(IMAGES)
    found = KLS["without_interval"](new, reference, weight, interval)
    assert_close(found, tensor(expected), rtol=1e-6, atol=0)


def cps_moments(i, x, v, level=0.8):
    s, after = SIGMAS[i], SIGMAS[i + 1]
    std = after * math.sin(level * math.pi / 2)
    clean, noisy = x - s * v, x + (1 - s) * v
    return clean * (1 - after) + noisy * math.sqrt(after**2 - std**2), std


@pytest.mark.parametrize("i", [0, 5, 8])
def test_a_flow_grpo_cps_step(i):
    plan = plan_flow(flow_grid(10), Cps(0.8), Native()).to("cpu")
    tensors, (x, old, new, noise) = random_latents(i)
    old_mean, std = cps_moments(i, x, old)
    new_mean, _ = cps_moments(i, x, new)
    x_next = old_mean + std * noise
    check_step(plan, i, tensors, x_next, old_mean, new_mean, std)
    # its "log-probability" under CPS is -mean (x - mean)^2, not divided by the variance
    expected = mean_of((x_next - old_mean) ** 2) - mean_of((x_next - new_mean) ** 2)
    step = step_batch(plan, i, tensors[0], tensors[1], tensors[3])
    assert_close(RATIOS["squared_error"](tensors[2], step), tensor(expected), **FLOAT32)
