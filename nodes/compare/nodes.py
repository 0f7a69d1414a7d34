"""Nodes that draw many prompts: two MODELs compared, gammas in rows, or images alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from comfy_api.latest import io, ui
from jaxtyping import Float
from torch import Tensor

from ...pcpo.rewards import Images, Reward, Scores
from .. import graph, show, sockets
from ..guidance.nodes import TunedSocket
from ..rewards import device as rewards_device
from ..rewards import score as rewards_score
from ..training.host import NONE, lora_files
from . import draw as compare_draw
from . import numbers as compare_numbers
from . import sides as compare_sides
from . import sweep as compare_sweep
from .sides import Plan

CATEGORY = "PCPO/rewards"


def _models() -> list[io.Input]:
    """What is compared."""
    return [
        io.Model.Input("model_a", tooltip="Side A: the first MODEL, often the base."),
        io.Clip.Input("clip", tooltip="Encodes the prompts of both sides."),
        io.Vae.Input("vae", tooltip="Turns the latents of both sides into images."),
        sockets.Reward.Input(
            "reward",
            tooltip="The reward to score with (from PCPO Reward). If it is a sum, each of its "
            "parts is compared too.",
        ),
    ]


def _second_model() -> list[io.Input]:
    return [
        io.Model.Input(
            "model_b",
            optional=True,
            tooltip="Side B: the second MODEL. If nothing is connected, it is model_a.",
        ),
        io.Clip.Input(
            "clip_b",
            optional=True,
            tooltip="The text encoder of side B, if it has its own.",
        ),
    ]


def _loras() -> list[io.Input]:
    return [
        io.Combo.Input(
            f"lora_{side}",
            options=lora_files(),
            default=NONE,
            tooltip=f"A LoRA in models/loras, loaded on MODEL and CLIP of side {side.upper()} at "
            "strength 1.",
        )
        for side in ("a", "b")
    ]


def _sampling_inputs() -> list[io.Input]:
    """How both sides draw."""
    return [
        io.Sampler.Input(
            "sampler", tooltip="Any sampler, such as KSamplerSelect or PCPO SDE Sampler."
        ),
        io.Sigmas.Input(
            "sigmas",
            tooltip="Any sigmas, such as those of BasicScheduler, or of PCPO Scheduler "
            "with model_a.",
        ),
        io.String.Input(
            "prompts",
            multiline=True,
            default="",
            tooltip="Prompts to draw, one per line. Choose some that neither side was trained on.",
        ),
        io.String.Input(
            "negative",
            multiline=True,
            default="",
            tooltip="Negative prompt, for all prompts. It is not used if cfg is 1.",
        ),
        io.Float.Input(
            "cfg",
            default=5.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Classifier-free guidance of both sides. 1 turns it off, as FLUX needs.",
        ),
        io.Int.Input("width", default=512, min=16, max=8192, step=8, tooltip="Image width in px."),
        io.Int.Input(
            "height", default=512, min=16, max=8192, step=8, tooltip="Image height in px."
        ),
    ]


def _images() -> list[io.Input]:
    """How many images."""
    return [
        io.Int.Input(
            "images_per_prompt",
            default=4,
            min=1,
            max=64,
            tooltip="Images per prompt on each side. Diversity needs at least two.",
        ),
        io.Int.Input(
            "batch",
            default=4,
            min=1,
            max=64,
            advanced=True,
            tooltip="Images drawn at once; fewer need less memory. With 1, each image is the one "
            "that KSampler draws at its seed. Samplers that add no noise draw that image with any "
            "batch.",
        ),
        sockets.seed_input(
            "Seed of each prompt's first image. The second image has seed + 1, and so on."
        ),
    ]


class PCPOCompareModels(io.ComfyNode):
    """Two MODELs at equal prompts and seeds."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOCompareModels",
            display_name="PCPO Compare Models",
            category=CATEGORY,
            description="Draws the same prompts and seeds with two models, or with and without a "
            "LoRA, and scores the images with a reward. Says which side is better, how certain "
            "that is, and whether its images are as diverse.",
            search_aliases=["a/b test", "side by side", "lora test", "win rate", "evaluate lora"],
            is_output_node=True,
            inputs=[*_models(), *_sampling_inputs(), *_loras(), *_images(), *_second_model()],
            outputs=[
                io.Image.Output(
                    display_name="grid",
                    tooltip="A and B side by side for each prompt and seed, with their scores and "
                    "a frame around the better one. Many prompts make several pages.",
                ),
                io.String.Output(
                    display_name="table",
                    tooltip="Markdown table: means, differences and win rates with 95% intervals, "
                    "diversity, and every prompt.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def execute(
        cls,
        model_a: Any,
        clip: Any,
        vae: Any,
        reward: Reward,
        sampler: Any,
        sigmas: Float[Tensor, " n_plus_1"],
        prompts: str,
        negative: str,
        cfg: float,
        width: int,
        height: int,
        lora_a: str,
        lora_b: str,
        images_per_prompt: int,
        batch: int,
        seed: int,
        model_b: Any = None,
        clip_b: Any = None,
    ) -> io.NodeOutput:
        """Check, draw, score, compare."""
        drawing = (prompts, negative, cfg, sampler, sigmas, (width, height))
        plan = compare_sides.plan_of(*drawing, images_per_prompt, batch, seed)
        rewards_score.check_texts(reward, plan.prompts)
        sides = compare_sides.sides_of((model_a, model_b), (clip, clip_b), (lora_a, lora_b))
        pixels, why, scores = _sample_and_score(sides, plan, vae, reward)
        texts, shape = plan.prompts, (2, len(plan.prompts), len(plan.seeds))
        values, pixels = scores.values.view(shape), pixels.view(*shape, *pixels.shape[1:])
        known = torch.tensor([fault is None for fault in why]).view(shape)
        lines = compare_numbers.lines_of(reward.name, scores, shape)
        lines += compare_numbers.diversities(pixels, known)
        names = [side.name for side in sides]
        grid = compare_draw.grid(pixels, values, texts, names)
        table = compare_numbers.table(names, lines, texts, values, scores.errors)
        show.show_text(compare_numbers.verdict(lines, names), cls.hidden.unique_id)
        shown = _picture(grid, cls) | ui.PreviewText(table).as_dict()
        return io.NodeOutput(grid, table, ui=shown)


def _picture(sheet: Tensor, node: Any) -> dict[str, Any]:
    """A node's first output in its own box, unless a node beside it shows it."""
    sent = node.hidden.prompt or {}
    if graph.shows(sent, node.hidden.unique_id, 0):
        return {}
    return ui.PreviewImage(sheet, cls=node).as_dict()


def _sample_and_score(
    sides: Sequence[compare_sides.Side], plan: Plan, vae: Any, reward: Reward
) -> tuple[Images, list[str | None], Scores]:
    """The images of both sides, why one is none, and what the reward says of them."""
    count = len(sides) * plan.images
    drawn = count * (plan.steps + 1)
    tick = show.progress(drawn + count)
    pixels, why = compare_sides.images_of(sides, plan, vae, tick)
    prompts = plan.prompt_of_each * len(sides)

    def scored(done: int) -> None:
        tick(drawn + done)

    found = rewards_score.score(reward, pixels, prompts, scored, why, rewards_device.lend)
    return pixels, why, found


OF_ONE_SIDE = {
    "sigmas": "Any sigmas, such as those of BasicScheduler, or of PCPO Scheduler with this model.",
    "prompts": "Prompts to draw, one per line.",
    "cfg": "Classifier-free guidance. 1 turns it off, as FLUX needs.",
    "images_per_prompt": "Images per prompt.",
}
"""Tooltips where nothing is compared."""


def _drawing_inputs(tooltips: Mapping[str, str]) -> list[io.Input]:
    given = [*_sampling_inputs(), *_images()]
    for each in given:
        each.tooltip = tooltips.get(each.id, each.tooltip)
    return given


class PCPODrawPrompts(io.ComfyNode):
    """Images of many prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPODrawPrompts",
            display_name="PCPO Draw Prompts",
            category=CATEGORY,
            description="Draws several images of each of many prompts, as one batch: to score "
            "them, to keep the best, or to vote on them with PCPO Rate Images.",
            search_aliases=["prompt list", "many prompts", "batch prompts", "prompt queue"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that draws."),
                io.Clip.Input("clip", tooltip="Encodes the prompts."),
                io.Vae.Input("vae", tooltip="Turns the latents into images."),
                *_drawing_inputs(OF_ONE_SIDE),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images", tooltip="All images, those of the first prompt first."
                ),
                io.String.Output(
                    display_name="prompts",
                    tooltip="The prompt of each image, one line per image, for the input prompt "
                    "of PCPO Rate Images and PCPO Score Images.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        sampler: Any,
        sigmas: Float[Tensor, " n_plus_1"],
        prompts: str,
        negative: str,
        cfg: float,
        width: int,
        height: int,
        images_per_prompt: int,
        batch: int,
        seed: int,
    ) -> io.NodeOutput:
        """Check and draw."""
        drawing = (prompts, negative, cfg, sampler, sigmas, (width, height))
        plan = compare_sides.plan_of(*drawing, images_per_prompt, batch, seed)
        pixels, _ = _sample([compare_sides.side_of(model, clip)], plan, vae)
        return io.NodeOutput(_images_of(pixels), "\n".join(plan.prompt_of_each))


OF_A_SWEEP = OF_ONE_SIDE | {
    "cfg": "Classifier-free guidance of base and tuned model. 1 turns it off, as FLUX needs.",
    "images_per_prompt": "Images per prompt at each gamma.",
}


class PCPOGammaSweep(io.ComfyNode):
    """Implicit Reward Guidance at several gammas."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOGammaSweep",
            display_name="PCPO Gamma Sweep",
            category=CATEGORY,
            description="Draws the same prompts and seeds at several gammas of Implicit Reward "
            "Guidance, as one sheet with a row for each gamma. With a reward it says which gamma "
            "scores best.",
            search_aliases=["irg", "gamma", "strength", "lora strength", "xy plot", "grid"],
            is_output_node=True,
            inputs=[
                io.Model.Input("base", tooltip="The base MODEL, without the LoRA."),
                TunedSocket.Input(
                    "tuned",
                    tooltip="PCPO Tuned LoRA's or PCPO Tuned Model's. Its own gamma does not "
                    "matter here.",
                ),
                io.Clip.Input("clip", tooltip="Encodes the prompts."),
                io.Vae.Input("vae", tooltip="Turns the latents into images."),
                *_drawing_inputs(OF_A_SWEEP),
                io.String.Input(
                    "gammas",
                    default="0, 0.5, 1, 1.5",
                    tooltip="One row each. 0: the base. 1: the tuned model. Above 1: beyond it.",
                ),
                sockets.Reward.Input("reward", optional=True, tooltip="Scores the images."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="sheet", tooltip="A row of images for each gamma, with its mean."
                ),
                io.Image.Output(
                    display_name="images", tooltip="All images, those of the first gamma first."
                ),
                io.String.Output(display_name="table", tooltip="The means as a Markdown table."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def execute(
        cls,
        base: Any,
        tuned: Any,
        clip: Any,
        vae: Any,
        sampler: Any,
        sigmas: Float[Tensor, " n_plus_1"],
        prompts: str,
        negative: str,
        cfg: float,
        width: int,
        height: int,
        images_per_prompt: int,
        batch: int,
        seed: int,
        gammas: str,
        reward: Reward | None = None,
    ) -> io.NodeOutput:
        """Check, draw, score."""
        values = compare_sweep.gammas_of(gammas)
        drawing = (prompts, negative, cfg, sampler, sigmas, (width, height))
        plan = compare_sides.plan_of(*drawing, images_per_prompt, batch, seed)
        if reward is not None:
            rewards_score.check_texts(reward, plan.prompts)
        sides = compare_sides.at_gammas(base, tuned, clip, values)
        pixels, scores = _sweep(sides, plan, vae, reward)
        shape = (len(values), plan.images)
        found = None if scores is None else scores.view(shape)
        drawn = pixels.view(*shape, *pixels.shape[1:])
        sheet = compare_sweep.sheet(drawn, values, found, plan.prompt_of_each)
        means = compare_sweep.means_of(found)
        name = "" if reward is None else reward.name
        said = compare_sweep.verdict(values, means, name, plan.images)
        show.show_text(said, cls.hidden.unique_id)
        table = compare_sweep.table(values, means) if means else ""
        return io.NodeOutput(sheet, _images_of(pixels), table, ui=_picture(sheet, cls))


def _sweep(
    sides: Sequence[compare_sides.Side], plan: Plan, vae: Any, reward: Reward | None
) -> tuple[Images, Float[Tensor, " b"] | None]:
    """The images of all gammas, and their scores if there is a reward."""
    if reward is not None:
        pixels, _, scores = _sample_and_score(sides, plan, vae, reward)
        return pixels, scores.values
    return _sample(sides, plan, vae)[0], None


def _sample(
    sides: Sequence[compare_sides.Side], plan: Plan, vae: Any
) -> tuple[Images, list[str | None]]:
    """Images that nothing scores, and why one is none."""
    tick = show.progress(len(sides) * plan.images * (plan.steps + 1))
    return compare_sides.images_of(sides, plan, vae, tick)


def _images_of(pixels: Images) -> Float[Tensor, "b h w 3"]:
    """ComfyUI's IMAGE."""
    return pixels.permute(0, 2, 3, 1).float() / 255


NODES: tuple[type[io.ComfyNode], ...] = (PCPOCompareModels, PCPODrawPrompts, PCPOGammaSweep)
