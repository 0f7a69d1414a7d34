"""Z-Image and FLUX.2 [klein] as ComfyUI has loaded them are what the trainer loads.

What it needs is in comfyui_fixture.py. ComfyUI hands each case over in its own Python; this one
loads them as a worker does.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_fixture import (
    HOST,
    MODELS,
    PACK,
    computed,
    in_comfyui,
    needs_host,
    needs_models,
    relative_error,
    report_in,
)
from comfyui_pcpo.tests.fixtures import host_files_fixture as files
from comfyui_pcpo.trainers.config.sections import ModelConfig
from comfyui_pcpo.trainers.families import Files, load_family
from comfyui_pcpo.trainers.families.embeds import Embeds
from comfyui_pcpo.trainers.families.registry import FAMILIES
from comfyui_pcpo.trainers.job.preflight import files_of, options_of
from comfyui_pcpo.trainers.lora import adapters
from diffusers import Flux2KleinPipeline, ZImagePipeline

SCRIPT = Path(__file__).parent / "scripts" / "comfyui_qwen_fixture.py"
PROMPT = "a red circle left of a blue square"
SIGMA = 0.7371

BY_FILES = (
    *("zimage_plain", "zimage_saved", "zimage_wide", "zimage_renamed", "zimage_shift"),
    *("klein_plain", "klein_saved", "klein_scaled", "klein_shift"),
)
"""Cases of which nothing is written."""
COPIED = tuple(f"{f}_{way}" for f in ("zimage", "klein") for way in ("lora", "fp8", "fp8_lora"))
EXPORTED = ("zimage_exported", "klein_exported")
CASES = (*BY_FILES, *COPIED, "klein_taef2", "klein_scaled_lora", *EXPORTED)
SHIFTS = {"zimage_shift": 6.0, "klein_shift": 1.8776}
"""Of a node; without one klein's depends on size and steps, and ComfyUI gives Z-Image 3."""

RELATIVE = 1e-5

AUTOENCODER = "vae/tiny_ae16.safetensors"
pytestmark = [needs_host, needs_models(AUTOENCODER)]


@pytest.fixture(scope="module")
def handed(tmp_path_factory):
    """ComfyUI's report on all cases, and where its numbers are."""
    out, models = tmp_path_factory.mktemp("handed"), tmp_path_factory.mktemp("models")
    files.write_files(models)
    (models / AUTOENCODER).symlink_to(MODELS / AUTOENCODER)
    for case in EXPORTED:
        write_exported(models, case, out / "made" / "loras" / f"{case}.safetensors")
    yield report_in(in_comfyui(SCRIPT, PACK, models, out, *CASES, seconds=1800)), out
    shutil.rmtree(out)  # gigabytes


def network_of(models: Path, case: str) -> Any:
    """The network of a case without adapters, as the trainer loads it."""
    file, vae = ((files.ZIMAGE, AUTOENCODER), (files.KLEIN, files.VAE))["klein" in case]
    given = Files(models / file, (models / files.QWEN,), models / vae)
    return load_family(given, parts="network")


def write_exported(models: Path, case: str, file: Path) -> None:
    """A LoRA as a run writes it, at a scale of 2."""
    network = network_of(models, case).network
    adapters.add_lora(network, 4, 8, FAMILIES[case.partition("_")[0]].lora_targets, seed=1)
    generator = torch.Generator().manual_seed(0)
    for _, layer in adapters.adapters(network):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.02, generator=generator)
    file.parent.mkdir(parents=True, exist_ok=True)
    adapters.export_lora(network, file)


@pytest.mark.parametrize("case", CASES)
def test_the_trainer_computes_what_comfyui_does(handed, case):
    given, theirs = handed[0][case], computed(handed, case)
    config = ModelConfig.model_validate(given["model"])
    family = load_family(files_of(config), **options_of(config))
    assert family.name == given["base"] == case.partition("_")[0]

    embeds = family.encode([PROMPT])
    tokens = embeds.tokens if embeds.lengths is None else embeds.tokens[:, : embeds.lengths[0]]
    with torch.no_grad():
        velocity = family.predict(theirs["latents"], torch.tensor(SIGMA), embeds.expand(2))
    errors = {
        "tokens": relative_error(tokens, theirs["tokens"]),
        "velocity": relative_error(velocity, theirs["velocity"]),
    }
    levels = family.decode(theirs["latents"]).permute(0, 2, 3, 1)
    difference = (levels - theirs["images"] * 255).abs().max().item()
    print(f"\nMEASURED {case} {errors} image {difference:.4f} of 255")
    assert max(errors.values()) < RELATIVE
    assert theirs["velocity"].std() > 0.1 and theirs["images"].std() > 0.05
    assert difference < 0.5 + 255 * RELATIVE  # rounded to whole levels, and no further away


@pytest.mark.parametrize("case", EXPORTED)
def test_trainer_and_diffusers_apply_a_lora_as_comfyui_does(handed, case):
    out, theirs = handed[1], computed(handed, case)
    models = Path(handed[0][case]["model"]["text_encoders"][0]).parents[1]
    lora = out / "made" / "loras" / f"{case}.safetensors"
    by_trainer, by_diffusers = (network_of(models, case) for _ in range(2))
    adapters.load_lora(by_trainer.network, lora)
    kind = Flux2KleinPipeline if "klein" in case else ZImagePipeline
    empty = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
    pipeline: Any = kind(**empty, transformer=by_diffusers.network)
    pipeline.load_lora_weights(str(lora), adapter_name="default")
    embeds = Embeds.from_rows([PROMPT], [theirs["tokens"][0]])
    if "klein" in case:
        embeds = Embeds(theirs["tokens"])
    for family in (by_trainer, by_diffusers):
        with torch.no_grad():
            found = family.predict(theirs["latents"], torch.tensor(SIGMA), embeds.expand(2))
        error = relative_error(found, theirs["velocity"])
        print(f"\nMEASURED {case} {error}")
        assert error < RELATIVE


@pytest.mark.parametrize("case", CASES)
def test_only_what_was_changed_is_written(handed, case):
    given = handed[0][case]
    assert given["is_written"] == (case not in BY_FILES)
    tokenizer = Path(HOST) / "comfy" / "text_encoders" / "qwen25_tokenizer"
    assert Path(given["model"]["qwen_tokenizer"]).resolve() == tokenizer.resolve()
    expected = SHIFTS.get(case, 3.0 if case.startswith("zimage") else None)
    assert given["shift"] == (expected if expected is None else pytest.approx(expected, abs=1e-3))
    kinds = {"scaled": "were dequantised", "fp8": "were turned into bfloat16"}
    for kind in kinds.keys() & {*case.split("_")}:
        assert kinds[kind] in given["notes"][0]


def test_the_cases_differ_where_they_should(handed):
    for case, base, name in (
        ("zimage_lora", "zimage_plain", "velocity"),
        ("zimage_lora", "zimage_plain", "tokens"),
        ("zimage_fp8", "zimage_plain", "velocity"),
        ("zimage_fp8_lora", "zimage_fp8", "velocity"),
        ("klein_lora", "klein_plain", "velocity"),
        ("klein_lora", "klein_plain", "tokens"),
        ("klein_fp8", "klein_plain", "velocity"),
        ("klein_fp8_lora", "klein_fp8", "velocity"),
        ("klein_scaled", "klein_plain", "velocity"),
        ("klein_scaled_lora", "klein_scaled", "velocity"),
        ("klein_taef2", "klein_plain", "images"),
        *((case, f"{case.partition('_')[0]}_plain", "velocity") for case in EXPORTED),
    ):
        found, without = computed(handed, case)[name], computed(handed, base)[name]
        assert relative_error(found, without) > 1e-3, (case, name)
