"""Flow models as ComfyUI has loaded them are what the trainer loads: text, velocity, images.

What it needs is in comfyui_fixture.py; of the tiny models SD3.5 and FLUX. Everything is handed over
inside ComfyUI's own Python; the trainer's loader reads it in this one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from comfyui_fixture import HOST, MODELS, PACK, in_comfyui, needs_host, needs_models, report_in
from comfyui_pcpo.trainers.config.sections import ModelConfig
from comfyui_pcpo.trainers.config.train_config import DEMO_FLOW_FOLDER
from comfyui_pcpo.trainers.families import load_family
from comfyui_pcpo.trainers.job.preflight import files_of
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "scripts" / "comfyui_handover_fixture.py"
PROMPT = "a red circle left of a blue square"
T5_LENGTHS = {"sd3": 77, "flux": 256}
"""Tokens that ComfyUI pads T5's prompts to."""

CHECKPOINT, CLIP, VAE = "checkpoints/tiny_sd35", "text_encoders/tiny_clip_l", "vae/tiny_ae16"
FLUX, T5 = "diffusion_models/tiny_flux", "text_encoders/t5"
BY_FILES = {
    "sd3_one_file": (CHECKPOINT, [], None),
    "sd3_ckpt": (f"{CHECKPOINT}.ckpt", [], None),
    "sd3_patched_clone": (CHECKPOINT, [], None),
    "sd3_shift": (CHECKPOINT, [], None),
    "sd3_two_files": ("diffusion_models/sd3", [CHECKPOINT], CHECKPOINT),
    "sd3_three_files": ("diffusion_models/sd3", [CLIP], VAE),
    "sd3_other_clip": (CHECKPOINT, [CLIP], None),
    "sd3_fp8_file": ("diffusion_models/fp8_sd3", [CLIP], VAE),
    "sd3_scaled_fp8": ("diffusion_models/scaled_sd3", [CLIP], VAE),
    "flux_three_files": (FLUX, [CLIP], VAE),
    "flux_one_file": ("checkpoints/saved_flux", [], None),
    "flux_t5": ("diffusion_models/wide_flux", [CLIP, T5], VAE),
    "flux_fp8_file": ("diffusion_models/fp8_flux", [CLIP], VAE),
    "flux_scaled_fp8": ("diffusion_models/scaled_flux", [CLIP], VAE),
    "flux_shift": (FLUX, [CLIP], VAE),
}
"""Cases that need no copy, and the files that they are handed over by."""
COPY = "COPY"
COPIED = {
    "sd3_lora": (COPY, [], CHECKPOINT),
    "sd3_model_lora": (COPY, [CLIP], VAE),
    "sd3_text_lora": ("diffusion_models/sd3", [COPY], VAE),
    "sd3_fp8": (COPY, [CLIP], VAE),
    "sd3_fp8_lora": (COPY, [CLIP], VAE),
    "sd3_scaled_fp8_lora": (COPY, [CLIP], VAE),
    "flux_lora": (COPY, [], VAE),
    "flux_model_lora": (COPY, [CLIP], VAE),
    "flux_fp8": (COPY, [CLIP], VAE),
    "flux_fp8_lora": (COPY, [CLIP], VAE),
    "flux_scaled_fp8_lora": (COPY, [CLIP], VAE),
}
"""Cases of which parts are written, and what the job then reads."""
DEMO, DEMO_COPIED = "demo", ("demo_lora", "demo_text_lora")
CASES = (*BY_FILES, *COPIED, *((DEMO, *DEMO_COPIED) if DEMO_FLOW_FOLDER.is_dir() else ()))
SHIFTS = {"sd3_shift": 5.5, "flux_shift": 1.8776}

pytestmark = [
    needs_host,
    needs_models("checkpoints/tiny_sd35.ckpt", "diffusion_models/tiny_flux.safetensors"),
]


@pytest.fixture(scope="module")
def handed(tmp_path_factory):
    """ComfyUI's report on all cases, and where its numbers are."""
    out = tmp_path_factory.mktemp("handed")
    yield report_in(in_comfyui(SCRIPT, PACK, MODELS, out, *CASES, seconds=1800)), out
    shutil.rmtree(out)  # gigabytes


def computed(handed, case):
    return load_file(handed[1] / case / "computed.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_the_trainer_computes_what_comfyui_does(handed, case):
    theirs = computed(handed, case)
    family = load_family(files_of(ModelConfig(**handed[0][case]["model"])))
    assert family.name == ("flux" if "flux" in case else "sd3")
    family.t5_length = T5_LENGTHS[family.name]
    tolerance = 1e-5 if DEMO in case else 1e-4

    embeds = family.encode([PROMPT])
    for found, expected in ((embeds.tokens, theirs["tokens"]), (embeds.pooled, theirs["pooled"])):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        velocity = family.predict(theirs["latents"], theirs["sigma"], embeds.expand(2))
    error = (velocity - theirs["velocity"]).abs().max()
    print(f"{case}: the velocity differs by up to {error:.1e}")
    assert theirs["velocity"].std() > 0.02
    assert error < tolerance

    images = family.decode(theirs["latents"]).permute(0, 2, 3, 1)
    assert len((theirs["images"] * 255).round().unique()) > 64
    assert (images - theirs["images"] * 255).abs().max() <= 1


def named(handed, case, names):
    out = handed[1]

    def path(name):
        if name is None:
            return None
        if name == COPY:
            return str(out / case / "model.safetensors")
        file = name if "." in name else f"{name}.safetensors"
        place = MODELS if (MODELS / file).is_file() else out / "made"
        return str(place / file)

    source, text, vae = names
    return {"source": path(source), "text_encoders": list(map(path, text)), "vae": path(vae)}


@pytest.mark.parametrize("case", BY_FILES)
def test_what_is_as_in_its_files_is_handed_over_by_them(handed, case):
    report, out = handed
    given, expected = dict(report[case]["model"]), named(handed, case, BY_FILES[case])
    if case in ("flux_t5", "flux_one_file"):
        tokenizer = Path(HOST) / "comfy" / "text_encoders" / "t5_tokenizer"
        assert Path(given.pop("t5_tokenizer")).resolve() == tokenizer.resolve()
    assert given == expected
    assert report[case]["written"] is None
    assert [file.name for file in (out / case).iterdir()] == ["computed.safetensors"]


@pytest.mark.parametrize("case", COPIED)
def test_only_what_was_changed_is_written(handed, case):
    report, out = handed
    assert report[case]["model"] == named(handed, case, COPIED[case])
    done, size = report[case]["written"]
    file = out / case / "model.safetensors"
    assert done == size < file.stat().st_size < size + 500_000
    *_, last = report[case]["notes"]
    assert last.startswith("the base is the model as loaded, LoRAs included; its copy takes ")


@pytest.mark.parametrize("case", [case for case in CASES if "fp8" in case])
def test_fp8_is_said_once(handed, case):
    about = [note for note in handed[0][case]["notes"] if "copy takes" not in note]
    wanted = "of the MODEL were dequantised" if "scaled" in case else "of the MODEL were turned"
    if case.endswith("file"):
        wanted = f"of {'_'.join(case.split('_')[1::-1])}.safetensors are read as the numbers"
    assert len(about) == 1 and wanted in about[0]


@pytest.mark.parametrize("case", CASES)
def test_the_shift_of_a_node_is_told(handed, case):
    shift = handed[0][case]["shift"]
    assert shift == (pytest.approx(SHIFTS[case], abs=1e-3) if case in SHIFTS else None)


def test_the_cases_differ_where_they_should(handed):
    pairs = [
        ("sd3_lora", "sd3_one_file", "velocity"),
        ("sd3_lora", "sd3_one_file", "tokens"),
        ("sd3_text_lora", "sd3_three_files", "tokens"),
        ("sd3_fp8_lora", "sd3_fp8", "velocity"),
        ("sd3_scaled_fp8_lora", "sd3_scaled_fp8", "velocity"),
        ("flux_lora", "flux_three_files", "velocity"),
        ("flux_lora", "flux_three_files", "tokens"),
        ("flux_fp8_lora", "flux_fp8", "velocity"),
        ("flux_scaled_fp8_lora", "flux_scaled_fp8", "velocity"),
        ("sd3_fp8", "sd3_three_files", "velocity"),
        ("sd3_scaled_fp8", "sd3_three_files", "velocity"),
        ("flux_fp8", "flux_three_files", "velocity"),
        ("flux_scaled_fp8", "flux_three_files", "velocity"),
    ]
    if DEMO in CASES:
        pairs += [("demo_lora", DEMO, "velocity"), ("demo_text_lora", DEMO, "tokens")]
    for case, base, name in pairs:
        found, without = computed(handed, case)[name], computed(handed, base)[name]
        assert (found - without).abs().max() > 1e-3 * without.abs().max(), (case, name)
    clone, plain = computed(handed, "sd3_patched_clone"), computed(handed, "sd3_one_file")
    assert clone["velocity"].equal(plain["velocity"])


@pytest.mark.skipif(not DEMO_FLOW_FOLDER.is_dir(), reason="tiny-flow is not in this checkout")
def test_the_demo_model_is_known(handed):
    report, out = handed
    assert report[DEMO] == {
        "base": "demo-flow",
        "model": {"source": "demo-flow"},
        "shift": None,
        "notes": [],
        "written": None,
    }
    for case in DEMO_COPIED:
        assert report[case]["model"] == {"source": str(out / case / "model")}
        assert report[case]["notes"] == ["the base is the model as loaded, LoRAs included"]
