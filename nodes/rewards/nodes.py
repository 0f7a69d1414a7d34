"""Nodes that score images: rewards, their sums, contact sheets, best of n."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ...pcpo.rewards import Images, Reward, Scores, WeightedSum
from .. import graph, show, sockets
from ..errors import NodeError
from . import device as rewards_device
from . import make as rewards_make
from . import score as rewards_score
from . import show as rewards_show
from . import sum as rewards_sum

CATEGORY = "PCPO/rewards"
MAX_REWARDS = 8
MOST = 1e6
"""A scale or a shift at most."""

NO_LATENTS = "PCPO Best of N has no latents to pass on; connect the LATENT batch of its images"


class PCPOReward(io.ComfyNode):
    """A reward, by its name."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOReward",
            display_name="PCPO Reward",
            category=CATEGORY,
            description="A reward gives each image a number, such as how well it shows its "
            "prompt. This node checks at once that the reward's files are there; they are loaded "
            "when it first scores an image.",
            search_aliases=[
                *("reward model", "scorer", "aesthetic", "preference", "human preference"),
                *("quality", "beauty", "metric", "HPS", "PickScore"),
            ],
            inputs=[
                io.Combo.Input(
                    "reward",
                    options=rewards_make.reward_names(),
                    default="scene",
                    tooltip="The reward to use. 'scene' scores the coloured shapes of the demo "
                    "model. The help page of this node says what each reward looks at and which "
                    "files it needs.",
                ),
                io.Combo.Input(
                    "weights",
                    options=rewards_make.weight_files(),
                    default=rewards_make.AUTOMATIC,
                    advanced=True,
                    tooltip="For a reward that is a network: its file in models/reward_models or "
                    "models/clip_vision. 'automatic' recognises the file by its content.",
                ),
                io.String.Input(
                    "options",
                    default="",
                    placeholder='{"quality": 50}',
                    advanced=True,
                    tooltip="Settings of the reward as a JSON object; leave it empty for the "
                    "defaults. If a name is wrong, the error lists the right ones. A url must be "
                    "one that ComfyUI's owner has allowed; see the help page.",
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
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, reward: str) -> bool | str:
        """Say what is missing before anything runs."""

        def check(node: graph.Node) -> None:
            if (values := graph.values_of(node)) is not None:
                cls.execute(**values)

        return graph.verdict(cls, check)

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
        tooltip="Precision that a network computes in. float32: as published. float16, bfloat16: "
        "half the memory, slightly different scores. 'automatic': the reward's own choice.",
    )


class PCPONormaliseReward(io.ComfyNode):
    """A reward on a scale that others have as well."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPONormaliseReward",
            display_name="PCPO Normalise Reward",
            category=CATEGORY,
            description="Rescales a reward, so that its weight can be compared with the weights "
            "of others: one unit of PickScore is a lot, one unit of sharpness is nothing.",
            search_aliases=["z-score", "scale reward", "standardise", "normalize reward", "mix"],
            inputs=[
                sockets.Reward.Input("reward", tooltip="The reward to rescale (from PCPO Reward)."),
                io.DynamicCombo.Input(
                    "normalise",
                    options=[
                        io.DynamicCombo.Option(rewards_sum.Z_SCORE, []),
                        io.DynamicCombo.Option(rewards_sum.AFFINE, _affine_inputs()),
                    ],
                    tooltip="z_score: how many standard deviations a score lies above the mean of "
                    "all scores so far. affine: scale times the score, plus shift.",
                ),
            ],
            outputs=[
                sockets.Reward.Output(
                    display_name="reward",
                    tooltip="The same reward on its new scale. z_score remembers the scores it "
                    "has seen until a widget changes or ComfyUI clears its cache.",
                )
            ],
        )

    @classmethod
    def execute(cls, reward: Reward, normalise: dict[str, Any]) -> io.NodeOutput:
        """Put the scale on; statistics are empty."""
        return io.NodeOutput(rewards_sum.normalise(reward, normalise))


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
            tooltip="Factor on the score. 0.038 turns PickScore into what Flow-GRPO trains on.",
        ),
        io.Float.Input(
            "shift",
            default=0.0,
            min=-MOST,
            max=MOST,
            step=0.01,
            round=1 / MOST,
            tooltip="Number added to the scaled score.",
        ),
    ]


class PCPOCombineRewards(io.ComfyNode):
    """A weighted sum of rewards."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        one = sockets.Reward.Input(
            "reward", tooltip="A reward. When it is connected, a socket for the next one appears."
        )
        return io.Schema(
            node_id="PCPOCombineRewards",
            display_name="PCPO Combine Rewards",
            category=CATEGORY,
            description="Adds up to eight rewards, each with a weight, into one. Rewards differ "
            "in scale, so their weights must differ too, unless each comes from PCPO Normalise "
            "Reward.",
            search_aliases=["weighted reward", "sum rewards", "mix rewards", "multi reward"],
            inputs=[
                io.Autogrow.Input(
                    "rewards",
                    template=io.Autogrow.TemplatePrefix(
                        one, prefix="reward_", min=1, max=MAX_REWARDS
                    ),
                    tooltip="One to eight rewards.",
                ),
                io.String.Input(
                    "weights",
                    default="1.0",
                    tooltip="One weight for all rewards, or one per reward in the order of the "
                    "sockets, separated by commas: '1.0, 0.5'. A negative weight turns a reward "
                    "into a penalty.",
                ),
            ],
            outputs=[
                sockets.Reward.Output(
                    display_name="reward", tooltip="The sum. Its score table lists the parts too."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, weights: str, rewards: Any = None) -> bool | str:
        """Count the weights before anything runs; rewards are not made yet."""

        def check(node: graph.Node) -> None:
            given, count = (
                node["inputs"]["weights"],
                sum(map(graph.is_link, node["inputs"].values())),
            )
            if not graph.is_link(given):
                rewards_make.parse_weights(given, count)

        return graph.verdict(cls, check)

    @classmethod
    def execute(cls, rewards: dict[str, Reward], weights: str) -> io.NodeOutput:
        """Join the rewards; they are loaded when they first have to score."""
        parts = tuple(rewards.values())
        found = rewards_make.parse_weights(weights, len(parts))
        return io.NodeOutput(rewards_sum.combine(parts, found))


def _shared_inputs() -> list[io.Input]:
    """What is scored, by what."""
    return [
        io.Image.Input(
            "images",
            tooltip="The images to score. Each is scored as Save Image would write it: 8 bits per "
            "colour, without its alpha channel.",
        ),
        sockets.Reward.Input("reward", tooltip="The reward to score with (from PCPO Reward)."),
        io.String.Input(
            "prompt",
            multiline=True,
            default="",
            tooltip="What the images should show: one line for all images, or one line per image. "
            "Rewards that look only at the image need no prompt.",
        ),
    ]


class PCPOScoreImages(io.ComfyNode):
    """Scores of a batch, as numbers, as a table and as a contact sheet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOScoreImages",
            display_name="PCPO Score Images",
            category=CATEGORY,
            description="Scores each image of a batch with a reward, sorts the batch, and draws a "
            "contact sheet with the score under each image and a frame around the best.",
            search_aliases=[
                *("rate images", "rank images", "contact sheet", "aesthetic score", "quality"),
                *("beauty", "human preference", "HPS", "PickScore"),
            ],
            is_output_node=True,
            inputs=_shared_inputs(),
            outputs=[
                io.Float.Output(
                    display_name="scores",
                    is_output_list=True,
                    tooltip="A list with one number per image, in the order of the batch; NaN "
                    "(not a number) for an image that could not be scored.",
                ),
                io.Int.Output(
                    display_name="best_index",
                    tooltip="Number of the highest-scoring image in the batch, counted from 0.",
                ),
                io.String.Output(
                    display_name="table",
                    tooltip="One line per image, best first: rank, number, score, parts, prompt, "
                    "and the error if there was one.",
                ),
                io.Image.Output(display_name="sorted", tooltip="The batch, best first."),
                io.Image.Output(
                    display_name="contact_sheet",
                    tooltip="All images on one sheet, best first, with their scores and, for a "
                    "sum, its parts.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images: Tensor, reward: Reward, prompt: str) -> io.NodeOutput:
        """Score, sort and draw."""
        prompts = rewards_score.split_prompts(prompt, len(images))
        pixels, scores = _score_batch(images, reward, prompts)
        order = rewards_score.rank(scores.values)
        parts = rewards_show.part_names(scores) if isinstance(reward, WeightedSum) else ()
        sheet = rewards_show.sheet(pixels, scores, order, parts)
        table = rewards_show.table(scores, prompts, order)
        line = rewards_show.summary(scores, order)
        show.show_text(line, cls.hidden.unique_id)
        shown = ui.PreviewImage(sheet, cls=cls).as_dict() | ui.PreviewText(line).as_dict()
        shown |= {"pcpo_table": [table]}  # table.js shows it
        return io.NodeOutput(
            scores.values.tolist(), order[0], table, images[order], sheet, ui=shown
        )


def _score_batch(images: Tensor, reward: Reward, prompts: list[str]) -> tuple[Images, Scores]:
    """The pixels of a batch, and what a reward says of them."""
    pixels, why = rewards_score.to_pixels(images), rewards_score.faults(images)
    tick = show.progress(len(images))
    return pixels, rewards_score.score(reward, pixels, prompts, tick, why, rewards_device.lend)


class PCPOBestOfN(io.ComfyNode):
    """The best images of a batch and their latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOBestOfN",
            display_name="PCPO Best of N",
            category=CATEGORY,
            description="Keeps the highest-scoring images of a batch, with their latents, so that "
            "you can upscale or refine them.",
            search_aliases=["best of n", "top k", "pick best", "filter images", "select best"],
            inputs=[
                *_shared_inputs(),
                io.Int.Input(
                    "n",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="Number of images to keep, at most as many as the batch has.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The latents that the images were decoded from, one per image. Their "
                    "masks and noise indices are sorted along.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The kept images, best first."),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="Their latents in the same order, if latents are connected.",
                ),
                io.Float.Output(
                    display_name="scores",
                    is_output_list=True,
                    tooltip="A list of their scores in the same order.",
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
        """Score, sort and cut."""
        from comfy_execution.graph_utils import ExecutionBlocker

        count = len(images)
        if n > count > 0:
            raise NodeError(f"the best {n} of {count} images cannot be kept; lower n to {count}")
        if latent is not None:
            rewards_score.pick_latents(latent, range(count), count)  # refused before any work
        prompts = rewards_score.split_prompts(prompt, count)
        _, scores = _score_batch(images, reward, prompts)
        rewards_score.check_kept(scores, n)
        best = rewards_score.rank(scores.values)[:n]
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
