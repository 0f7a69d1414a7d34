"""Nodes that score images: rewards, their sums, contact sheets, best of n."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..pcpo.rewards import REWARDS, Images, Reward, Scores, WeightedSum
from . import (
    rewards_device,
    rewards_make,
    rewards_score,
    rewards_show,
    rewards_sum,
    show,
    sockets,
)
from .errors import NodeError

CATEGORY = "PCPO/rewards"
MAX_REWARDS = 8
MOST = 1e6
"""A scale or a shift at most."""

NO_LATENTS = "PCPO Best of N has no latents to give; connect the LATENT batch of its images"


class PCPOReward(io.ComfyNode):
    """A reward, by its name."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Widgets and sockets."""
        return io.Schema(
            node_id="PCPOReward",
            display_name="PCPO Reward",
            category=CATEGORY,
            description="A reward: something that gives an image a number, such as how well it "
            "shows its prompt. What it needs is looked for at once and loaded when "
            "it first has to score.",
            search_aliases=["reward model", "scorer", "aesthetic", "preference", "metric"],
            inputs=[
                io.Combo.Input(
                    "reward",
                    options=list(REWARDS),
                    default="scene",
                    tooltip="Which. 'scene' judges the coloured shapes of the demo model. The help "
                    "page of this node says what each one judges by and which files it needs.",
                ),
                io.Combo.Input(
                    "weights",
                    options=rewards_make.weight_files(),
                    default=rewards_make.AUTOMATIC,
                    advanced=True,
                    tooltip="A file of models/reward_models or models/clip_vision, for a reward "
                    "that is a network. 'automatic' looks for it there by what is in the files.",
                ),
                io.String.Input(
                    "options",
                    default="",
                    placeholder='{"quality": 50}',
                    advanced=True,
                    tooltip="Settings of the reward as a JSON object, for those that have some; "
                    "a wrong name is answered with the right ones. Empty: its usual settings. "
                    "A url has to be one that ComfyUI's owner has named; see the help page.",
                ),
                _dtype_input(),
            ],
            outputs=[
                sockets.Reward.Output(
                    display_name="reward",
                    tooltip="For PCPO Score Images, PCPO Best of N, PCPO Normalise Reward, PCPO "
                    "Combine Rewards and PCPO Train in Background.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, reward: str, weights: str, options: str, dtype: str = rewards_make.AUTOMATIC
    ) -> io.NodeOutput:
        """Look for all that the reward needs; no network is loaded yet."""
        return io.NodeOutput(rewards_make.named_reward(reward, weights, dtype, options))


def _dtype_input() -> io.Input:
    return io.Combo.Input(
        "dtype",
        options=list(rewards_make.DTYPES),
        default=rewards_make.AUTOMATIC,
        optional=True,
        advanced=True,
        tooltip="Numbers that a network computes with: float32 as published; float16 and bfloat16 "
        "take half the memory and change scores a little. 'automatic' is the reward's own choice.",
    )


class PCPONormaliseReward(io.ComfyNode):
    """A reward on a scale that others have as well."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Widgets and sockets."""
        return io.Schema(
            node_id="PCPONormaliseReward",
            display_name="PCPO Normalise Reward",
            category=CATEGORY,
            description="Brings a reward to a scale, so that weights mean something when it is "
            "added to others: one unit of PickScore is a lot, one of sharpness nothing.",
            search_aliases=["z-score", "scale reward", "standardise", "normalize reward", "mix"],
            inputs=[
                sockets.Reward.Input("reward", tooltip="PCPO Reward's."),
                io.DynamicCombo.Input(
                    "normalise",
                    options=[
                        io.DynamicCombo.Option(rewards_sum.Z_SCORE, []),
                        io.DynamicCombo.Option(rewards_sum.AFFINE, _affine_inputs()),
                    ],
                    tooltip="z_score: how many deviations a score is above the mean of all that "
                    "were seen so far. affine: scale times the score, plus shift.",
                ),
            ],
            outputs=[
                sockets.Reward.Output(
                    display_name="reward",
                    tooltip="The same reward on its new scale. What z_score has seen is kept with "
                    "it until ComfyUI forgets it or a widget changes.",
                )
            ],
        )

    @classmethod
    def execute(cls, reward: Reward, normalise: dict[str, Any]) -> io.NodeOutput:
        """Put the scale on; statistics are empty."""
        return io.NodeOutput(rewards_sum.normalised(reward, normalise))


def _affine_inputs() -> list[io.Input]:
    """What an affine scale is told."""
    return [
        io.Float.Input(
            "scale",
            default=1.0,
            min=1 / MOST,
            max=MOST,
            step=0.001,
            round=1 / MOST,
            tooltip="Times this: 0.038 makes of PickScore what Flow-GRPO trains on.",
        ),
        io.Float.Input(
            "shift",
            default=0.0,
            min=-MOST,
            max=MOST,
            step=0.01,
            round=1 / MOST,
            tooltip="Added afterwards.",
        ),
    ]


class PCPOCombineRewards(io.ComfyNode):
    """A weighted sum of rewards."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Widgets and sockets."""
        one = sockets.Reward.Input(
            "reward", tooltip="A reward; connect it and a socket for the next one appears."
        )
        return io.Schema(
            node_id="PCPOCombineRewards",
            display_name="PCPO Combine Rewards",
            category=CATEGORY,
            description="The weighted sum of up to eight rewards, as one reward. Rewards differ "
            "in scale, so their weights do too, unless PCPO Normalise Reward is before each.",
            search_aliases=["weighted reward", "sum rewards", "mix rewards", "multi reward"],
            inputs=[
                io.Autogrow.Input(
                    "rewards",
                    template=io.Autogrow.TemplatePrefix(
                        one, prefix="reward_", min=1, max=MAX_REWARDS
                    ),
                    tooltip="The rewards, one to eight.",
                ),
                io.String.Input(
                    "weights",
                    default="1.0",
                    tooltip="One weight for all rewards, or one for each in the order of the "
                    "sockets with commas between them, such as '1.0, 0.5'. A negative weight "
                    "makes a penalty of a reward.",
                ),
            ],
            outputs=[
                sockets.Reward.Output(
                    display_name="reward", tooltip="The sum; its table shows the parts as well."
                )
            ],
        )

    @classmethod
    def execute(cls, rewards: dict[str, Reward], weights: str) -> io.NodeOutput:
        """Join the rewards; they are loaded when they first have to score."""
        parts = tuple(rewards.values())
        found = rewards_make.parse_weights(weights, len(parts))
        return io.NodeOutput(rewards_sum.combined(parts, found))


def _shared_inputs() -> list[io.Input]:
    """What is scored, by what."""
    return [
        io.Image.Input(
            "images",
            tooltip="The batch. Each image is scored as Save Image would write it: 8 bits a "
            "colour; an alpha channel is left out.",
        ),
        sockets.Reward.Input("reward", tooltip="What scores, from PCPO Reward."),
        io.String.Input(
            "prompt",
            multiline=True,
            default="",
            tooltip="What the images should show: one line for all of them, or one line for "
            "each image. Rewards that look at the image alone need none.",
        ),
    ]


class PCPOScoreImages(io.ComfyNode):
    """Scores of a batch, as numbers, as a table and as a contact sheet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Widgets and sockets."""
        return io.Schema(
            node_id="PCPOScoreImages",
            display_name="PCPO Score Images",
            category=CATEGORY,
            description="Scores each image of a batch with a reward, sorts the batch, and draws "
            "a contact sheet with each score under its image, the best one framed.",
            search_aliases=["rate images", "rank images", "contact sheet", "aesthetic score"],
            is_output_node=True,
            inputs=_shared_inputs(),
            outputs=[
                io.Float.Output(
                    display_name="scores",
                    is_output_list=True,
                    tooltip="One number an image, in the order of the batch, as a list; NaN (no "
                    "number) where an image could not be scored.",
                ),
                io.Int.Output(
                    display_name="best_index",
                    tooltip="Which image of the batch scores highest, counted from 0.",
                ),
                io.String.Output(
                    display_name="table",
                    tooltip="One line an image, best first: rank, number, score, parts, prompt, "
                    "and what went wrong where something did.",
                ),
                io.Image.Output(display_name="sorted", tooltip="The batch, best first."),
                io.Image.Output(
                    display_name="contact_sheet",
                    tooltip="All images in one, best first, with their scores and, of a sum, its "
                    "parts.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images: Tensor, reward: Reward, prompt: str) -> io.NodeOutput:
        """Score, sort and draw."""
        prompts = rewards_score.split_prompts(prompt, len(images))
        pixels, scores = _scored(images, reward, prompts)
        order = rewards_score.ranked(scores.values)
        parts = rewards_show.part_names(scores) if isinstance(reward, WeightedSum) else ()
        sheet = rewards_show.sheet(pixels, scores, order, parts)
        table = rewards_show.table(scores, prompts, order)
        show.show_text(table, cls.hidden.unique_id)
        shown = ui.PreviewImage(sheet, cls=cls).as_dict() | ui.PreviewText(table).as_dict()
        return io.NodeOutput(
            scores.values.tolist(), order[0], table, images[order], sheet, ui=shown
        )


def _scored(images: Tensor, reward: Reward, prompts: list[str]) -> tuple[Images, Scores]:
    """The pixels of a batch, and what a reward says of them."""
    pixels, why = rewards_score.to_pixels(images), rewards_score.faults(images)
    tick = show.progress(len(images))
    return pixels, rewards_score.score(reward, pixels, prompts, tick, why, rewards_device.lend)


class PCPOBestOfN(io.ComfyNode):
    """The best images of a batch and their latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Widgets and sockets."""
        return io.Schema(
            node_id="PCPOBestOfN",
            display_name="PCPO Best of N",
            category=CATEGORY,
            description="Keeps the images of a batch that a reward scores highest, and their "
            "latents, so that they can be upscaled or refined further.",
            search_aliases=["best of n", "top k", "pick best", "filter images", "select best"],
            inputs=[
                *_shared_inputs(),
                io.Int.Input(
                    "n",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="How many images to keep, at most as many as the batch has.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The latents that the images were decoded from, one an image; their "
                    "masks and noise numbers are kept in step.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The kept images, best first."),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="Their latents in the same order, where latents are connected.",
                ),
                io.Float.Output(
                    display_name="scores",
                    is_output_list=True,
                    tooltip="Their scores in the same order, as a list.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        images: Tensor,
        reward: Reward,
        prompt: str,
        n: int,
        latent: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        """Score, sort and cut.

        Raises:
            NodeError: where there are fewer images, or scores, than should be kept.
        """
        from comfy_execution.graph_utils import ExecutionBlocker

        count = len(images)
        if n > count > 0:
            raise NodeError(f"the best {n} of {count} images cannot be kept; lower n to {count}")
        if latent is not None:
            rewards_score.pick_latents(latent, range(count), count)  # refused before any work
        prompts = rewards_score.split_prompts(prompt, count)
        _, scores = _scored(images, reward, prompts)
        rewards_score.check_kept(scores, n)
        best = rewards_score.ranked(scores.values)[:n]
        blocked = ExecutionBlocker(NO_LATENTS)
        latents = blocked if latent is None else rewards_score.pick_latents(latent, best, count)
        return io.NodeOutput(images[best], latents, scores.values[best].tolist())


NODES: tuple[type[io.ComfyNode], ...] = (
    PCPOReward,
    PCPONormaliseReward,
    PCPOCombineRewards,
    PCPOScoreImages,
    PCPOBestOfN,
)
