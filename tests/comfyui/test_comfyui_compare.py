"""PCPO Compare Models' images in real ComfyUI: those of the usual graph, one by one.

The whole node is run by its workflow (test_comfyui_workflows.py). What it needs is in
comfyui_fixture.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comfyui_fixture import PACK, in_comfyui, needs_host, report_in

SCRIPT = Path(__file__).parent / "scripts" / "comfyui_compare_fixture.py"

pytestmark = needs_host


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("loras")
    return report_in(in_comfyui(SCRIPT, PACK, "compare", folder, seconds=600))


def test_images_are_those_of_the_usual_graph_at_their_seeds(report):
    assert report["shape"] == [12, 3, 64, 64]
    assert report["ksampler"] <= 1 and report["flow"] <= 1  # several at once: a rounding
    assert report["ksampler, noisy"] == 0  # one at a time
    assert report["noisy differs"] > 10 and report["sides differ"] > 10


def test_a_lora_changes_its_own_side_alone(report):
    assert report["names"] == ["model_a", "shipped", "model_a", "model_b"]
    assert report["as a model"] <= 1  # the same LoRA, put on before
    exact, effect = report["text"]
    assert exact <= 1 and effect > 10  # its text encoder is tuned too
    assert report["base again"] <= 1


def test_progress_and_interruption(report):
    ticks = report["ticks"]
    assert ticks == sorted(ticks) and ticks[-1] == 12 * (4 + 1)
    assert {2, 4, 6, 8, 9, 10, 11, 12} <= set(ticks)  # two images' steps, then one's
    assert report["interrupted after"] == 3


def test_refusals(report):
    assert "changes nothing in this MODEL and CLIP" in report["strange"]
    assert report["gone"].startswith(
        "NodeError: the LoRA 'gone.safetensors' is not in models/loras"
    )
