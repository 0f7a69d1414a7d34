"""The statistics of a comparison: from the files of its runs to numbers with intervals.

A run is described by its evaluations, the base first: iteration, held-out reward, seconds,
distances. Between them everything is interpolated linearly. None means unknown, or that a target
was not reached.

Intervals of rewards are over seeds and prompts, both of which are samples; those of distances and
seconds are over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ...pcpo.statistics.bootstrap import bootstrap, interval, resample_crossed
from ...pcpo.statistics.bootstrap import estimate as mean_of
from ...pcpo.statistics.two_way import two_way_interval
from ..config.train_config import ConfigError
from ..evaluate.comparison import CONTROL, Comparison, Member
from ..job.folder import JobFolder
from ..job.metrics import lines_of

Run = dict[str, Any]
Result = dict[str, Any]

FRACTIONS = (0.25, 0.5, 0.75, 1.0)  # of the reference's mean rise: the target rewards
DISTANCES = ("diversity", "drift_pixels", "drift_prediction")
SERIES = ("clip_fraction", "clip_fraction_on_policy", "outside_fraction", "log_ratio_max")
UNKNOWN = {"mean": None, "low": None, "high": None}
SAME = 1e-6  # rewards of one base model differ by less than this


# --- one run -------------------------------------------------------------------------------------


def run_of(member: Member) -> Run:
    """Read the numbers of a finished run.

    Returns:
        "seed"; one entry per evaluation, the base first, of "iteration", "reward", "scores" (the
        reward of each prompt), "elapsed" (s of training) and the distances (None if they are not
        measured); one entry per iteration of the series; "seconds" in all.
    """
    folder = member.folder
    wanted = ("iteration", "seconds", "held_out", *SERIES)
    metrics = [{k: line[k] for k in wanted if k in line} for line in lines_of(folder.metrics_file)]
    evaluated = [line for line in metrics if "held_out" in line]
    elapsed = np.cumsum([line["seconds"] for line in metrics])
    iterations = [0, *(line["iteration"] for line in evaluated)]
    scores = [_scores(folder, iteration) for iteration in iterations]
    measured = JobFolder(member.measures.parent).read(member.measures.name)
    names = ["base", *(folder.export(line["iteration"]).name for line in evaluated)]
    return {
        "seed": member.seed,
        "iteration": iterations,
        "reward": [sum(scores[0]) / len(scores[0]), *(line["held_out"] for line in evaluated)],
        "scores": scores,
        "elapsed": [0.0, *(float(elapsed[line["iteration"] - 1]) for line in evaluated)],
        **{kind: [measured.get(name, {}).get(kind) for name in names] for kind in DISTANCES},
        **{name: [line[name] for line in metrics] for name in SERIES},
        "seconds": float(elapsed[-1]),
        "device": folder.job()["versions"].get("device", ""),
        "threads": folder.job()["versions"].get("threads"),
    }


def _scores(folder: JobFolder, iteration: int) -> list[float]:
    """The held-out reward of each prompt."""
    return [score["reward"] for score in folder.scores(iteration)]


def first_crossing(run: Run, target: float) -> float | None:
    """The iteration at which a run first has a reward, by interpolation; None if it never has.

    >>> first_crossing({"iteration": [0, 10, 20], "reward": [0.0, 0.4, 0.2]}, 0.1)
    2.5
    """
    points = list(zip(run["iteration"], run["reward"], strict=True))
    if points[0][1] >= target:
        return float(points[0][0])
    for (start, low), (end, high) in pairwise(points):
        if low < target <= high:
            return start + (target - low) / (high - low) * (end - start)
    return None


def value_at(run: Run, kind: str, iteration: float | None) -> float | None:
    """A run's number at an iteration; None if that is None or nothing was measured."""
    if iteration is None or any(value is None for value in run[kind]):
        return None
    return float(np.interp(iteration, run["iteration"], run[kind]))


# --- several seeds -------------------------------------------------------------------------------


def estimate(values: Sequence[float | None]) -> Result | None:
    """The mean over seeds of the values that are not None; None if there are none.

    Returns:
        "mean", "low" and "high" (None for a single seed) and "seeds".
    """
    known = [value for value in values if value is not None]
    return {**mean_of(known), "seeds": len(known)} if known else None


def median_to_target(values: Sequence[float | None]) -> Result:
    """The median over all seeds of iterations or seconds to a target.

    A value of None, a target that was not reached, counts as later than all others.

    Returns:
        "median", "low" and "high", None if they are beyond the end of the runs; "reached" and
        "seeds".
    """
    filled = [np.inf if value is None else value for value in values]
    ends = bootstrap(filled, np.median) if len(filled) > 1 else (None, None)
    found = {"median": float(np.median(filled)), "low": ends[0], "high": ends[1]}
    finite = {k: v if v is not None and np.isfinite(v) else None for k, v in found.items()}
    return finite | {"reached": sum(v is not None for v in values), "seeds": len(values)}


def pair_seeds(values: Mapping[int, float | None], reference: Mapping[int, float | None]) -> Result:
    """Differences at equal seeds, of values by seed.

    Returns:
        As `estimate`, with None if no seed is in both.
    """
    both = [
        now - then
        for seed, now in values.items()
        if now is not None and (then := reference.get(seed)) is not None
    ]
    return estimate(both) or {**UNKNOWN, "seeds": 0}


# --- rewards, over seeds and prompts -------------------------------------------------------------

Curves = np.ndarray  # (seeds, prompts, evaluations), the base first


def curves_of(runs: Sequence[Run]) -> Curves:
    """Rewards of one method's runs by seed, prompt and evaluation.

    All runs have the same evaluations. The mean of all prompts counts as one prompt, unless all
    runs have the rewards of each.
    """
    is_whole = len({len(scores) for run in runs for scores in run["scores"]}) == 1
    rows = [run["scores"] if is_whole else [[reward] for reward in run["reward"]] for run in runs]
    return np.array(rows, dtype=float).swapaxes(1, 2)


def estimate_rewards(values: np.ndarray) -> Result:
    """The mean of (seeds, prompts), with its interval.

    Returns:
        "mean", "low", "high" (None for a single seed) and "seeds".
    """
    low, high = two_way_interval(values) if len(values) > 1 else (None, None)
    return {"mean": float(values.mean()), "low": low, "high": high, "seeds": len(values)}


def crossings(curves: np.ndarray, iterations: Sequence[int], target: np.ndarray) -> np.ndarray:
    """`first_crossing` of many curves at once.

    Args:
        curves: (resamples, seeds, evaluations).
        target: (resamples,).

    Returns:
        (resamples, seeds): iterations, infinite if the target is never reached.
    """
    at_, wanted = np.asarray(iterations, dtype=float), target[:, None, None]
    low, high = curves[..., :-1], curves[..., 1:]
    crosses = (low < wanted) & (wanted <= high)
    first = crosses.argmax(-1)[..., None]
    start, end = (np.take_along_axis(part, first, -1)[..., 0] for part in (low, high))
    begin, length = at_[:-1][first[..., 0]], np.diff(at_)[first[..., 0]]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = begin + (target[:, None] - start) / (end - start) * length
    found = np.where(crosses.any(-1), found, np.inf)
    return np.where(curves[..., 0] >= target[:, None], at_[0], found)


def faster(
    mine: Curves, theirs: Curves, iterations: Sequence[int], fraction: float
) -> tuple[float, float]:
    """The interval of the reference's median time to a target over a method's, less 1.

    The target is a share of the reference's rise in each resample of seeds and prompts. If neither
    gets there, or the reference does not rise, they count as equal.

    Args:
        theirs: of the reference, at the same seeds and prompts.
        fraction: share of the reference's rise.

    Returns:
        Its ends; infinite if the method gets there and the reference does not.
    """
    drawn = resample_crossed(np.stack([mine, theirs], axis=-1))
    mean = drawn[..., 1].mean(1)  # the reference's mean curve
    target = mean[:, 0] + fraction * (mean[:, -1] - mean[:, 0])
    medians = [np.median(crossings(drawn[..., i], iterations, target), axis=1) for i in (0, 1)]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = medians[1] / medians[0] - 1
    rises = mean[:, -1] > mean[:, 0]
    return interval(np.where(rises & ~np.isnan(ratio), ratio, 0.0))


# --- all runs ------------------------------------------------------------------------------------


def summarise(comparison: Comparison) -> Result:
    """All numbers of a comparison's finished runs.

    Returns:
        "comparisons", one per value of the varied field, and "notes", one sentence each.
    """
    members = [member for member in comparison.members() if member.is_finished()]
    notes = _missing_runs(comparison, members)
    parts = []
    for value in comparison.values:
        runs: dict[str, list[Run]] = {}
        for member in [member for member in members if member.value == value]:
            runs.setdefault(member.method, []).append(_read(member))
        if runs:
            ordered = {name: runs[name] for name in comparison.methods if name in runs}
            where = f"{comparison.varied_field} {value}: " if comparison.fields else ""
            parts.append({"value": value, **_one_value(ordered, notes, where)})
    return {"comparisons": parts, "notes": notes}


def _read(member: Member) -> Run:
    try:
        return run_of(member)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        root = member.folder.root
        raise ConfigError(
            f"the numbers of {root} cannot be read ({type(error).__name__}: {error}); delete the "
            "run and its file in measures/, and compare again"
        ) from error


def _missing_runs(comparison: Comparison, members: Sequence[Member]) -> list[str]:
    count = len(comparison.members()) - len(members)
    return [f"{count} of the runs are not finished and left out"] if count else []


def _one_value(runs: Mapping[str, list[Run]], notes: list[str], where: str) -> Result:
    """One comparison of methods; anomalies are added to the notes."""
    reference = "baseline" if "baseline" in runs else next(iter(runs))
    bases = [run["reward"][0] for group in runs.values() for run in group]
    if max(bases) - min(bases) > SAME:
        notes.append(
            f"{where}the base model's reward differs between the runs ({min(bases):.6f} to "
            f"{max(bases):.6f}): they were made on different machines, or with other "
            "numbers of threads or micro-batches"
        )
    base, final = float(np.mean(bases)), [run["reward"][-1] for run in runs[reference]]
    rise = float(np.mean(final)) - base
    targets = [{"fraction": f, "reward": base + f * rise} for f in FRACTIONS] if rise > 0 else []
    if not targets:
        notes.append(f"{where}the {reference}'s reward did not rise: there are no target rewards")
    diversity = [run["diversity"][0] for group in runs.values() for run in group]
    return {
        "reference": reference,
        "base": {"reward": base, "diversity": diversity[0]},
        "targets": targets,
        "methods": {
            name: _method(group, runs[reference], runs.get(CONTROL, []), targets)
            for name, group in runs.items()
        },
    }


def _method(
    group: list[Run], reference: list[Run], control: list[Run], targets: list[Result]
) -> Result:
    return {
        "seeds": [run["seed"] for run in group],
        **_rewards(group),
        "difference": _difference(group, reference),
        "control": _difference(group, control),
        "targets": [_target(group, reference, target) for target in targets],
        "last": {kind: estimate([run[kind][-1] for run in group]) for kind in DISTANCES},
        "clip": _clip(group),
        "seconds": {
            "total": estimate([run["seconds"] for run in group]),
            "iteration": estimate([run["seconds"] / run["iteration"][-1] for run in group]),
        },
        "curve": _curve(group),
        "runs": [{k: v for k, v in run.items() if k != "scores"} for run in group],
    }


def _rewards(group: list[Run]) -> Result:
    """Final rewards and rises."""
    curves = curves_of(group)
    final = curves[..., -1]
    return {"final": estimate_rewards(final), "rise": estimate_rewards(final - curves[..., 0])}


def _difference(group: list[Run], reference: list[Run]) -> Result:
    """The difference from another method at equal seeds and prompts, at the end and along the way;
    also as a share of the other's rise."""
    mine, theirs = _at_equal_seeds(group, reference)
    if not len(mine):
        return {**UNKNOWN, "seeds": 0, "won": 0, "share": UNKNOWN, "along": UNKNOWN}
    apart, rise = mine - theirs, (theirs[..., -1] - theirs[..., 0]).mean()
    end = estimate_rewards(apart[..., -1])
    shares = {k: None if end[k] is None or rise <= 0 else end[k] / rise for k in UNKNOWN}
    won = int((apart[..., -1].mean(1) > 0).sum())
    along = estimate_rewards(apart[..., 1:].mean(-1))
    return {**end, "won": won, "share": shares, "along": along}


def _at_equal_seeds(group: list[Run], reference: list[Run]) -> tuple[Curves, Curves]:
    """Rewards of both at the seeds, evaluations and prompts that both have."""
    then = {run["seed"]: run for run in reference}
    pairs = [(run, then[run["seed"]]) for run in group if run["seed"] in then]
    if not pairs:
        return np.empty((0, 0, 0)), np.empty((0, 0, 0))
    both = curves_of([run for pair in pairs for run in pair])
    return both[::2], both[1::2]


def _target(group: list[Run], reference: list[Run], target: Result) -> Result:
    """Iterations, seconds and distances at a target reward; differences where both reach it."""
    when = {run["seed"]: first_crossing(run, target["reward"]) for run in group}
    then = {run["seed"]: first_crossing(run, target["reward"]) for run in reference}
    found: Result = {
        **target,
        "iterations": median_to_target(list(when.values())),
        "seconds": median_to_target([value_at(run, "elapsed", when[run["seed"]]) for run in group]),
        "faster": _faster(group, reference, target["fraction"]),
    }
    mine, theirs = found["iterations"]["median"], median_to_target(list(then.values()))["median"]
    found["faster"]["mean"] = theirs / mine - 1 if mine and theirs is not None else None
    for kind in DISTANCES:
        values = {run["seed"]: value_at(run, kind, when[run["seed"]]) for run in group}
        others = {run["seed"]: value_at(run, kind, then[run["seed"]]) for run in reference}
        found[kind] = estimate(list(values.values()))
        found[f"{kind}_difference"] = pair_seeds(values, others)
    return found


def _faster(group: list[Run], reference: list[Run], fraction: float) -> Result:
    """The interval of "faster", None if it has no end or there are not two seeds."""
    mine, theirs = _at_equal_seeds(group, reference)
    if len(mine) < 2:
        return dict(UNKNOWN)
    ends = faster(mine, theirs, group[0]["iteration"], fraction)
    low, high = (end if np.isfinite(end) else None for end in ends)
    return {**UNKNOWN, "low": low, "high": high}


def _clip(group: list[Run]) -> Result:
    """Means over iterations and seeds, and the largest log ratio; the means by iteration."""
    table = {name: np.array([run[name] for run in group]) for name in SERIES}
    means = {name: float(rows.mean()) for name, rows in table.items() if name != "log_ratio_max"}
    by_iteration = {name: rows.mean(axis=0).tolist() for name, rows in table.items()}
    largest = float(table["log_ratio_max"].max())
    return {**means, "log_ratio_max": largest, "by_iteration": by_iteration}


def _curve(group: list[Run]) -> Result:
    """Held-out reward by iteration: mean, and the interval of the mean."""
    columns = list(zip(*(run["reward"] for run in group), strict=True))
    points = [estimate(column) or {} for column in columns]
    ends = {name: [point[name] for point in points] for name in ("mean", "low", "high")}
    return {"iteration": group[0]["iteration"], **ends}
