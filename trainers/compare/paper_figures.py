"""Figures 2, 3 and 6 of `pcpo paper`. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..evaluate.comparison import METHODS
from .report import COLOURS, plot_clip, plot_reward, save_figure

Parts = Sequence[tuple[str, dict[str, Any]]]


def figure2(parts: Parts, file: Path) -> None:
    """Held-out reward by iteration: mean and interval over seeds."""
    figure = Figure(figsize=(5.6 * len(parts), 4.2))
    for axis, (title, part) in zip(
        figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True
    ):
        plot_reward(axis, part)
        axis.set(title=title, xlabel="iteration", ylabel="held-out reward")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    save_figure(figure, file)


def figure3(parts: Parts, file: Path) -> None:
    """Clip fraction (dotted: first update of an iteration) and largest log ratio by iteration."""
    figure = Figure(figsize=(5.6 * len(parts), 7.4))
    axes = figure.subplots(2, len(parts), squeeze=False)
    for (above, below), (title, part) in zip(zip(*axes, strict=True), parts, strict=True):
        for name, method in part["methods"].items():
            series = method["clip"]["by_iteration"]["log_ratio_max"]
            below.plot(range(1, len(series) + 1), series, color=COLOURS[name])
        plot_clip(above, part)
        above.set(title=title, ylabel="clip fraction")
        below.set(xlabel="iteration", ylabel="largest |log ratio|, nats", yscale="log")
        for axis in (above, below):
            axis.grid(alpha=0.25)
        above.legend(fontsize=8)
    save_figure(figure, file)


def figure6(parts: Parts, file: Path) -> None:
    """Rise of the held-out reward at each step from the baseline to PCPO."""
    figure = Figure(figsize=(5.6 * len(parts), 4.2))
    for axis, (title, part) in zip(
        figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True
    ):
        names = [name for name in METHODS if name in part["methods"]]
        for at, name in enumerate(names):
            rise = part["methods"][name]["rise"]
            axis.bar(at, rise["mean"], color=COLOURS[name], width=0.6)
            if rise["low"] is not None:
                axis.vlines(at, rise["low"], rise["high"], color="#333333")
        axis.set_xticks(range(len(names)), names, rotation=20, fontsize=8)
        axis.set(title=title, ylabel="rise of the held-out reward")
        axis.grid(alpha=0.25, axis="y")
    save_figure(figure, file)
