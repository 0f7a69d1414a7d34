"""An SDXL model that ComfyUI has loaded is what the trainer loads: text, first prediction, images.

What it needs is in comfyui_fixture.py, tiny SDXL files among it. ComfyUI hands each case over in
its own Python; this one loads them as a worker does.
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
from comfyui_pcpo.trainers.config.sections import ModelConfig
from comfyui_pcpo.trainers.families import load_family
from comfyui_pcpo.trainers.families.files import Files
from comfyui_pcpo.trainers.job.preflight import files_of, options_of
from comfyui_pcpo.trainers.lora.adapters import export_unet
from comfyui_pcpo.trainers.lora.base_notes import marks_of

SCRIPT = Path(__file__).parent / "scripts" / "comfyui_sdxl_fixture.py"
PROMPT = "a red circle left of a blue square"
WHOLE, ZERO_SNR = "tiny_sdxl.ckpt", "tiny_sdxl_vpred_zsnr.ckpt"

COPIED = ("lora", "fp8")
"""Cases of which something is written; the others are handed over by their files."""
V_PREDICTION = ("zero_snr_file", "zero_snr_node", "exported", "fine_tuned")
"""Of a schedule that ends in pure noise."""
CASES = (
    *("plain", "sizes", *COPIED, *V_PREDICTION, "other_vae", "files"),
    *("clip_skip_1", "clip_skip_2", "clip_skip_3"),
)
SIZES = [1024, 768, 16, 32, 640, 512]
"""What CLIPTextEncodeSDXL is set to in the case "sizes", as `model.size_condition` has it."""

RELATIVE = 1e-4

pytestmark = [needs_host, needs_models(f"checkpoints/{WHOLE}", f"checkpoints/{ZERO_SNR}")]


@pytest.fixture(scope="module")
def handed(tmp_path_factory):
    """ComfyUI's report on all cases, and where its numbers are."""
    out = tmp_path_factory.mktemp("handed")
    write_fine_tuned(out / "made" / "diffusion_models" / "fine_tuned.safetensors")
    arguments = (PACK, MODELS / "checkpoints", out, *CASES)
    yield report_in(in_comfyui(SCRIPT, *arguments, seconds=1200)), out
    shutil.rmtree(out)  # gigabytes


def write_fine_tuned(file):
    """A network as a run with `trainable.kind = "full"` exports it."""
    network, text = (MODELS / "checkpoints" / name for name in (ZERO_SNR, WHOLE))
    family = load_family(Files(network, (text,)), parts="network")
    file.parent.mkdir(parents=True)
    export_unet(family.network, file, marks=marks_of(family))


@pytest.mark.parametrize("case", CASES)
def test_the_trainer_computes_what_comfyui_does(handed, case):
    given, theirs = handed[0][case], computed(handed, case)
    more = {"size_condition": SIZES} if case == "sizes" else {}
    config = ModelConfig.model_validate(given["model"] | more)
    family = load_family(files_of(config), **options_of(config))
    is_v = case in V_PREDICTION
    assert family.schedule.prediction_type == ("v_prediction" if is_v else "epsilon")
    bars = 1 / (1 + theirs["sigmas"].double() ** 2)
    assert (family.schedule.alpha_bars() - bars).abs().max() < 1e-6
    assert (bars[-1] < 1e-7) == is_v

    embeds = family.encode([PROMPT])
    with torch.no_grad():
        prediction = family.predict(theirs["latents"], theirs["timestep"], embeds.expand(2))
    errors = {
        "tokens": relative_error(embeds.expand(2).tokens, theirs["tokens"]),
        "pooled": relative_error(embeds.pooled, theirs["pooled"]),
        "prediction": relative_error(prediction, theirs["prediction"]),
    }
    levels = family.decode(theirs["noise"]).permute(0, 2, 3, 1)
    difference = (levels - theirs["images"] * 255).abs().max().item()
    print(f"\nMEASURED {case} {errors} image {difference:.4f} of 255")
    assert max(errors.values()) < RELATIVE
    assert theirs["prediction"].std() > 0.1 and theirs["images"].std() > 0.1
    assert difference < 0.5 + 255 * RELATIVE  # rounded to whole levels, and no further away
