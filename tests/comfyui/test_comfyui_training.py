"""What ComfyUI has loaded is what the trainer loads: text, first prediction and images agree.

What it needs is in comfyui_fixture.py. Everything is handed over inside ComfyUI's own Python; the
trainer's loader reads it in this one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from comfyui_fixture import (
    MODELS,
    PACK,
    computed,
    in_comfyui,
    needs_host,
    needs_models,
    relative_error,
    report_in,
)
from comfyui_pcpo.trainers.families import load_family
from comfyui_pcpo.trainers.job.preflight import model_source

SCRIPT = Path(__file__).parent / "scripts" / "comfyui_training_fixture.py"
PROMPT = "a red circle left of a blue square"

BY_FILE = {
    "safetensors": "tiny_sd15.safetensors",
    "ckpt": "tiny_sd15.ckpt",
    "v_prediction": "tiny_sd15.safetensors",
}
"""Cases that need no copy, and the file that they are handed over by."""
COPIED = (
    *("lora", "patched_clone", "clip_skip", "other_vae", "three_files", "taesd"),
    *("fp8", "fp8_lora", "scaled_fp8", "scaled_fp8_lora"),
)
DEMO, DEMO_COPIED = "demo", ("demo_lora", "demo_text_lora")
CASES = (*BY_FILE, *COPIED, DEMO, *DEMO_COPIED)

RELATIVE = 1e-4
"""Everywhere, fp8 included: ComfyUI computes on a CPU in float32 with the very numbers that are
written, and every fp8 number is a bfloat16 one. float32 itself takes 2e-6 of it."""

pytestmark = [needs_host, needs_models("checkpoints/tiny_sd15.ckpt")]


@pytest.fixture(scope="module")
def handed(tmp_path_factory):
    """ComfyUI's report on all cases, and where its numbers are."""
    out = tmp_path_factory.mktemp("handed")
    arguments = (PACK, MODELS / "checkpoints", out, *CASES)
    yield report_in(in_comfyui(SCRIPT, *arguments, seconds=1200)), out
    shutil.rmtree(out)  # gigabytes


@pytest.mark.parametrize("case", CASES)
def test_the_trainer_computes_what_comfyui_does(handed, case):
    given, theirs = handed[0][case], computed(handed, case)
    kind = None if given["prediction_type"] == "auto" else given["prediction_type"]
    family = load_family(model_source(given["source"]), prediction_type=kind)
    expected = "v_prediction" if case == "v_prediction" else "epsilon"
    assert family.scheduler_config.prediction_type == expected

    embeds = family.encode([PROMPT])
    assert embeds.tokens.shape == theirs["embeds"].shape
    assert relative_error(embeds.tokens, theirs["embeds"]) < RELATIVE
    with torch.no_grad():
        prediction = family.predict(theirs["latents"], theirs["timestep"], embeds.expand(2))
    assert theirs["prediction"].std() > 0.1
    assert relative_error(prediction, theirs["prediction"]) < RELATIVE

    levels = family.decode(theirs["latents"]).permute(0, 2, 3, 1)
    assert theirs["images"].std() > 0.1
    assert len((theirs["images"] * 255).round().unique()) > 128
    difference = (levels - theirs["images"] * 255).abs().max()
    assert difference < 0.5 + 255 * RELATIVE  # rounded to whole levels, and no further away


@pytest.mark.parametrize("case", BY_FILE)
def test_what_is_as_in_its_file_is_handed_over_by_it(handed, case):
    report, out = handed
    assert report[case]["source"] == str(MODELS / "checkpoints" / BY_FILE[case])
    assert report[case]["written"] is None and report[case]["notes"] == []
    assert [file.name for file in (out / case).iterdir()] == ["computed.safetensors"]


@pytest.mark.parametrize("case", COPIED)
def test_what_was_changed_is_written(handed, case):
    report, out = handed
    file = out / case / "model.safetensors"
    assert report[case]["source"] == str(file)
    done, size = report[case]["written"]
    assert done == size < file.stat().st_size < size + 500_000
    assert report[case]["rises"]
    *about, last = report[case]["notes"]
    assert last.startswith("the base is the model as loaded, LoRAs included; its copy takes ")
    wanted = {"fp8": "turned into bfloat16", "scaled_fp8": "dequantised"}
    wanted = wanted.get(case.removesuffix("_lora"))
    assert len(about) == (wanted is not None)
    assert not wanted or wanted in about[0]


def test_the_demo_model_is_known(handed):
    report, out = handed
    assert report[DEMO] | {"rises": None} == {
        "source": "demo",
        "prediction_type": "auto",
        "notes": [],
        "written": None,
        "rises": None,
    }
    for case in DEMO_COPIED:
        assert report[case]["source"] == str(out / case / "model")
        assert report[case]["notes"] == ["the base is the model as loaded, LoRAs included"]


def test_the_cases_differ_where_they_should(handed):
    plain, tuned = computed(handed, "safetensors"), computed(handed, "lora")
    for name in ("embeds", "prediction"):
        assert relative_error(tuned[name], plain[name]) > 1e-2
        assert computed(handed, "patched_clone")[name].equal(plain[name])
    for case, base in (("fp8_lora", "fp8"), ("scaled_fp8_lora", "scaled_fp8"), ("demo_lora", DEMO)):
        found, without = computed(handed, case)["prediction"], computed(handed, base)["prediction"]
        assert relative_error(found, without) > 1e-2, case
    for case in ("fp8", "scaled_fp8"):
        assert relative_error(computed(handed, case)["prediction"], plain["prediction"]) > 1e-3
    skipped = computed(handed, "clip_skip")["embeds"]
    assert relative_error(skipped, plain["embeds"]) > 1e-2
    changed, shipped = computed(handed, "demo_text_lora"), computed(handed, DEMO)
    assert relative_error(changed["embeds"], shipped["embeds"]) > 1e-2
