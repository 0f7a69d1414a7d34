"""One self-contained page on a run: curves, images by iteration, before and after, settings.

`report/report.html` needs no network and no other file: the numbers, the images and the script
that draws them (`nodes/web/charts.js`, which the panel in ComfyUI uses too) are inside it. It can
be written at any point of a run; what is not there yet is said on the page. No torch.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, pvariance
from typing import Any, TypeGuard

from .files import replacing
from .job import JobFolder

TEMPLATE = Path(__file__).with_name("report_page.html")
WEB = Path(__file__).parent.parent / "nodes" / "web"
CHARTS, GUARD_CURVES = WEB / "charts.js", WEB / "guard_curves.js"

MAX_PROMPTS, MAX_COLUMNS = 16, 8
"""How many rows and columns the grid of images has at most."""
MAX_IMAGE_BYTES = 48 * 2**20
"""Of all images on the page; rows that do not fit are left out, but for the first."""
WINDOW = 10
"""Iterations over which the variance of the gradient norm is taken."""


def write_page(folder: JobFolder) -> Path:
    """Write `report/report.html`, whole or not at all, from what the job folder holds now.

    Args:
        folder: of a run, complete or not.

    Returns:
        The page.
    """
    data = page_data(folder)
    parts = {
        "title": html.escape(data["title"]),
        "data": to_script(data),
        "charts": "\n".join(f.read_text(encoding="utf-8") for f in (CHARTS, GUARD_CURVES)),
    }
    # in one pass: a prompt that says {{charts}} stays a prompt
    template = TEMPLATE.read_text(encoding="utf-8")
    page = re.sub(r"\{\{(title|data|charts)\}\}", lambda found: parts[found[1]], template)
    path = folder.report / "report.html"
    with replacing(path) as fresh:
        fresh.write_text(page, encoding="utf-8")
    return path


def page_data(folder: JobFolder) -> dict[str, Any]:
    """All that the page shows; numbers that are not finite are None.

    Args:
        folder: of a run, complete or not.

    Returns:
        What becomes the JSON inside the page.
    """
    job, status, metrics = folder.read("job.json"), folder.read("status.json"), folder.metrics()
    method = job.get("config", {}).get("method", {})
    known = "credit" in method and "objective" in method
    name = (
        f"{method['credit']} credit, {method['objective']}" if known else folder.root.resolve().name
    )
    data = {
        "title": f"PCPO report: {name}",
        "status": status,
        "config": job.get("config", {}),
        "versions": job.get("versions", {}),
        "environment": {k: v for k, v in job.items() if k not in ("config", "versions")},
        "summary": _summary(folder, status, metrics),
        "metrics": metrics,
        "guard": folder.guarded(),
        "grad_norm_variance": grad_norm_variance(metrics),
        "window": WINDOW,
        "samples": _samples(folder),
    }
    return _finite(data)


def to_script(value: Any) -> str:
    """JSON that may stand inside a script element, whatever its strings say.

    Args:
        value: made of dicts, lists, strings and finite numbers.

    Returns:
        The JSON, where no character can end the element or begin a comment.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def grad_norm_variance(metrics: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Variance of the gradient norm over the last `WINDOW` iterations, at each iteration.

    Of the updates' norms where they are recorded, else of the iterations' means.

    Args:
        metrics: lines of metrics.jsonl.

    Returns:
        A variance a line; None where there are fewer than two norms.
    """
    norms: list[list[float]] = []
    for line in metrics:
        found = line.get("grad_norms") or [line.get("grad_norm")]
        norms.append([norm for norm in found if _is_number(norm)])
    windows = [
        [norm for part in norms[max(0, i + 1 - WINDOW) : i + 1] for norm in part]
        for i in range(len(norms))
    ]
    return [pvariance(window) if len(window) > 1 else None for window in windows]


def _summary(
    folder: JobFolder, status: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The figures at the head of the page; None for what is not known."""
    held_out = [line["held_out"] for line in metrics if _is_number(line.get("held_out"))]
    speeds = [v for line in metrics if _is_number(v := line.get("images_per_second"))]
    seconds = [v for line in metrics if _is_number(v := line.get("seconds"))]
    done = metrics[-1].get("iteration") if metrics else None
    return {
        "iteration": status.get("iteration", done),
        "of": status.get("of"),
        "before": _reward_before(folder, str(status.get("message", ""))),
        "after": held_out[-1] if held_out else None,
        "seconds": sum(seconds) if seconds else None,
        "images_per_second": median(speeds) if speeds else None,
    }


def _reward_before(folder: JobFolder, message: str) -> float | None:
    """Held-out reward of the base: from its samples, else from the message at the end of a run."""
    scores = _scores(folder, "00000")
    rewards = [reward for score in scores if _is_number(reward := score.get("reward"))]
    if rewards and len(rewards) == len(scores):
        return sum(rewards) / len(rewards)
    found = re.fullmatch(r"(?:held-out reward )?(-?[0-9]+[.][0-9]+) -> -?[0-9.]+", message)
    return float(found[1]) if found else None


def _samples(folder: JobFolder) -> dict[str, Any]:
    """Prompts, and for each chosen iteration the rewards and the images as base64."""
    # scores.json is written last: a folder without it is not finished
    places = sorted(file.parent for file in folder.samples.glob("*/scores.json"))
    scored = [place for place in places if place.name.isdigit() and _scores(folder, place.name)]
    chosen = [(place, _scores(folder, place.name)) for place in _spread(scored, MAX_COLUMNS)]
    prompts = [str(score.get("prompt", "")) for score in chosen[-1][1]] if chosen else []
    folders = [place for place, _ in chosen]
    shown = _rows_that_fit(folders, min(len(prompts), MAX_PROMPTS))
    columns = [
        {
            "iteration": int(place.name),
            "rewards": [s.get("reward") for s in scores[:shown]],
            "images": [_base64(_image(place, row)) for row in range(shown)],
        }
        for place, scores in chosen
    ]
    totals = {"prompts_kept": len(prompts), "iterations_kept": len(scored)}
    return {"prompts": prompts[:shown], "columns": columns, **totals}


def _scores(folder: JobFolder, name: str) -> list[dict[str, Any]]:
    return folder.read_list(f"samples/{name}/scores.json")


def _spread(items: Sequence[Path], limit: int) -> list[Path]:
    """At most so many, evenly, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def _rows_that_fit(folders: Sequence[Path], rows: int) -> int:
    size = 0
    for row in range(rows):
        files = [_image(folder, row) for folder in folders]
        size += sum(file.stat().st_size for file in files if file.exists())
        if row and size > MAX_IMAGE_BYTES:
            return row
    return rows


def _image(folder: Path, row: int) -> Path:
    return folder / f"{row:03}.png"


def _base64(file: Path) -> str | None:
    return base64.b64encode(file.read_bytes()).decode("ascii") if file.exists() else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _finite(value: Any) -> Any:
    """The same, with None for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
