"""What a LoRA's metadata says of its base."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_pcpo.trainers.families.scheduler import ZERO_SNR, SchedulerConfig
from comfyui_pcpo.trainers.lora.base_notes import notes_on_base
from safetensors.torch import save_file


def family(name: str = "sdxl", **schedule: Any) -> Any:
    return SimpleNamespace(
        name=name, base_model_version="a-version", schedule=SchedulerConfig(**schedule)
    )


@pytest.mark.parametrize(
    ("source", "title"),
    [
        ("sd_xl_base_1.0.safetensors", "SDXL 1.0"),
        ("C:\\models\\ponyDiffusionV6XL.safetensors", "Pony"),
        ("/pony/Illustrious-XL-v1.0.safetensors", "Illustrious"),
        ("waiIL_v140.safetensors", None),
        ("hassakuXL_IL_v2.safetensors", "Illustrious"),
        ("noobaiXLNAIXL_vPred10.safetensors", "NoobAI"),
        ("illustrious_noob_mix.ckpt", "NoobAI"),
        ("my_model.safetensors", None),
        ("someone/pony-xl", "Pony"),
    ],
)
def test_well_known_bases_are_told_by_their_names(source, title):
    notes = notes_on_base(family(), source)
    assert notes.get("modelspec.tags") == title
    assert notes["ss_base_model_version"] == "a-version"
    assert notes["ss_sd_model_name"] == source.replace("\\", "/").rpartition("/")[2]
    assert "modelspec.tags" not in notes_on_base(family("sd1"), source)


@pytest.mark.parametrize("note", ["modelspec.title", "ss_sd_model_name"])
def test_a_file_may_say_what_its_name_does_not(tmp_path, note):
    file = tmp_path / "mix.safetensors"
    save_file(
        {"a": torch.zeros(1)}, file, {note: "Illustrious-XL", "modelspec.description": "pony"}
    )
    assert notes_on_base(family(), str(file))["modelspec.tags"] == "Illustrious"


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ({}, ("False", "False", "epsilon")),
        ({"prediction_type": "v_prediction"}, ("True", "False", "v")),
        ({"prediction_type": "v_prediction", **ZERO_SNR}, ("True", "True", "v")),
        ({"prediction_type": "sample"}, ("False", "False", None)),
    ],
)
def test_prediction_and_schedule_are_said(schedule, told):
    notes = notes_on_base(family(**schedule), "a.safetensors")
    names = ("ss_v_parameterization", "ss_zero_terminal_snr", "modelspec.prediction_type")
    assert tuple(notes.get(name) for name in names) == told


def test_a_flow_model_has_no_such_notes():
    flow: Any = SimpleNamespace(name="flux", base_model_version="flux1", schedule=object())
    assert notes_on_base(flow, "/a/flux1-dev.safetensors") == {
        "ss_base_model_version": "flux1",
        "ss_sd_model_name": "flux1-dev.safetensors",
    }
