"""LoRA files of other trainers on Z-Image and FLUX.2 [klein]: what stock programs apply is read."""

from __future__ import annotations

import flow_layouts_fixture as fixture
import pytest
import torch
from comfyui_pcpo.trainers.families import ModelError
from comfyui_pcpo.trainers.families.registry import families_of_lora
from comfyui_pcpo.trainers.lora import adapters
from diffusers import Flux2KleinPipeline, ZImagePipeline
from flow_layouts_fixture import CASES, LAYOUTS
from safetensors.torch import save_file
from torch import Tensor, nn

PIPELINES = {"zimage": ZImagePipeline, "klein": Flux2KleinPipeline}


def written(tmp_path, family, name):
    tensors, changes = fixture.write(family, LAYOUTS[family][name])
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    return file, changes


def applied(family: str, network: nn.Module) -> dict[str, Tensor]:
    """What a network's adapters change, by the original layer."""
    found = {}
    for path, layer in adapters.adapters(network):
        down, up = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B"))
        found[path] = (up @ down * layer.scaling["default"]).detach()
    return fixture.original(family, found)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_layout_is_read(tmp_path, family, name):
    file, changes = written(tmp_path, family, name)
    network = fixture.network(family)
    adapters.load_lora(network, file)
    assert_equal(applied(family, network), changes)
    assert family in families_of_lora(fixture.write(family, LAYOUTS[family][name])[0])


@pytest.mark.parametrize(
    ("family", "name"), [(f, n) for f, n in CASES if "diffusers" in LAYOUTS[f][n].read_by]
)
def test_diffusers_applies_the_same(tmp_path, family, name):
    file, changes = written(tmp_path, family, name)
    network = fixture.network(family)
    pipeline = PIPELINES[family](None, None, None, None, network)
    pipeline.load_lora_weights(str(file), adapter_name="default")
    assert_equal(applied(family, network), changes)


def test_a_lora_of_comfyui_s_trainer_changes_biases_and_is_refused_with_a_way_out(tmp_path):
    tensors, _ = fixture.write("zimage", LAYOUTS["zimage"]["ComfyUI's trainer, without biases"])
    save_file(tensors | {"diffusion_model.x_embedder.diff_b": torch.ones(128)}, tmp_path / "l.sft")
    with pytest.raises(ModelError, match=r"x_embedder.diff_b, .* put it on the MODEL with Load"):
        adapters.load_lora(fixture.network("zimage"), tmp_path / "l.sft")


@pytest.mark.parametrize(("family", "other"), [("zimage", "klein"), ("klein", "zimage")])
def test_the_other_model_s_lora_is_refused_by_name(tmp_path, family, other):
    title = {"klein": r"FLUX.2 \[klein\]", "zimage": "Z-Image"}[other]
    for name in LAYOUTS[other]:
        file, _ = written(tmp_path, other, name)
        with pytest.raises(ModelError, match=f"does not have: it was made for .*{title}"):
            adapters.load_lora(fixture.network(family), file)


@pytest.mark.parametrize(
    ("family", "name", "targets"),
    [
        ("klein", "DiffSynth's", ("attn.to_q", "attn.to_out")),
        ("zimage", "ai-toolkit's", ("attention.to_q",)),
    ],
)
def test_a_lora_of_more_layers_than_the_run_says_what_to_set(tmp_path, family, name, targets):
    file, _ = written(tmp_path, family, name)
    network = fixture.network(family)
    adapters.add_lora(network, 4, 4, targets)
    with pytest.raises(ModelError, match=r"also changes .* set trainable\.targets to ") as said:
        adapters.load_lora(network, file)
    targets = str(said.value).rpartition("targets to ")[2].split(", ")
    network = fixture.network(family)
    adapters.add_lora(network, 4, 4, targets)
    adapters.load_lora(network, file)


def test_the_parts_of_a_fused_layer_may_come_with_the_whole_once_only(tmp_path):
    tensors, _ = fixture.write("zimage", LAYOUTS["zimage"]["dots"])
    fused, _ = fixture.write("zimage", LAYOUTS["zimage"]["musubi-tuner's, converted"])
    save_file(tensors | fused, tmp_path / "l.sft")
    with pytest.raises(ModelError, match=r"attention\.to_[qkv] twice, under two names"):
        adapters.load_lora(fixture.network("zimage"), tmp_path / "l.sft")
