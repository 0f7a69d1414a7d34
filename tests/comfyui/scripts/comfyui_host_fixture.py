"""Runs inside a ComfyUI checkout's own Python: never imported by the tests themselves.

usage: python comfyui_host_fixture.py COMFYUI_ROOT write CHECKPOINT
       python comfyui_host_fixture.py COMFYUI_ROOT run CHECKPOINT LORA INPUTS OUTPUTS MERGED
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys

ROOT, TASK, *PATHS = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, ROOT)
os.chdir(ROOT)

import comfy.options  # noqa: E402 (the path has to be set first)

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import comfy.lora_convert  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


class Warnings(logging.Handler):
    """ComfyUI says on its log which keys of a LoRA it did not use."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def fill(module, prefix, buffer):
    """Random weights that share one buffer, so that the file is small; norms stay near 1."""
    tensors = {}
    for key, value in module.state_dict().items():
        shape = tuple(value.shape)
        if not shape:
            tensors[prefix + key] = torch.tensor(1.0 if "scale" in key else 0.0)
            continue
        rows, columns = shape[0], math.prod(shape[1:])
        if rows * columns < buffer.numel():
            start = (hash_of(key) * 7919) % (buffer.numel() - rows * columns)
            weight = buffer[start : start + rows * columns].view(shape)
        else:
            stride = (buffer.numel() - columns) // rows
            weight = buffer.as_strided((rows, columns), (stride, 1)).view(shape)
        is_norm = len(shape) == 1 and key.endswith("weight")
        tensors[prefix + key] = weight + 1 if is_norm else weight
    return tensors


def hash_of(key):
    return sum(i * ord(letter) for i, letter in enumerate(key, 1))


def write(path):
    """The smallest SD1.x that ComfyUI's detection accepts: two levels, TAESD, CLIP-L whole."""
    import comfy.clip_model
    import comfy.ops
    import comfy.taesd.taesd
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    ops = comfy.ops.disable_weight_init
    with open(os.path.join(ROOT, "comfy", "sd1_clip_config.json"), encoding="utf-8") as file:
        config = json.load(file)
    with torch.device("meta"):
        unet = UNetModel(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=320,
            num_res_blocks=[1, 1],
            channel_mult=[1, 1],
            transformer_depth=[1, 1],
            transformer_depth_output=[1, 1, 1, 1],
            transformer_depth_middle=1,
            num_heads=8,
            num_head_channels=-1,
            use_spatial_transformer=True,
            context_dim=768,
            legacy=False,
            use_linear_in_transformer=False,
            operations=ops,
        )
        clip = comfy.clip_model.CLIPTextModel(config, torch.float32, "meta", ops)
        vae = comfy.taesd.taesd.TAESD(latent_channels=4)
    buffer = (torch.randn(1_500_001, generator=torch.Generator().manual_seed(0)) * 0.03).half()
    tensors = fill(unet, "model.diffusion_model.", buffer)
    tensors |= fill(vae, "first_stage_model.", buffer)
    text = fill(clip, "cond_stage_model.transformer.", buffer)
    tensors |= {k: t for k, t in text.items() if "text_projection" not in k}
    torch.save({"state_dict": tensors}, path)


def run(checkpoint, lora_path, inputs_path, outputs_path, merged_path):
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(checkpoint)
    inputs = load_file(inputs_path)
    prompt = bytes(inputs["prompt"].tolist()).decode()
    out = {"embeds": clip.encode_from_tokens(clip.tokenize(prompt))}
    raw = model.model.process_latent_out(inputs["latents"])
    out["images"] = vae.decode(raw)

    lora = comfy.utils.load_torch_file(lora_path, safe_load=True)
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    spy = Warnings()
    logging.getLogger().addHandler(spy)
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(lora), keys)
    logging.getLogger().removeHandler(spy)
    tuned = model.clone()
    applied = tuned.add_patches(patches, 1.0)
    for name, patcher in (("base", model), ("tuned", tuned)):
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)
        network = patcher.model.diffusion_model
        with torch.no_grad():
            out[name] = network(
                inputs["latents"].to(patcher.load_device), inputs["timestep"], inputs["embeds"]
            )
    comfy.sd.save_checkpoint(merged_path, tuned, clip, vae)
    save_file({key: tensor.float().cpu().contiguous() for key, tensor in out.items()}, outputs_path)
    unmatched = [line for line in spy.lines if "not loaded" in line or "lora" in line.lower()]
    report = {"patches": len(patches), "applied": len(applied), "unmatched": unmatched}
    print("REPORT", json.dumps(report))


if __name__ == "__main__":
    {"write": write, "run": run}[TASK](*PATHS)
