"""The grids against diffusers' schedulers and against printed values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comfyui_pcpo.pcpo.schedules import (
    FLOW_GRIDS,
    SPACINGS,
    ddim_grid,
    flow_grid,
    linear_alpha_bars,
    resolution_shift,
    scaled_linear_alpha_bars,
    zero_terminal_snr,
)
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

torch.set_num_threads(1)

COUNTS = (1, 2, 7, 13, 20, 25, 30, 33, 49, 50, 51, 99, 100)


def diffusers_ddim(**options) -> DDIMScheduler:
    sd = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**(sd | {"steps_offset": 1, "set_alpha_to_one": False} | options))


def diffusers_timesteps(num_steps: int, **options) -> list[int]:
    scheduler = diffusers_ddim(**options)
    scheduler.set_timesteps(num_steps)
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize("num_steps", COUNTS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_timesteps_are_those_of_diffusers(spacing, num_steps):
    expected = diffusers_timesteps(num_steps, timestep_spacing=spacing)
    assert ddim_grid(num_steps, spacing=spacing).timesteps.tolist() == expected


@pytest.mark.parametrize(("spacing", "num_steps"), [("linspace", 31), ("trailing", 48)])
def test_ddim_timesteps_at_a_half_are_those_of_diffusers(spacing, num_steps):
    expected = diffusers_timesteps(num_steps, timestep_spacing=spacing)
    assert ddim_grid(num_steps, spacing=spacing).timesteps.tolist() == expected


def test_leading_without_an_offset():
    expected = diffusers_timesteps(30, steps_offset=0)
    assert ddim_grid(30, steps_offset=0).timesteps.tolist() == expected
    assert expected[-1] == 0


# diffusers' alpha-bars are float32 products of 1000 factors: 1e-5 is what they are good for
FLOAT32_PRODUCT = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize(
    ("ours", "schedule"),
    [
        (scaled_linear_alpha_bars(), {}),
        (
            linear_alpha_bars(),
            {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        ),
        (zero_terminal_snr(scaled_linear_alpha_bars()), {"rescale_betas_zero_snr": True}),
    ],
)
def test_alpha_bars_are_those_of_diffusers(ours, schedule):
    expected = diffusers_ddim(**schedule).alphas_cumprod
    assert ours.dtype == torch.float64
    assert_close(ours.float(), expected, **FLOAT32_PRODUCT)


def test_zero_terminal_snr_ends_in_nothing_and_keeps_the_start():
    before = scaled_linear_alpha_bars()
    after = zero_terminal_snr(before)
    assert after[-1] == 0
    assert_close(after[0], before[0], rtol=1e-14, atol=0)
    assert (after.diff() < 0).all()


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_step_arrives_where_the_next_one_starts(spacing):
    alpha_bars = scaled_linear_alpha_bars()
    grid = ddim_grid(30, spacing=spacing)
    assert_close(grid.alpha_bar, alpha_bars[grid.timesteps.long()], rtol=0, atol=0)
    assert_close(grid.alpha_bar_next[:-1], grid.alpha_bar[1:], rtol=0, atol=0)
    assert grid.alpha_bar_next[-1] == alpha_bars[0]
    assert ddim_grid(30, spacing=spacing, final_alpha_bar=1.0).alpha_bar_next[-1] == 1


def test_intervals_of_diffusion():
    assert ddim_grid(50).intervals.tolist() == [20.0] * 50
    uneven = ddim_grid(4, spacing="linspace")  # 999, 666, 333, 0
    assert uneven.intervals.tolist() == [333.0] * 4
    fifty = ddim_grid(50, spacing="linspace")
    assert set(fifty.intervals.tolist()) == {20.0, 21.0}
    assert fifty.intervals[0] == fifty.timesteps[0] - fifty.timesteps[1]
    assert ddim_grid(1, spacing="trailing").intervals.tolist() == [1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 50, "spacing": "karras"}, "no spacing 'karras'.*leading, trailing, linsp"),
        ({"num_steps": 0}, "num_steps is 0; it must lie in 1 to 1000"),
        ({"num_steps": 1001}, "num_steps is 1001; it must lie in 1 to 1000"),
    ],
)
def test_ddim_grid_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ddim_grid(**options)


# --- flow ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 4, 10, 28, 40])
def test_flow_match_euler_grid_is_that_of_diffusers(num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    assert_close(flow_grid(num_steps).sigmas.float(), scheduler.sigmas)


def test_flow_grpo_grid_has_the_printed_values():
    printed = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    assert [round(s, 4) for s in flow_grid(10).sigmas.tolist()] == printed


@pytest.mark.parametrize("num_steps", [12, 16])
def test_dance_grpo_grid(num_steps):
    even = np.linspace(1, 0, num_steps + 1)
    expected = torch.from_numpy(3 * even / (1 + 2 * even))
    assert_close(flow_grid(num_steps, kind="uniform", shift=3.0).sigmas, expected)


@pytest.mark.parametrize(("pixels", "mu", "shift"), [(512, 0.63, 1.878), (720, 0.799, 2.224)])
def test_resolution_shift_of_flux(pixels, mu, shift):
    found = resolution_shift((pixels // 16) ** 2)
    assert np.log(found) == pytest.approx(mu, abs=5e-4)
    assert found == pytest.approx(shift, abs=5e-4)


def test_resolution_shift_at_its_two_ends():
    assert resolution_shift(256) == pytest.approx(np.exp(0.5), rel=1e-14)
    assert resolution_shift((1024 // 16) ** 2) == pytest.approx(np.exp(1.15), rel=1e-14)
    assert np.exp(1.15) == pytest.approx(3.158, abs=5e-4)


@pytest.mark.parametrize("num_steps", [6, 28])
def test_inverse_count_grid_is_the_flux_pipelines(num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = float(np.log(resolution_shift(1024)))
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps), mu=mu)
    grid = flow_grid(num_steps, kind="inverse_count", shift=resolution_shift(1024))
    assert_close(grid.sigmas.float(), scheduler.sigmas)


def test_inverse_count_grid_has_the_printed_values():
    printed = [1, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0]
    grid = flow_grid(6, kind="inverse_count", shift=resolution_shift((512 // 16) ** 2))
    assert [round(s, 4) for s in grid.sigmas.tolist()] == printed


@pytest.mark.parametrize("kind", FLOW_GRIDS)
def test_flow_intervals_sum_to_one(kind):
    grid = flow_grid(9, kind=kind)
    assert grid.sigmas.dtype == torch.float64
    assert (grid.intervals > 0).all()
    assert_close(grid.intervals.sum(), torch.tensor(1.0).double(), rtol=1e-14, atol=0)
    assert_close(grid.timesteps - grid.intervals, grid.sigma_next, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 8, "kind": "karras"}, "no flow grid 'karras'.*uniform"),
        ({"num_steps": 0}, "num_steps is 0; it must be at least 1"),
        ({"num_steps": 8, "shift": 0.0}, "shift is 0.0; it must be positive"),
        ({"num_steps": 8, "shift": float("nan")}, "shift is nan; it must be positive"),
    ],
)
def test_flow_grid_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        flow_grid(**options)
