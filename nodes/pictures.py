"""Nodes that show the method: the credit of each step, and the way from noise to image."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from jaxtyping import Float
from torch import Tensor

from ..pcpo.credit import Credit, Native, Proportionate
from ..pcpo.plan import step_set
from ..pcpo.schedules import DiffusionGrid
from . import host, pictures_draw, sockets
from .errors import NodeError
from .sampling import noise_level_input, transition_input
from .sampling_record import SampledTrajectory
from .sampling_sde import SdeSettings, transition_of

CATEGORY = "PCPO/pictures"
PUBLISHED = -1


class PCPOCreditWeights(io.ComfyNode):
    """The paper's Figure 2 for any model and sigmas."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Widgets and sockets."""
        return io.Schema(
            node_id="PCPOCreditWeights",
            display_name="PCPO Credit Weights",
            category=CATEGORY,
            description="How much each step of a sampler counts when a model is aligned along it: "
            "natively, and with PCPO's proportionate credit. Figure 2 of the paper, for your MODEL "
            "and sigmas; nothing is sampled.",
            search_aliases=["weights", "figure", "plot", "proportionate", "credit"],
            inputs=[
                io.Model.Input("model", tooltip="Whose noise schedule the sigmas belong to."),
                io.Sigmas.Input("sigmas", tooltip="PCPO Scheduler's, or any other's."),
                transition_input(),
                noise_level_input(),
                io.Int.Input(
                    "untrained_last_steps",
                    default=PUBLISHED,
                    min=-1,
                    max=100,
                    advanced=True,
                    tooltip="Last steps that the training leaves out, and the mean weight with "
                    "it. -1: as published, 1 for flow models and 0 for diffusion models.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="figure",
                    tooltip="Weights and noise of each step, from noise to image.",
                ),
                io.String.Output(
                    display_name="table",
                    tooltip="The same in numbers, with each step's true weight in the density of "
                    "PCPO's sampler, which is uneven where the credit is even.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        sigmas: Tensor,
        transition: str,
        noise_level: float,
        untrained_last_steps: int,
    ) -> io.NodeOutput:
        """Compute both credits, and show them."""
        sampling = host.sampling_of(model)
        kind = transition_of(SdeSettings(transition, noise_level), sampling)
        grid = host.grid_of(sampling, sigmas)
        left_out = untrained_last_steps
        if left_out < 0:
            left_out = 0 if isinstance(grid, DiffusionGrid) else 1
        native, credited = credits_of(grid, kind, left_out)
        title = f"{kind.name}, {len(grid.timesteps)} steps, {int(native.trained.sum())} trained"
        figure = pictures_draw.weights_figure(grid, native, credited, title)
        return io.NodeOutput(figure, table(grid, native, credited))


def credits_of(grid: host.Grid, kind: Any, left_out: int) -> tuple[Credit, Credit]:
    """Native and proportionate credit of a sampler.

    Args:
        grid: its points.
        kind: the transition.
        left_out: last steps that are not trained.

    Returns:
        Both.

    Raises:
        NodeError: where no step would be trained.
    """
    count = len(grid.timesteps)
    if left_out >= count:
        raise NodeError(
            f"untrained_last_steps is {left_out} of {count} steps; leave at least one step"
        )
    over = step_set(count, left_out)
    try:
        return Native()(grid, kind, over), Proportionate()(grid, kind, over)
    except ValueError as error:
        raise NodeError(f"there are no weights to show: {error}") from error


def table(grid: host.Grid, native: Credit, credited: Credit) -> str:
    """One line a step, and the sums.

    Args:
        grid: the sampler's points.
        native: the sampler with its own weights.
        credited: the same with proportionate credit.

    Returns:
        Text in columns.
    """
    at = "timestep" if isinstance(grid, DiffusionGrid) else "sigma"
    names = ("native", "PCPO", "noise", "PCPO noise", "true")
    lines = [f"step {at:>9} " + " ".join(f"{name:>10}" for name in names)]
    noise = (native.steps.std, credited.steps.std)
    columns = (native.weight, credited.share, *noise, credited.true_weight)
    for i, point in enumerate(grid.timesteps.tolist()):
        numbers = " ".join(f"{column[i]:>10.6f}" for column in columns)
        lines.append(f"{i:>4} {point:>9.5g} {numbers} {_mark(i, native, credited)}".rstrip())
    used = native.trained & native.weight.isfinite()
    sums = (native.weight[used].sum(), credited.share[used].sum())
    lines.append(f"{'sum':>14} {sums[0]:>10.6f} {sums[1]:>10.6f}")
    if isinstance(grid, DiffusionGrid):
        energy = noise[1].square().sum() / noise[0].square().sum()
        lines.append(f"noise energy {energy:.3f} of the native; true: weight in the density")
    return "\n".join(lines)


def _mark(i: int, native: Credit, credited: Credit) -> str:
    if not native.policy[i]:
        return "no noise"
    if not native.trained[i]:
        return "not trained"
    return "noise kept" if credited.projected[i] else ""


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
            description="The clean image as the model saw it at some of the steps, one sheet an "
            "image of the batch.",
            search_aliases=["trajectory", "steps", "denoised", "contact sheet", "film strip"],
            inputs=[
                sockets.Trajectory.Input("trajectory", tooltip="PCPO Sample with Trajectory's."),
                io.Vae.Input("vae", tooltip="Turns the estimates into images."),
                io.Int.Input(
                    "frames",
                    default=8,
                    min=1,
                    max=64,
                    tooltip="How many steps are shown, spread evenly from the first to the last.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="sheets",
                    tooltip="One sheet an image; below each frame its step and its sigma.",
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
            pictures_draw.strip(_decoded(vae, way[chosen]), labels) for way in trajectory.clean
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


def _decoded(vae: Any, latents: Float[Tensor, "n *d"]) -> Tensor:
    """Images of latents, uint8 (n, height, width, 3); of a video, its first picture."""
    images = vae.decode(latents.float()).detach()
    images = images[:, 0] if images.ndim == 5 else images
    return (images[..., :3].clamp(0, 1) * 255).round().to("cpu", torch.uint8)


NODES: tuple[type[io.ComfyNode], ...] = (PCPOCreditWeights, PCPOTrajectoryStrip)
