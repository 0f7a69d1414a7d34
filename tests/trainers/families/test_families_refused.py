"""What cannot be trained is refused by name, before its weights are read."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_pcpo.tests.fixtures import sd1_fixture as fixture
from comfyui_pcpo.trainers.families import ModelError, inspect_source, load_family
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return fixture.write_folder(tmp_path_factory.mktemp("models") / "kl")


UNET = "model.diffusion_model."
REFUSED = {
    "SD2.x": {"cond_stage_model.model.ln_final.weight": (4,)},
    "SD2.x ": {f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (4, 1024)},
    "a LoRA": {"lora_unet_down_blocks_0_to_q.lora_down.weight": (4, 4)},
    "a LoRA ": {"joint_blocks.0.x_block.attn.qkv.lora_A.weight": (4, 4)},
    "one part": {"down_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3)},
    "network alone": {"input_blocks.0.0.weight": (4, 4, 3, 3)},
    "inpainting": {f"{UNET}input_blocks.0.0.weight": (4, 9, 3, 3)},
    "no text encoder": {f"{UNET}input_blocks.0.0.weight": (4, 4, 3, 3)},
    "quantised": {f"{UNET}input_blocks.0.0.weight_scale_2": (4,)},
    "no model known": {"something.else": (4,)},
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_files_are_refused_by_name(tmp_path, what):
    path = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in REFUSED[what].items()}, path)
    with pytest.raises(ModelError, match=what.strip()) as caught:
        inspect_source(path)
    assert "model.safetensors" in str(caught.value)


def test_file_without_a_vae_is_refused(tmp_path, folder):
    tensors = fixture.original_names(folder)
    kept = {k: t.contiguous() for k, t in tensors.items() if "first_stage" not in k}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="holds no VAE"):
        inspect_source(tmp_path / "model.safetensors")


@pytest.mark.parametrize("part", ["diffusion_model", "first_stage_model", "transformer"])
@pytest.mark.parametrize("change", ["a tensor less", "a tensor more"])
def test_incomplete_file_is_refused(tmp_path, folder, part, change):
    """Nothing is left at random values, and nothing is left out."""
    tensors = fixture.original_names(folder)
    bias = next(k for k in reversed(tensors) if part in k and k.endswith("bias") and ".0." in k)
    if change == "a tensor less":
        del tensors[bias]
    else:
        tensors[bias.replace("bias", "surplus")] = torch.zeros(1)
    path = tmp_path / "model.safetensors"
    save_file({k: t.contiguous() for k, t in tensors.items()}, path)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_family(path)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_damaged_and_dangerous_files_are_refused(tmp_path):
    def refuse(name: str, content: bytes | None, match: str) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=match):
            load_family(tmp_path / name)

    refuse("absent.safetensors", None, "there is no model at .*absent.safetensors")
    refuse("cut.safetensors", b"\x10\x00\x00", "not a complete safetensors file")
    refuse("model.gguf", b"GGUF\x03\x00\x00\x00", "GGUF")
    refuse("notes.txt", b"hello", "no model file")
    refuse("page.ckpt", b"<html>", "damaged or no checkpoint")
    torch.save({"state_dict": {}, "bomb": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.ckpt")
    refuse("bomb.ckpt", None, "cannot be read safely")
    refuse("old.ckpt", pickle.dumps(Bomb(tmp_path / "exploded")), "cannot be read safely")
    assert not (tmp_path / "exploded").exists()


def test_folders_of_other_families_are_refused(tmp_path):
    def refuse(part: str, config: dict[str, object], match: str, *others: str) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        files = {f"{part}/config.json": config} | {name: {} for name in others}
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True)
            (folder / name).write_text(json.dumps(content))
        with pytest.raises(ModelError, match=match):
            inspect_source(folder)

    refuse("transformer", {"_class_name": "PixArtTransformer2DModel"}, "PixArtTransformer2DModel")
    refuse("transformer", {"_class_name": "FluxTransformer2DModel"}, "schnell")
    sd3 = {"_class_name": "SD3Transformer2DModel"}
    others = ("vae/config.json", "scheduler/scheduler_config.json")
    refuse("transformer", sd3, "vae/config.json is missing")
    refuse("transformer", sd3, "transformer holds no .safetensors weights", *others)
    refuse("unet", {"cross_attention_dim": 1024}, "SD2.x")
    refuse("unet", {"in_channels": 9, "out_channels": 4}, "inpainting")
    refuse("unet", {"in_channels": 4}, "vae/config.json is missing")
    refuse("tokenizer", {}, "unet/config.json is missing")


def test_hub_name_is_fetched_only_when_allowed(monkeypatch, folder):
    asked = []

    def snapshot(name, *, local_files_only, **_):
        asked.append((name, local_files_only))
        if local_files_only:
            raise FileNotFoundError("not in the cache")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(ModelError, match=r"no file or folder nobody/nothing.* allow the download"):
        load_family("nobody/nothing")
    assert inspect_source("nobody/nothing", allow_download=True).path == folder
    assert asked == [("nobody/nothing", True), ("nobody/nothing", False)]


def test_parts_of_different_models_are_refused(tmp_path):
    def refuse(match: str, **change: int) -> None:
        folder = tmp_path / match
        fixture.write_folder(folder)
        config = CLIPTextModel.from_pretrained(folder / "text_encoder").config
        other = CLIPTextConfig(**(config.to_dict() | change))
        CLIPTextModel(other).save_pretrained(folder / "text_encoder")
        with pytest.raises(ModelError, match=match):
            load_family(folder)

    refuse("text encoder is 48 wide and the network expects 32", hidden_size=48)
    refuse("tokenizer knows 49408 tokens and the text encoder 500", vocab_size=500)


def test_refusing_does_not_import_torch(tmp_path):
    save_file({f"{UNET}double_blocks.0.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    script = (
        "import sys\n"
        "from comfyui_pcpo.trainers.families import ModelError, inspect_source\n"
        "try:\n    inspect_source(sys.argv[1])\n"
        "except ModelError as error:\n    print(error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.safetensors")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "FLUX" in done.stdout
