"""Flow models as users have them on disk are trained, exported and sampled by the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.tests.fixtures import flux_fixture, sd3_fixture
from comfyui_pcpo.tests.fixtures.flow_files_fixture import CONFIG, check_run
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.job.folder import JobFolder
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, list[str]]:
    """By layout, what names the model on the command line."""
    made = tmp_path_factory.mktemp("files")
    t5 = str(sd3_fixture.write_t5_tokenizer(made / "t5"))
    sd3 = sd3_fixture.original_names(sd3_fixture.modules("sd3.5-m"))
    folder = flux_fixture.write_folder(made / "flux")
    parts, letters = flux_fixture.parts(folder), str(folder / "tokenizer_2")
    found = {}
    for suffix in (".safetensors", ".ckpt"):
        whole = sd3_fixture.write(sd3, made / f"sd3{suffix}")
        found[f"SD3.5 {suffix}"] = [str(whole), "--t5-tokenizer", t5]
        network, vae, clip, text = (
            str(flux_fixture.save(parts[name], made / f"{name}{suffix}"))
            for name in ("network", "vae", "clip_l", "t5xxl")
        )
        found[f"FLUX parts {suffix}"] = [
            *(network, "--vae", vae, "--text-encoders", clip, text, "--t5-tokenizer", letters)
        ]
    saved = flux_fixture.save(flux_fixture.whole(folder), made / "saved.safetensors")
    found["FLUX as ComfyUI saves it"] = [str(saved), "--t5-tokenizer", letters]
    return found


def of_train(words: list[str]) -> list[str]:
    """The same for `pcpo train`, where the fields are in a section."""
    return [word.replace("--", "--model.", 1) if word[:2] == "--" else word for word in words]


LAYOUTS = [
    *("SD3.5 .safetensors", "SD3.5 .ckpt", "FLUX parts .safetensors", "FLUX parts .ckpt"),
    "FLUX as ComfyUI saves it",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_on_disk_trains_and_exports(files, tmp_path, layout):
    (tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    (tmp_path / "run.toml").write_text(CONFIG, encoding="utf-8")
    prompts = ["--prompts.source", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "run")]
    source, *rest = of_train(files[layout])
    command = ["train", str(tmp_path / "run.toml"), "--model.source", source, *rest, *prompts]
    assert main(command) == 0
    check_run(tmp_path / "run", "flux" if "FLUX" in layout else "sd3")


@pytest.mark.parametrize("layout", ["SD3.5 .ckpt", "FLUX parts .safetensors"])
def test_a_model_in_parts_is_sampled(files, tmp_path, layout):
    looks = ["--width", "64", "--height", "48", "--steps", "2", "--prompts", "a cat"]
    out = ["--out", str(tmp_path / "images"), "--latents", str(tmp_path / "x.safetensors")]
    assert main(["sample", "--model", *files[layout], *looks, *out]) == 0
    assert Image.open(tmp_path / "images" / "000.png").size == (64, 48)
    latents = load_file(tmp_path / "x.safetensors")["latents"]
    assert latents.shape == (1, 16, 6, 8) and torch.isfinite(latents).all()


def test_a_trained_lora_changes_what_is_sampled(files, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    (tmp_path / "run.toml").write_text(CONFIG, encoding="utf-8")
    words = files["FLUX parts .safetensors"]
    prompts = ["--prompts.source", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "run")]
    model = ["--model.source", *of_train(words)]
    assert main(["train", str(tmp_path / "run.toml"), *model, *prompts]) == 0
    export = JobFolder(tmp_path / "run").last_export()
    latents = []
    for name, lora in (("base", []), ("tuned", ["--lora", str(export)])):
        file = Path(tmp_path / f"{name}.safetensors")
        looks = ["--width", "64", "--height", "64", "--steps", "2", "--prompts", "a cat"]
        out = ["--out", str(tmp_path / name), "--latents", str(file)]
        assert main(["sample", "--model", *words, *lora, *looks, *out]) == 0
        latents.append(load_file(file)["latents"])
    assert 1e-6 < (latents[0] - latents[1]).abs().max() < 1
