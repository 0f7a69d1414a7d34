"""Runs inside a ComfyUI checkout's own Python: never imported by the tests themselves.

usage: python comfyui_flow_fixture.py COMFYUI_ROOT NETWORK CLIP VAE LORA INPUTS OUTPUTS SAVED

What stock ComfyUI computes with a flow model's files: the prompt's embeddings, the velocity without
and with a LoRA, the image; and the model with its LoRA as its save node writes it.
"""

from __future__ import annotations

import os
import sys

ROOT, NETWORK, CLIP, VAE, LORA, INPUTS, OUTPUTS, SAVED = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, ROOT)
os.chdir(ROOT)

import comfy.options  # noqa: E402 (the path has to be set first)

comfy.options.enable_args_parsing()

import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

comfy.utils.set_progress_bar_enabled(False)


def velocity(model, inputs):
    x, sigma = inputs["latents"], inputs["sigma"]
    extra = {"pooled_output": inputs["pooled"], "guidance": 3.5}

    def sampler(denoiser, _x, sigmas, extra_args=None, callback=None, disable=None):
        return (x - denoiser(x, sigmas[0].expand(len(x)), **extra_args)) / sigma

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([[inputs["tokens"], extra]], [[inputs["tokens"], extra]])
    guider.set_cfg(1.0)
    out = {}

    def keep(*args, **kwargs):
        out["velocity"] = sampler(*args, **kwargs)
        return x

    sigmas = torch.stack([sigma, sigma / 2])
    kept = comfy.samplers.KSAMPLER(keep)
    guider.sample(torch.zeros_like(x), torch.zeros_like(x), kept, sigmas, seed=0)
    return out["velocity"].contiguous()


def main():
    inputs = load_file(INPUTS)
    prompt = bytes(inputs["prompt"].tolist()).decode()
    model = comfy.sd.load_diffusion_model(NETWORK)
    clip = comfy.sd.load_clip([CLIP], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
    tokens, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
    tensors, metadata = comfy.utils.load_torch_file(VAE, return_metadata=True)
    vae = comfy.sd.VAE(sd=tensors, metadata=metadata)
    images = vae.decode(model.model.process_latent_out(inputs["latents"]))
    outputs = {
        "tokens": tokens.contiguous(),
        "pooled": pooled.contiguous(),
        "images": images.contiguous(),
        "velocity": velocity(model, inputs),
    }
    lora = comfy.utils.load_torch_file(LORA)
    tuned = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
    print("LORA", len(tuned.patches), len(lora))
    outputs["tuned"] = velocity(tuned, inputs)
    save_file(outputs, OUTPUTS)
    comfy.sd.save_checkpoint(SAVED, tuned, clip, vae)


main()
