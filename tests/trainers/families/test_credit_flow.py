"""Credit on the grids of Z-Image and FLUX.2 [klein], against numpy: formulas written anew."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from comfyui_pcpo.pcpo.credit import Native, Proportionate
from comfyui_pcpo.pcpo.plan import Plan, plan_flow
from comfyui_pcpo.pcpo.transitions import Cps, FlowSde
from comfyui_pcpo.trainers.families.flow import FlowSchedule
from comfyui_pcpo.trainers.run.plans import sigma_grid

CASES = {
    "Z-Image": (FlowSchedule(shift=6.0), (16, 64, 64), None),
    "Z-Image in ComfyUI": (FlowSchedule(shift=6.0), (16, 64, 64), 3.0),
    "klein, 512 px": (FlowSchedule(is_empirical=True, patch=1), (128, 32, 32), None),
    "klein, 1024 px": (FlowSchedule(is_empirical=True, patch=1), (128, 64, 64), None),
}
"""Schedule, shape of a latent, and a shift that a node has set."""
STEPS = (10, 16, 20)


def factor(case: str, steps: int) -> float:
    """The shift: static, or Black Forest Labs' function of tokens and steps."""
    schedule, (_, height, width), asked = CASES[case]
    if not schedule.is_empirical:
        return asked or schedule.shift
    tokens = height * width
    at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    slope = (at_200 - at_10) / 190
    return math.exp(slope * steps + at_200 - 200 * slope)


def sigmas(case: str, steps: int) -> np.ndarray:
    even, shift = np.linspace(1, 1 / steps, steps), factor(case, steps)
    return np.append(shift * even / (1 + (shift - 1) * even), 0.0)


def plan(case: str, steps: int, transition, credit, **more) -> Plan:
    schedule, shape, asked = CASES[case]
    grid = sigma_grid(schedule, shape, steps, "inverse_count", asked)
    return plan_flow(grid, transition, credit, drop_last=1, **more)


def step_of(kind: str, x: float, v: float, now: float, after: float) -> tuple[float, float]:
    """Mean and deviation of a step."""
    if kind == "cps":  # of the noise, a part is kept and a part is new
        clean, eps, angle = x - now * v, x + (1 - now) * v, 0.8 * math.pi / 2
        return (1 - after) * clean + after * math.cos(angle) * eps, after * math.sin(angle)
    g = 0.7 * math.sqrt(now / (1 - now))
    length = after - now
    drift = v + g**2 / (2 * now) * (x + (1 - now) * v)
    return x + drift * length, g * math.sqrt(-length)


@pytest.mark.parametrize("kind", ["flow_sde", "cps"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", STEPS)
def test_the_native_weight_is_that_of_the_gaussians(case, steps, kind):
    """log N(new) - log N(old) of a step, from densities: -(w d z + (w d)^2 / 2)."""
    points = sigmas(case, steps)
    found = plan(case, steps, Cps(0.8) if kind == "cps" else FlowSde(0.7), Native())
    random, first = np.random.default_rng(0), 1 if kind == "flow_sde" else 0
    for i in range(first, steps - 1):  # at sigma 1 Flow-GRPO's noise has a limit of its own
        x, old, new, z = random.standard_normal(4)
        was, std = step_of(kind, x, old, *points[i : i + 2])
        is_now, _ = step_of(kind, x, new, *points[i : i + 2])
        value = was + std * z
        log_ratio = (-((value - is_now) ** 2) + (value - was) ** 2) / (2 * std**2)
        w, d = found.weight[i].item(), new - old
        assert abs(log_ratio) == pytest.approx(
            abs(w * d * z * np.sign(is_now - was) / np.sign(d) - (w * d) ** 2 / 2), rel=1e-6
        )
        assert found.std[i].item() == pytest.approx(std, rel=1e-9)
    assert found.trained.tolist() == [True] * (steps - 1) + [False]


@pytest.mark.parametrize("kind", ["flow_sde", "cps"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("window", [None, (0, 3), (2, 6)])
def test_credit_is_proportionate_to_the_intervals(case, steps, kind, window):
    """Of a window the mean of its own steps is kept."""
    inside = None
    if window is not None:
        inside = torch.zeros(steps, dtype=torch.bool)
        inside[slice(*window)] = True
    transition = Cps(0.8) if kind == "cps" else FlowSde(0.7)
    native = plan(case, steps, transition, Native(), inside=inside)
    found = plan(case, steps, transition, Proportionate(), inside=inside)
    kept = found.trained.numpy()
    assert kept.sum() == (steps - 1 if window is None else window[1] - window[0])
    lengths = -np.diff(sigmas(case, steps))
    expected = native.weight.numpy()[kept].mean() * lengths / lengths[kept].mean()
    assert found.credit.numpy()[kept] == pytest.approx(expected[kept], rel=1e-5)
    assert torch.equal(found.std, native.std)  # the sampler is Flow-GRPO's
    spread = [t.numpy()[kept] / lengths[kept] for t in (found.credit, native.credit)]
    assert np.ptp(spread[0]) < 1e-4 * spread[0].mean() < np.ptp(spread[1])
