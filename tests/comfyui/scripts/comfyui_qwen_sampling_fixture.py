"""Runs inside a ComfyUI checkout's own Python: never imported by the tests themselves.

Samples a small Z-Image or FLUX.2 [klein] with the pack's nodes, and writes down the latents with
what made them.

usage: python comfyui_qwen_sampling_fixture.py COMFYUI_ROOT PACK FAMILY NETWORK PLANS_FILE OUT_FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FAMILY, NETWORK, PLANS, OUT = sys.argv[3:]
sys.argv[3:] = [FAMILY]  # the task, and no paths

from comfyui_sampling_fixture import (  # noqa: E402 (sets ComfyUI up, by the arguments)
    comfy,
    given,
    guider_of,
    pack,
    sampled,
    sampler,
    save_file,
    torch,
)

# isort: split
import small_models  # noqa: E402, F401 (tells ComfyUI of their sizes)
from comfy_extras.nodes_flux import Flux2Scheduler  # noqa: E402
from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow  # noqa: E402

IS_KLEIN = FAMILY == "klein"
SHAPE = (2, 128, 4, 6) if IS_KLEIN else (2, 16, 8, 12)
WIDTH, HEIGHT = 96, 64
STEPS = 8


def conditioning(seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 512, 7680) if IS_KLEIN else (1, 10 + seed, 2560)
    return [[torch.randn(*shape, generator=generator), {"pooled_output": None}]]


def lora_of(model, seed):
    """A MODEL with a random LoRA on layers of all its blocks, far from nothing."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    ends = ("attention.qkv.weight", "img_attn.qkv.weight", "linear1.weight", "linear2.weight")
    for key, weight in model.model.state_dict().items():
        if key.endswith(ends):
            name, (rows, columns) = key.removesuffix(".weight"), weight.shape
            tensors[f"{name}.lora_up.weight"] = torch.randn(rows, 2, generator=generator) * 0.1
            tensors[f"{name}.lora_down.weight"] = torch.randn(2, columns, generator=generator) * 0.1
    return comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)[0]


def sigmas_of(model, steps):
    if IS_KLEIN:
        return given(Flux2Scheduler, steps, WIDTH, HEIGHT)
    return given(pack("nodes.sampling.nodes").PCPOScheduler, model, steps, "auto", 1.0)


def one_step(guider, empty):
    """Where euler's step leads, which is affine in the clean estimate."""
    sigmas, noise = torch.tensor([0.8, 0.5]), pack("nodes.sampling.nodes").StreamNoise(7)
    return sampled(noise, guider, comfy.samplers.sampler_object("euler"), sigmas, empty)


def mixed(model, tuned, positive, negative):
    """PCPO Implicit Reward Guider of LoRAs."""
    module = pack("nodes.guidance.nodes")
    ones = {
        f"tuned_{i}": given(module.PCPOTunedModel, one, gamma, 0.0, 1.0)
        for i, (one, gamma) in enumerate(zip(tuned, (0.7, 0.4), strict=True))
    }
    return given(module.PCPOImplicitRewardGuider, model, positive, 4.0, ones, negative)


def main():
    nodes = pack("nodes.sampling.nodes")
    model = comfy.sd.load_diffusion_model(NETWORK)
    if not IS_KLEIN:
        model = ModelSamplingAuraFlow().patch_aura(model, 4.0)[0]
    positive, negative = conditioning(1), conditioning(2)
    out = {"positive": positive[0][0], "negative": negative[0][0]}
    empty, report = {"samples": torch.zeros(SHAPE)}, {}
    tuned = [lora_of(model, seed) for seed in (3, 4)]
    with torch.inference_mode():  # as the executor runs nodes
        for name, plan in json.loads(Path(PLANS).read_text()).items():
            sigmas = sigmas_of(model, plan["steps"])
            made = sampler(plan["transition"], plan["noise"], credit=plan["credit"])
            guider = guider_of(model, positive, negative, plan["guidance"])
            found = sampled(nodes.StreamNoise(plan["seed"]), guider, made, sigmas, empty)
            out[name] = model.model.process_latent_in(found)
            out[f"{name} sigmas"] = sigmas
        alone = [guider_of(one, positive, negative, 4.0) for one in (model, *tuned)]
        guider = mixed(model, tuned, positive, negative)
        out["one step"] = one_step(guider, empty)
        base, first, second = (one_step(one, empty) for one in alone)
        out["one step base"] = base
        out["one step summed"] = base + 0.7 * (first - base) + 0.4 * (second - base)
        report["beside"] = len(guider.beside)  # that could not be rows of one batch
        node = pack("nodes.sampling.credit_plot").PCPOCreditWeights
        report["table"] = given(node, model, sigmas_of(model, STEPS), "auto", -1.0, -1)[1]
    kept = {key: value.detach().float().cpu().contiguous() for key, value in out.items()}
    save_file(kept, OUT)
    print("REPORT", json.dumps(report))


if __name__ == "__main__":
    main()
