"""docs/ARCHITECTURE.md: its picture is the table of arrows, its path what a run enters."""

from __future__ import annotations

import re
import runpy
import sys
from html import unescape
from pathlib import Path
from types import FrameType

import comfyui_pcpo
from comfyui_pcpo.trainers.config.train_config import read_preset, validate
from comfyui_pcpo.trainers.run.start import train

ROOT = Path(comfyui_pcpo.__path__[0])
PAGE = (ROOT / "docs" / "ARCHITECTURE.md").read_text("utf-8")
COUNTED = ("pcpo/", "trainers/run/", "trainers/families/", "trainers/lora/")
DRAWING = runpy.run_path(str(ROOT / "docs" / "draw_architecture.py"))


def test_the_picture_is_drawn_from_the_table():
    # where this fails: uv run --extra test python docs/draw_architecture.py
    arrows, picture = DRAWING["table"](), unescape(DRAWING["PICTURE"].read_text("utf-8"))
    assert set(re.findall(r'id="([\w.]*)->([\w.]+)"', picture)) == DRAWING["drawn"](arrows)
    assert DRAWING["numbers"](arrows) in picture
    assert DRAWING["numbers"](arrows).endswith(": 0 up, 0 in circles")


def test_arrows_that_go_up_or_round_are_counted():
    arrows = {"nodes.a": {"trainers.b"}, "trainers.b": {"pcpo.c"}, "pcpo.c": set()}
    assert DRAWING["numbers"](arrows) == "3 packages, 2 arrows: 0 up, 0 in circles"
    arrows["pcpo.c"] = {"trainers.b"}
    assert DRAWING["numbers"](arrows) == "3 packages, 3 arrows: 1 up, 2 in circles"


def test_an_arrow_that_follows_from_others_is_not_drawn():
    arrows = {"a": {"b", "c"}, "b": {"c"}, "c": {"d"}, "d": set()}
    assert DRAWING["drawn"](arrows) == {("a", "b"), ("b", "c"), ("c", "d")}
    assert DRAWING["floors"](arrows) == {"a": 3, "b": 2, "c": 1, "d": 0}


class Entered:
    """The functions of each counted file that run within some others.

    Args:
        within: their names.
        apart: those within which nothing is counted.
    """

    def __init__(self, within: set[str], apart: set[str]) -> None:
        self.within, self.apart = within, apart
        self.functions: dict[str, set[str]] = {}
        self._open: list[str] = []

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(str(ROOT)):
            return
        file = Path(code.co_filename).relative_to(ROOT).as_posix()
        if code.co_name in self.within | self.apart and file.startswith("trainers/"):
            self._open.append(code.co_name) if event == "call" else self._open.pop()
        is_counted = file.startswith(COUNTED) or file == "trainers/job/prompts.py"
        if is_counted and self._open and self._open[-1] not in self.apart:
            self.functions.setdefault(file, set()).add(code.co_qualname)


def test_the_path_of_a_prompt_is_what_a_run_enters(tmp_path):
    changes = {
        "method": {"update": "two_pass"},
        "prompts": {"per_iteration": 2, "images_per_prompt": 2},
        "sampler": {"steps": 3},
        "run": {"iterations": 1, "eval_prompts": 2, "eval_steps": 2, "device": "cpu"},
    }
    preset = read_preset("demo-flow").model_dump()
    config = {name: part | changes.get(name, {}) for name, part in preset.items()}
    entered = Entered(
        {"split_prompts", "load_conditioning", "iterate"}, {"load", "cache_of", "evaluate"}
    )
    sys.setprofile(entered)
    try:
        train(validate(config, "the test"), tmp_path / "run")
    finally:
        sys.setprofile(None)
    rows = re.findall(r"^\| \d+ \| `([\w/.]+)` \| (.*?) \|", PAGE, re.MULTILINE)
    helpers = PAGE.partition("These help the twenty:")[2].partition("\n\n")[0]
    path = [file for file, _ in rows]
    assert len(path) == 20
    named = {*path, *re.findall(r"`((?:pcpo|trainers)/[\w/]+\.py)`", helpers)}
    assert sorted(entered.functions) == sorted(named)
    for file, functions in rows:
        names = {part for name in entered.functions[file] for part in (name, *name.split("."))}
        assert {*re.findall(r"`([\w.]+)`", functions)} <= names, file
