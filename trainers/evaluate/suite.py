"""The metrics of an evaluation: available ones are made, others listed with a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ... import registry
from ...pcpo.metrics import FEATURES, Features, load_features
from ...pcpo.metrics.lpips import Lpips
from ...pcpo.metrics.similarity import DIVERSITIES
from ...pcpo.rewards import Reward, load_reward
from ..config.reward_options import rewards_of
from ..config.train_config import ConfigError, TrainConfig, validate

REWARDS = ("hps_v2_1", "aesthetic", "clip_score", "pick_score", "image_reward")
"""The rewards of every evaluation, if their weights are there."""
LPIPS = "lpips_diversity"


@dataclass(slots=True)
class Suite:
    """The metrics of an evaluation.

    Attributes:
        features: encoders by the name of their Fréchet distance.
        diversities: of the images of one prompt.
        lpips: "lpips_diversity", if it is available.
        missing: "name" and "why" of each metric that is not available.
    """

    features: dict[str, Features] = field(default_factory=dict)
    diversities: dict[str, Callable[[Tensor], float]] = field(default_factory=dict)
    lpips: dict[str, Lpips] = field(default_factory=dict)
    rewards: dict[str, Reward] = field(default_factory=dict)
    missing: list[dict[str, str]] = field(default_factory=list)

    def modules(self) -> list[nn.Module]:
        """Load all networks; one whose weights cannot be read is listed as missing instead."""
        modules: list[nn.Module] = []
        for table in (self.features, self.lpips, self.rewards):
            for name, part in list(table.items()):
                try:
                    modules += part.modules()
                except ValueError as error:
                    self.missing.append({"name": name, "why": str(error)})
                    del table[name]
        return modules

    def fingerprints(self) -> dict[str, dict[str, Any]]:
        parts = {**self.features, **self.lpips, **self.rewards}
        return {name: part.fingerprint() for name, part in parts.items()}


def suite_of(
    metrics: Sequence[str],
    rewards: Mapping[str, tuple[str, Mapping[str, Any]]],
    prompts: Sequence[str],
) -> Suite:
    """Make the metrics that are available, and list the others.

    Args:
        metrics: names; all metrics if empty.
        rewards: name and options by label, besides `REWARDS`.

    Raises:
        ConfigError: for an unknown metric.
    """
    suite = Suite()
    known = [*FEATURES, LPIPS, *DIVERSITIES, *registry.REWARDS]
    strange = [name for name in metrics if name not in known]
    if strange:
        raise ConfigError(f"there is no metric {strange[0]!r}; choose of {', '.join(known)}")
    for name in FEATURES:
        if not metrics or name in metrics:
            _add(suite.missing, name, lambda n=name: suite.features.update({n: load_features(n)}))
    if "fid" not in suite.features and (not metrics or "fid" in metrics):
        suite.missing.append({"name": "inception_score", "why": "it needs FID's network"})
    if not metrics or LPIPS in metrics:
        _add(suite.missing, LPIPS, lambda: suite.lpips.update({LPIPS: Lpips()}))
    for name, diversity in DIVERSITIES.items():
        if not metrics or name in metrics:
            suite.diversities[name] = diversity
    wanted = {n: (n, {}) for n in (metrics or REWARDS) if n in registry.REWARDS}
    for label, (name, options) in {**wanted, **rewards}.items():
        _add(
            suite.missing,
            label,
            lambda key=label, n=name, o=options: _reward(suite, key, n, o, prompts),
        )
    return suite


def _reward(
    suite: Suite, label: str, name: str, options: Mapping[str, Any], prompts: Sequence[str]
) -> None:
    reward = load_reward(name, **options)
    distinct = list(dict.fromkeys(prompts))
    for prompt, why in zip(distinct, reward.complaints(distinct), strict=True):
        if why is not None:
            suite.missing.append(
                {"name": label, "why": f"it cannot judge the prompt {prompt[:60]!r}: {why}"}
            )
            return
    suite.rewards[label] = reward


def _add(missing: list[dict[str, str]], name: str, make: Callable[[], None]) -> None:
    """Make a metric, or add it to the missing ones."""
    try:
        make()
    except (ValueError, TypeError) as error:
        missing.append({"name": name, "why": str(error)})


def told_rewards(
    config: TrainConfig | None, asked: Sequence[str], options: Sequence[str]
) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """The rewards besides the usual ones: those of the run, and those asked for.

    Args:
        config: of the run; None without one.
        asked: names, from the command line.
        options: NAME.OPTION=VALUE, of those asked for.

    Returns:
        Name and options by label.
    """
    named = rewards_of(list(dict.fromkeys(asked)), options) if asked or options else {}
    own = validate({"rewards": named}, "pcpo evaluate").reward_parts if named else {}
    parts = {**(config.reward_parts if config is not None else {}), **own}
    return {label: (str(part.name), part.options) for label, part in parts.items()}
