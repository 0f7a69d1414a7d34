"""Nodes of a person's taste: pictures to vote on, and the reward that the votes make."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from .. import show, sockets
from ..rewards import score as rewards_score
from . import rate
from .places import names

CATEGORY = "PCPO/rewards"


class PCPORateImages(io.ComfyNode):
    """Puts images up for votes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPORateImages",
            display_name="PCPO Rate Images",
            category=CATEGORY,
            description="Puts pairs of these images into the queue of a taste. You vote on them "
            "on the page Taste of the PCPO tab, and PCPO Taste makes a reward of your votes. "
            "Nothing leaves this machine.",
            search_aliases=["vote", "preference", "human feedback", "like", "pick", "pairs"],
            is_output_node=True,
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="The images to vote on: best thirty or more, of many prompts like "
                    "those you will train on. Images that were here before are not asked about "
                    "again.",
                ),
                io.String.Input(
                    "taste",
                    default="my_taste",
                    tooltip="Name of the taste. If there is none of this name, it is made.",
                ),
                io.Int.Input(
                    "pairs",
                    default=20,
                    min=1,
                    max=500,
                    tooltip="Most pairs that are put into the queue. While you vote, more are "
                    "drawn from the same images.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="What the images were drawn for: one line for all images, or one line "
                    "per image. If prompts have several images, those of one prompt are compared.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The same images."),
                io.Int.Output(display_name="waiting", tooltip="Number of pairs that wait."),
                io.String.Output(
                    display_name="text",
                    tooltip="How many pairs are new and how many wait, where to vote, and what "
                    "the taste knows so far.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, taste: str | None = None, **inputs: Any) -> str:
        """Changes if the taste was deleted or made anew: its queue is then empty."""
        return rate.age_of(taste)

    @classmethod
    def execute(cls, images: Tensor, taste: str, pairs: int, prompt: str) -> io.NodeOutput:
        """Keep the images, and draw pairs of them."""
        prompts = rewards_score.split_prompts(prompt, len(images))
        waiting, text = rate.put(taste, images, prompts, pairs)
        show.show_text(text, cls.hidden.unique_id)
        return io.NodeOutput(images, waiting, text, ui=ui.PreviewText(text))


class PCPOTaste(io.ComfyNode):
    """A person's taste as a reward."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOTaste",
            display_name="PCPO Taste",
            category=CATEGORY,
            description="Your own taste as a reward: how much you would like an image, as your "
            "votes let it guess. If there are new votes, the taste learns from them first.",
            search_aliases=["preference", "my taste", "personal", "votes", "reward model"],
            inputs=[
                io.Combo.Input(
                    "taste",
                    options=[rate.NEWEST, *names()],
                    default=rate.NEWEST,
                    tooltip="The taste, by name. newest taste: the one that you voted on last. If "
                    "a new taste is not in the list, press R.",
                )
            ],
            outputs=[
                sockets.Reward.Output(
                    display_name="reward",
                    tooltip="For PCPO Score Images, PCPO Best of N, PCPO Normalise Reward, PCPO "
                    "Combine Rewards and PCPO Train in Background. Its unit is log odds: 1 more "
                    "means chosen 2.7 times as often.",
                ),
                io.String.Output(
                    display_name="text",
                    tooltip="How many votes it has, how often it agrees with you, and what more "
                    "votes would bring.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, taste: str) -> bool:
        """Names are looked up when the node runs, for the list may be old."""
        return True

    @classmethod
    def fingerprint_inputs(cls, taste: str | None = None) -> str:
        """Changes with the votes."""
        return rate.sign_of(taste)

    @classmethod
    def execute(cls, taste: str) -> io.NodeOutput:
        """Fit what is new, and make the reward."""
        reward, text = rate.reward_of(rate.chosen(taste))
        show.show_text(text, cls.hidden.unique_id)
        return io.NodeOutput(reward, text)


NODES: tuple[type[io.ComfyNode], ...] = (PCPORateImages, PCPOTaste)
