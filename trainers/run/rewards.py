"""The rewards of a run: made from a config, scored, combined into one number, and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from textwrap import shorten
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ...pcpo import combine_advantages
from ...pcpo.branches import Branches, mean_over_leaves
from ...pcpo.finite import all_finite
from ...pcpo.rewards import Images, Reward, RewardUnavailable, Scores, WeightedSum, load_reward
from ...pcpo.rewards.combine import Affine, Scale, ZScore
from ..config.sections import AdvantageConfig, RewardConfig
from ..config.train_config import ConfigError, TrainConfig
from ..errors import RunError
from ..finite import Diverged
from ..memory.offload import LentReward, place_reward
from .method import advantage_of
from .phases import phase
from .tastes import Tastes

if TYPE_CHECKING:
    from ..distributed.processes import Processes

Values = Float[Tensor, "rewards b"]


class RewardError(RunError):
    """A reward failed; the iteration changed nothing."""


@dataclass(slots=True)
class RewardSet:
    """The rewards of a run, in the config's order.

    Running statistics (`z_score`) are kept twice. Those that training divides by are updated in
    every iteration. Those of displayed numbers stay as the run's first rewards set them, the base
    model's on the held-out prompts if there are any, so that numbers of different iterations can be
    compared: 0 is the base model, 1 one deviation above it.

    Attributes:
        labels: of the rewards, as in the config.
        scales: rescale each reward for training.
        shown_scales: the same for curves and comparisons.
        tastes: those of them that are tastes.
        ahead: indices of those that do not need the training device.
        turn: held by the thread that calls one of these; no reward is called by two at once.
    """

    labels: tuple[str, ...]
    weights: tuple[float, ...]
    rewards: list[Reward]
    scales: list[Scale]
    shown_scales: list[Scale] = field(default_factory=list)
    tastes: Tastes = field(default_factory=lambda: Tastes({}, {}))
    ahead: tuple[int, ...] = ()
    turn: Lock = field(default_factory=Lock, repr=False, compare=False)

    @classmethod
    def from_config(cls, config: TrainConfig, heads: Mapping[str, str] | None = None) -> RewardSet:
        """Make a config's rewards, without loading networks; `ConfigError` as `from_parts`.

        Args:
            config: of the run.
            heads: files to use for tastes, by label, instead of their folders' own.
        """
        parts = dict(config.reward_parts)
        for label, head in (heads or {}).items():
            options = {**parts[label].options, "head": head}
            parts[label] = parts[label].model_copy(update={"options": options})
        return cls.from_parts(parts)

    @classmethod
    def from_parts(cls, parts: Mapping[str, RewardConfig], where: str = "rewards.") -> RewardSet:
        """Make rewards from their long form, by label.

        Args:
            where: prefix of a label in an error.

        Raises:
            ConfigError: if one is not available, or has an option it does not know.
        """
        rewards = []
        for label, part in parts.items():
            try:
                rewards.append(load_reward(str(part.name), **part.options))
            except RewardUnavailable as error:
                raise ConfigError(str(error)) from error
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{where}{label}: {error}") from error
        scales, shown = ([_scale(part) for part in parts.values()] for _ in range(2))
        weights = tuple(part.weight for part in parts.values())
        tastes = Tastes.of(parts, rewards)
        return cls(tuple(parts), weights, rewards, scales, shown, tastes)

    def as_one(self) -> WeightedSum:
        """All of them as one reward, with fresh running scales."""
        scales = tuple(ZScore() if isinstance(s, ZScore) else s for s in self.scales)
        is_plain = all(scale == Affine() for scale in scales)
        return WeightedSum(
            tuple(self.rewards), self.weights, () if is_plain else scales, self.labels
        )

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse a prompt that a reward cannot read, naming both."""
        wanted = list(dict.fromkeys(prompts))
        for label, reward in zip(self.labels, self.rewards, strict=True):
            for prompt, why in zip(wanted, _complaints(reward, wanted), strict=True):
                if why is not None:
                    raise ConfigError(
                        f"the reward {label!r} cannot judge the prompt {shorten(prompt, 80)!r}: "
                        f"{why}"
                    )

    def place(self, device: torch.device, *, is_lent: bool) -> None:
        """Load the networks onto the training device, or have it lent to them while they score.

        If `is_lent`, they wait in main memory. `ConfigError` if weights cannot be read.
        """
        try:
            self.rewards = [
                place_reward(reward, device, is_lent=is_lent) for reward in self.rewards
            ]
            self.ahead = tuple(
                place for place, reward in enumerate(self.rewards) if _is_ahead(reward, device)
            )
        except RewardUnavailable as error:
            raise ConfigError(str(error)) from error

    @property
    def is_elsewhere(self) -> bool:
        """Whether a server computes one of them."""
        return any(reward.is_elsewhere for reward in self.rewards)

    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """What the numbers of each reward depend on, by label."""
        return {k: r.fingerprint() for k, r in zip(self.labels, self.rewards, strict=True)}

    def score(
        self,
        images: Images,
        prompts: Sequence[str],
        asked: Mapping[int, Callable[[], Scores]] | None = None,
    ) -> Float[Tensor, "b rewards"]:
        """Score images with each reward: finite float32 numbers on the CPU.

        Args:
            asked: by index, functions that give the scores of rewards that were called already.

        Returns:
            One column per reward; `RewardError` if a score is missing or not a number.
        """
        return self.columns(self.scores(images, prompts, asked))

    def columns(self, scores: Sequence[Scores]) -> Float[Tensor, "b rewards"]:
        """The values of `scores`, side by side."""
        return torch.stack([part.values.float() for part in scores], dim=1).cpu()

    @phase("reward")
    def scores(
        self,
        images: Images,
        prompts: Sequence[str],
        asked: Mapping[int, Callable[[], Scores]] | None = None,
    ) -> list[Scores]:
        """The scores of each reward, with their details.

        Args:
            images: none or more.
            prompts: of each image.
            asked: as of `score`.

        Raises:
            RewardError: if a score is missing or not a number.
        """
        if not prompts:
            return [Scores(torch.zeros(0)) for _ in self.rewards]
        found = []
        for place, (label, reward) in enumerate(zip(self.labels, self.rewards, strict=True)):
            ask = (asked or {}).get(place, partial(reward.score, images, prompts))
            try:
                scores = ask()
            except RewardUnavailable as error:
                raise RewardError(str(error)) from error
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                raise RewardError(f"the reward {label!r} failed: {text}") from error
            if not scores.values.float().isfinite().all():
                why = next((error for error in scores.errors if error), "it is not a number")
                raise RewardError(f"the reward {label!r} failed: {why}")
            found.append(scores)
        return found

    def scale_for_training(self, rewards: Values) -> Values:
        """An iteration's rewards on the scales of training, which are updated first."""
        return _apply_scales(self.scales, rewards, is_seen=True)

    def scale_for_display(self, rewards: Values) -> Float[Tensor, " b"]:
        """Rewards as one number per image, on scales that the run's first ones set."""
        is_first = any(isinstance(s, ZScore) and s.count == 0 for s in self.shown_scales)
        return self.weighted_sum(_apply_scales(self.shown_scales, rewards, is_seen=is_first))

    def weighted_sum(self, rewards: Values) -> Float[Tensor, " b"]:
        """The weighted sum."""
        return (torch.tensor(self.weights)[:, None] * rewards).sum(dim=0)

    def state_dict(self) -> dict[str, list[dict[str, Any] | None]]:
        both = {"scales": self.scales, "shown_scales": self.shown_scales}
        return {name: [_state(scale) for scale in scales] for name, scales in both.items()}

    def load_state_dict(self, state: dict[str, list[dict[str, Any] | None]]) -> None:
        for name, states in state.items():
            for scale, known in zip(getattr(self, name), states, strict=True):
                if known is not None:
                    scale.load_state_dict(known)


def _is_ahead(reward: Reward, device: torch.device) -> bool:
    return reward.is_elsewhere or (
        device.type != "cpu" and not isinstance(reward, LentReward) and not reward.modules()
    )


def _scale(part: RewardConfig) -> Scale:
    return ZScore() if part.normalise == "z_score" else Affine(part.scale, part.shift)


def _apply_scales(scales: Sequence[Scale], rewards: Values, *, is_seen: bool) -> Values:
    for scale, values in zip(scales, rewards, strict=True):
        if is_seen:
            scale.see(values)
    return torch.stack([scale(values) for scale, values in zip(scales, rewards, strict=True)])


def _state(scale: Scale) -> dict[str, Any] | None:
    return scale.state_dict() if isinstance(scale, ZScore) else None


def _complaints(reward: Reward, prompts: Sequence[str]) -> list[str | None]:
    try:
        return reward.complaints(prompts)
    except RewardUnavailable as error:  # a reward elsewhere, which is asked
        raise ConfigError(str(error)) from error


# --- in an iteration -----------------------------------------------------------------------------


@dataclass(slots=True)
class Scoring:
    """Images on their way to their rewards, computed while the next are sampled where possible.

    A thread waits for a server's answer and, beside a GPU, computes on the CPU any reward without a
    network. The numbers are the same. The failure of a reward is raised when they are collected.

    Attributes:
        prompts: of n images, over all processes.
        order: in which they are divided among processes.
        tree: images that share a path, which stay together.
        images: of this process's share, as far as they have come.
        asked: present or future scores of each part of them, by the rewards' indices.
    """

    reward_set: RewardSet
    processes: Processes
    prompts: Sequence[str]
    order: Sequence[int]
    tree: int = 1
    images: list[UInt8[Tensor, "b 3 height width"]] = field(default_factory=list)
    asked: dict[int, list[Future[Scores]]] = field(default_factory=dict)

    @property
    def mine(self) -> list[int]:
        """This process's share of the order."""
        return self.processes.share(self.order, tree=self.tree)

    def see(self, images: UInt8[Tensor, "b 3 height width"]) -> None:
        """Take the next images of the share, on the CPU; padding after its last is left out."""
        first, reward_set = sum(map(len, self.images)), self.reward_set
        prompts = [self.prompts[i] for i in self.mine[first : first + len(images)]]
        self.images.append(images[: len(prompts)])
        for place in reward_set.ahead if prompts else ():
            ask = partial(reward_set.rewards[place].score, self.images[-1], prompts)
            self.asked.setdefault(place, []).append(_start_thread(ask, reward_set.turn))

    def rewards(self) -> Float[Tensor, "rewards n"]:
        """The rewards of all images, over all processes; `RewardError` if one fails."""
        with self.processes.in_agreement():
            none = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
            images = torch.cat(self.images) if self.images else none
            asked = {place: partial(_collect, parts) for place, parts in self.asked.items()}
            prompts = [self.prompts[i] for i in self.mine]
            scores = self.reward_set.scores(images, prompts, asked)
            self.reward_set.tastes.see(images, prompts, scores)
            own = self.reward_set.columns(scores)
        return self.processes.gather(own, self.order, self.tree).T


def _start_thread(work: Callable[[], Scores], turn: Lock) -> Future[Scores]:
    """Start work in a daemon thread that waits for its turn; a stopped run can end without it."""
    future = Future[Scores]()

    def do() -> None:
        with turn:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

    Thread(target=do, name="pcpo-reward", daemon=True).start()
    return future


def _collect(parts: Sequence[Future[Scores]]) -> Scores:
    return Scores.concatenate([part.result() for part in parts])


@dataclass(frozen=True, slots=True)
class Advantages:
    """How much better than expected each image is.

    Attributes:
        reward_set: the rewards, with their weights and scales.
        combine: "rewards" or "advantages": which of the two is summed over the rewards.
        among: "prompt" or "siblings": whom a path of a tree is compared with.
        kinds: one for the rewards' sum, or one per reward.
    """

    reward_set: RewardSet
    combine: str
    kinds: list[Any]
    among: str = "prompt"

    @classmethod
    def of(cls, config: AdvantageConfig, reward_set: RewardSet) -> Advantages:
        count = 1 if config.combine == "rewards" else len(reward_set.rewards)
        kinds = [advantage_of(config) for _ in range(count)]
        return cls(reward_set, config.combine, kinds, config.among)

    @phase("advantages")
    def __call__(
        self, rewards: Float[Tensor, "rewards b"], prompts: Sequence[str]
    ) -> Float[Tensor, " b"]:
        """The images' advantages; `Diverged` if a float cannot hold one."""
        return self._compare(self.reward_set.scale_for_training(rewards), prompts)

    @phase("advantages")
    def of_paths(
        self, rewards: Float[Tensor, "rewards b"], prompts: Sequence[str], branches: Branches
    ) -> list[Float[Tensor, " paths"]]:
        """The advantages of a tree's paths, of each segment; the last are the images' own."""
        scaled = self.reward_set.scale_for_training(rewards)
        if self.among == "prompt":
            own = self._compare(scaled, prompts)
            return [mean_over_leaves(own, leaves) for leaves in branches.leaves]
        return [
            self._compare(mean_over_leaves(scaled, leaves), branches.siblings(depth, prompts))
            for depth, leaves in enumerate(branches.leaves)
        ]

    def _compare(self, scaled: Values, prompts: Sequence[str]) -> Float[Tensor, " b"]:
        if self.combine == "advantages":
            weights = list(self.reward_set.weights)
            advantages = combine_advantages(self.kinds, list(scaled), weights, list(prompts))
        else:
            advantages = self.kinds[0](self.reward_set.weighted_sum(scaled), list(prompts))
        if not all_finite([advantages]):
            raise Diverged(
                "the advantages are not finite: the rewards, times their weights and scales, are "
                "too large; lower rewards.NAME.weight or .scale, or set normalise to 'z_score'"
            )
        return advantages
