"""Nodes that score images: rewards, their sums, contact sheets, best of n."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..pcpo.rewards import REWARDS, Reward, WeightedSum
from . import rewards_make, rewards_score, show, sockets
from .errors import NodeError

CATEGORY = "PCPO/rewards"
MAX_REWARDS = 8
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
            "shows its prompt. It is loaded when it first has to score.",
            search_aliases=["reward model", "scorer", "aesthetic", "preference", "metric"],
            inputs=[
                io.Combo.Input(
                    "reward",
                    options=list(REWARDS),
                    default="scene",
                    tooltip="Which. 'scene' judges the coloured shapes of the demo model; the "
                    "JPEG rewards judge by the size of the image as a file.",
                ),
                io.Combo.Input(
                    "weights",
                    options=rewards_make.weight_files(),
                    default=rewards_make.AUTOMATIC,
                    advanced=True,
                    tooltip="A file of models/pcpo_rewards, for a reward that is a network. "
                    "'automatic' lets the reward look for its usual file there.",
                ),
                io.String.Input(
                    "options",
                    default="",
                    placeholder='{"quality": 50}',
                    advanced=True,
                    tooltip="Settings of the reward as a JSON object, for those that have some; "
                    "a wrong name is answered with the right ones. Empty: its usual settings.",
                ),
            ],
            outputs=[
                sockets.Reward.Output(
                    display_name="reward",
                    tooltip="For PCPO Score Images, PCPO Best of N and PCPO Combine Rewards.",
                )
            ],
        )

    @classmethod
    def execute(cls, reward: str, weights: str, options: str) -> io.NodeOutput:
        """Check the widgets; nothing is loaded yet."""
        return io.NodeOutput(rewards_make.lazy_reward(reward, weights, options))


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
            "in scale, so their weights do too.",
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
        return io.NodeOutput(WeightedSum(parts, rewards_make.parse_weights(weights, len(parts))))


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
                    tooltip="One number an image, in the order of the batch, as a list.",
                ),
                io.Int.Output(
                    display_name="best_index",
                    tooltip="Which image of the batch scores highest, counted from 0.",
                ),
                io.String.Output(
                    display_name="table",
                    tooltip="One line an image, best first: rank, number, score, parts, prompt.",
                ),
                io.Image.Output(display_name="sorted", tooltip="The batch, best first."),
                io.Image.Output(
                    display_name="contact_sheet",
                    tooltip="All images in one, best first, with their scores.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images: Tensor, reward: Reward, prompt: str) -> io.NodeOutput:
        """Score, sort and draw."""
        pixels = rewards_score.to_pixels(images)
        prompts = rewards_score.split_prompts(prompt, len(images))
        scores = rewards_score.score(reward, pixels, prompts, show.progress(len(images)))
        order = rewards_score.ranked(scores.values)
        values = scores.values.tolist()
        sheet = rewards_score.sheet(pixels, values, order)
        table = rewards_score.table(scores, prompts, order)
        show.show_text(table, cls.hidden.unique_id)
        shown = ui.PreviewImage(sheet, cls=cls).as_dict() | ui.PreviewText(table).as_dict()
        return io.NodeOutput(values, order[0], table, images[order], sheet, ui=shown)


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
            NodeError: where there are fewer images than should be kept.
        """
        from comfy_execution.graph_utils import ExecutionBlocker

        pixels, count = rewards_score.to_pixels(images), len(images)
        if n > count:
            raise NodeError(f"the best {n} of {count} images cannot be kept; lower n to {count}")
        if latent is not None:
            rewards_score.pick_latents(latent, range(count), count)  # refused before any work
        prompts = rewards_score.split_prompts(prompt, count)
        scores = rewards_score.score(reward, pixels, prompts, show.progress(count))
        best = rewards_score.ranked(scores.values)[:n]
        blocked = ExecutionBlocker(NO_LATENTS)
        latents = blocked if latent is None else rewards_score.pick_latents(latent, best, count)
        return io.NodeOutput(images[best], latents, scores.values[best].tolist())


NODES: tuple[type[io.ComfyNode], ...] = (
    PCPOReward,
    PCPOCombineRewards,
    PCPOScoreImages,
    PCPOBestOfN,
)
