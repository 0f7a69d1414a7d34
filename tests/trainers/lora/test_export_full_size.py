"""What a run exports at full size is what loaders of full-size models expect: diffusers says what.

The networks have no memory for their weights; their adapters are real and are really exported.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from comfyui_pcpo.tests.fixtures import (
    flux_fixture,
    klein_fixture,
    sd1_fixture,
    sd3_fixture,
    zimage_fixture,
)
from comfyui_pcpo.trainers.families.flux.model import Flux
from comfyui_pcpo.trainers.families.header import read_header
from comfyui_pcpo.trainers.families.klein.model import Klein
from comfyui_pcpo.trainers.families.sd1.model import StableDiffusion
from comfyui_pcpo.trainers.families.sd1.single_file import CONFIGS
from comfyui_pcpo.trainers.families.sd3.model import StableDiffusion3
from comfyui_pcpo.trainers.families.zimage.model import ZImage
from comfyui_pcpo.trainers.lora import adapters
from diffusers import (
    Flux2KleinPipeline,
    FluxPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
)
from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

RANK, ALPHA = 2, 4
FAMILIES = {
    "sd1": (StableDiffusion, 128),
    "sd3": (StableDiffusion3, 191),
    "flux": (Flux, 190),
    "zimage": (ZImage, 136),
    "klein": (Klein, 80),
}
"""With the number of adapters of the published model (SD1.5, SD3.5-M) with the default targets."""
PIPELINES = {
    "sd3": StableDiffusion3Pipeline,
    "flux": FluxPipeline,
    "zimage": ZImagePipeline,
    "klein": Flux2KleinPipeline,
}
FIXTURES = {"flux": flux_fixture, "zimage": zimage_fixture, "klein": klein_fixture}


def network(family: str, size: str) -> nn.Module:
    if (fixture := FIXTURES.get(family)) is not None:
        return fixture.full_size() if size == "full" else fixture.tiny_transformer()
    if family == "sd3":
        if size == "tiny":
            return sd3_fixture.transformer("sd3.5-m")
        with torch.device("meta"):
            return SD3Transformer2DModel(**sd3_fixture.FULL["sd3.5-m"])
    if size == "tiny":
        return sd1_fixture.tiny_unet()
    with torch.device("meta"):
        config = UNet2DConditionModel.load_config(str(CONFIGS), subfolder="unet")
        return UNet2DConditionModel.from_config(config)


def exported(family: str, size: str, path: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a file that a run of this family writes."""
    made = network(family, size)
    adapters.add_lora(made, RANK, ALPHA, FAMILIES[family][0].lora_targets)
    for _, layer in adapters.adapters(made):
        for part in (layer.lora_A["default"], layer.lora_B["default"]):
            nn.init.zeros_(part.to_empty(device="cpu").weight)
    return dict(read_header(adapters.export_lora(made, path)).shapes)


def peft_names(family: str) -> dict[str, tuple[int, ...]]:
    """The adapters of the full-size network, as diffusers' own `add_adapter` makes them."""
    made = network(family, "full")
    ends = tuple(f".{target}" for target in FAMILIES[family][0].lora_targets)
    targets = [name for name in adapters.module_names(made) if f".{name}".endswith(ends)]
    made.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    return {key: tuple(t.shape) for key, t in get_peft_model_state_dict(made).items()}


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_flow_models_export_what_diffusers_saves_and_alpha(family, tmp_path):
    ours = exported(family, "full", tmp_path / "ours.safetensors")
    layers = {key: torch.zeros(shape) for key, shape in peft_names(family).items()}
    PIPELINES[family].save_lora_weights(tmp_path, transformer_lora_layers=layers)
    theirs = read_header(tmp_path / "pytorch_lora_weights.safetensors").shapes
    weights = {key: shape for key, shape in ours.items() if not key.endswith(".alpha")}
    assert weights == theirs
    modules = {key.removesuffix(".lora_A.weight") for key in weights if "lora_A" in key}
    assert len(modules) == FAMILIES[family][1]
    assert ours.keys() - weights.keys() == {f"{module}.alpha" for module in modules}


def test_sd1_exports_kohyas_names_of_what_diffusers_saves(tmp_path):
    ours = exported("sd1", "full", tmp_path / "ours.safetensors")
    layers = {f"unet.{key}": torch.zeros(s) for key, s in peft_names("sd1").items()}
    theirs = {k: tuple(t.shape) for k, t in convert_state_dict_to_kohya(layers).items()}
    assert ours.keys() == theirs.keys() and len(ours) == 3 * FAMILIES["sd1"][1]
    assert all(ours[key] == theirs[key] for key in ours if not key.endswith(".alpha"))


def test_diffusers_reads_each_file_back_under_its_own_names(tmp_path):
    for family in FAMILIES:
        path = tmp_path / f"{family}.safetensors"
        exported(family, "full", path)
        expected = {f"{_part(family)}.{key}": s for key, s in peft_names(family).items()}
        found = _read(family, path)
        assert found == expected and len(found) == 2 * FAMILIES[family][1], family


def _part(family: str) -> str:
    return "unet" if family == "sd1" else "transformer"


def _read(family: str, path: Path) -> dict[str, tuple[int, ...]]:
    """What diffusers' loader of this pipeline makes of a file, alphas left out."""
    if family == "sd1":
        config = network("sd1", "full").config
        state, _ = StableDiffusionPipeline.lora_state_dict(str(path), unet_config=config)
        state = convert_unet_state_dict_to_peft(state)  # as its loader does next
    else:
        state = PIPELINES[family].lora_state_dict(str(path))
    return {k: tuple(t.shape) for k, t in state.items() if not k.endswith(".alpha")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_exports_by_the_same_rule(family, tmp_path):
    """Names but for their numbers; and the rank where it belongs."""
    rules = []
    for size in ("tiny", "full"):
        found = exported(family, size, tmp_path / f"{size}.safetensors")
        rules.append({re.sub(r"(?<=[._])\d+(?=[._])", "N", key) for key in found})
        for key, shape in found.items():
            if key.endswith(".alpha"):
                assert shape == ()
            else:
                is_down = "lora_down" in key or "lora_A" in key
                assert shape[0 if is_down else 1] == RANK and len(shape) == 2
    assert rules[0] == rules[1]
