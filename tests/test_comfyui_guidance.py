"""Implicit Reward Guidance in real ComfyUI: equal to the sum of separate runs.

Needs a ComfyUI checkout and tiny checkpoints of its three families, see test_comfyui_host.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import comfyui_pcpo
import pytest

HOST = os.environ.get("COMFYUI_PATH", "")
MODELS = os.environ.get("PCPO_TINY_MODELS", "")
SCRIPT = Path(__file__).parent / "comfyui_guidance_fixture.py"

pytestmark = [
    pytest.mark.skipif(
        not HOST or not (Path(HOST) / "comfy").is_dir(),
        reason="COMFYUI_PATH names no ComfyUI checkout",
    ),
    pytest.mark.skipif(
        not (Path(MODELS) / "diffusion_models" / "tiny_flux.safetensors").is_file(),
        reason="PCPO_TINY_MODELS names no folder with tiny_sd15, tiny_sd35 and tiny_flux",
    ),
]


def in_comfyui(*arguments: str) -> dict:
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    pack = comfyui_pcpo.__path__[0]
    done = subprocess.run(
        [python, str(SCRIPT), HOST, pack, *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("REPORT ")[2])


@pytest.mark.parametrize("family", ["sd15", "sd35", "flux"])
def test_guidance_is_the_sum_of_separate_runs(family):
    report = in_comfyui("check", MODELS, family)
    assert report["layers"] >= 14 and report["effect"] > 1e-2
    assert len(report["worst"]) == (19 if family == "sd15" else 18)
    for name, error in report["worst"].items():
        assert error < 1e-4, name
    for exact in ("gamma 0 is the base", "out of its range", "base afterwards"):
        assert report["worst"][exact] == 0
    assert report["regional"] < 1e-4
    assert report["restored"] == "yes"


def test_one_batch_costs_no_more_than_separate_steps():
    seconds = in_comfyui("time", MODELS)
    print(seconds)
    assert seconds["N=1"] < 2 * 1.35 * seconds["plain"]
    assert seconds["N=3"] < 4 * 1.35 * seconds["plain"]
