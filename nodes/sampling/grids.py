"""The papers' grids as ComfyUI's sigmas."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...pcpo.schedules import FLOW_GRIDS, SPACINGS, ddim_grid, flow_grid
from ...trainers.families.spec import FamilySpec
from .. import host
from ..errors import NodeError
from .sde import AUTO


def automatic_grid(sampling: Any, spec: FamilySpec | None = None) -> str:
    """DDPO's grid for diffusion models, a flow model's family's, else DanceGRPO's where the
    schedule is FLUX's and Flow-GRPO's where not.

    "leading" never begins at the last timestep. Where that is pure noise it has to be the first
    (Lin et al. 2024), as in training.
    """
    if host.family_of(sampling) == host.DIFFUSION:
        return "trailing" if host.ends_in_noise(sampling) else "leading"
    if spec is not None and spec.grid:
        return spec.grid
    return "uniform" if host.is_flux(sampling) else "flow_match_euler"


def grid_sigmas(
    sampling: Any, steps: int, grid: str, spec: FamilySpec | None = None
) -> Float[Tensor, " n_plus_1"]:
    """The sigmas of a paper's grid, for a model of a known family or another.

    Args:
        grid: a key of `SPACINGS` (diffusion), of `FLOW_GRIDS` (flow), or `AUTO`.

    Returns:
        Descending sigmas, float32. Diffusion grids end at the schedule's smallest sigma, flow's
        at 0. The last step of linspace, which goes nowhere, is left out.
    """
    family = host.family_of(sampling)
    fitting = SPACINGS if family == host.DIFFUSION else FLOW_GRIDS
    kind = automatic_grid(sampling, spec) if grid == AUTO else grid
    if kind not in fitting:
        raise NodeError(
            f"grid '{grid}' is not for a {family} MODEL; choose {', '.join(fitting)} or '{AUTO}'"
        )
    if family == host.FLOW:
        return flow_grid(steps, kind=kind, shift=host.shift_of(sampling)).sigmas.float()
    table = sampling.sigmas.cpu()
    if steps > len(table):
        raise NodeError(f"{steps} steps are more than the {len(table)} of this MODEL's schedule")
    points = ddim_grid(steps, host.alpha_bars_of(sampling), spacing=kind).timesteps.long()
    if not points[0] > 0:
        raise NodeError(f"grid '{kind}' needs at least 2 steps; give more, or take 'leading'")
    return table[torch.cat([points, points.new_zeros(int(points[-1] > 0))])]
