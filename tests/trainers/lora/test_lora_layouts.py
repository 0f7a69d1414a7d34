"""LoRA files of other tools on SDXL: what stock programs apply is what is read here."""

from __future__ import annotations

import lora_layouts_fixture as fixture
import pytest
import sdxl_fixture
import torch
from comfyui_pcpo.trainers.families import ModelError, load_family
from comfyui_pcpo.trainers.lora import adapters
from diffusers import StableDiffusionXLPipeline
from lora_layouts_fixture import LAYOUTS
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sdxl_fixture.write_folder(tmp_path_factory.mktemp("sdxl") / "model", vae="tiny")


def written(tmp_path, name, **more):
    file = tmp_path / "lora.safetensors"
    save_file(LAYOUTS[name].tensors | more, file)
    return file


def ours(folder, file) -> dict[str, torch.Tensor]:
    """The changes of weights that training would start from, by module."""
    network = load_family(folder, parts="network").network
    adapters.load_lora(network, file, ignore_text_encoder=True)
    found = {}
    for path, layer in adapters.adapters(network):
        down, up = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B"))
        found[path] = fixture.delta_of(down, up, layer.scaling["default"])
    return found


def assert_equal(found, parts):
    assert found.keys() == parts.keys()
    for path, (down, up) in parts.items():
        assert (found[path] - fixture.delta_of(down, up)).abs().max() < 1e-5, path


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read(folder, tmp_path, name):
    assert_equal(ours(folder, written(tmp_path, name)), LAYOUTS[name].parts)


@pytest.mark.parametrize("name", [n for n, at in LAYOUTS.items() if "diffusers" in at.read_by])
def test_diffusers_applies_the_same(folder, tmp_path, name):
    family = load_family(folder)
    pipeline = StableDiffusionXLPipeline(
        vae=family.vae,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
        tokenizer=family.text.clip_l.tokenizer,
        tokenizer_2=family.text.clip_g.tokenizer,
        unet=family.unet,
        scheduler=None,  # pyright: ignore[reportArgumentType]
        add_watermarker=False,
    )
    pipeline.load_lora_weights(str(written(tmp_path, name)), adapter_name="default")
    found = {}
    for path, layer in adapters.adapters(pipeline.unet):
        down, up = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B"))
        found[path] = fixture.delta_of(down, up, layer.scaling["default"])
    assert_equal(found, LAYOUTS[name].parts)


def test_changes_of_text_encoders_are_refused_unless_they_are_to_be_ignored(folder, tmp_path):
    network = load_family(folder, parts="network").network
    with pytest.raises(ModelError, match="also changes the text encoder"):
        adapters.load_lora(network, written(tmp_path, "kohya, original names, text encoders"))


FIRST = "lora_unet_" + fixture.ORIGINAL[next(iter(LAYOUTS["peft's"].parts))].replace(".", "_")


@pytest.mark.parametrize(
    "end",
    [
        "dora_scale",
        "hada_w1_a",
        "lokr_w1",
        "oft_blocks",
        "oft_diag",
        "diff",
        "diff_b",
        "lora_mid.weight",
    ],
)
def test_what_is_no_plain_lora_is_refused_by_its_tensor(folder, tmp_path, end):
    network = load_family(folder, parts="network").network
    file = written(tmp_path, "kohya, original names", **{f"{FIRST}.{end}": torch.ones(2, 2)})
    with pytest.raises(ModelError, match=f"a tensor {FIRST}.{end}, which is no plain LoRA weight"):
        adapters.load_lora(network, file)


def test_a_lora_of_another_family_is_refused(folder, tmp_path):
    network = load_family(folder, parts="network").network
    file = tmp_path / "sd15.safetensors"
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)},
        file,
    )
    with pytest.raises(
        ModelError, match=r"which this network does not have: it was made for SD1\.x$"
    ):
        adapters.load_lora(network, file)
