"""LoRA files of other tools: ComfyUI applies what is read here."""

from __future__ import annotations

from pathlib import Path

import flow_layouts_fixture as flow
import lora_layouts_fixture as fixture
import pytest
import torch
from comfyui_fixture import in_comfyui, needs_host
from lora_layouts_fixture import LAYOUTS
from safetensors.torch import load_file, save_file

pytestmark = needs_host
SCRIPT = Path(__file__).parent / "scripts" / "comfyui_lora_layouts_fixture.py"


def test_comfyui_applies_the_same_to_sdxl(tmp_path):
    """Its own names and arithmetic, on the shapes of a network of tiny width."""
    read = {name: layout for name, layout in LAYOUTS.items() if "ComfyUI" in layout.read_by}
    paths = {number: tmp_path / f"{number}.safetensors" for number in range(len(read))}
    for number, layout in enumerate(read.values()):
        save_file(layout.tensors, paths[number])
    shapes = {
        f"diffusion_model.{fixture.ORIGINAL[path]}.weight": module.weight.detach().zero_()
        for path, module in fixture.layers((torch.nn.Linear, torch.nn.Conv2d)).items()
    }
    save_file(shapes, tmp_path / "network.safetensors")
    in_comfyui(SCRIPT, tmp_path, len(read), "SDXL", str(fixture.COMFYUI))
    for number, (name, layout) in enumerate(read.items()):
        found = load_file(tmp_path / f"{number}-applied.safetensors")
        assert len(found) == len(layout.parts), name
        for path, (down, up) in layout.parts.items():
            applied = found[f"diffusion_model.{fixture.ORIGINAL[path]}.weight"]
            assert (applied - fixture.delta_of(down, up)).abs().max() < 1e-5, (name, path)


@pytest.mark.parametrize("family", flow.LAYOUTS)
def test_comfyui_applies_the_same_to(family, tmp_path):
    read = [layout for layout in flow.LAYOUTS[family].values() if "ComfyUI" in layout.read_by]
    expected = []
    for number, layout in enumerate(read):
        tensors, changes = flow.write(family, layout)
        save_file(tensors, tmp_path / f"{number}.safetensors")
        expected.append(changes)
    zeros = {f"diffusion_model.{key}": tensor for key, tensor in flow.shapes(family).items()}
    save_file(zeros, tmp_path / "network.safetensors")
    kind, config = flow.COMFYUI[family]
    in_comfyui(SCRIPT, tmp_path, len(read), kind, str(config))
    for number, changes in enumerate(expected):
        found = load_file(tmp_path / f"{number}-applied.safetensors")
        assert found.keys() == {f"diffusion_model.{name}.weight" for name in changes}
        for name, change in changes.items():
            applied = found[f"diffusion_model.{name}.weight"]
            torch.testing.assert_close(applied, change, atol=1e-5, rtol=1e-5)
