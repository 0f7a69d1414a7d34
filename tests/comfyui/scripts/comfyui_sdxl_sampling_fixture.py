"""Runs inside a ComfyUI checkout's own Python: never imported by the tests themselves.

Samples a tiny SDXL model with the pack's nodes, and writes down the latents with what made them.

usage: python comfyui_sdxl_sampling_fixture.py COMFYUI_ROOT PACK CHECKPOINT PLANS_FILE OUT_FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

CHECKPOINT, PLANS, OUT = sys.argv[3:]
sys.argv[3:] = ["sdxl"]  # the task, and no paths

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

STEPS = 20


def conditioning(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, 77, 2048, generator=generator)
    return [[tokens, {"pooled_output": torch.randn(1, 1280, generator=generator)}]]


def lora_of(model, seed):
    """A MODEL with a random LoRA on the attention's queries, far from nothing."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    sizes = model.model.state_dict()
    for name, key in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        if name.startswith("lora_unet_") and name.endswith("attn2_to_q"):
            rows, columns = sizes[key].shape
            tensors[f"{name}.lora_up.weight"] = torch.randn(rows, 2, generator=generator) * 0.2
            tensors[f"{name}.lora_down.weight"] = torch.randn(2, columns, generator=generator) * 0.2
    return comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)[0]


def one_step(guider, empty):
    """Where euler's step leads, which is affine in the clean estimate."""
    sigmas, noise = torch.tensor([7.0, 3.0]), pack("nodes.sampling.nodes").StreamNoise(7)
    return sampled(noise, guider, comfy.samplers.sampler_object("euler"), sigmas, empty)


def weights_of(model, sigmas):
    node = pack("nodes.sampling.credit_plot").PCPOCreditWeights
    return given(node, model, sigmas, "auto", -1.0, -1)[1]


def main():
    nodes = pack("nodes.sampling.nodes")
    model = comfy.sd.load_checkpoint_guess_config(CHECKPOINT, output_clip=False, output_vae=False)[
        0
    ]
    positive, negative = conditioning(1), conditioning(2)
    out = {"positive": positive[0][0], "pooled": positive[0][1]["pooled_output"]}
    out |= {"negative": negative[0][0], "negative pooled": negative[0][1]["pooled_output"]}
    empty, report = {"samples": torch.zeros(2, 4, 8, 12)}, {}
    tuned = [lora_of(model, seed) for seed in (3, 4)]

    def latents_of(plan, guider):
        sigmas = given(nodes.PCPOScheduler, model, plan["steps"], "auto", 1.0)
        made = sampler(noise_level=plan["eta"], credit=plan["credit"])
        found = sampled(nodes.StreamNoise(plan["seed"]), guider, made, sigmas, empty)
        report["first sigma"] = float(sigmas[0])
        return model.model.process_latent_in(found)

    with torch.inference_mode():  # as the executor runs nodes
        for name, plan in json.loads(Path(PLANS).read_text()).items():
            out[name] = latents_of(plan, guider_of(model, positive, negative, plan["guidance"]))
        alone = [guider_of(one, positive, negative, 4.0) for one in (model, *tuned)]
        way = {"steps": 4, "eta": 1.0, "credit": "native", "seed": 5, "guidance": 4.0}
        led = mixed(model, tuned, positive, negative)
        out["one step"] = one_step(led, empty)
        base, first, second = (one_step(guider, empty) for guider in alone)
        out["one step summed"] = base + 0.7 * (first - base) + 0.4 * (second - base)
        out["base"], out["led"] = latents_of(way, alone[0]), latents_of(way, led)
        relative = way | {"credit": "relative"}
        out["relative"] = latents_of(relative, mixed(model, tuned[:1], positive, negative, [1.0]))
        out["plainly"] = latents_of(way, alone[1])
        sigmas = given(nodes.PCPOScheduler, model, STEPS, "auto", 1.0)
        report["table"] = weights_of(model, sigmas)
    kept = {key: value.detach().float().cpu().contiguous() for key, value in out.items()}
    save_file(kept, OUT)
    print("REPORT", json.dumps(report))


def mixed(model, tuned, positive, negative, gammas=(0.7, 0.4)):
    """PCPO Implicit Reward Guider of LoRAs."""
    module = pack("nodes.guidance.nodes")
    ones = {
        f"tuned_{i}": given(module.PCPOTunedModel, one, gamma, 0.0, 1.0)
        for i, (one, gamma) in enumerate(zip(tuned, gammas, strict=True))
    }
    return given(module.PCPOImplicitRewardGuider, model, positive, 4.0, ones, negative)


if __name__ == "__main__":
    main()
