"""From measurements to numbers with intervals: per side, per prompt, and between methods.

A side's number is the mean over prompts; its interval, and that of its difference from the base,
come from the bootstrap over prompts. Methods of several sides are compared by a mixed model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ...pcpo.statistics import Factor, MixedModel, design_of, estimate, fit_mixed_model, holm
from .metrics import Measured
from .sides import Side

Result = dict[str, Any]


def summarise(sides: Sequence[Side], measured: Mapping[str, Measured]) -> Result:
    """All numbers of an evaluation; the base is the first side.

    Returns:
        "sides" (overall, by metric), "prompts" (a list per metric and side) and "models".
    """
    base = measured[sides[0].name]
    tables = {side.name: _by_prompt(measured[side.name]) for side in sides}
    of_base = tables[sides[0].name]
    told = []
    for side in sides:
        found = measured[side.name]
        numbers = {
            name: _compare(values, of_base.get(name, []))
            for name, values in tables[side.name].items()
        }
        overall = {name: dict(entry) for name, entry in found.overall.items()}
        told.append(
            {
                **side.as_json(),
                "images": sum(found.images),
                "overall": overall,
                "metrics": numbers,
                "faults": found.faults,
            }
        )
    return {
        "sides": told,
        "prompts": tables,
        "models": {
            "against_base": _against_base(sides, measured, base),
            "methods": methods(sides, measured),
        },
    }


def _by_prompt(measured: Measured) -> dict[str, list[float]]:
    """One number per prompt: as measured, or the mean of its images' known numbers."""
    table = {name: list(values) for name, values in measured.prompts.items()}
    ends = np.cumsum(measured.files)
    for name, column in measured.scores.items():
        parts = np.split(np.asarray(column), ends[:-1])
        table[name] = [_mean(part) for part in parts]
    return table


def _mean(values: Any) -> float:
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    return float(known.mean()) if len(known) else math.nan


def _compare(values: Sequence[float], base: Sequence[float]) -> Result:
    """A mean with its interval, and the difference from the base at equal prompts."""
    here = [v for v in values if math.isfinite(v)]
    pairs = zip(values, base, strict=len(values) == len(base))
    apart = [v - b for v, b in pairs if math.isfinite(v - b)]
    return {**estimate(here), "prompts": len(here), "difference": estimate(apart)}


# --- mixed models --------------------------------------------------------------------------------


def _against_base(
    sides: Sequence[Side], measured: Mapping[str, Measured], base: Measured
) -> dict[str, Result]:
    """For each side and score, metric ~ side + (1 | prompt); p-values corrected over the scores."""
    by_side: dict[str, Result] = {}
    for side in sides[1:]:
        own = measured[side.name]
        rows = {}
        for name in own.scores:
            if name in base.scores and name != "drift_pixels":
                both = {"base": (base, sides[0]), "side": (own, side)}
                rows[name] = _fit(name, both, ("base", "side"), is_batch=False)
        _correct(rows, "method[side]")
        by_side[side.name] = rows
    return by_side


def methods(sides: Sequence[Side], measured: Mapping[str, Measured]) -> Result | None:
    """Compare methods that have several sides, or two and more methods of runs.

    metric ~ method * batch + (1 | prompt), with the batch if it was varied; the baseline is the
    reference. Scores are taken image by image, numbers of prompts prompt by prompt.

    Returns:
        "levels", "seeds" of each, and by metric a model; None if there are not two methods.
    """
    tuned = [side for side in sides[1:] if side.seed is not None]
    names = list(dict.fromkeys(side.method for side in tuned))
    if len(names) < 2:
        return None
    levels = sorted(names, key=lambda name: name != "baseline")
    groups = {side.name: (measured[side.name], side) for side in tuned}
    kinds = {name for one, _ in groups.values() for name in (*one.scores, *one.prompts)}
    rows = {name: _fit(name, groups, levels, is_batch=True) for name in sorted(kinds)}
    seeds = {level: [s.seed for s in tuned if s.method == level] for level in levels}
    of_sides = {
        name: {s.name: _mean([v for _, v in _observations(measured[s.name], name)]) for s in tuned}
        for name in sorted(kinds)
    }
    rewards = {s.name: math.nan if s.reward is None else s.reward for s in tuned}
    of_sides = {"held-out reward": rewards, **of_sides}
    by_seed = {name: _by_seed(values, tuned, levels) for name, values in of_sides.items()}
    for level in levels[1:]:
        _correct(rows, f"method[{level}]")
    return {
        "levels": levels,
        "seeds": seeds,
        "metrics": rows,
        "by_seed": by_seed,
    }


def _fit(
    name: str,
    groups: Mapping[str, tuple[Measured, Side]],
    levels: Sequence[str],
    *,
    is_batch: bool,
) -> Result:
    """One model; "error" if it cannot be fitted."""
    values: list[float] = []
    level, batch, prompt = [], [], []
    for key, (measured_one, side) in groups.items():
        for at, value in _observations(measured_one, name):
            values.append(value)
            prompt.append(at)
            level.append(side.method if is_batch else key)
            batch.append(side.batch)
    factors = [Factor("method", level, list(levels))]
    if is_batch and len(set(batch)) > 1:
        factors.append(Factor("batch", batch))
    try:
        return _model_result(fit_mixed_model(values, design_of(*factors), prompt))
    except ValueError as error:
        return {"error": str(error)}


def _observations(measured: Measured, name: str) -> list[tuple[int, float]]:
    """Prompt and value of every known observation of a metric."""
    if name in measured.prompts:
        rows = enumerate(measured.prompts[name])
    else:
        at = np.repeat(np.arange(len(measured.files)), measured.files)
        rows = zip(at.tolist(), measured.scores.get(name, ()), strict=False)
    return [(i, value) for i, value in rows if math.isfinite(value)]


def _model_result(model: MixedModel) -> Result:
    effects = [asdict(coefficient) for coefficient in model.coefficients]
    return {
        "effects": {effect.pop("name"): effect for effect in effects},
        "prompt_variance": model.group_variance,
        "residual_variance": model.residual_variance,
        "observations": model.observations,
        "prompts": model.groups,
        "note": model.note,
    }


def _correct(rows: dict[str, Result], effect: str) -> None:
    """Add "p_holm" of an effect, over all metrics."""
    fitted = {n: row["effects"] for n, row in rows.items() if effect in row.get("effects", {})}
    adjusted = holm([effects[effect]["p"] for effects in fitted.values()])
    for effects, p in zip(fitted.values(), adjusted, strict=True):
        effects[effect]["p_holm"] = p


def _by_seed(values: Mapping[str, float], sides: Sequence[Side], levels: Sequence[str]) -> Result:
    """Means over training seeds, and differences from the first method at equal seeds.

    They are few, but independent. Runs of one method and seed at several batch sizes are averaged.
    """
    by_method: dict[str, dict[int | None, list[float]]] = {level: {} for level in levels}
    for side in sides:
        by_method[side.method].setdefault(side.seed, []).append(values[side.name])
    means = {level: {s: _mean(v) for s, v in seeds.items()} for level, seeds in by_method.items()}
    differences = {}
    for level in levels[1:]:
        pairs = [(v, means[levels[0]].get(s, math.nan)) for s, v in means[level].items()]
        apart = [v - first for v, first in pairs if math.isfinite(v - first)]
        won = sum(value > 0 for value in apart)
        differences[level] = {**estimate(apart), "seeds": len(apart), "greater": won}
    known = {level: [v for v in m.values() if math.isfinite(v)] for level, m in means.items()}
    return {
        "means": {level: estimate(values) for level, values in known.items()},
        "differences": differences,
    }
