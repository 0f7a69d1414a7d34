"""The credit of a sampler's steps as text."""

from __future__ import annotations

import torch

from .credit import Credit, Grid, noise_energy
from .schedules import DiffusionGrid
from .statistics.tables import aligned

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
    return f"{aligned(rows, len(rows[0]) - 1)}\n{_summary(grid, native, credited)}"


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
    if (credited.scale != 1).any():
        lines.append(_ends("lambda", credited.scale[used]))
    energy = noise_energy(grid, credited)
    return "\n".join([*lines, f"noise energy {energy:.3f} of DDPM's (sum of std^2)"])


def _ends(name: str, values: torch.Tensor) -> str:
    return f"{name:14} min {values.min():.6f}  max {values.max():.6f}"
