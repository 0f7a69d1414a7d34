"""`pcpo paper`: the paper's tables and figures, for given comparisons and evaluations.

Table 1 (10 in full)  epochs to a target reward, and how much faster than the baseline
Table 2, Table 5      quality at the evaluated exports: of diffusion models, and of flow models
Table 3               mixed models: coefficients of method, batch size and their interaction
Figure 2              held-out reward by iteration
Figure 3              clip fraction and largest log ratio by iteration
Figure 6              the steps from the baseline to PCPO: rise of the reward

What the folders do not contain is left out, with a note. An epoch of the paper is an iteration
here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from ...pcpo.statistics.tables import markdown, with_interval
from ...registry import samplers
from ..config.arguments import Arguments, Words, parse
from ..config.train_config import ConfigError
from ..evaluate.command import PLAN
from ..evaluate.comparison import SETUP, Comparison, read_setup
from ..evaluate.report import effect_cells
from ..job.files import write_csv, write_text
from ..job.folder import JobFolder
from ..reading import check_target, named
from .measures import estimate, summarise

Row = tuple[str, ...]
Result = dict[str, Any]


class PaperArguments(Arguments):
    """Write the paper's tables and figures from comparisons and evaluations."""

    folders: Words = Field(description="folders of the commands compare and evaluate")
    out: str = Field(default="paper", description="folder of the tables and figures")


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the paper.

    Attributes:
        name: of its file, such as "table1".
        notes: what a reader must know.
    """

    name: str
    title: str
    head: Row
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    """Write paper.md, a CSV file per table and a PNG file per figure."""
    a = parse(PaperArguments, arguments, "pcpo paper")
    comparisons: list[tuple[Comparison, Result]] = []
    evaluations: list[tuple[str, Result]] = []
    for name in a.folders:
        folder = Path(name)
        if os.path.isfile(folder / SETUP):
            comparisons.append((comparison := read_setup(folder), summarise(comparison)))
        elif os.path.isfile(folder / PLAN):
            evaluations.append((folder.resolve().name, _read_evaluation(folder)))
        else:
            raise ConfigError(
                f"{named(name)} holds neither a comparison ({SETUP}) nor an evaluation ({PLAN}); "
                "give folders of the commands compare or evaluate"
            )
    if not comparisons and not evaluations:
        raise ConfigError("name the folders of comparisons and evaluations")
    out = Path(a.out)
    check_target(a.out, "--out", is_folder=True)
    tables = [
        speedups(comparisons),
        quality("table2", "Table 2: quality, diffusion models", evaluations, is_flow=False),
        effects(evaluations),
        quality("table5", "Table 5: quality, flow models", evaluations, is_flow=True),
    ]
    figures = _figures(comparisons, out)
    _write(out, [table for table in tables if table.rows], figures)
    for table in tables:
        if not table.rows:
            print(f"{table.title}: nothing in the folders tells it")
    print(f"paper.md, tables and figures in {out}")
    return 0


def _read_evaluation(folder: Path) -> Result:
    """The results of an evaluation; `ConfigError` if it is not finished."""
    result = JobFolder(folder).read("result.json")
    if "sides" not in result:
        raise ConfigError(f"the evaluation in {folder} is not finished; run its command again")
    return result


# --- Table 1 -------------------------------------------------------------------------------------


def speedups(comparisons: Sequence[tuple[Comparison, Result]]) -> Table:
    """Epochs to target rewards: shares of the baseline's rise, in full as in Table 10.

    One row per method and target.
    """
    head = ("comparison", "target reward", "share of the rise", "method", "iterations (median)")
    table = Table("table1", "Table 1 (10): iterations to a reward", (*head, "reached", "faster"))
    for comparison, result in comparisons:
        for part in result["comparisons"]:
            where = _where(comparison, part)
            for name, method in part["methods"].items():
                for target in method["targets"]:
                    table.rows.append((*_target(where, name, target, part),))
    table.notes.append(
        "faster: the reference's median over this one's, less 1; the interval of a median is 95% "
        "of the bootstrap over seeds, and > means later than the last iteration."
    )
    return table


def _where(comparison: Comparison, part: Result) -> str:
    name = comparison.out.resolve().name
    return f"{name}, {comparison.varied_field} {part['value']}" if comparison.fields else name


def _target(where: str, name: str, target: Result, part: Result) -> Row:
    reached = target["iterations"]
    ends = [reached[key] for key in ("median", "low", "high")]
    shown = [">" if value is None else f"{value:.1f}" for value in ends]
    text = shown[0] if reached["seeds"] == 1 else f"{shown[0]} [{shown[1]}, {shown[2]}]"
    faster = target["faster"]["mean"] if name != part["reference"] else None
    return (
        where,
        f"{target['reward']:.4f}",
        f"{target['fraction']:.0%}",
        name,
        text,
        f"{reached['reached']}/{reached['seeds']}",
        "" if faster is None else f"{faster:+.1%}",
    )


# --- Tables 2, 3 and 5 ---------------------------------------------------------------------------


def quality(
    name: str, title: str, evaluations: Sequence[tuple[str, Result]], *, is_flow: bool
) -> Table:
    """Quality of methods, as means over the training seeds if there are several; one row per
    method.

    Args:
        evaluations: name and result of each.
        is_flow: whether to take evaluations of flow models, or those of all others.
    """
    chosen = [(where, result) for where, result in evaluations if _is_flow(result) == is_flow]
    names = list(
        dict.fromkeys(
            key for _, r in chosen for s in r["sides"] for key in (*s["overall"], *_means(s))
        )
    )
    table = Table(name, title, ("evaluation", "method", "seeds", "reward", *names))
    for where, result in chosen:
        groups: dict[str, list[Result]] = {}
        for side in result["sides"]:
            groups.setdefault(side["method"] or side["name"], []).append(side)
        for method, sides in groups.items():
            cells = [_over([_value(side, key) for side in sides]) for key in names]
            reward = _over([side["reward"] for side in sides])
            table.rows.append((where, method, str(len(sides)), reward, *cells))
        told = (f"{where}: {m['name']} is missing: {m['why']}" for m in result["missing"])
        table.notes.extend(told)
    table.notes.append(
        "reward: held-out, of the export that was evaluated; intervals, where there are several "
        "seeds of training, are 95% of the bootstrap over them."
    )
    return table


def _is_flow(result: Result) -> bool:
    return result["settings"].get("sampler", {}).get("transition") in samplers(is_flow=True)


def _means(side: Result) -> list[str]:
    return [key for key in side["metrics"] if key not in side["overall"]]


def _value(side: Result, key: str) -> float | None:
    if key in side["overall"]:
        return side["overall"][key]["value"]
    return side["metrics"].get(key, {}).get("mean")


def _over(values: Sequence[float | None]) -> str:
    return with_interval(estimate(values)) if any(v is not None for v in values) else ""


def effects(evaluations: Sequence[tuple[str, Result]]) -> Table:
    """Coefficients of the mixed models; one row per metric and effect."""
    head = ("evaluation", "metric", "effect", "coefficient", "SE", "z", "p", "p (Holm)")
    table = Table("table3", "Table 3: metric ~ method * batch size + (1 | prompt), REML", head)
    for where, result in evaluations:
        methods = result["models"]["methods"]
        for metric, model in ((methods or {}).get("metrics") or {}).items():
            for effect, entry in model.get("effects", {}).items():
                table.rows.append((where, metric, effect, *effect_cells(entry)))
    table.notes.append(
        "Images of one training run are taken for independent given their prompt; how methods "
        "differ over other seeds of training is in table 2 or 5, with its intervals."
    )
    return table


# --- figures and files ---------------------------------------------------------------------------


def _figures(comparisons: Sequence[tuple[Comparison, Result]], out: Path) -> list[str]:
    if not comparisons:
        return []
    from .paper_figures import figure2, figure3, figure6

    parts = [
        (_where(comparison, part), part)
        for comparison, result in comparisons
        for part in result["comparisons"]
    ]
    figure2(parts, out / "figure2.png")
    figure3(parts, out / "figure3.png")
    figure6(parts, out / "figure6.png")
    return [
        "Figure 2: held-out reward by iteration",
        "Figure 3: clip fraction and largest log ratio by iteration",
        "Figure 6: rise of the reward at each step from the baseline to PCPO",
    ]


def _write(out: Path, tables: Sequence[Table], figures: Sequence[str]) -> None:
    parts = []
    for table in tables:
        notes = "\n".join(f"- {note}" for note in dict.fromkeys(table.notes))
        parts.append(f"## {table.title}\n\n{markdown(table.head, table.rows)}\n{notes}\n")
        write_csv(out / f"{table.name}.csv", [table.head, *table.rows])
    for title in figures:
        number = title.partition(":")[0].removeprefix("Figure ")
        parts.append(f"## {title}\n\n![{title}](figure{number}.png)\n")
    write_text(out / "paper.md", "\n".join(parts))
