"""The real ComfyUI that tests run in, and the tiny models that they load there.

COMFYUI_PATH names a ComfyUI checkout, COMFYUI_PYTHON a Python that has its requirements (this one
where unset), PCPO_TINY_MODELS a models folder with tiny checkpoints.

    pytestmark = [needs_host, needs_models("vae/tiny_ae16.safetensors")]
    printed = in_comfyui(SCRIPT, "run", file)  # python SCRIPT COMFYUI_PATH run FILE
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import comfyui_pcpo
import pytest
import torch
from safetensors.torch import load_file, save_file

HOST = os.environ.get("COMFYUI_PATH", "")
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
MODELS = Path(os.environ.get("PCPO_TINY_MODELS", "") or "/nonexistent")
PACK = Path(comfyui_pcpo.__path__[0])

LAYERS = {
    "sd15": ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", 320),
    "sdxl": ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", 320),
    "sd35": ("transformer.transformer_blocks.0.attn.to_q", 128),
    "flux": ("transformer.transformer_blocks.0.attn.to_q", 128),
    "zimage": ("diffusion_model.layers.0.attention.to_q", 1152),
    "klein": ("transformer.transformer_blocks.0.attn.to_q", 128),
}
"""A layer of each tiny model, and its width."""

needs_host = pytest.mark.skipif(
    not HOST or not (Path(HOST) / "comfy").is_dir(),
    reason="COMFYUI_PATH names no ComfyUI checkout",
)


def needs_models(*files: str) -> pytest.MarkDecorator:
    """A mark: skipped where one of these files is not in the folder of tiny models."""
    return pytest.mark.skipif(
        not all((MODELS / file).is_file() for file in files),
        reason=f"PCPO_TINY_MODELS names no folder with {', '.join(files)}",
    )


def write_lora(file: Path, family: str) -> None:
    """A LoRA of a tiny model: of one layer, named as kohya does for a UNet, else as diffusers."""
    layer, width = LAYERS[family]
    is_kohya = layer.startswith("lora_unet_")
    down, up = ("lora_down", "lora_up") if is_kohya else ("lora_A", "lora_B")
    random = torch.Generator().manual_seed(len(file.stem))
    tensors = {
        f"{layer}.{down}.weight": torch.randn(4, width, generator=random),
        f"{layer}.{up}.weight": torch.randn(width, 4, generator=random) * 0.05,
        f"{layer}.alpha": torch.tensor(4.0),
    }
    save_file(tensors, file)


def in_comfyui(script: Path, *arguments: object, seconds: float = 300) -> str:
    """Run a script in ComfyUI's Python, with the checkout as its first argument.

    Args:
        script: of this folder.
        arguments: the others.
        seconds: it may take; the machine may be busy.

    Returns:
        What it has printed, to stderr and then to stdout.
    """
    command = [PYTHON, str(script), HOST, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr + done.stdout


def report_in(printed: str) -> Any:
    """The JSON that a script prints after the word REPORT."""
    return json.loads(printed.partition("REPORT ")[2])


def computed(handed: tuple[Any, Path], case: str) -> dict[str, torch.Tensor]:
    """What ComfyUI computed in a case; `handed` is its report, and the folder of its numbers."""
    return load_file(handed[1] / case / "computed.safetensors")


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the largest number."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
