"""The demo nodes' own logic, without ComfyUI: names of weights, sizes, refusals."""

from __future__ import annotations

import json
from types import SimpleNamespace

import comfy_api_fixture
import pytest
import torch
from comfyui_pcpo.nodes.demo import nodes as demo
from comfyui_pcpo.nodes.demo import parts as demo_parts
from comfyui_pcpo.nodes.errors import NodeError
from comfyui_pcpo.trainers.config.train_config import DEMO_FLOW_FOLDER, DEMO_FOLDER
from comfyui_pcpo.trainers.families import load_family
from comfyui_pcpo.trainers.families.autoencoder import tiny_autoencoder
from safetensors.torch import load_file


class Model:
    """A MODEL's attachments."""

    def __init__(self, **attachments):
        self.attachments = attachments

    def get_attachment(self, key):
        return self.attachments.get(key)


def test_every_demo_is_there():
    assert demo.DEMOS == {"tiny-sd": DEMO_FOLDER, "tiny-flow": DEMO_FLOW_FOLDER}
    for network, folder in zip(("unet", "transformer"), demo.DEMOS.values(), strict=True):
        for part in (network, "vae"):
            assert (folder / part / "diffusion_pytorch_model.safetensors").is_file()


def test_the_tag_is_read_back():
    assert demo.demo_id_of(Model(**{demo.DEMO_TAG: "tiny-sd"})) == "tiny-sd"
    assert demo.demo_id_of(Model()) is None


def test_missing_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(demo.DEMOS, "tiny-sd", tmp_path)
    with pytest.raises(NodeError, match="files of demo 'tiny-sd' are missing"):
        comfy_api_fixture.run(demo.PCPODemoModel)


def test_loras_are_listed_by_name(tmp_path, monkeypatch):
    def offered():
        return comfy_api_fixture.schema_of(demo.PCPODemoLora).inputs[1].options

    monkeypatch.setattr(demo, "LORAS", tmp_path / "none here")
    assert offered() == ["none"]
    monkeypatch.setattr(demo, "LORAS", tmp_path)
    for name in ("red.safetensors", "blue.safetensors", "README.md"):
        (tmp_path / name).touch()
    assert offered() == ["blue", "red"]


def test_a_lora_is_refused_where_it_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "LORAS", tmp_path)
    (tmp_path / "red.safetensors").touch()
    for lora, model, says in (
        ("none", Model(**{demo.DEMO_TAG: "tiny-sd"}), "has no demo LoRA 'none'"),
        ("red", Model(), "fits PCPO Demo Model only"),
    ):
        with pytest.raises(NodeError, match=says):
            comfy_api_fixture.run(demo.PCPODemoLora, model=model, lora=lora)


def test_unet_sizes_are_those_of_the_config():
    config = json.loads((DEMO_FOLDER / "unet" / "config.json").read_text(encoding="utf-8"))
    sizes = demo_parts.unet_sizes(config)
    assert (sizes["model_channels"], sizes["channel_mult"]) == (32, [1, 2])
    assert sizes["num_res_blocks"] == [1, 1]
    assert len(sizes["transformer_depth_output"]) == 4
    assert config["attention_head_dim"] == 8  # ComfyUI's SD15 knows 8 heads only


def test_the_autoencoder_comes_back_under_its_own_names():
    weights = load_file(DEMO_FOLDER / "vae" / "diffusion_pytorch_model.safetensors")
    scale = 0.18215
    state = {key: value.float() for key, value in demo_parts.vae_state(weights, scale).items()}
    back = tiny_autoencoder(state, {"scaling_factor": scale}, "demo")
    assert back.config.scaling_factor == pytest.approx(1)
    assert back.config.shift_factor == 0
    latents = torch.randn(1, 4, 8, 8)
    expected = load_family(DEMO_FOLDER).vae.decode(latents, return_dict=False)[0]
    torch.testing.assert_close(back.decode(latents, return_dict=False)[0], expected)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_the_text_encoder_fills_comfyuis_class(prefix):
    weights = load_file(DEMO_FOLDER / "text_encoder" / "model.safetensors")
    plain = {key.removeprefix("text_model."): value for key, value in weights.items()}
    state = demo_parts.text_state({prefix + key: value for key, value in plain.items()}, 64)
    tokens = state["clip_l.transformer.text_model.embeddings.token_embedding.weight"]
    assert tokens.shape == (49408, 64)
    assert tokens[:648].equal(plain["embeddings.token_embedding.weight"])
    assert not tokens[648:].any()
    assert state["clip_l.transformer.text_projection.weight"].equal(torch.eye(64))
    assert len(state) == len(plain) + 1
    assert all(key.startswith("clip_l.transformer.") for key in state)


def test_folders_are_read_without_diffusers_or_comfyui():
    assert demo_parts._config(DEMO_FOLDER / "vae")["scaling_factor"] == 1
    kinds = demo_parts._weights(DEMO_FOLDER / "text_encoder" / "model.safetensors")
    assert {value.dtype for value in kinds.values()} == {torch.float32}
    assert isinstance(SimpleNamespace, type)
