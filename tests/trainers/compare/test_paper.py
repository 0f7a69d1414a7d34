"""`pcpo paper`: tables and figures from comparisons and evaluations."""

from __future__ import annotations

import csv
import json

from comfyui_pcpo.trainers.cli.command import main
from evaluation_fixture import made_up_comparison
from PIL import Image

REWARDS = {
    ("baseline", 0): (0.0, 0.2, 0.4),
    ("baseline", 1): (0.0, 0.2, 0.4),
    ("proportionate", 0): (0.0, 0.4, 0.6),
    ("proportionate", 1): (0.0, 0.4, 0.6),
}


def rows_of(file):
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def evaluation(folder, transition: str) -> None:
    """The files of a finished evaluation of two methods at two seeds."""

    def side(name: str, method: str, fid: float) -> dict:
        metrics = {"scene": {"mean": 0.5, "low": None, "high": None, "prompts": 3}}
        overall = {"fid": {"value": fid, "note": None}}
        known = {"name": name, "method": method, "reward": 0.4}
        return known | {"overall": overall, "metrics": metrics}

    effect = {"value": -2.0, "error": 0.5, "z": -4.0, "p": 6e-5, "low": -3.0, "high": -1.0}
    result = {
        "settings": {"sampler": {"transition": transition}},
        "missing": [{"name": "fd_dinov2", "why": "no weights"}],
        "sides": [
            side("b0", "baseline", 24.0),
            side("b1", "baseline", 26.0),
            side("p0", "proportionate", 22.0),
            side("p1", "proportionate", 23.0),
        ],
        "models": {"methods": {"metrics": {"fid": {"effects": {"method[proportionate]": effect}}}}},
    }
    folder.mkdir()
    (folder / "evaluation.json").write_text("{}")
    (folder / "result.json").write_text(json.dumps(result))


def test_tables_and_figures(tmp_path, capsys):
    made_up_comparison(tmp_path / "cmp", REWARDS)
    evaluation(tmp_path / "ev", "ddim")
    evaluation(tmp_path / "flow", "dance_sde")
    out = tmp_path / "paper"
    words = [str(tmp_path / name) for name in ("cmp", "ev", "flow")]
    assert main(["paper", *words, "--out", str(out)]) == 0
    speedups = rows_of(out / "table1.csv")
    half = [row for row in speedups if row["share of the rise"] == "50%"]
    assert [row["iterations (median)"].split()[0] for row in half] == ["1.0", "0.5"]
    assert [row["faster"] for row in half] == ["", "+100.0%"]
    for name, where in (("table2", "ev"), ("table5", "flow")):
        rows = rows_of(out / f"{name}.csv")
        assert [row["evaluation"] for row in rows] == [where, where]
        assert [row["fid"].split()[0] for row in rows] == ["25", "22.5"]
    effects = rows_of(out / "table3.csv")
    assert effects[0]["coefficient"] == "-2" and effects[0]["effect"] == "method[proportionate]"
    for number in (2, 3, 6):
        with Image.open(out / f"figure{number}.png") as drawn:
            assert drawn.width > 300
    text = (out / "paper.md").read_text(encoding="utf-8")
    assert "fd_dinov2 is missing: no weights" in text and "figure6.png" in text


def test_what_is_not_told_is_said(tmp_path, capsys):
    made_up_comparison(tmp_path / "cmp", REWARDS)
    assert main(["paper", str(tmp_path / "cmp"), "--out", str(tmp_path / "paper")]) == 0
    said = capsys.readouterr().out
    assert "Table 2: quality, diffusion models: nothing in the folders tells it" in said
    assert not (tmp_path / "paper" / "table2.csv").exists()


def test_other_folders_are_refused(tmp_path, capsys):
    assert main(["paper", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "neither a comparison" in said and said.count("\n") == 1
