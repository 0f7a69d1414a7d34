"""Plots of a run, from its metrics, and of a sampler's weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..job.files import replace_file

BLUE, RED, GREY = "#1f5fbf", "#c0392b", "#8a8a8a"


def plot_run(
    metrics: Sequence[dict[str, Any]], before: float | None, file: Path, title: str
) -> None:
    """Plot reward and gradient norm by iteration; clip fraction and log ratio unless all are 0.

    Args:
        metrics: lines of metrics.jsonl, thinned if they are many; at least one.
        before: held-out reward of the base model, None if it was not measured.
    """
    x = [line["iteration"] for line in metrics]
    has_moved = any(line.get("log_ratio_max") for line in metrics)  # one pass is always on policy
    rows, size = (2, (11, 7)) if has_moved else (1, (11, 4))
    figure = Figure(size)
    axes = figure.subplots(rows, 2, sharex=True, squeeze=False)
    _reward(axes[0][0], x, metrics, before)
    if has_moved:
        _clip_fraction(axes[0][1], x, metrics)
        _log_ratio(axes[1][0], x, metrics)
    axis = axes[-1][1]
    axis.plot(x, _column(metrics, "grad_norm"), color=BLUE)
    axis.set(title="gradient norm before clipping", yscale="log")
    for axis in axes[-1]:
        axis.set(xlabel="iteration")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    figure.suptitle(title)
    _save(figure, file)


def _column(metrics: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [line.get(name, math.nan) for line in metrics]


def _reward(
    axis: Axes, x: list[int], metrics: Sequence[dict[str, Any]], before: float | None
) -> None:
    mean, std = _column(metrics, "reward"), _column(metrics, "reward_std")
    low = [a - b for a, b in zip(mean, std, strict=True)]
    high = [a + b for a, b in zip(mean, std, strict=True)]
    axis.fill_between(x, low, high, color=BLUE, alpha=0.12, linewidth=0, label="one deviation")
    axis.plot(x, mean, color=BLUE, label="mean of the iteration")
    evaluated = [] if before is None else [(0, before)]
    evaluated += [(line["iteration"], line["held_out"]) for line in metrics if "held_out" in line]
    if evaluated:
        axis.plot(*zip(*evaluated, strict=True), "o-", color=RED, label="held-out prompts")
    axis.set(title="reward")
    axis.legend(fontsize=8)


def _clip_fraction(axis: Axes, x: list[int], metrics: Sequence[dict[str, Any]]) -> None:
    axis.plot(x, _column(metrics, "clip_fraction"), color=RED, label="all updates")
    on_policy = _column(metrics, "clip_fraction_on_policy")
    axis.plot(x, on_policy, color=BLUE, label="first update (on policy)")
    outside = _column(metrics, "outside_fraction")
    axis.plot(x, outside, color=GREY, linestyle=":", label="|ratio - 1| beyond the range")
    axis.set(title="clip fraction", ylim=(-0.03, 1.03))
    axis.legend(fontsize=8)


def _log_ratio(axis: Axes, x: list[int], metrics: Sequence[dict[str, Any]]) -> None:
    axis.plot(x, _column(metrics, "log_ratio"), color=BLUE, label="mean")
    axis.plot(x, _column(metrics, "log_ratio_max"), color=GREY, label="largest |log ratio|")
    axis.plot(x, _column(metrics, "log_ratio_std"), color=RED, label="deviation")
    axis.set(title="log ratio (mean over latent elements)")
    axis.set_yscale("symlog", linthresh=1e-6)
    axis.legend(fontsize=8)


def _save(figure: Figure, file: Path) -> None:
    figure.subplots_adjust(left=0.07, right=0.98, wspace=0.17, hspace=0.15)
    # inches: titles and labels are as high in every figure
    height = figure.get_figheight()
    figure.subplots_adjust(bottom=0.5 / height, top=1 - 0.7 / height)
    with replace_file(file) as fresh:
        figure.savefig(fresh, dpi=110, format="png")
