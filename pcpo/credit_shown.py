"""The credit of a sampler's steps as text and as the paper's Figure 2."""

from __future__ import annotations

from typing import Any

import torch

from .credit import Credit, Grid, noise_energy
from .predictions import v_prediction
from .schedules import DiffusionGrid
from .statistics.tables import align_columns

NATIVE, CREDITED = "#c0392b", "#1f5fbf"
HEAD = ("step", "native w", "credit", "native std", "std", "true w", "")


def credit_table(grid: Grid, native: Credit, credited: Credit) -> str:
    """One line per step, then a summary; the true weight is that of the policy's density.

    Args:
        grid: the sampler's points.
        native: the sampler with its own weights.
        credited: the same with another credit.
    """
    stds = (native.steps.std, credited.steps.std)
    columns = (native.weight, credited.share, *stds, credited.true_weight)
    step, *names = HEAD
    rows = [[step, "timestep" if isinstance(grid, DiffusionGrid) else "sigma", *names]]
    for i, at in enumerate(grid.timesteps.tolist()):
        numbers = (f"{column[i]:.6f}" for column in columns)
        rows.append([f"{i:4}", f"{at:.5g}", *numbers, _mark(credited, i)])
    return f"{align_columns(rows, len(rows[0]) - 1)}\n{_summary(grid, native, credited)}"


def _mark(credit: Credit, i: int) -> str:
    if not credit.policy[i]:
        return "no policy"
    solved = "solved" if credit.solved[i] else "projected" if credit.projected[i] else ""
    return solved if credit.trained[i] else f"{solved} not trained".strip()


def _summary(grid: Grid, native: Credit, credited: Credit) -> str:
    used = native.trained & native.weight.isfinite()
    weight, credit = native.weight[used], credited.share[used]
    lines = [
        f"{int(native.trained.sum())} steps trained",
        f"{_ends('native weight', weight)}  mean {weight.mean():.7f}",
        f"{_ends('credit', credit)}  mean {credit.mean():.7f}",
        _ends("true weight", credited.true_weight[used]),
        f"sum            native {weight.sum():.6f}  credit {credit.sum():.6f}",
    ]
    if not isinstance(grid, DiffusionGrid):
        return "\n".join([*lines, f"zeta {(credited.share / grid.intervals)[used][0]:.4f}"])
    projected = credited.projected.nonzero().flatten().tolist()
    if credited.solved.any():
        steps = f": {', '.join(map(str, projected))}" if projected else ""
        lines.append(
            f"solved {int(credited.solved.sum())} steps, projected {len(projected)}{steps}"
        )
    lines.extend(_of_pure_noise(grid, credited))
    if (credited.scale != 1).any():
        lines.append(_ends("lambda", credited.scale[used]))
    energy = noise_energy(grid, credited)
    return "\n".join([*lines, f"noise energy {energy:.3f} of DDPM's (sum of std^2)"])


def _of_pure_noise(grid: DiffusionGrid, credited: Credit) -> list[str]:
    """What steps count that start at alpha_bar 0, where only v (or x0) says anything."""
    _, per_v = credited.steps.in_terms_of(v_prediction(*grid.levels))
    rows = (credited.policy & credited.weight.isinf()).nonzero().flatten().tolist()
    weights = (-per_v / credited.steps.std).tolist()
    return [
        f"step {i} starts from pure noise: infinite in eps, {weights[i]:.6f} in v, natively and "
        "with credit; no part of any mean"
        for i in rows
    ]


def _ends(name: str, values: torch.Tensor) -> str:
    return f"{name:14} min {values.min():.6f}  max {values.max():.6f}"


def draw_credit(figure: Any, grid: Grid, native: Credit, credited: Credit, title: str) -> None:
    """Native weights of each step, its credit and true weight, and the noise (paper's Figure 2).

    Args:
        figure: matplotlib's, empty.
        grid: the sampler's points.
        native: the sampler with its own weights.
        credited: the same with another credit.
        title: above the plots.
    """
    left, right = figure.subplots(1, 2)
    _draw_weights(left, grid, native, credited)
    _draw_noise(right, grid, native, credited)
    for axis in (left, right):
        axis.set_xlabel("timestep" if isinstance(grid, DiffusionGrid) else "sigma")
        axis.invert_xaxis()  # sampling runs from noise, on the left, to the image
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    figure.suptitle(title)


def _draw_weights(axis: Any, grid: Grid, native: Credit, credited: Credit) -> None:
    seen = native.policy & native.weight.isfinite()
    x, share, true = (v[seen] for v in (grid.timesteps, credited.share, credited.true_weight))
    axis.plot(x, native.weight[seen], "o-", color=NATIVE, markersize=3, label="native weight")
    axis.plot(x, share, "o-", color=CREDITED, markersize=3, label="credit")
    if not torch.allclose(share, true):
        axis.plot(x, true, "--", color=CREDITED, linewidth=1, label="true weight")
    lost = credited.projected & seen
    if lost.any():
        marks = {"color": CREDITED, "fillstyle": "none", "label": "noise as native"}
        axis.plot(grid.timesteps[lost], credited.share[lost], "s", **marks)
    axis.set(title="weight of a step", yscale="log")


def _draw_noise(axis: Any, grid: Grid, native: Credit, credited: Credit) -> None:
    wide = {"color": NATIVE, "linewidth": 3, "alpha": 0.5, "label": "native"}
    thin = {"color": CREDITED, "marker": "o", "markersize": 3, "label": "with the credit"}
    for credit, how in ((native, wide), (credited, thin)):
        axis.plot(grid.timesteps[credit.policy], credit.steps.std[credit.policy], **how)
    title = "noise (standard deviation)"
    if isinstance(grid, DiffusionGrid):
        title += f", energy {noise_energy(grid, credited):.3f} of DDPM's"
    axis.set_title(title)
