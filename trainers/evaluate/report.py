"""The report of an evaluation: a table in markdown, CSV files, JSON, and one page. No torch."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...pcpo.statistics.tables import markdown, with_interval
from ..job.files import cell, finite, write_csv, write_json, write_text
from ..job.folder import JobFolder
from ..report.page import page_of
from .sides import rewards_of_run

TEMPLATE = Path(__file__).with_name("evaluation_page.html")
MAX_PROMPTS, MAX_SEEDS, MAX_SIDES = 45, 4, 6
"""Most rows, images per row and columns of images on the page."""
MAX_IMAGE_BYTES = 32 * 2**20
"""Most bytes of all images on the page."""

INTERVALS = (
    "Intervals, in brackets, are 95% of the bootstrap over prompts; p is of the mixed model "
    "metric ~ side + (1 | prompt) over images, corrected by Holm over the metrics of a side."
)

Files = Mapping[str, Mapping[str, Sequence[Path]]]
Result = dict[str, Any]


WORDS = {
    "fid": "FID, Fréchet distance of Inception-2015 features; less is nearer to the base's images",
    "fd_dinov2": "FD-DINOv2, Fréchet distance of DINOv2 features; less is nearer",
    "fd_random": "Fréchet distance of a fixed random network's features: an offline stand-in, not "
    "FID; less is nearer",
    "inception_score": "Inception Score; more is sharper and more varied over all prompts",
    "lpips_diversity": "mean LPIPS of two images of a prompt; more is more diverse",
    "pixel_diversity": "mean RMS of the pixels of two images of a prompt, an offline stand-in; "
    "more is more diverse",
    "ssim_diversity": "1 less the mean SSIM of two images of a prompt, an offline stand-in; more "
    "is more diverse",
    "drift_pixels": "RMS of the pixels to the base's image of the same prompt and seed; less is "
    "nearer",
}
LESS_IS_BETTER = {"fid", "fd_dinov2", "fd_random", "drift_pixels"}
"""Metrics of which less is better; of all others more is."""


def write_report(out: Path, result: Result, files: Files, scores: Mapping[str, Any]) -> str:
    """Write result.json, table.md, the CSV files and report.html, and return the table.

    Args:
        files: of each side's images, by prompt.
        scores: of each side, by metric, one per image.
    """
    result = finite(result)
    table = table_of(result)
    write_json(out / "result.json", result, indent=1)
    write_text(out / "table.md", table)
    write_text(out / "report.html", _page(result, files))
    tables = {
        "sides": _sides(result),
        "prompts": _prompts(result),
        "images": _images(files, scores),
    }
    for name, rows in tables.items():
        write_csv(out / f"{name}.csv", (map(cell, row) for row in rows))
    return table


# --- the table -----------------------------------------------------------------------------------


def table_of(result: Result) -> str:
    """The tables in markdown."""
    sides = result["sides"]
    parts = ["# Evaluation\n", _setup(result)]
    overall = [name for name in sides[0]["overall"]]
    heads = ("all images", "images", *overall)
    rows = [(s["name"], str(s["images"]), *(_value_text(s, n) for n in overall)) for s in sides]
    parts.append(markdown(heads, rows))
    metrics = list(dict.fromkeys(name for side in sides for name in side["metrics"]))
    rows = [(s["name"], *(with_interval(s["metrics"].get(n)) for n in metrics)) for s in sides]
    parts.append(markdown(("mean over prompts", *metrics), rows))
    if len(sides) > 1:
        rows = [(s["name"], *(_difference_text(result, s, n) for n in metrics)) for s in sides[1:]]
        parts.append(markdown((f"minus {sides[0]['name']}", *metrics), rows))
    if (methods := result["models"]["methods"]) is not None:
        parts.append(_methods(methods))
    return "\n".join([*parts, _notes(result)])


def _setup(result: Result) -> str:
    lines = [f"- date: {result['date']}", f"- command: `{result['command']}`"]
    settings = result["settings"]
    if "model" in settings:
        sampler = settings["sampler"]
        lines.append(
            f"- images: {len(settings['prompts'])} prompts x {settings['count']} seeds of "
            f"{settings['model']['source']}, {sampler['steps']} steps, noise {sampler['noise']:g}, "
            f"guidance {sampler['guidance_scale']:g}"
        )
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    lines.append(f"- versions: {versions}")
    for side in result["sides"]:
        if side["iteration"] is not None:
            reward = side["reward"]
            shown = "" if reward is None else f", held-out reward {reward:.4f}"
            lines.append(f"- {side['name']}: iteration {side['iteration']} of its run{shown}")
    lines += [f"- **missing** {m['name']}: {m['why']}" for m in result["missing"]]
    return "\n".join(lines) + "\n"


def _value_text(side: Result, name: str) -> str:
    entry = side["overall"].get(name)
    if entry is None or entry["value"] is None:
        return "not known"
    spread = f" ± {entry['std']:.3g}" if entry.get("std") is not None else ""
    return f"{entry['value']:.5g}{spread}{' (!)' if entry['note'] else ''}"


def _difference_text(result: Result, side: Result, name: str) -> str:
    entry = side["metrics"].get(name)
    if entry is None:
        return "not known"
    text = with_interval(entry["difference"], "{:+.4g}")
    model = result["models"]["against_base"].get(side["name"], {}).get(name, {})
    p = model.get("effects", {}).get("method[side]", {}).get("p_holm")
    return text if p is None else f"{text}, p {p:.2g}"


def effect_cells(entry: Result) -> tuple[str, ...]:
    """A coefficient's value, standard error, z, p and p corrected by Holm."""
    numbers = (f"{entry['value']:+.4g}", f"{entry['error']:.2g}", f"{entry['z']:.2f}")
    holm = entry.get("p_holm")
    return (*numbers, f"{entry['p']:.2g}", "" if holm is None else f"{holm:.2g}")


def _methods(methods: Result) -> str:
    """Coefficients of the mixed models, and the comparison by seeds."""
    levels = methods["levels"]
    rows = []
    for name, model in methods["metrics"].items():
        for effect, entry in model.get("effects", {}).items():
            if effect == "intercept":
                continue
            rows.append((name, effect, *effect_cells(entry)))
    text = (
        f"Methods, reference {levels[0]}: metric ~ method (* batch size) + (1 | prompt), REML\n\n"
    )
    text += markdown(("metric", "effect", "coefficient", "SE", "z", "p", "p (Holm)"), rows) + "\n"
    rows = []
    for name, entry in methods["by_seed"].items():
        for level, apart in entry["differences"].items():
            ends = (with_interval(entry["means"][key]) for key in (levels[0], level))
            won = f"{apart['greater']}/{apart['seeds']}"
            rows.append((name, level, *ends, with_interval(apart, "{:+.4g}"), won))
    head = ("over seeds of training", "method", levels[0], "this one", "difference", "greater")
    return text + markdown(head, rows)


def _notes(result: Result) -> str:
    lines = [f"- {INTERVALS}"]
    if result["models"]["methods"] is not None:
        lines.append(
            "- The mixed model of methods takes every image for an independent draw given its "
            "prompt, though images of one training run are not: it says nothing of other seeds of "
            "training. The table over seeds does, with as many values as there are seeds."
        )
    names = dict.fromkeys(n for s in result["sides"] for n in (*s["overall"], *s["metrics"]))
    lines += [f"- {name}: {WORDS[name]}" for name in names if name in WORDS]
    noted: dict[tuple[str, str], list[str]] = {}
    for side in result["sides"]:
        for name, entry in side["overall"].items():
            if entry["note"]:
                noted.setdefault((name, entry["note"]), []).append(side["name"])
    lines += [f"- (!) {name} of {', '.join(of)}: {note}" for (name, note), of in noted.items()]
    for side in result["sides"]:
        lines += [f"- left out: {f['file']}: {f['why']}" for f in side["faults"][:20]]
        if len(side["faults"]) > 20:
            lines.append(f"- {len(side['faults']) - 20} more of {side['name']} are in result.json")
    cost = ", ".join(f"{k} {1000 * v:.3g} ms" for k, v in result["seconds_an_image"].items())
    lines.append(f"- cost an image: {cost}")
    return "\n".join(lines) + "\n"


# --- CSV -----------------------------------------------------------------------------------------


def _sides(result: Result) -> list[list[Any]]:
    rows: list[list[Any]] = [["side", "metric", "value", "low", "high", "difference", "note"]]
    for side in result["sides"]:
        for name, entry in side["overall"].items():
            rows.append([side["name"], name, entry["value"], None, None, None, entry["note"]])
        for name, entry in side["metrics"].items():
            ends = [entry["mean"], entry["low"], entry["high"], entry["difference"]["mean"], None]
            rows.append([side["name"], f"{name} (mean over prompts)", *ends])
    return rows


def _prompts(result: Result) -> list[list[Any]]:
    names = list(dict.fromkeys(n for table in result["prompts"].values() for n in table))
    rows: list[list[Any]] = [["side", "prompt", *names]]
    for side, table in result["prompts"].items():
        for i, prompt in enumerate(result["prompts_used"]):
            rows.append([side, prompt, *(table[n][i] if n in table else None for n in names)])
    return rows


def _images(files: Files, scores: Mapping[str, Any]) -> Iterator[list[Any]]:
    """One line per image as it comes: there may be very many."""
    names = list(dict.fromkeys(n for side in scores.values() for n in side.scores))
    yield ["side", "prompt", "file", *names]
    for side, by_prompt in files.items():
        columns = scores[side].scores
        some = ((prompt, path) for prompt, paths in by_prompt.items() for path in paths)
        for at, (prompt, path) in enumerate(some):
            values = (columns[n][at] if n in columns else math.nan for n in names)
            yield [side, prompt, str(path), *map(finite, values)]


# --- the page ------------------------------------------------------------------------------------


def _page(result: Result, files: Files) -> str:
    names = [side["name"] for side in result["sides"]][:MAX_SIDES]
    data = {
        "result": {k: v for k, v in result.items() if k not in ("prompts", "fingerprints")},
        "by_prompt": result["prompts"],
        "words": WORDS,
        "less_is_better": sorted(LESS_IS_BETTER),
        "intervals": INTERVALS,
        "columns": names,
        "curves": _curves(result["sides"]),
        "rows": _pictures(result["prompts_used"], names, files),
    }
    return page_of(TEMPLATE, "PCPO evaluation: " + _name_list(names, len(result["sides"])), data)


def _name_list(names: Sequence[str], sides: int) -> str:
    """Name a few sides.

    >>> _name_list(["base", "one", "two", "three"], 11)
    'base, one, two and 8 others'
    """
    if sides <= 4:
        return ", ".join(names)
    return f"{', '.join(names[:3])} and {sides - 3} others"


def _curves(sides: Sequence[Result]) -> list[Result]:
    """Held-out reward by iteration of the sides that are runs."""
    curves = []
    for side in sides:
        known = {} if side["run"] is None else rewards_of_run(JobFolder(Path(side["run"])))
        if known:
            at = (side["iteration"], side["reward"])
            curve = {"x": list(known), "y": list(known.values()), "at": at}
            curves.append({"name": side["name"], "method": side["method"], **curve})
    return finite(curves)


def _pictures(prompts: Sequence[str], names: Sequence[str], files: Files) -> list[Result]:
    """Prompts with the same seeds of each column as base64, as many as fit the page."""
    rows: list[Result] = []
    size = 0
    for prompt in prompts[:MAX_PROMPTS]:
        some = {name: list(files[name][prompt])[:MAX_SEEDS] for name in names}
        size += sum(file.stat().st_size for column in some.values() for file in column)
        if rows and size > MAX_IMAGE_BYTES:
            break
        images = {name: [_base64(file) for file in column] for name, column in some.items()}
        rows.append({"prompt": prompt, "images": images})
    return rows


def _base64(file: Path) -> str:
    kind = {".png": "png", ".webp": "webp", ".bmp": "bmp"}.get(file.suffix.lower(), "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"
