"""LoRA files of the flow families: every way to name a module gives the same change of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfyui_pcpo.tests.fixtures import flux_fixture
from comfyui_pcpo.trainers.families import ModelError
from comfyui_pcpo.trainers.families.assemble import swap_halves
from comfyui_pcpo.trainers.families.flux import file as flux_file
from comfyui_pcpo.trainers.families.registry import FAMILIES
from comfyui_pcpo.trainers.families.sd3 import file as sd3_file
from comfyui_pcpo.trainers.lora import keys
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

CONVERSIONS = {"flux": flux_file.to_diffusers, "sd3": sd3_file.to_diffusers}


def network(family: str) -> nn.Module:
    if family == "flux":
        return flux_fixture.tiny_transformer()
    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        caption_projection_dim=32,
        joint_attention_dim=24,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def linears(module: nn.Module) -> dict[str, Tensor]:
    found = module.named_modules()
    return {name: part.weight.detach() for name, part in found if isinstance(part, nn.Linear)}


def natives(family: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in the original layout, taken back by the conversion's own table of names."""
    found = {}
    for name, paths, is_swapped in FAMILIES[family].part("file").original_layers(weights):
        if all(path in weights for path in paths):
            fused = torch.cat([weights[path] for path in paths])
            found[name] = swap_halves(fused) if is_swapped else fused
    return found


def random_lora(shapes: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    found = {}
    for i, (name, weight) in enumerate(shapes.items()):
        rank = 2 + i % 3
        down = torch.randn(rank, weight.shape[1], generator=generator)
        up = torch.randn(len(weight), rank, generator=generator)
        found[name] = (down, up, torch.tensor(1.5 + i % 2))
    return found


def write(lora: dict[str, tuple[Tensor, Tensor, Tensor]], path: Path, name: str) -> Path:
    old = name.startswith("lora_")
    ends = ("lora_down.weight", "lora_up.weight", "alpha")
    ends = ends if old else ("lora_A.weight", "lora_B.weight", "alpha")
    tensors = {}
    for module, parts in lora.items():
        key = name.format(module.replace(".", "_") if old else module)
        tensors |= {f"{key}.{end}": part for end, part in zip(ends, parts, strict=True)}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("family", ["flux", "sd3"])
@pytest.mark.parametrize(
    "name", ["transformer.{}", "base_model.model.{}", "{}", "lora_transformer_{}", "lycoris_{}"]
)
def test_diffusers_paths(family, name, tmp_path):
    weights = linears(network(family))
    lora = random_lora(weights)
    path = write(lora, tmp_path / "lora.safetensors", name)
    rows = {key: len(weight) for key, weight in weights.items()}
    found = keys.read_lora(path, FAMILIES[family], rows)
    assert found.keys() == weights.keys()
    for key, (down, up, alpha) in lora.items():
        assert found[key].down.equal(down) and found[key].up.equal(up)
        assert found[key].alpha == alpha


@pytest.mark.parametrize("family", ["flux", "sd3"])
@pytest.mark.parametrize("name", ["lora_unet_{}", "diffusion_model.{}", "{}"])
def test_original_names_change_what_they_change_there(family, name, tmp_path):
    """The changed weights converted are the converted weights changed."""
    weights = linears(network(family))
    original = natives(family, weights)
    assert len(original) < len(weights)  # some are fused
    lora = random_lora(original)
    path = write(lora, tmp_path / "lora.safetensors", name)
    rows = {key: len(weight) for key, weight in weights.items()}
    found = keys.read_lora(path, FAMILIES[family], rows)
    assert found.keys() == weights.keys()
    changed = {
        f"{key}.weight": weight + lora[key][2] / len(lora[key][0]) * lora[key][1] @ lora[key][0]
        for key, weight in original.items()
    }
    for key, weight in CONVERSIONS[family](changed).items():
        module = key.removesuffix(".weight")
        delta = found[module]
        torch.testing.assert_close(weights[module] + delta.scale * delta.up @ delta.down, weight)


def test_names_that_are_written_are_read(tmp_path):
    assert keys.tensor_names(FAMILIES["flux"], "transformer_blocks.0.attn.to_q") == (
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight",
        "transformer.transformer_blocks.0.attn.to_q.alpha",
    )


def test_refusals(tmp_path):
    weights = linears(network("flux"))
    rows = {key: len(weight) for key, weight in weights.items()}

    def read(tensors, **options):
        save_file(tensors, tmp_path / "lora.safetensors")
        return keys.read_lora(tmp_path / "lora.safetensors", FAMILIES["flux"], rows, **options)

    def pair(key, up=256, down=256):
        return {
            f"{key}.lora_A.weight": torch.ones(2, down),
            f"{key}.lora_B.weight": torch.ones(up, 2),
        }

    good = pair("transformer.transformer_blocks.0.attn.to_q")
    assert read(good)["transformer_blocks.0.attn.to_q"].scale == 1  # no alpha: that of the rank
    with pytest.raises(ModelError, match=r"a module transformer\.joint_blocks\.0"):
        read(pair("transformer.joint_blocks.0.x_block.attn.qkv"))
    with pytest.raises(ModelError, match="rows where the network needs 768"):
        read(pair("diffusion_model.double_blocks.0.img_attn.qkv"))
    with pytest.raises(ModelError, match=r"changes transformer_blocks.0.attn.to_q twice"):
        read(good | pair("diffusion_model.double_blocks.0.img_attn.qkv", up=768))
    with pytest.raises(ModelError, match="also changes the text encoder"):
        read(good | pair("text_encoder.x"))
    assert len(read(good | pair("lora_te1_x"), ignore_text_encoder=True)) == 1
    with pytest.raises(ModelError, match="no plain LoRA weight"):
        read(good | {"transformer.x.lora_magnitude_vector": torch.ones(2)})
    with pytest.raises(ModelError, match="lacks the up weight"):
        read({"transformer.proj_out.lora_A.weight": torch.ones(2, 256)})
