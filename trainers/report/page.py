"""One self-contained page on a run: curves, images by iteration, before and after, settings.

`report/report.html` needs no network and no other file: it contains the numbers, the images and the
script that draws them (`nodes/web/charts.js`, which the panel in ComfyUI uses too). It can be
written at any point of a run, and says what is not there yet. No torch.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..job.files import finite, json_text, write_text
from ..job.folder import FIRST_SCORES, JobFolder
from ..job.metrics import WINDOW, Digest, is_number
from .page_images import sampled_images

TEMPLATE = Path(__file__).with_name("report_page.html")
HEAD = Path(__file__).with_name("page_head.html")
COMMON = Path(__file__).with_name("page.js")
WEB = Path(__file__).parents[2] / "nodes" / "web"
WORDS = WEB / "words.js"
CHARTS = WEB / "charts.js"
CURVES = (WEB / "guard_curves.js", WEB / "taste_curves.js")

MAX_LINES = 2000
"""Iterations on the page; a longer run is thinned without losing a peak of its curves."""


def write_page(folder: JobFolder, digest: Digest | None = None) -> Path:
    """Write `report/report.html`, completely or not at all, from the job folder's present contents.

    Args:
        folder: of a run, complete or not.
        digest: of its metrics, kept from one page to the next; without it all are read.
    """
    digest = digest or Digest(folder.metrics_file, MAX_LINES)
    data = page_data(folder, digest.update())
    path = folder.report / "report.html"
    write_text(path, page_of(TEMPLATE, data["title"], data, (CHARTS, *CURVES, COMMON)))
    return path


def page_of(
    template: Path, title: str, data: Any, scripts: Sequence[Path] = (CHARTS, COMMON)
) -> str:
    """A page of its template, with the head and the scripts that pages share.

    Args:
        template: has {{head}}, {{title}}, {{data}} and {{script}}, or some of them.
        data: JSON's plain types, for a script element.
    """
    parts = {
        "title": html.escape(title),
        "data": to_script(data),
        "script": "\n".join(map(_script, (WORDS, *scripts))),
    }
    text = template.read_text(encoding="utf-8")
    text = text.replace("{{head}}\n", HEAD.read_text(encoding="utf-8"))
    # in one pass: a prompt that says {{script}} stays a prompt
    return re.sub(r"\{\{(title|data|script)\}\}", lambda match: parts[match[1]], text)


def _script(file: Path) -> str:
    """A script without its imports: a page has all of its scripts in one."""
    return re.sub(r"^import .*;\n", "", file.read_text(encoding="utf-8"), flags=re.M)


def page_data(folder: JobFolder, digest: Digest) -> dict[str, Any]:
    """The JSON inside the page; numbers that are not finite are None."""
    job, status = folder.read("job.json"), folder.read("status.json")
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
        "summary": _summary(folder, status, digest),
        "metrics": digest.curves.lines,
        "measured": {"count": digest.count, "width": digest.curves.width},
        "guard": folder.guard_record(),
        "window": WINDOW,
        "samples": sampled_images(folder, digest.best and digest.best[1]),
    }
    return finite(data)


def to_script(value: Any) -> str:
    """JSON for a script element: no character in it can end the element or begin a comment."""
    text = json_text(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _summary(folder: JobFolder, status: Mapping[str, Any], digest: Digest) -> dict[str, Any]:
    """The figures at the head of the page; None if unknown."""
    last = digest.curves.lines[-1:]
    return {
        "iteration": status.get("iteration", last[0]["iteration"] if last else None),
        "of": status.get("of"),
        "before": reward_before(folder),
        "after": digest.held_out,
        "seconds": digest.seconds,
        "images_per_second": digest.images_per_second,
    }


def reward_before(folder: JobFolder) -> float | None:
    """Held-out reward of the base: from its samples, else from the message at the end of a run."""
    scores = folder.read_list(FIRST_SCORES)
    rewards = [reward for score in scores if is_number(reward := score.get("reward"))]
    if rewards and len(rewards) == len(scores):
        return sum(rewards) / len(rewards)
    message = str(folder.read("status.json").get("message", ""))
    match = re.fullmatch(r"(?:held-out reward )?(-?[0-9]+[.][0-9]+) -> -?[0-9.]+", message)
    return float(match[1]) if match else None
