"""Runs inside a ComfyUI checkout's own Python: never imported by the tests themselves.

usage: python comfyui_compare_fixture.py COMFYUI_ROOT PACK compare FOLDER

Prints a line `REPORT {json}`. What all scripts of this kind need is in comfyui_sampling_fixture.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from comfyui_sampling_fixture import (
    PATHS,
    comfy,
    given,
    interrupting,
    management,
    pack,
    refused,
)
from safetensors.torch import load_file, save_file

PROMPTS, SEEDS, STEPS, CFG = ("a red circle", "a blue square left of a cross"), (7, 8, 9), 4, 2.0
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"


def plan_of(model, sampler, batch, cfg=CFG):
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)
    made = comfy.samplers.sampler_object(sampler)
    plan = pack("nodes.compare.sides").Plan
    return plan(PROMPTS, "a green ring", SEEDS, cfg, made, sigmas, (64, 64), batch)


def drawn(sides, plan, vae, tick=lambda done: None):
    images, why = pack("nodes.compare.sides").images_of(sides, plan, vae, tick)
    assert why == [None] * len(images)
    return images.int()


def with_stock_nodes(side, vae, sampler, channels=4):
    """The images of a side by the usual graph, one at a time."""
    import nodes as stock_nodes

    found = []
    for prompt in PROMPTS:
        positive = stock_nodes.CLIPTextEncode().encode(side.clip, prompt)[0]
        negative = stock_nodes.CLIPTextEncode().encode(side.clip, "a green ring")[0]
        for seed in SEEDS:
            latent = {"samples": torch.zeros(1, channels, 8, 8)}
            given_ = (side.model, seed, STEPS, CFG, sampler, "normal", positive, negative, latent)
            done = stock_nodes.KSampler().sample(*given_)[0]
            images = stock_nodes.VAEDecode().decode(vae, done)[0]
            found.append(pack("nodes.rewards.score").to_pixels(images).int())
    return torch.cat(found)


def apart(one, other):
    return int((one - other).abs().max())


def write_loras(folder, shipped):
    """The demo's LoRA, one of the text encoder alone, and one of nothing that is there."""
    import folder_paths

    random = torch.Generator().manual_seed(0)
    save_file(load_file(shipped), folder / "shipped.safetensors")
    for name, layer in (("text", TEXT), ("strange", "lora_unet_nowhere")):
        tensors = {
            f"{layer}.lora_down.weight": torch.randn(4, 64, generator=random),
            f"{layer}.lora_up.weight": torch.randn(256, 4, generator=random),
        }
        save_file(tensors, folder / f"{name}.safetensors")
    folder_paths.add_model_folder_path("loras", str(folder))


def compare(folder):
    demo, module = pack("nodes.demo.nodes"), pack("nodes.compare.sides")
    model, clip, vae = given(demo.PCPODemoModel, "tiny-sd")
    write_loras(Path(folder), demo.lora_files()["scene"])

    def sides_of(*loras, second=None, text=None):
        return module.sides_of((model, second), (clip, text), loras)

    sides = sides_of("none", "shipped.safetensors")
    ticks = []
    quiet = drawn(sides, plan_of(model, "euler", 2), vae, ticks.append)
    theirs = torch.cat([with_stock_nodes(side, vae, "euler") for side in sides])
    alone = drawn(sides, plan_of(model, "euler_ancestral", 1), vae)
    noisy = torch.cat([with_stock_nodes(side, vae, "euler_ancestral") for side in sides])
    tuned = given(demo.PCPODemoLora, model, "scene", 1.0)
    pair = sides_of("none", "none", second=tuned)
    texts = sides_of("none", "text.safetensors")
    by_text = drawn(texts, plan_of(model, "euler", 2), vae)
    expected = torch.cat([with_stock_nodes(side, vae, "euler") for side in texts])
    report = {
        "names": [side.name for side in (*sides, *pair)],
        "shape": list(quiet.shape),
        "ticks": ticks,
        "ksampler": apart(quiet, theirs),
        "ksampler, noisy": apart(alone, noisy),
        "noisy differs": apart(alone, quiet),
        "sides differ": apart(quiet[:6], quiet[6:]),
        "as a model": apart(drawn(pair, plan_of(model, "euler", 3), vae), quiet),
        "text": [apart(by_text, expected), apart(by_text[:6], by_text[6:])],
        "base again": apart(by_text[:6], quiet[:6]),
        "flow": flow(),
        "interrupted after": interrupted(model, clip, vae),
        "strange": refused(lambda: sides_of("none", "strange.safetensors")),
        "gone": refused(lambda: sides_of("none", "gone.safetensors")),
    }
    print("REPORT", json.dumps(report))


def flow():
    """A model of other latents: the largest difference from the usual graph."""
    demo, module = pack("nodes.demo.nodes"), pack("nodes.compare.sides")
    model, clip, vae = given(demo.PCPODemoModel, "tiny-flow")
    plan = plan_of(model, "euler", 3)
    (side, _) = module.sides_of((model, model.clone()), (clip, None), ("none", "none"))
    return apart(drawn((side,), plan, vae), with_stock_nodes(side, vae, "euler", 16))


def interrupted(model, clip, vae):
    """How often the network was begun when the user interrupted while it ran for the third time."""
    watched, calls = interrupting(model)
    sides = pack("nodes.compare.sides").sides_of((watched, model), (clip, None), ("none", "none"))
    tick = pack("nodes.show").progress(100)
    try:
        drawn(sides, plan_of(model, "euler", 3), vae, tick)
    except management.InterruptProcessingException:
        return len(calls)
    return None


if __name__ == "__main__":
    with torch.inference_mode():  # as ComfyUI runs nodes
        compare(*PATHS)
