"""Bad input for flow models: one clear line, exit code 2, nothing written; what is only said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.tests.fixtures import flux_fixture, sd3_fixture
from comfyui_pcpo.tests.fixtures.refused_fixture import refused, refused_here
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.job.folder import JobFolder
from safetensors.torch import load_file, save_file

NET, TEXT = "model.diffusion_model.", "text_encoders."
CONFIG = """
rewards = { jpeg_incompressibility = 1.0 }
model = { width = 64, height = 64, t5_length = 16 }
sampler = { transition = "flow_sde", noise_level = 0.7, steps = 3, drop_last = 1 }
advantage = { kind = "group" }
prompts = { source = "prompts.txt", per_iteration = 1, images_per_prompt = 2 }
run = { iterations = 1, micro_batch = 2, eval_prompts = 1, eval_steps = 1 }
"""


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tiny flow models, whole and in parts, and everything that is at fault in one of the cases."""
    made = tmp_path_factory.mktemp("flow")
    (made / "flow.toml").write_text(CONFIG, encoding="utf-8")
    (made / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    sd3_fixture.write_t5_tokenizer(made / "t5")
    sd3_fixture.write_folder(made / "sd3_folder")
    sd3 = sd3_fixture.original_names(sd3_fixture.modules("sd3.5-m"))
    flux_fixture.write_folder(made / "flux_folder")
    flux = flux_fixture.whole(made / "flux_folder")

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        sd3_fixture.write(tensors, made / name)

    def only(tensors, *prefixes):
        return {key: t for key, t in tensors.items() if key.startswith(prefixes)}

    write("sd3.safetensors", sd3)
    write("flux.safetensors", flux)
    write("schnell.safetensors", {k: t for k, t in flux.items() if "guidance_in" not in k})
    write("sdxl.safetensors", {f"{NET}label_emb.0.0.weight": torch.zeros(4, 4)})
    write("lora.safetensors", {"transformer.x.lora_A.weight": torch.zeros(4, 4)})
    write("sd3_net.safetensors", only(sd3, NET))
    write("flux_net.safetensors", only(flux, NET))
    write("flux_net.ckpt", only(flux, NET))
    write("sd3_no_vae.safetensors", only(sd3, NET, TEXT))
    write("flux_no_vae.safetensors", only(flux, NET, TEXT))
    four = f"{NET}double_blocks.0.img_attn.qkv.weight_scale_2"
    write("nvfp4.safetensors", flux | {four: torch.zeros(())})
    write("nvfp4_t5.safetensors", {"shared.weight_scale_2": torch.zeros(())})
    (made / "flux.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    for name, tensors in (("sd3", sd3), ("flux", flux)):
        t5 = {k.partition("t5xxl.transformer.")[2]: t for k, t in tensors.items() if "t5xxl" in k}
        write(f"t5_{name}.safetensors", t5)
    vae = {k.removeprefix("vae."): t for k, t in only(flux, "vae.").items()}
    write("sd1_vae.safetensors", vae | {"decoder.conv_in.weight": torch.zeros(64, 4, 3, 3)})
    return made


def model(name: str, *options: str) -> tuple[str, ...]:
    return ("train", "flow.toml", "--model.source", name, *options)


PARTS = ("--model.text-encoders",)
GUARD = ("--method.ratio", "guard", "--method.credit", "native")
FLUX_T5 = ("--model.t5-tokenizer", "flux_folder/tokenizer_2")
# what is asked, what is said; all by headers
AT_ONCE = {
    "schnell": (model("schnell.safetensors"), "schnell.safetensors takes no guidance, as FLUX.1-s"),
    "SDXL": (model("sdxl.safetensors"), "sdxl.safetensors holds no complete network of SDXL"),
    "a LoRA": (model("lora.safetensors"), "lora.safetensors is a LoRA, not a model"),
    "SD3 alone": (model("sd3_net.safetensors"), "sd3_net.safetensors holds no text encoder"),
    "FLUX alone": (model("flux_net.safetensors"), "flux_net.safetensors comes without CLIP-L"),
    "SD3 no VAE": (model("sd3_no_vae.safetensors"), "sd3_no_vae.safetensors holds no VAE"),
    "FLUX no VAE": (model("flux_no_vae.safetensors"), "flux_no_vae.safetensors holds no VAE"),
    "nvfp4": (model("nvfp4.safetensors"), "nvfp4.safetensors holds nvfp4 weights"),
    "nvfp4 part": (
        model("flux.safetensors", *PARTS, "nvfp4_t5.safetensors"),
        "nvfp4_t5.safetensors holds nvfp4 weights",
    ),
    "GGUF": (model("flux.gguf"), "flux.gguf is a GGUF file"),
    "GGUF part": (model("flux.safetensors", *PARTS, "flux.gguf"), "flux.gguf is a GGUF file"),
    "FLUX other T5": (
        model("flux.safetensors", *PARTS, "t5_sd3.safetensors"),
        "prompt tokens 32 wide and T5 gives 64: they belong to different models",
    ),
    "SD3 other T5": (
        model("sd3.safetensors", *PARTS, "t5_flux.safetensors"),
        "prompt tokens 64 wide and T5 gives 32: they belong to different models",
    ),
    "no encoder": (
        model("sd3.safetensors", *PARTS, "sd1_vae.safetensors"),
        "sd1_vae.safetensors holds no CLIP, T5 or Qwen3 text encoder",
    ),
    "no part": (model("sd3.safetensors", "--model.vae", "gone.safetensors"), "gone.safetensors"),
    "no tokenizer": (model("sd3.safetensors", "--model.t5-tokenizer", "gone"), "t5_tokenizer is"),
    "parts of a folder": (
        model("sd3_folder", *PARTS, "t5_sd3.safetensors"),
        "sd3_folder is a folder, which has its own text encoders",
    ),
    "parts of SD1": (
        ("train", "--preset", "demo", "--model.vae", "sd1_vae.safetensors"),
        "leave out text_encoders, vae and t5_tokenizer",
    ),
    "width": (
        model("sd3.safetensors", "--model.width", "520"),
        "width is 520; it must be a multiple of 16, for example 512",
    ),
    "height": (model("flux_folder", "--model.height", "88"), "height is 88; it must be a multiple"),
    "diffusion": (
        model("flux.safetensors", "--sampler.transition", "ddim", "--sampler.noise-level", "1"),
        "flux is a flow model: use 'dance_sde' or 'flow_sde' or 'cps'",
    ),
    "T5 of SD1": (
        ("train", "--preset", "demo", "--model.t5-length", "128"),
        "model.t5_length is 128, but sd1 has no T5",
    ),
    "beta and full": (
        model("flux.safetensors", "--trainable.kind", "full", "--method.kl-weight", "0.04"),
        "method.kl_weight is 0.04, but trainable.kind is 'full'",
    ),
    "guard": (
        model("flux.safetensors", *GUARD, "--sampler.transition", "dance_sde"),
        "method.ratio 'guard' (GRPO-Guard) belongs to sampler.transition 'flow_sde'",
    ),
}


@pytest.mark.parametrize("case", AT_ONCE)
def test_refused_from_headers(folder, case):
    words, said = AT_ONCE[case]
    line, is_loaded, _ = refused(folder, *words)
    assert said in line
    assert not is_loaded


# what is asked, what is said; only torch can tell
LOADED = {
    "pickle alone": (model("flux_net.ckpt"), "flux_net.ckpt comes without CLIP-L"),
    "other VAE": (
        model("flux.safetensors", "--model.vae", "sd1_vae.safetensors", *FLUX_T5),
        "has 4 latent channels and the network takes 16",
    ),
    "no such layer": (
        model("flux_folder", "--trainable.targets", "to_q", "to_x"),
        "trainable.targets: the target 'to_x' matches no module of the network; choose from:",
    ),
    "too wide": (model("sd3_folder", "--model.width", "144"), "positions reach 128 pixels"),
    "sample": (
        ("sample", "--model", "flux_folder", "--width", "72", "--prompts", "a cat"),
        "width is 72; it must be a multiple of 16",
    ),
}


@pytest.mark.parametrize("case", LOADED)
def test_refused_before_anything_is_written(folder, capsys, monkeypatch, case):
    words, said = LOADED[case]
    assert said in refused_here(folder, capsys, monkeypatch, *words)


# --- what is only said ---------------------------------------------------------------------------


def train(folder: Path, out: Path, capsys, monkeypatch, *options: str) -> str:
    monkeypatch.chdir(folder)
    assert main(["train", "flow.toml", "--out", str(out), *options]) == 0
    return capsys.readouterr().out


def test_guidance_over_flux_own_is_allowed_but_said(folder, tmp_path, capsys, monkeypatch):
    options = ("--model.source", "flux_folder", "--sampler.guidance-scale", "2")
    said = train(folder, tmp_path / "run", capsys, monkeypatch, *options)
    assert said.count("sampler.guidance_scale is 2 on FLUX.1-dev") == 1
    assert "both are applied, at twice the time" in said
    assert JobFolder(tmp_path / "run").metrics()


@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_is_read_and_said_once(folder, tmp_path, capsys, monkeypatch, scaled):
    tensors = {}
    for key, tensor in load_file(folder / "sd3.safetensors").items():
        tensors[key] = tensor
        if key.endswith("qkv.weight"):
            scale = tensor.abs().max() / 448 if scaled else torch.tensor(1.0)
            tensors[key] = (tensor / scale).to(torch.float8_e4m3fn)
            if scaled:
                tensors[key.replace(".weight", ".scale_weight")] = scale.reshape(1)
    save_file(tensors, tmp_path / "eight.safetensors")
    options = ("--model.source", str(tmp_path / "eight.safetensors"), "--model.t5-tokenizer", "t5")
    said = train(folder, tmp_path / "run", capsys, monkeypatch, *options)
    kind = "scaled fp8" if scaled else "fp8"
    assert said.count("eight.safetensors stores weights as") == 1
    assert f"stores weights as {kind}: they are read as the numbers they stand for" in said
    assert JobFolder(tmp_path / "run").metrics()[0]["log_ratio_max_on_policy"] == 0
