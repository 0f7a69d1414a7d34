"""Implicit Reward Guidance in real ComfyUI: equal to the sum of separate runs.

What it needs is in comfyui_fixture.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from comfyui_fixture import MODELS, PACK, in_comfyui, needs_host, needs_models, report_in

SCRIPT = Path(__file__).parent / "scripts" / "comfyui_guidance_fixture.py"

pytestmark = [needs_host, needs_models("diffusion_models/tiny_flux.safetensors")]


def reported(*arguments: object) -> dict:
    return report_in(in_comfyui(SCRIPT, PACK, *arguments, seconds=600))


@pytest.mark.parametrize("family", ["sd15", "sd35", "flux"])
def test_guidance_is_the_sum_of_separate_runs(family):
    report = reported("check", MODELS, family)
    assert report["layers"] >= 14 and report["effect"] > 1e-2
    assert len(report["worst"]) == (29 if family == "sd15" else 28)
    for name, error in report["worst"].items():
        assert error < 1e-4, name
    for exact in ("gamma 0 is the base", "out of its range", "base afterwards"):
        assert report["worst"][exact] == 0
    assert report["rows"] == "| 8 | 4 | 5 | 3"
    assert report["regional"] < 1e-4
    assert report["restored"] == "yes"


def test_what_of_a_lora_is_left_out_is_said():
    (said,) = reported("notes", MODELS)
    assert "the text encoder (2 tensors), which is left out here" in said
    assert "states its scale in metadata that ComfyUI does not read" in said


def test_one_batch_costs_no_more_than_separate_steps():
    seconds = reported("time", MODELS)
    print(seconds)
    for count in (1, 3, 5):
        assert seconds[f"N={count}"] < (count + 1) * 1.15 * seconds["plain"]
    assert seconds["N=5 shared"] < 0.8 * seconds["N=5"]
