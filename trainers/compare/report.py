"""The report of a comparison: a table in markdown, and plots. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...pcpo.statistics.tables import markdown, with_interval
from ...registry import samplers
from ..config.train_config import TrainConfig, flat
from ..evaluate.comparison import CONTROL, METHODS, Comparison
from ..job.files import replace_file, write_json, write_text
from ..report.progress import clock

PALETTE = (
    *("#c0392b", "#e88b80", "#e08e0b", "#8e5bb5", "#1f5fbf"),
    *("#2e8b57", "#17a2b8", "#7f6000", "#d63384", "#5d6d7e"),
)
COLOURS = dict(zip(METHODS, PALETTE, strict=True))
GREY = "#8a8a8a"
DASHED = "epsilon-matching"  # its curve may hide that of "log-objective"

NOTES = """\
- All methods are evaluated with one sampler: {steps} steps of {sampler}, guidance \
{guidance:g}, on {count} held-out prompts at fixed seeds.
- Intervals are 95%. Those of rewards hold for other seeds and other prompts (two crossed random \
factors, Student's t); that of "faster" too (both drawn anew 10,000 times, which is a little too \
wide); all others are of the bootstrap over seeds, with few of which they are too narrow. "of its \
rise" is the difference over the {reference}'s mean rise. "won" counts the seeds at which a method \
ended above the {reference}; "along the way" is the difference in the mean of all evaluations.
- Target rewards are shares of the {reference}'s mean rise. "k/n" is how many seeds reached one; a \
seed that did not counts as later than all others, and ">" means later than the last iteration. \
"faster" is the {reference}'s median over this one's, less 1, as in the paper; resamples in which \
neither gets there count as equal. \
Between evaluations (every {every} iterations) all is interpolated linearly.
- Diversity is the mean RMS distance of two images of one prompt (pixels from 0 to 1; {images} \
images of each of {prompts} prompts); drift is the RMS distance to the base's images at equal \
noise, and the mean squared difference of the predictions on the base's own trajectories, as a \
share of their mean square. At a target they are of the seeds that reached it, and differences of \
the seeds at which both did.
- Seconds are of sampling and updating, without evaluations; runs side by side slow each other.
"""


def write_report(comparison: Comparison, result: dict[str, Any]) -> str:
    """Write result.json, table.md and the plots, and return the table.

    `result` is from `compare_measures.summarise`, with at least one finished run.
    """
    out = comparison.out
    table = _table(comparison, result)
    write_json(out / "result.json", result, indent=1)
    write_text(out / "table.md", table)
    _plot(comparison, result, out / "compare.png")
    if comparison.fields:
        _plot_varied(comparison, result, out / "compare_vary.png")
    return table


# --- the table -----------------------------------------------------------------------------------


def _table(comparison: Comparison, result: dict[str, Any]) -> str:
    parts = ["# Comparison of methods\n", _setup(comparison, result)]
    for part in result["comparisons"]:
        if comparison.fields:
            parts.append(f"## {comparison.varied_field} = {part['value']}\n")
        base = part["base"]
        parts.append(
            f"The base model: held-out reward {base['reward']:.4f}, "
            f"diversity {_number(base['diversity'])}.\n"
        )
        parts += [_rewards(part), *_verdicts(part), "", _against_control(part), _by_seed(part)]
        parts += [_targets(part), _distances(part), _training_table(part)]
    if comparison.fields:
        parts.append(_at_their_best(comparison, result["comparisons"]))
    config, run = comparison.config, comparison.config.run
    parts.append(
        NOTES.format(
            steps=run.eval_steps,
            sampler=_looked_with(config),
            guidance=config.sampler.guidance_scale,
            count=run.eval_prompts,
            reference=comparison.reference,
            every=run.save_every,
            images=comparison.images,
            prompts=min(comparison.prompts, run.eval_prompts),
        )
    )
    return "\n".join(parts)


def _looked_with(config: TrainConfig) -> str:
    """The evaluation's sampler (`plans.looking_plan`) in words."""
    noise = config.run.eval_noise
    if config.sampler.transition in samplers(is_flow=False):
        return f"DDIM, eta {noise:g}"
    return f"CPS, noise level {noise:g}" if noise else "the ODE, without noise"


def _setup(comparison: Comparison, result: dict[str, Any]) -> str:
    lines = [f"- date: {result['date']}"]
    for machine in comparison.machines:
        versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
        lines.append(
            f"- machine: {machine['processor']}, {machine['cores']} cores, {machine['system']}"
        )
        lines.append(f"- versions: {versions}")
    runs = [r for p in result["comparisons"] for m in p["methods"].values() for r in m["runs"]]
    places = sorted({f"{run['device'] or 'CPU'} ({run['threads']} threads)" for run in runs})
    lines.append(f"- runs: {len(runs)} finished, on {', '.join(places)}")
    lines += [f"- command: `{command}`" for command in comparison.commands]
    lines.append(f"- config, where it differs from the defaults: {_changes(comparison.config)}")
    lines += [f"- **note**: {note}" for note in result["notes"]]
    return "\n".join(lines) + "\n"


def _changes(config: TrainConfig) -> str:
    default, now = flat(TrainConfig().model_dump()), flat(config.model_dump())
    own = ("method.credit", "method.ratio", "method.objective")
    changed = [f"{k} {v}" for k, v in now.items() if default.get(k) != v and k not in own]
    return ", ".join(changed) or "nowhere"


def _rewards(part: dict[str, Any]) -> str:
    reference = part["reference"]
    head = (
        "method",
        "seeds",
        "final reward",
        "rise",
        f"minus {reference}",
        "of its rise",
        "won",
        "along the way",
    )
    rows = []
    for name, method in part["methods"].items():
        difference = method["difference"]
        own = (
            _estimate(difference),
            _estimate(difference["share"], "{:+.0%}"),
            f"{difference['won']}/{difference['seeds']}",
            _estimate(difference["along"]),
        )
        cells = (_estimate(method["final"]), _estimate(method["rise"]))
        others = own if name != reference else ("", "", "", "")
        rows.append((name, str(len(method["seeds"])), *cells, *others))
    return markdown(head, rows)


def _verdicts(part: dict[str, Any]) -> list[str]:
    """One sentence per method: what its difference from the reference shows and excludes."""
    sentences = []
    for name, method in part["methods"].items():
        share = method["difference"]["share"]
        if name == part["reference"] or share["low"] is None:
            continue
        low, high = share["low"], share["high"]
        if low > 0:
            text = f"ends above the {part['reference']}, by {low:.0%} of its rise at least"
        elif high < 0:
            text = f"ends below the {part['reference']}, by {-high:.0%} of its rise at least"
        else:
            text = (
                f"shows no difference from the {part['reference']}: what is excluded is a gain of "
                f"more than {max(high, 0):.0%} of its rise, and a loss of more than "
                f"{max(-low, 0):.0%}"
            )
        sentences.append(f"- {name} {text}.")
    return sentences


def _against_control(part: dict[str, Any]) -> str:
    """Differences from the control, if it was run."""
    if CONTROL not in part["methods"]:
        return ""
    rows = []
    for name, method in part["methods"].items():
        apart = method["control"]
        if name not in (CONTROL, part["reference"]):
            won = f"{apart['won']}/{apart['seeds']}"
            rows.append((name, _estimate(apart), won, _estimate(apart["along"])))
    return markdown((f"minus {CONTROL}", "at the end", "won", "along the way"), rows)


def _by_seed(part: dict[str, Any]) -> str:
    seeds = sorted({seed for method in part["methods"].values() for seed in method["seeds"]})
    rows = []
    for name, method in part["methods"].items():
        final = {run["seed"]: run["reward"][-1] for run in method["runs"]}
        rows.append((name, *(f"{final[s]:.4f}" if s in final else "" for s in seeds)))
    return markdown(("final reward by seed", *map(str, seeds)), rows)


def _at_their_best(comparison: Comparison, parts: Sequence[dict[str, Any]]) -> str:
    """Each method at the value at which it ends highest: no method has to use another's."""
    rows = []
    for name in comparison.methods:
        there = [part for part in parts if name in part["methods"]]
        if there:
            best = max(there, key=lambda part: part["methods"][name]["final"]["mean"])
            finals = [f"{part['methods'][name]['final']['mean']:.4f}" for part in there]
            own = (str(best["value"]), _estimate(best["methods"][name]["final"]))
            rows.append((name, *own, ", ".join(finals)))
    head = ("each at its best", comparison.varied_field, "final reward", "at all values")
    return markdown(head, rows)


def _estimate(found: dict[str, Any] | None, form: str = "{:.4f}") -> str:
    return with_interval(found, form)


def _targets(part: dict[str, Any]) -> str:
    if not part["targets"]:
        return ""
    heads = [f"{t['fraction']:.0%} ({t['reward']:.4f})" for t in part["targets"]]
    text = ""
    for kind, show in (("iterations", "{:.1f}".format), ("seconds", clock)):
        rows = []
        for name, method in part["methods"].items():
            runs = method["runs"]
            ends = {"iterations": runs[0]["iteration"][-1], "seconds": runs[0]["seconds"]}
            beyond = f">{ends['iterations']}" if kind == "iterations" else "later"
            cells = [_reached_text(t[kind], show, beyond) for t in method["targets"]]
            if kind == "iterations" and name != part["reference"]:
                cells = [
                    c + _faster(t["faster"]) for c, t in zip(cells, method["targets"], strict=True)
                ]
            rows.append((name, *cells))
        text += markdown((f"{kind} to a share of the rise", *heads), rows) + "\n"
    return text


def _faster(found: dict[str, Any]) -> str:
    if found["mean"] is None and found["low"] is None:
        return ""
    ends = f" [{found['low']:+.0%}, {_share(found['high'])}]" if found["low"] is not None else ""
    return f", faster {_share(found['mean'])}{ends}"


def _share(value: float | None) -> str:
    return "∞" if value is None else f"{value:+.0%}"


def _reached_text(found: dict[str, Any], show: Callable[[float], str], beyond: str) -> str:
    median, low, high = (
        beyond if found[name] is None else show(found[name]) for name in ("median", "low", "high")
    )
    interval = f" [{low}, {high}]" if found["seeds"] > 1 else ""
    return f"{median}{interval} {found['reached']}/{found['seeds']}"


def _distances(part: dict[str, Any]) -> str:
    """Diversity and drift, at each target and in the end."""
    titles = {
        "diversity": "diversity at a share of the rise",
        "drift_pixels": "drift of images",
        "drift_prediction": "drift of predictions",
    }
    heads = [f"{t['fraction']:.0%}" for t in part["targets"]]
    text = ""
    for kind, title in titles.items():
        rows = []
        for name, method in part["methods"].items():
            cells = []
            for target in method["targets"]:
                difference = target[f"{kind}_difference"]
                is_shown = name != part["reference"] and difference["seeds"]
                cells.append(_estimate(target[kind]))
                if is_shown:
                    cells[-1] += f", {difference['mean']:+.4f} at {difference['seeds']} seeds"
            rows.append((name, *cells, _estimate(method["last"][kind])))
        text += markdown((title, *heads, "at the end"), rows) + "\n"
    return text


def _training_table(part: dict[str, Any]) -> str:
    head = (
        "training",
        "clipped",
        "clipped on policy",
        "ratio outside the range",
        "largest log ratio",
        "seconds",
        "seconds an iteration",
    )
    rows = []
    for name, method in part["methods"].items():
        clip, seconds = method["clip"], method["seconds"]
        shares = ("clip_fraction", "clip_fraction_on_policy", "outside_fraction")
        rows.append(
            (
                name,
                *(f"{clip[share]:.2%}" for share in shares),
                f"{clip['log_ratio_max']:.2g}",
                _estimate(seconds["total"], "{:.0f}"),
                _estimate(seconds["iteration"], "{:.2f}"),
            )
        )
    return markdown(head, rows)


def _number(value: float | None, form: str = "{:.4f}") -> str:
    return "not known" if value is None else form.format(value)


# --- the plots -----------------------------------------------------------------------------------


def _plot(comparison: Comparison, result: dict[str, Any], file: Path) -> None:
    """One row per value: held-out reward, diversity against reward, clip fraction."""
    parts = result["comparisons"]
    figure = Figure(figsize=(15, 4.4 * len(parts)))
    axes = figure.subplots(len(parts), 3, squeeze=False)
    for row, part in zip(axes, parts, strict=True):
        plot_reward(row[0], part)
        for target in part["targets"]:
            row[0].axhline(target["reward"], color=GREY, linewidth=0.6, linestyle=":")
        _plot_diversity(row[1], part)
        plot_clip(row[2], part)
        if comparison.fields:
            row[0].set_title(f"{comparison.varied_field} = {part['value']}: held-out reward")
        for axis in row:
            axis.grid(alpha=0.25)
    axes[0][0].legend(fontsize=8)
    save_figure(figure, file)


def plot_reward(axis: Axes, part: dict[str, Any]) -> None:
    """Held-out reward by iteration: mean and interval over seeds."""
    for name, method in part["methods"].items():
        curve, colour = method["curve"], COLOURS[name]
        count = len(method["seeds"])
        axis.plot(curve["iteration"], curve["mean"], **_line(name), label=f"{name} ({count})")
        if count > 1:
            band = (curve["iteration"], curve["low"], curve["high"])
            axis.fill_between(*band, color=colour, alpha=0.15, linewidth=0)
    axis.set(title="held-out reward (mean and 95% interval over seeds)", xlabel="iteration")


def _plot_diversity(axis: Axes, part: dict[str, Any]) -> None:
    """The path of every run, and of the means over the seeds."""
    for name, method in part["methods"].items():
        runs = [run for run in method["runs"] if None not in run["diversity"]]
        for run in runs:
            axis.plot(
                run["reward"], run["diversity"], color=COLOURS[name], linewidth=0.6, alpha=0.4
            )
        if runs:
            x, y = (_mean([run[kind] for run in runs]) for kind in ("reward", "diversity"))
            axis.plot(x, y, **_line(name))
    for target in part["targets"]:
        axis.axvline(target["reward"], color=GREY, linewidth=0.6, linestyle=":")
    axis.set(title="diversity within a prompt against reward", xlabel="held-out reward")


def plot_clip(axis: Axes, part: dict[str, Any]) -> None:
    """Clip fraction by iteration, of the first update dotted."""
    for name, method in part["methods"].items():
        series = method["clip"]["by_iteration"]
        x = range(1, len(series["clip_fraction"]) + 1)
        axis.plot(x, series["clip_fraction"], color=COLOURS[name], label=name)
        axis.plot(x, series["clip_fraction_on_policy"], ":", color=COLOURS[name])
    axis.set(title="clip fraction (dotted: first update)", xlabel="iteration", ylim=(0, None))


def _plot_varied(comparison: Comparison, result: dict[str, Any], file: Path) -> None:
    """Final rise against the varied field's values, evenly spaced."""
    figure = Figure(figsize=(7.5, 4.6))
    axis = figure.subplots()
    parts = result["comparisons"]
    for name in comparison.methods:
        there = [
            (i, p["methods"][name]["rise"]) for i, p in enumerate(parts) if name in p["methods"]
        ]
        x, rises = [i for i, _ in there], [rise for _, rise in there]
        axis.plot(x, [rise["mean"] for rise in rises], **_line(name), label=name)
        ends = [(i, rise["low"], rise["high"]) for i, rise in there if rise["low"] is not None]
        for i, low, high in ends:
            axis.vlines(i, low, high, color=COLOURS[name], alpha=0.5)
    axis.set_xticks(range(len(parts)), [str(p["value"]) for p in parts], parse_math=False)
    axis.set(title="rise of the held-out reward", xlabel=comparison.varied_field)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    save_figure(figure, file)


def _line(name: str) -> dict[str, Any]:
    """The style of a method's means."""
    return {"color": COLOURS[name], "marker": "o", "linestyle": "--" if name == DASHED else "-"}


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure as PNG."""
    for axis in figure.axes:
        axis.title.set_parse_math(False)  # a folder's name or a value may hold a dollar
    figure.tight_layout()
    with replace_file(file) as fresh:
        figure.savefig(fresh, dpi=110, format="png")
