"""`pcpo weights` for flow models: Proposition 2's columns against float64 numpy (METHOD M4)."""

from __future__ import annotations

import re

import numpy as np
import pytest
from comfyui_pcpo.pcpo.credit import Native, Proportionate
from comfyui_pcpo.pcpo.plan import step_set
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.cli.weights import WeightsArguments, case_of
from PIL import Image


def dance_grpo(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Sigmas and diffusion coefficients: linspace shifted by 3, eta 0.3."""
    even = np.linspace(1, 0, steps + 1)
    return 3 * even / (1 + 2 * even), np.full(steps, 0.3)


def flow_grpo(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """diffusers' grid, shifted twice at its end; a = 0.7, sigma_1 in the first denominator."""
    even = np.linspace(1, 3 * 0.001 / (1 + 2 * 0.001), steps)
    sigmas = np.append(3 * even / (1 + 2 * even), 0)
    at = sigmas[:-1]
    return sigmas, 0.7 * np.sqrt(at / (1 - np.where(at == 1, sigmas[1], at)))


# family, steps, last steps left out, the grid, zeta
CASES = {
    "DanceGRPO-16": ("flux", 16, 0, dance_grpo, 13.3432),
    "DanceGRPO-16 without the last": ("flux", 16, 1, dance_grpo, 14.0114),
    "DanceGRPO-12": ("flux", 12, 0, dance_grpo, 11.4842),
    "DanceGRPO-12 without the last": ("flux", 12, 1, dance_grpo, 12.3283),
    "Flow-GRPO-10": ("sd3", 10, 0, flow_grpo, 5.7054),
    "Flow-GRPO-10 without the last": ("sd3", 10, 1, flow_grpo, 3.9702),
}
PRINTED = {  # native weights, as METHOD M4 gives them
    "DanceGRPO-16": ("min", "max", 0.4915, 1.6670),
    "Flow-GRPO-10": (
        *(0.0570, 0.0784, 0.1292, 0.1880, 0.2640, 0.3710, 0.5356, 0.8248, 1.4867, 1.7706),
    ),
}


def expected(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sigmas, native weights, proportionate ones, and the steps' standard deviations."""
    _, steps, dropped, grid, _ = CASES[name]
    sigmas, g = grid(steps)
    at, delta = sigmas[:-1], sigmas[:-1] - sigmas[1:]
    weight = np.sqrt(delta) / g * (1 + (1 - at) * g**2 / (2 * at))
    kept = slice(0, steps - dropped)
    zeta = weight[kept].sum() / delta[kept].sum()
    return at, weight, zeta * delta, g * np.sqrt(delta)


@pytest.mark.parametrize("name", CASES)
def test_columns_equal_an_independent_computation(name):
    family, steps, dropped, _, zeta = CASES[name]
    case = case_of(WeightsArguments(family=family, steps=steps, drop_last=dropped))
    over = step_set(steps, dropped)
    native = Native()(case.grid, case.transition, over)
    credited = Proportionate()(case.grid, case.transition, over)
    at, weight, credit, std = expected(name)
    for ours, theirs in (
        (case.grid.timesteps, at),
        (native.weight, weight),
        (credited.credit, credit),
        (native.steps.std, std),
        (credited.steps.std, std),  # a flow's sampler is not changed
    ):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-12, atol=1e-15)
    kept = steps - dropped
    assert abs(native.weight[:kept].sum() - credited.credit[:kept].sum()) < 1e-12
    assert credit[0] / (at[0] - at[1]) == pytest.approx(zeta, abs=5e-5)
    assert credited.trained.sum() == kept


@pytest.mark.parametrize("name", PRINTED)
def test_the_figures_of_method_m4(name):
    _, weight, _, _ = expected(name)
    if PRINTED[name][0] == "min":
        assert (weight.min(), weight.max()) == pytest.approx(PRINTED[name][2:], abs=1e-4)
    else:
        assert weight == pytest.approx(PRINTED[name], abs=1e-4)


@pytest.mark.parametrize("name", ["DanceGRPO-16", "Flow-GRPO-10 without the last"])
def test_the_command_prints_and_plots_them(name, tmp_path, capsys):
    family, steps, dropped, _, zeta = CASES[name]
    plot = tmp_path / "weights.png"
    options = ["--family", family, "--drop-last", str(dropped), "--out", str(plot)]
    assert main(["weights", *options]) == 0  # steps, shift and noise are the published ones
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if re.match(r" +\d+  ", line)]
    assert len(rows) == steps
    at, weight, credit, std = expected(name)
    columns = np.array([[float(value) for value in row[1:6]] for row in rows]).T
    for ours, theirs, digits in zip(
        columns, (at, weight, credit, std, std), (4e-5, 1e-6, 1e-6, 1e-6, 1e-6), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=digits, rtol=0)
    assert ["not trained" in " ".join(row) for row in rows] == [False] * (steps - dropped) + [
        True
    ] * dropped
    total = weight[: steps - dropped].sum()
    assert f"native {total:.6f}  credit {total:.6f}" in said
    assert f"zeta {zeta:.4f}" in said
    picture = Image.open(plot)
    assert picture.size[0] > 500 and len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10
