"""The command line: help, figures, errors without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from comfyui_pcpo.trainers.cli.command import COMMANDS, WAITING, main
from PIL import Image


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in COMMANDS)
    assert main([]) == 2
    assert main(["dance"]) == 2


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"doctor", "demo"}))
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "figures"),
    [
        (
            ["--family", "sd1", "--steps", "50", "--credit", "exact"],
            ["min 0.374", "max 3.2747", "mean 0.5169002", "43, 44, 45, 46, 47, 48, 49"],
        ),
        (
            ["--credit", "published", "--solve-weight", "4.5"],  # METHOD M3
            [
                *("min 0.385", "max 3.368", "solved 50 steps, projected 0"),
                *("noise energy 1.258", "  0.446"),
            ],
        ),
        ([], ["solve weight 4.5: the larger root", "noise energy 1.258"]),
        (["--credit", "relative"], ["true weight    min 0.516900  max 0.516900", "min 0.157"]),
        (["--steps", "30", "--credit", "exact"], ["mean 0.7203175", "26, 27, 28, 29"]),
        (["--steps", "20", "--credit", "exact"], ["mean 0.9802297", "17, 18, 19"]),
        (
            ["--spacing", "trailing", "--credit", "exact"],
            ["mean 0.5333540", "45, 46, 47, 48, 49"],
        ),
        (
            ["--spacing", "trailing", "--zero-terminal-snr", "--credit", "exact"],
            ["0, 1, 2, 3, 4, 5, 6, 7, 46, 47, 48, 49"],
        ),
        (["--drop-last", "1"], ["49 steps trained", "mean 0.5069"]),
        (["--target", "3.275"], ["solved 50 steps, projected 0"]),
        (["--family", "sd3"], ["zeta 5.7054", "max 1.7706"]),
        (["--family", "sd3", "--drop-last", "1"], ["zeta 3.9702"]),
        (["--family", "flux"], ["zeta 13.3432", "min 0.4914"]),
        (["--family", "flux", "--steps", "12", "--drop-last", "1"], ["zeta 12.3283"]),
    ],
)
def test_weights_prints_the_papers_figures(tmp_path, capsys, options, figures):
    plot = tmp_path / "weights.png"
    assert main(["weights", *options, "--out", str(plot)]) == 0
    said = capsys.readouterr().out
    for figure in figures:
        assert figure in said
    assert Image.open(plot).size[0] > 500


def test_errors_say_what_to_do(capsys):
    assert main(["weights", "--family", "flux", "--transition", "ddim"]) == 2
    assert "use dance_sde or flow_sde or cps" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "--preset" in capsys.readouterr().err
    assert main(["score", "nothing.png"]) == 2
    assert "nothing.png" in capsys.readouterr().err
    assert main(["export", "nowhere", "--out", "x.safetensors"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["doctor", "please"]) == 2


def test_doctor_is_content(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "torch" in said and "demo models: there" in said


def test_score_with_one_prompt_for_all(tmp_path, capsys):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    options = ["--reward", "jpeg_compressibility"]
    assert main(["score", str(tmp_path / "a.png"), *options]) == 0
    assert "-0.6910" in capsys.readouterr().out  # a white image of 64 px is 691 bytes as a JPEG
    assert main(["score", str(tmp_path / "a.png"), "--prompts", "a red circle"]) == 0
    assert "0.0000" in capsys.readouterr().out
    assert main(["score", str(tmp_path / "a.png"), "--prompts", "a red horse"]) == 1


def test_bench_runs_on_a_cpu(capsys):
    options = ["--size", "tiny", "--px", "64", "--steps", "3", "--images", "3"]
    more = ["--micro-batch", "2", "--device", "cpu", "--precision", "float32"]
    assert main(["bench", *options, *more]) == 0
    said = capsys.readouterr().out
    assert "rollout" in said and "update" in said and "on policy |log ratio| 0.00e+00" in said


def test_the_installed_command_runs():
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "comfyui_pcpo.trainers",
            "weights",
            "--out",
            "-.png",
            "--steps",
            "0",
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "Traceback" not in result.stderr


ENTRY = """
import os, sys
from comfyui_pcpo.trainers.__main__ import command
main = command()
assert "torch" not in sys.modules  # which reads it when it is imported
main(["--help"])
print(*(f"{name}={os.environ.get(name)}" for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")))
"""


@pytest.mark.parametrize(
    ("asked", "waits"),
    [
        ({}, "OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=None"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "OMP_WAIT_POLICY=ACTIVE GOMP_SPINCOUNT=None"),
        ({"GOMP_SPINCOUNT": "99"}, "OMP_WAIT_POLICY=None GOMP_SPINCOUNT=99"),
    ],
)
def test_threads_wait_passively_unless_the_user_says_how(asked, waits):
    own = {name: value for name, value in os.environ.items() if name not in WAITING}
    words = [sys.executable, "-c", ENTRY]
    result = subprocess.run(words, env=own | asked, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == waits
