"""Exports of equal reward: compare what two methods cost where they have gained the same.

The target is the highest reward that both runs reach, or a given one; of each run the export whose
held-out reward is nearest to it is taken, and the distance is reported. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..config.train_config import ConfigError
from ..job.folder import JobFolder
from .sides import Side, rewards_of_run

Rewards = Mapping[int, float]


def matched_sides(sides: Sequence[Side], at_reward: float | None = None) -> tuple[Side, ...]:
    """The sides at the exports of nearest reward.

    Args:
        sides: runs, two or more; those of equal seeds are matched with each other, or all of them
            if every seed occurs once.
        at_reward: the target; the highest that all runs of a seed reach if None.

    Raises:
        ConfigError: if a side is no run, or there are no two to match.
    """
    strange = [side for side in sides if side.run is None]
    if strange:
        raise ConfigError(f"--matched compares runs by their reward, and {strange[0].name} is none")
    seeds = [side.seed for side in sides]
    groups = {seed: [side for side in sides if side.seed == seed] for seed in dict.fromkeys(seeds)}
    if all(len(group) == 1 for group in groups.values()):
        groups = {None: list(sides)}
    alone = [group[0] for group in groups.values() if len(group) == 1]
    if alone:
        raise ConfigError(
            f"--matched: {alone[0].name} is the only run of seed {alone[0].seed}; give runs of "
            "equal seeds"
        )
    chosen: dict[str, Side] = {}
    for group in groups.values():
        curves = {side.name: _rewards(side) for side in group}
        target = matched_target(list(curves.values())) if at_reward is None else at_reward
        for side in group:
            chosen[side.name] = _nearest_export(side, curves[side.name], target)
    return tuple(chosen[side.name] for side in sides)


def matched_target(curves: Sequence[Rewards]) -> float:
    """The highest reward that all runs reach, by their reward by iteration.

    >>> matched_target([{1: 0.2, 2: 0.5, 3: 0.4}, {1: 0.3, 2: 0.45}])
    0.45
    """
    return min(max(curve.values()) for curve in curves)


def nearest(curve: Rewards, target: float) -> int:
    """The iteration whose reward is nearest to a target, the first of equals.

    >>> nearest({1: 0.2, 2: 0.5, 3: 0.44}, 0.45)
    3
    """
    return min(curve, key=lambda iteration: (abs(curve[iteration] - target), iteration))


def _rewards(side: Side) -> Rewards:
    """The rewards of a run at its exports; `ConfigError` if no export was evaluated."""
    folder = JobFolder(side.run or Path())
    exports = folder.exports()
    known = {i: reward for i, reward in rewards_of_run(folder).items() if i in exports}
    if not known:
        raise ConfigError(
            f"no export of {side.run} has a held-out reward to be matched by; train with "
            "run.eval_prompts and run.save_every"
        )
    return known


def _nearest_export(side: Side, curve: Rewards, target: float) -> Side:
    iteration = nearest(curve, target)
    path = JobFolder(side.run or Path()).export(iteration)
    return replace(side, iteration=iteration, reward=curve[iteration], path=path)
