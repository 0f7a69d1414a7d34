"""Nodes that show the method: the credit of each step, and the way from noise to image."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from jaxtyping import Float
from torch import Tensor

from ...pcpo import CREDITS
from ...pcpo.credit import (
    Credit,
    CreditRule,
    Exact,
    Native,
    ObjectiveOnly,
    Proportionate,
    Published,
    Relative,
)
from ...pcpo.credit_shown import credit_table
from ...pcpo.plan import step_set
from ...pcpo.schedules import DiffusionGrid
from .. import graph, host, sockets
from ..errors import NodeError
from ..families import spec_of_network
from . import draw as pictures_draw
from .nodes import check_numbers, noise_level_input, noise_level_of, transition_input
from .record import SampledTrajectory
from .sde import SdeSettings, transition_of

CATEGORY = "PCPO/pictures"
SHOWN = tuple(c.name for c in (Proportionate, Published, Exact, ObjectiveOnly, Relative))
CREDIT_TOOLTIP = (
    "The credit to compare with the native weights. proportionate: PCPO's, which is published on "
    "ddim and objective_only on flow. published (ddim): the larger root of the paper's equation, "
    "the other branch of C_t, so its true weights are uneven. exact: the smaller root, with even "
    "weights and little noise. objective_only: native noise and an even credit. relative: native "
    "noise, and weights made even by a policy relative to the base."
)


def _credit_inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "credit",
            options=[*SHOWN],
            default=Proportionate.name,
            optional=True,
            tooltip=CREDIT_TOOLTIP,
        ),
        sockets.number_or_word(
            "solve_weight",
            unset=0,
            optional=True,
            advanced=True,
            tooltip="w of the published noise; its authors use 4.5 at 50 steps. auto: the w that "
            "gives these steps 1.258 times DDPM's noise energy, as 4.5 does at 50 steps.",
        ),
    ]


class PCPOCreditWeights(io.ComfyNode):
    """The paper's Figure 2 for any model and sigmas."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Widgets and sockets."""
        return io.Schema(
            node_id="PCPOCreditWeights",
            display_name="PCPO Credit Weights",
            category=CATEGORY,
            description="Shows how much each sampling step counts in alignment: natively, and "
            "with PCPO's credit or another reading of it. This is Figure 2 of the paper for your "
            "MODEL and sigmas; nothing is sampled.",
            search_aliases=["weights", "figure", "plot", "proportionate", "published", "relative"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The MODEL to whose noise schedule the sigmas belong."
                ),
                io.Sigmas.Input("sigmas", tooltip="The sigmas of PCPO Scheduler, or any others."),
                transition_input(),
                noise_level_input(),
                sockets.number_or_word(
                    "untrained_last_steps",
                    advanced=True,
                    tooltip="Last steps that are neither trained nor counted in the mean weight. "
                    "auto: as published, which is 1 for flow models and 0 for diffusion models.",
                ),
                *_credit_inputs(),
            ],
            outputs=[
                io.Image.Output(
                    display_name="figure",
                    tooltip="Weights and noise of each step, from noise to image.",
                ),
                io.String.Output(
                    display_name="table",
                    tooltip="The figure in numbers: each step's credit, noise and true weight "
                    "in the policy's density.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, noise_level: Any) -> bool | str:
        """Refuse what is no number before anything runs."""
        return graph.verdict(cls, check_numbers)

    @classmethod
    def execute(
        cls,
        model: Any,
        sigmas: Tensor,
        transition: str,
        noise_level: Any,
        untrained_last_steps: Any,
        credit: str = Proportionate.name,
        solve_weight: Any = sockets.AUTO,
    ) -> io.NodeOutput:
        """Compute both credits, and show them."""
        sampling = host.sampling_of(model)
        spec = spec_of_network(model.model)
        kind = transition_of(SdeSettings(transition, noise_level_of(noise_level)), sampling, spec)
        grid = host.grid_of(sampling, sigmas)
        left_out = sockets.number_of(untrained_last_steps, "untrained_last_steps")
        if left_out is None or left_out < 0:
            left_out = 0 if isinstance(grid, DiffusionGrid) else 1
        weight = sockets.number_of(solve_weight, "solve_weight")
        rule = rule_of(credit, weight or 0.0, grid, kind)
        native, credited = credits_of(grid, kind, int(left_out), rule)
        title = f"{_credit_title(rule, credited)}: {kind.name}, {len(grid.timesteps)} steps, "
        title += f"{int(native.trained.sum())} trained"
        figure = pictures_draw.weights_figure(grid, native, credited, title)
        return io.NodeOutput(figure, f"{title}\n{credit_table(grid, native, credited)}")


def rule_of(credit: str, weight: float, grid: host.Grid, kind: Any) -> CreditRule:
    """The credit that the native weights are compared with.

    Args:
        credit: one of `SHOWN`.
        weight: w of the published noise; 0 for the rule's.
    """
    made: Any = CREDITS[credit]
    is_ddim = isinstance(grid, DiffusionGrid)
    if is_ddim and made is Exact and kind.eta != 1:
        raise NodeError(
            f"noise_level is {kind.eta:g}, but credit 'exact' solves for ddim's noise itself; set "
            "it to auto"
        )
    if weight == 0:
        return made()
    if not (is_ddim and made in (Proportionate, Published)):
        raise NodeError(
            f"solve_weight is {weight:g}, but credit '{credit}' on {kind.name} solves for no noise "
            "by it; set it to auto"
        )
    return made(solve_weight=weight)


def _credit_title(rule: CreditRule, credited: Credit) -> str:
    """A credit in the words of a title."""
    if credited.solve_weight is None:
        return f"{rule.name} credit"
    kind = "published, " * (rule.name != "published")
    return f"{rule.name} credit ({kind}larger root, w {credited.solve_weight:.4g})"


def credits_of(
    grid: host.Grid, kind: Any, left_out: int, rule: CreditRule
) -> tuple[Credit, Credit]:
    """Native and another credit of a sampler.

    Args:
        left_out: last steps that are not trained.
    """
    count = len(grid.timesteps)
    if left_out >= count:
        raise NodeError(
            f"untrained_last_steps is {left_out} of {count} steps; leave at least one step"
        )
    over = step_set(count, left_out)
    try:
        return Native()(grid, kind, over), rule(grid, kind, over)
    except ValueError as error:
        raise NodeError(f"there are no weights to show: {error}") from error


# --- the way -------------------------------------------------------------------------------------


class PCPOTrajectoryStrip(io.ComfyNode):
    """What the model took the image to be, along the way."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Widgets and sockets."""
        return io.Schema(
            node_id="PCPOTrajectoryStrip",
            display_name="PCPO Trajectory Strip",
            category=CATEGORY,
            description="Shows the clean image as the model saw it at some of the steps, one "
            "sheet per image of the batch.",
            search_aliases=["trajectory", "steps", "denoised", "contact sheet", "film strip"],
            inputs=[
                sockets.Trajectory.Input(
                    "trajectory", tooltip="The trajectory of PCPO Sample with Trajectory."
                ),
                io.Vae.Input("vae", tooltip="Turns the estimates into images."),
                io.Int.Input(
                    "frames",
                    default=8,
                    min=1,
                    max=64,
                    tooltip="Number of steps to show, spread evenly from the first to the last.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="sheets",
                    tooltip="One sheet per image, with step and sigma below each frame.",
                )
            ],
        )

    @classmethod
    def execute(cls, trajectory: SampledTrajectory, vae: Any, frames: int) -> io.NodeOutput:
        """Decode the chosen steps, and draw them."""
        chosen = chosen_steps(trajectory.clean.shape[1], frames)
        sigmas = trajectory.sigmas.tolist()
        levels = [sigmas[min(i, len(sigmas) - 1)] for i in chosen]
        labels = [
            (f"step {i + 1}", f"sigma {level:.2g}") for i, level in zip(chosen, levels, strict=True)
        ]
        sheets = [
            pictures_draw.strip(_decode(vae, way[chosen]), labels) for way in trajectory.clean
        ]
        return io.NodeOutput(torch.cat(sheets))


def chosen_steps(count: int, frames: int) -> list[int]:
    """Steps spread evenly over all, with the first and the last; of one, the last.

    Args:
        count: of all steps, >= 1.
        frames: how many are wanted, >= 1.

    Returns:
        Their numbers from 0, ascending, as many as there are at most.
    """
    if frames == 1:
        return [count - 1]
    places = torch.linspace(0, count - 1, min(frames, count), dtype=torch.float64)
    return places.round().long().tolist()


def _decode(vae: Any, latents: Float[Tensor, "n *d"]) -> Tensor:
    """Images of latents, uint8 (n, height, width, 3); of a video, its first picture."""
    images = vae.decode(latents.float()).detach()
    images = images[:, 0] if images.ndim == 5 else images
    return (images[..., :3].clamp(0, 1) * 255).round().to("cpu", torch.uint8)


NODES: tuple[type[io.ComfyNode], ...] = (PCPOCreditWeights, PCPOTrajectoryStrip)
