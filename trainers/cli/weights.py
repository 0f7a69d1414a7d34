"""`pcpo weights`: the paper's Figure 2 for any family, grid and number of steps."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from matplotlib.figure import Figure
from pydantic import Field

from ...pcpo.credit import Native
from ...pcpo.credit_shown import credit_table, draw_credit
from ...pcpo.plan import step_set
from ...pcpo.schedules import (
    DiffusionGrid,
    FlowGrid,
    ddim_grid,
    flow_grid,
    resolution_shift,
    scaled_linear_alpha_bars,
    zero_terminal_snr,
)
from ...pcpo.transitions import Transition as Sampler
from ...registry import TRANSITIONS, samplers
from ..config import bounds
from ..config.arguments import Arguments, parse
from ..config.sections import Credit, MeanOver, MethodConfig, Transition
from ..config.train_config import ConfigError
from ..families.registry import FAMILIES
from ..reading import check_target
from ..run.method import credit_of


def usual(name: str) -> str:
    """An attribute of each family, for the help: "50 for sd1, 10 for sd3"."""
    values = {spec.name: getattr(spec, name) for spec in FAMILIES.values()}
    return ", ".join(f"{value} for {family}" for family, value in values.items() if value)


class WeightsArguments(Arguments):
    """Native and proportionate weights of a sampler, as a table and a plot."""

    family: Literal[*FAMILIES] = Field(  # pyright: ignore[reportInvalidTypeForm]
        default=next(iter(FAMILIES)),
        description="model family, which sets the defaults of grid and sampler",
    )
    steps: int | None = Field(
        default=None,
        ge=1,
        le=bounds.STEPS,
        description=f"by default {usual('steps')}",
    )
    transition: Transition | None = Field(
        default=None, description=f"by default {usual('transition')}"
    )
    noise_level: float | None = Field(
        default=None,
        gt=0,
        le=bounds.NOISE,
        description="by default 1, 0.7, 0.3 or 0.8, as published",
    )
    spacing: Literal["leading", "trailing", "linspace"] | None = Field(
        default=None,
        description="spacing of a diffusion model's timesteps; by default leading, or trailing "
        "where the schedule ends in pure noise, as in training",
    )
    zero_terminal_snr: bool = Field(
        default=False, description="of a diffusion model: end the schedule in pure noise"
    )
    grid: Literal["uniform", "flow_match_euler", "inverse_count"] | None = Field(
        default=None,
        description=f"grid of flow models; by default {usual('grid')}",
    )
    shift: float | None = Field(
        default=None,
        gt=0,
        le=bounds.GUIDANCE,
        description="shift of flow models; by default 3, unless px is given",
    )
    px: int | None = Field(
        default=None, ge=16, le=bounds.SIDE, description="side of a FLUX image, for its own shift"
    )
    drop_last: int = Field(
        default=0, ge=0, le=bounds.STEPS, description="last steps that are not trained"
    )
    credit: Credit = Field(
        default="proportionate", description="credit to compare native weights with"
    )
    target: float | None = Field(
        default=None, gt=0, le=bounds.LARGE, description="w*; by default the mean native weight"
    )
    solve_weight: float | None = Field(
        default=None,
        gt=0,
        le=bounds.LARGE,
        description="w of the published noise; by default the one that gives this grid as much "
        "noise as the authors' 4.5 gives 50 steps",
    )
    mean_over: MeanOver = Field(
        default="trained", description="steps over which w* is the mean; 'grid' means all"
    )
    out: str | None = Field(default=None, description="PNG file of the plot")


@dataclass(frozen=True, slots=True)
class Case:
    """The parsed arguments."""

    grid: DiffusionGrid | FlowGrid
    transition: Sampler
    name: str


def case_of(arguments: WeightsArguments) -> Case:
    """The grid and the sampler of the arguments."""
    spec = FAMILIES[arguments.family]
    steps, transition = arguments.steps or spec.steps, arguments.transition or spec.transition
    grid = arguments.grid or spec.grid
    fitting = samplers(is_flow=spec.is_flow)
    if transition not in fitting:
        raise ConfigError(
            f"transition '{transition}' does not go with family '{arguments.family}'; use "
            f"{' or '.join(fitting)}"
        )
    if arguments.drop_last >= steps:
        raise ConfigError(f"drop_last is {arguments.drop_last} of {steps} steps; one must be left")
    kind, level = TRANSITIONS[transition], arguments.noise_level
    made = kind(level) if level else kind()
    if not spec.is_flow:
        alpha_bars = scaled_linear_alpha_bars()
        if arguments.zero_terminal_snr:
            alpha_bars = zero_terminal_snr(alpha_bars)
        spacing = arguments.spacing or ("trailing" if arguments.zero_terminal_snr else "leading")
        points = ddim_grid(steps, alpha_bars, spacing=spacing)
        return Case(points, made, f"{spec.name}, {spacing}, {steps} steps")
    shift = arguments.shift or (
        3.0 if arguments.px is None else resolution_shift((arguments.px // 16) ** 2)
    )
    flow = flow_grid(steps, kind=grid, shift=shift)
    return Case(flow, made, f"{spec.name}, {grid}, shift {shift:.3g}, {steps} steps")


def main(arguments: list[str]) -> int:
    """Print the table and draw the plot."""
    given = parse(WeightsArguments, arguments, "pcpo weights")
    case = case_of(given)
    if given.out is not None:
        check_target(given.out, "--out", is_folder=False)
    over = step_set(len(case.grid.timesteps), given.drop_last)
    native = Native()(case.grid, case.transition, over)
    try:
        credited = credit_of(_method(given))(case.grid, case.transition, over, _mean(given, over))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print(f"{case.name}:")
    print(credit_table(case.grid, native, credited))
    if credited.solve_weight is not None:
        print(
            f"solve weight {credited.solve_weight:.4g}: the larger root, the equation's other "
            "branch; the true weight"
        )
        print("is not even, the credit in log rho is")
    out = Path(given.out or f"weights_{given.family}_{len(over)}.png")
    figure = Figure((11, 4.2), layout="constrained")
    draw_credit(figure, case.grid, native, credited, case.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    print(f"plot {out}", file=sys.stderr)
    return 0


def _method(given: WeightsArguments) -> MethodConfig:
    return MethodConfig(
        credit=given.credit, target_weight=given.target, solve_weight=given.solve_weight
    )


def _mean(given: WeightsArguments, over: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(over) if given.mean_over == "grid" else over
