"""Have ComfyUI apply LoRA files to a network of zeros, given as its tensors and `unet_config`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

COMFYUI, FOLDER, COUNT, CONFIG = sys.argv[1:5]
sys.path.insert(0, COMFYUI)
sys.argv = [sys.argv[0], "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import comfy.lora_convert  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

folder = Path(FOLDER)
zeros = load_file(folder / "network.safetensors")
model = SimpleNamespace(
    state_dict=lambda: zeros, model_config=SimpleNamespace(unet_config=ast.literal_eval(CONFIG))
)
names = comfy.lora.model_lora_keys_unet(model, {})
for number in range(int(COUNT)):
    lora = comfy.lora_convert.convert_lora(load_file(folder / f"{number}.safetensors"))
    applied = {}
    for key, patch in comfy.lora.load_lora(lora, names).items():
        patches = [(1.0, patch, 1.0, None, None)]
        applied[key] = comfy.lora.calculate_weight(patches, zeros[key].clone(), key).contiguous()
    save_file(applied, folder / f"{number}-applied.safetensors")
