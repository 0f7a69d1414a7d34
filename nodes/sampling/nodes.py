"""Nodes that sample as the method does: sampler, noise, sigmas, and the whole trajectory."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io
from jaxtyping import Float
from torch import Tensor

from ...pcpo import TRANSITIONS
from ...pcpo.schedules import FLOW_GRIDS, SPACINGS
from .. import graph, host, sockets
from ..errors import NodeError
from ..families import spec_of_network
from . import record as sampling_record
from . import sde
from .grids import grid_sigmas
from .noise import StreamNoise, batch_places, plain_latents
from .sde import AS_COMFYUI, AS_TRAINED, AUTO, PUBLISHED, SAMPLED, SdeSettings

CATEGORY = "PCPO/sampling"
TRANSITION_TOOLTIP = (
    "How a step adds noise. auto: ddim for diffusion models, dance_sde for FLUX.1, flow_sde for "
    "SD3, Z-Image, FLUX.2 [klein] and other flow models. "
)
NOISE_TOOLTIP = (
    "How much noise a step adds: a number, or auto, which is as published ({}). 0: none, which is "
    "stock euler or ddim."
)
CREDIT_TOOLTIP = (
    "native: the sampler's own noise. proportionate: the noise that PCPO trains with; on ddim "
    "that is published, which takes the larger root of the paper's equation, the other branch of "
    "C_t, so its true weights are uneven. Flow samplers do not change. relative (ddim only): for "
    "a LoRA trained with relative credit, at the same steps, grid and noise level; needs PCPO "
    "Implicit Reward Guider."
)


MOST = {"noise_level": 10, "untrained_last_steps": 100, "solve_weight": 100}
"""Largest values of widgets that take a number or "auto"."""


def transition_input() -> io.Combo.Input:
    """The choice of a sampler's kind."""
    names = [AUTO, *TRANSITIONS]
    about = " ".join(f"{name}: {entry.about}." for name, entry in TRANSITIONS.entries.items())
    tooltip = TRANSITION_TOOLTIP + about
    return io.Combo.Input("transition", options=names, default=AUTO, tooltip=tooltip)


def noise_level_input() -> Any:
    """How much noise a step adds."""
    published = (f"{name} {fields(kind)[0].default:g}" for name, kind in TRANSITIONS.items())
    tooltip = NOISE_TOOLTIP.format(", ".join(published))
    return sockets.number_or_word("noise_level", tooltip=tooltip)


def noise_level_of(given: Any) -> float:
    """The noise level of that widget, `PUBLISHED` for auto and for numbers below 0."""
    number = sockets.number_of(given, "noise_level", most=MOST["noise_level"])
    return PUBLISHED if number is None or number < 0 else number


def check_numbers(node: graph.Node) -> None:
    """Refuse what is no number in a node's widgets that take numbers or "auto"."""
    for name, most in MOST.items():
        if not graph.is_link(given := node["inputs"].get(name, sockets.AUTO)):
            sockets.number_of(given, name, most=most)


class PCPOSdeSampler(io.ComfyNode):
    """The stochastic samplers, for any node that takes a SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Widgets and sockets."""
        return io.Schema(
            node_id="PCPOSdeSampler",
            display_name="PCPO SDE Sampler",
            category=CATEGORY,
            description="The samplers that models are aligned with, which add fresh noise at "
            "every step. Each image of a batch has its own noise, made from the seed and its "
            "place in the batch.",
            search_aliases=["sde", "ddim eta", "flow grpo", "dance grpo", "cps", "ancestral"],
            inputs=[
                transition_input(),
                noise_level_input(),
                io.Combo.Input(
                    "credit",
                    options=[*SAMPLED],
                    default="native",
                    tooltip=CREDIT_TOOLTIP,
                ),
                io.Combo.Input(
                    "ends",
                    options=[AS_TRAINED, AS_COMFYUI],
                    default=AS_TRAINED,
                    advanced=True,
                    tooltip="For diffusion models whose sigmas start below the largest or end "
                    "above 0, as those of PCPO Scheduler do. as trained: an empty latent starts "
                    "from full noise, and the last latent is scaled as in training. as ComfyUI: "
                    "neither, like the stock samplers.",
                ),
            ],
            outputs=[
                io.Sampler.Output(
                    display_name="sampler",
                    tooltip="For SamplerCustomAdvanced or PCPO Sample with Trajectory.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, noise_level: Any) -> bool | str:
        """Refuse what is no number before anything runs."""
        return graph.verdict(cls, check_numbers)

    @classmethod
    def execute(cls, transition: str, noise_level: Any, credit: str, ends: str) -> io.NodeOutput:
        """Give ComfyUI's own sampler object around the loop; the MODEL is met when it runs."""
        from comfy.samplers import KSAMPLER

        settings = SdeSettings(transition, noise_level_of(noise_level), credit, ends)
        return io.NodeOutput(KSAMPLER(sde.sample_sde, {"settings": settings}))


# --- noise ---------------------------------------------------------------------------------------


class PCPONoise(io.ComfyNode):
    """Initial noise from one stream an image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Widgets and sockets."""
        return io.Schema(
            node_id="PCPONoise",
            display_name="PCPO Noise",
            category=CATEGORY,
            description="Noise in which each image depends only on the seed and its place in the "
            "batch: a larger batch adds images and changes none. The command sample uses the same "
            "noise.",
            search_aliases=["random noise", "seed", "per image noise"],
            inputs=[
                sockets.seed_input(
                    "Seed of the initial noise, and of the noise that PCPO SDE Sampler adds."
                )
            ],
            outputs=[
                io.Noise.Output(
                    display_name="noise",
                    tooltip="For SamplerCustomAdvanced or PCPO Sample with Trajectory.",
                )
            ],
        )

    @classmethod
    def execute(cls, seed: int) -> io.NodeOutput:
        """Give the noise; it is drawn when a latent's size is known."""
        return io.NodeOutput(StreamNoise(seed))


# --- sigmas --------------------------------------------------------------------------------------


class PCPOScheduler(io.ComfyNode):
    """The papers' grids."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Widgets and sockets."""
        return io.Schema(
            node_id="PCPOScheduler",
            display_name="PCPO Scheduler",
            category=CATEGORY,
            description="The sampling steps that models are aligned on, made from the MODEL's own "
            "noise schedule and shift.",
            search_aliases=["scheduler", "sigmas", "ddim", "leading", "trailing", "flow match"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL whose noise schedule and shift to use."),
                io.Int.Input(
                    "steps", default=20, min=1, max=1000, tooltip="Number of sampling steps."
                ),
                io.Combo.Input(
                    "grid",
                    options=[AUTO, *SPACINGS, *FLOW_GRIDS],
                    default=AUTO,
                    tooltip="auto: leading for diffusion models, or trailing where the schedule "
                    "ends in pure noise (zero terminal SNR); uniform for FLUX.1, flow_match_euler "
                    "for SD3, inverse_count for Z-Image and FLUX.2 [klein]. For diffusion models: "
                    "leading (DDPO, DanceGRPO), trailing or linspace. For flow models: "
                    "flow_match_euler (Flow-GRPO on SD3), uniform (DanceGRPO) or inverse_count "
                    "(Flow-GRPO on FLUX). Sigmas of FLUX.2 [klein] depend on image size and steps: "
                    "take Flux2Scheduler.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Below 1, part of the image is kept: only the last steps of a finer "
                    "grid are used, as in Basic Scheduler.",
                ),
            ],
            outputs=[
                io.Sigmas.Output(display_name="sigmas", tooltip="The sigmas, from noise to image.")
            ],
        )

    @classmethod
    def execute(cls, model: Any, steps: int, grid: str, denoise: float) -> io.NodeOutput:
        """Make the sigmas."""
        finer, spec = int(steps / denoise), spec_of_network(model.model)
        sigmas = grid_sigmas(host.sampling_of(model), finer, grid, spec)
        return io.NodeOutput(sigmas[-(steps + 1) :])


# --- trajectory ----------------------------------------------------------------------------------


class PCPOSampleTrajectory(io.ComfyNode):
    """SamplerCustomAdvanced that also remembers the way."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Widgets and sockets."""
        return io.Schema(
            node_id="PCPOSampleTrajectory",
            display_name="PCPO Sample with Trajectory",
            category=CATEGORY,
            description="Samples like SamplerCustomAdvanced, with any sampler, and keeps the "
            "image as the model saw it at every step.",
            search_aliases=["sampler custom advanced", "trajectory", "steps", "denoised"],
            inputs=[
                io.Noise.Input(
                    "noise", tooltip="PCPO Noise, for one stream of noise per image, or any other."
                ),
                io.Guider.Input("guider", tooltip="The MODEL with its prompts."),
                io.Sampler.Input("sampler", tooltip="PCPO SDE Sampler, or any other."),
                io.Sigmas.Input("sigmas", tooltip="The sigmas of PCPO Scheduler, or any others."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent, or an image to change. Its mask is respected.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The sampled latent."),
                io.Latent.Output(
                    display_name="denoised", tooltip="The clean estimate of the last step."
                ),
                sockets.Trajectory.Output(
                    display_name="trajectory", tooltip="For PCPO Trajectory Strip."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, noise: Any, guider: Any, sampler: Any, sigmas: Tensor, latent_image: dict[str, Any]
    ) -> io.NodeOutput:
        """Sample; the record is a new one at every run."""
        latent = _ready(guider, latent_image)
        places = batch_places(latent)
        record = _recorder(guider, sampler, sigmas)
        sampled = _sample(noise, guider, _with_places(sampler, places), sigmas, latent, record)
        inner = guider.model_patcher.model
        trajectory = sampling_record.trajectory_of(
            record, inner.process_latent_in(sampled), inner.process_latent_out, noise.seed, places
        )
        denoised = {**latent, "samples": inner.process_latent_out(record.last.cpu())}
        return io.NodeOutput({**latent, "samples": sampled}, denoised, trajectory)


def _ready(guider: Any, latent_image: dict[str, Any]) -> dict[str, Any]:
    """A copy of a LATENT, an empty one in the MODEL's own number of channels."""
    from comfy.sample import fix_empty_latent_channels

    sizes = ("downscale_ratio_spacial", "downscale_ratio_temporal")
    samples, ratios = plain_latents(latent_image), [latent_image.get(size) for size in sizes]
    samples = fix_empty_latent_channels(guider.model_patcher, samples, *ratios)
    rest = {key: value for key, value in latent_image.items() if key not in sizes}
    return {**rest, "samples": samples}


def _recorder(guider: Any, sampler: Any, sigmas: Tensor) -> sampling_record.Recorder:
    """A record with ComfyUI's previews behind it; refuses sigmas that do not fit."""
    import latent_preview

    if len(sigmas) < 2:
        raise NodeError(f"SIGMAS hold {len(sigmas)} values, which make no step; give at least two")
    shown = latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1)
    walk = sampling_record.walk_of_sampler(sampler, guider.model_patcher, sigmas)
    return sampling_record.Recorder(shown, sigmas.cpu().double(), walk)


def _with_places(sampler: Any, places: list[int]) -> Any:
    """The same sampler, a PCPO one told which image of its batch each one is."""
    if not sampling_record.is_pcpo(sampler):
        return sampler
    options = {**sampler.extra_options, "images": places}
    return type(sampler)(sampler.sampler_function, options, sampler.inpaint_options)


def _sample(
    noise: Any,
    guider: Any,
    sampler: Any,
    sigmas: Tensor,
    latent: dict[str, Any],
    record: sampling_record.Recorder,
) -> Float[Tensor, "b *d"]:
    """Run ComfyUI's own sampling."""
    import comfy.model_management
    import comfy.utils

    sampled = guider.sample(
        noise.generate_noise(latent),
        latent["samples"],
        sampler,
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=record,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=noise.seed,
    )
    return sampled.to(comfy.model_management.intermediate_device())


NODES: tuple[type[io.ComfyNode], ...] = (
    PCPOSdeSampler,
    PCPONoise,
    PCPOScheduler,
    PCPOSampleTrajectory,
)
