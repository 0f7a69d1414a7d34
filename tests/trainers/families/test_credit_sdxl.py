"""Credit on SDXL's own grids, against numpy: Gaussian densities, roots and means written anew."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from comfyui_pcpo.pcpo.credit import NOISE_ENERGY, Native, ObjectiveOnly, Proportionate
from comfyui_pcpo.pcpo.plan import Plan, plan_diffusion
from comfyui_pcpo.pcpo.transitions import Ddim
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.families.scheduler import ZERO_SNR, SchedulerConfig
from comfyui_pcpo.trainers.families.sdxl.file import CONFIGS
from comfyui_pcpo.trainers.families.source import read_config
from comfyui_pcpo.trainers.run.plans import diffusion_grid
from diffusers import DDIMScheduler

OWN = read_config(CONFIGS / "scheduler" / "scheduler_config.json")
KINDS = {
    "leading": ("leading", "epsilon", False),
    "trailing": ("trailing", "epsilon", False),
    "v": ("leading", "v_prediction", False),
    "zero SNR": ("trailing", "v_prediction", True),
}


class Levels(NamedTuple):
    """alpha_bar of each step and of the next, float64; timesteps."""

    now: np.ndarray
    after: np.ndarray
    timesteps: np.ndarray

    @property
    def std(self) -> np.ndarray:
        """DDPM's posterior: beta~ = (1 - a') / (1 - a) (1 - a / a')."""
        return np.sqrt((1 - self.after) / (1 - self.now) * (1 - self.now / self.after))


def levels(steps: int, kind: str) -> Levels:
    """Timesteps as diffusers spaces them; alpha_bar by its formulas, in float64."""
    spacing, _, is_zero = KINDS[kind]
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", timestep_spacing=spacing, steps_offset=1
    )
    scheduler.set_timesteps(steps)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    roots = np.sqrt(np.cumprod(1 - betas))
    if is_zero:  # Lin et al., algorithm 1
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    times = scheduler.timesteps.numpy()
    bars = roots**2
    return Levels(bars[times], np.append(bars[times[1:]], bars[0]), times)


def plan(steps: int, kind: str, credit) -> Plan:
    spacing, prediction, is_zero = KINDS[kind]
    schedule = SchedulerConfig.from_dict(OWN | (ZERO_SNR if is_zero else {}))
    grid = diffusion_grid(schedule, steps, "leading" if is_zero else spacing)
    return plan_diffusion(grid, Ddim(1.0), credit, prediction_type=prediction)


def mean_of(at: Levels, i: int, x: float, prediction: float, kind: str, std: float) -> float:
    """A step's mean, through the clean image and the noise that a prediction stands for."""
    signal, noise = np.sqrt(at.now[i]), np.sqrt(1 - at.now[i])
    if KINDS[kind][1] == "epsilon":
        clean, eps = (x - noise * prediction) / signal, prediction
    else:
        clean, eps = signal * x - noise * prediction, noise * x + signal * prediction
    direction = np.sqrt(max(0.0, 1 - at.after[i] - std**2))
    return np.sqrt(at.after[i]) * clean + direction * eps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [20, 25, 30])
def test_the_native_weight_is_that_of_the_gaussians(steps, kind):
    """log N(new) - log N(old) of a step, from densities: -(w d z + (w d)^2 / 2)."""
    at, found = levels(steps, kind), plan(steps, kind, Native())
    assert found.timesteps.tolist() == at.timesteps.tolist()
    assert (at.now[0] == 0) == (kind == "zero SNR")
    random = np.random.default_rng(0)
    for i in range(steps):
        x, old, new, z = random.standard_normal(4)
        std = at.std[i]
        was, is_now = (mean_of(at, i, x, p, kind, std) for p in (old, new))
        value = was + std * z
        log_ratio = (-((value - is_now) ** 2) + (value - was) ** 2) / (2 * std**2)
        w, d = found.weight[i].item(), new - old
        assert log_ratio == pytest.approx(-(w * d * z + (w * d) ** 2 / 2), rel=1e-7, abs=1e-9)
    if kind == "zero SNR":  # all is noise: v says the clean image alone
        expected = np.sqrt(at.after[0] / (1 - at.after[0]))
        assert found.weight[0].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [20, 25, 30])
def test_credit_is_proportionate_to_the_intervals(steps, kind):
    """The credit of a difference of the noise, which is sqrt(alpha_bar) of one of v."""
    at, found = levels(steps, kind), plan(steps, kind, ObjectiveOnly())
    per = np.sqrt(at.now) if KINDS[kind][1] == "v_prediction" else np.ones(steps)
    known = at.now > 0
    lengths = -np.diff(at.timesteps).astype(float)
    lengths = np.append(lengths, lengths[-1])
    native = plan(steps, kind, Native()).weight.numpy()[known] / per[known]
    expected = native.mean() * lengths / lengths[known].mean() * per
    assert found.credit.numpy()[known] == pytest.approx(expected[known], rel=1e-10)
    assert found.trained.all()
    if not known.all():  # the first step: its native weight in v, and no infinity
        assert found.credit[0] == found.weight[0] > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [20, 25, 30])
def test_the_published_noise_is_the_larger_root(steps, kind):
    at, rule = levels(steps, kind), Proportionate()
    found = plan(steps, kind, rule)
    assert found.std.isfinite().all() and found.credit.isfinite().all()
    energy = (found.std.numpy() ** 2).sum() / (at.std**2).sum()
    spacing, _, is_zero = KINDS[kind]
    schedule = SchedulerConfig.from_dict(OWN | (ZERO_SNR if is_zero else {}))
    grid = diffusion_grid(schedule, steps, spacing)
    w = rule(grid, Ddim(1.0), found.trained).solve_weight
    for i in range(steps):
        a2 = at.after[i] * (1 - at.now[i]) / at.now[i] if at.now[i] else np.inf
        b2 = 1 - at.after[i]
        roots = np.roots([1 + w**2, -2 * np.sqrt(a2) * w, a2 - b2]) if at.now[i] else [1j]
        expected = max(np.real(roots)) if np.isreal(roots).all() else at.std[i]
        assert found.std[i].item() == pytest.approx(expected, rel=1e-6)
    reached = abs(energy / NOISE_ENERGY - 1) < 1e-6
    assert reached or energy < NOISE_ENERGY  # none has as much: the one with the most


@pytest.mark.parametrize("more", [[], ["--zero-terminal-snr"]])
@pytest.mark.parametrize("steps", [20, 25, 30])
def test_the_table_of_weights_is_drawn(tmp_path, capsys, steps, more):
    out = tmp_path / "w.png"
    words = ["weights", "--family", "sdxl", "--steps", str(steps), "--out", str(out), *more]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"sdxl, {'trailing' if more else 'leading'}, {steps} steps" in said
    assert "nan" not in said.lower() and out.stat().st_size > 1000
