"""Have ComfyUI apply LoRA files to zeros: a network given as its tensors, class and `unet_config`.

Writes what each changes, and fails where a change of the network was not read.
"""

from __future__ import annotations

import ast
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

COMFYUI, FOLDER, COUNT, CLASS, CONFIG = sys.argv[1:6]
sys.path.insert(0, COMFYUI)
sys.argv = [sys.argv[0], "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import comfy.lora_convert  # noqa: E402
import comfy.model_base  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

LOGGED: list[str] = []
folder = Path(FOLDER)
zeros = load_file(folder / "network.safetensors")
kind = getattr(comfy.model_base, CLASS)
model = kind.__new__(kind)
model.state_dict = lambda: zeros
model.model_config = SimpleNamespace(unet_config=ast.literal_eval(CONFIG))
logging.getLogger().addFilter(lambda record: LOGGED.append(record.getMessage()) or True)
names = comfy.lora.model_lora_keys_unet(model, {})
for number in range(int(COUNT)):
    lora = comfy.lora_convert.convert_lora(load_file(folder / f"{number}.safetensors"))
    patches = {}
    for place, patch in comfy.lora.load_lora(lora, names).items():
        given = (place,) if isinstance(place, str) else place
        key, offset, change = (*given, None, None)[:3]  # as ModelPatcher.add_patches has it
        patches.setdefault(key, []).append((1.0, patch, 1.0, offset, change))
    applied = {
        key: comfy.lora.calculate_weight(of, zeros[key].clone(), key).contiguous()
        for key, of in patches.items()
    }
    save_file(applied, folder / f"{number}-applied.safetensors")
if left := [said for said in LOGGED if "not loaded" in said and "lora_te" not in said]:
    sys.exit(f"{len(left)} left out: {left[:3]}")
