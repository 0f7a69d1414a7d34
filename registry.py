"""What a config calls by name: samplers, credits, ratios, objectives, rewards and so on. No torch.

An addition is a class, as a rule in a file of `pcpo/`, and one entry in a table here. The config,
the command line, the nodes, the estimates and their messages all read these tables; `pcpo` offers
them as its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, TypeVar


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a thing before it is imported.

    Attributes:
        where: "module:name"; a module that begins with a dot is of this package.
    """

    where: str


@dataclass(frozen=True, slots=True)
class SamplerEntry(Entry):
    """Of a sampler, whose only argument is its noise level, with the published one as default.

    Attributes:
        about: it in a few words of a tooltip.
        is_flow: whether it samples flow models; if not, diffusion models.
        most: the largest noise level.
    """

    about: str
    is_flow: bool = True
    most: float = math.inf


@dataclass(frozen=True, slots=True)
class AdvantageEntry(Entry):
    """Of an advantage, whose arguments are fields of the config's section `advantage`.

    Attributes:
        reads: those of them that are not read by all: neither `limit` nor `offset`.
        is_of_groups: whether a reward is compared with those of its own prompt and iteration.
    """

    reads: tuple[str, ...] = ()
    is_of_groups: bool = False


@dataclass(frozen=True, slots=True)
class RewardEntry(Entry):
    """Of a reward, whose arguments are its options.

    Attributes:
        files: keys of the catalogue's weight files that it needs at its default options.
        weights: numbers in its networks, by their published architectures.
        work: operations for an image and its prompt.
        live: numbers alive at the worst moment, of one image.
        is_elsewhere: whether a server computes it.
    """

    files: tuple[str, ...] = ()
    weights: float = 0.0
    work: float = 0.0
    live: float = 0.0
    is_elsewhere: bool = False


E = TypeVar("E", bound=Entry)


class Table(Mapping[str, Any], Generic[E]):
    """Things by their names, each imported when it is first asked for.

    Attributes:
        entries: what is known of them without that.
    """

    def __init__(self, **entries: E) -> None:
        self.entries = entries

    def __getitem__(self, name: str) -> Any:
        module, _, attribute = self.entries[name].where.partition(":")
        return getattr(import_module(module, __package__), attribute)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


TRANSITIONS = Table(
    ddim=SamplerEntry(
        ".pcpo.transitions:Ddim", "DDIM with eta (DDPO, DanceGRPO on SD)", is_flow=False, most=1
    ),
    dance_sde=SamplerEntry(".pcpo.transitions:DanceSde", "DanceGRPO"),
    flow_sde=SamplerEntry(".pcpo.transitions:FlowSde", "Flow-GRPO"),
    cps=SamplerEntry(".pcpo.transitions:Cps", "coefficients-preserving sampling", most=1),
)


def samplers(*, is_flow: bool) -> list[str]:
    """Names of the samplers for flow models, or of those for diffusion models."""
    return [name for name, entry in TRANSITIONS.entries.items() if entry.is_flow == is_flow]


CREDITS = Table(
    native=Entry(".pcpo.credit:Native"),
    proportionate=Entry(".pcpo.credit:Proportionate"),
    published=Entry(".pcpo.credit:Published"),
    exact=Entry(".pcpo.credit:Exact"),
    objective_only=Entry(".pcpo.credit:ObjectiveOnly"),
    relative=Entry(".pcpo.credit:Relative"),
    weighted_loss=Entry(".pcpo.credit:WeightedLoss"),
)
RATIOS = Table(
    epsilon_matching=Entry(".pcpo.ratios:epsilon_matching"),
    density=Entry(".pcpo.ratios:density"),
    squared_error=Entry(".pcpo.ratios:squared_error"),
    guard=Entry(".pcpo.ratios:guard"),
)
KLS = Table(
    exact=Entry(".pcpo.ratios:kl_exact"),
    without_interval=Entry(".pcpo.ratios:kl_without_interval"),
)
OBJECTIVES = Table(
    ppo_clip=Entry(".pcpo.objectives:PpoClip"),
    hinge=Entry(".pcpo.objectives:Hinge"),
    log_hinge=Entry(".pcpo.objectives:LogHinge"),
)
ADVANTAGES = Table(
    batch=AdvantageEntry(".pcpo.advantages:BatchAdvantage", ("ddof",)),
    per_prompt=AdvantageEntry(".pcpo.advantages:RunningAdvantage", ("buffer_size", "min_count")),
    group=AdvantageEntry(".pcpo.advantages:GroupAdvantage", ("global_std", "ddof"), True),
)
SELECTIONS = Table(
    all=Entry(".pcpo.selection:AllSteps"),
    random_fraction=Entry(".pcpo.selection:RandomFraction"),
    sliding_window=Entry(".pcpo.selection:SlidingWindow"),
)

_CLIP_L = (428e6, 175e9, 257 * 1024 * 12)
_CLIP_H = (986e6, 382e9, 257 * 1280 * 12)
REWARDS = Table(
    aesthetic=RewardEntry(
        ".pcpo.rewards.aesthetic:Aesthetic",
        ("aesthetic_head", "clip_l_vision"),
        *(304e6, 162e9, 257 * 1024 * 12),
    ),
    brightness=RewardEntry(".pcpo.rewards.brightness:Brightness"),
    clip_score=RewardEntry(".pcpo.rewards.clip_score:ClipScore", ("clip_l",), *_CLIP_L),
    colour=RewardEntry(".pcpo.rewards.colour:Colour"),
    colourfulness=RewardEntry(".pcpo.rewards.colourfulness:Colourfulness"),
    hps_v2=RewardEntry(".pcpo.rewards.hps:HpsV2", ("hps_v2",), *_CLIP_H),
    hps_v2_1=RewardEntry(".pcpo.rewards.hps:HpsV21", ("hps_v2_1",), *_CLIP_H),
    image_reward=RewardEntry(
        ".pcpo.rewards.image_reward:ImageReward",
        ("image_reward", "bert_vocab"),
        *(446e6, 137e9, 197 * 1024 * 12),
    ),
    jpeg_compressibility=RewardEntry(".pcpo.rewards.jpeg:JpegCompressibility"),
    jpeg_incompressibility=RewardEntry(".pcpo.rewards.jpeg:JpegIncompressibility"),
    ocr=RewardEntry(".pcpo.rewards.ocr:Ocr"),
    pick_score=RewardEntry(".pcpo.rewards.pick_score:PickScore", ("pick_score",), *_CLIP_H),
    remote=RewardEntry(".pcpo.rewards.remote:Remote", is_elsewhere=True),
    scene=RewardEntry(".pcpo.rewards.scene:SceneReward"),
    sharpness=RewardEntry(".pcpo.rewards.sharpness:Sharpness"),
    symmetry=RewardEntry(".pcpo.rewards.symmetry:Symmetry"),
    taste=RewardEntry(".pcpo.rewards.taste:Taste"),
    vlm_bert_score=RewardEntry(
        ".pcpo.rewards.vlm_bert_score:VlmBertScore",
        ("deberta",),
        *(650e6, 60e9, 2 * 512 * 1024 * 12),
        is_elsewhere=True,
    ),
    vlm_judge=RewardEntry(".pcpo.rewards.vlm_judge:VlmJudge", is_elsewhere=True),
)
