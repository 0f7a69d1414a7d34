"""Runs inside a ComfyUI checkout's own Python: never imported by the tests themselves.

Loads small Z-Image and FLUX.2 [klein] models with ComfyUI's stock nodes in several ways, hands each
over to a worker as the pack does, and writes down what ComfyUI computes with them.

usage: python comfyui_qwen_fixture.py COMFYUI_ROOT PACK MODELS OUT CASE...
"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path

import comfyui_training_fixture as common  # sets ComfyUI up
from comfyui_training_fixture import CHECKPOINTS, FILES, OUT, PROMPT, pack, stock, told, use

# isort: split
import comfy.model_management as management
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import small_models  # noqa: F401 (tells ComfyUI of their sizes)
import torch
from comfy_extras import nodes_model_advanced
from safetensors.torch import save_file

comfy.utils.set_progress_bar_enabled(False)

SIGMA = 0.7371
LOGGED: list[str] = []
logging.getLogger().addFilter(lambda record: LOGGED.append(record.getMessage()) or True)
PARTS = {
    "zimage": ("z_image.ckpt", "lumina2", "tiny_ae16.safetensors"),
    "klein": ("flux-2-klein-base.safetensors", "flux2", "flux2-vae.ckpt"),
}
"""Network, type of the text encoder, autoencoder."""


# --- files ---------------------------------------------------------------------------------------


def make_saved(file):
    """As ComfyUI's Save Checkpoint writes it, without its embedding of gigabytes twice."""
    comfy.sd.save_checkpoint(str(file), *parts(file.stem))


def make_renamed(file):
    """Z-Image's network in diffusers' names, which ComfyUI reads too."""
    network = pack("trainers.families.zimage.file")
    stored = torch.load(Path(CHECKPOINTS, "diffusion_models", "z_image.ckpt"), weights_only=True)
    torch.save({"state_dict": network.to_diffusers(stored["state_dict"])}, file)


def make_lora(file):
    """Random, on the network and on Qwen3, far from nothing."""
    model, clip, _ = parts(file.stem)
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, module in (("", model.model), ("text_encoders.", clip.cond_stage_model)):
        for key, weight in module.state_dict().items():
            wanted = any(w in key for w in ("attention.", "attn", "linear1", "linear2"))
            if wanted and key.endswith("weight") and weight.ndim == 2:
                rows, columns = weight.shape
                place = name + key.removesuffix(".weight")
                up = torch.randn(rows, 2, generator=generator)
                down = torch.randn(2, columns, generator=generator)
                tensors[f"{place}.lora_up.weight"] = up * 0.02
                tensors[f"{place}.lora_down.weight"] = down * 0.02
                tensors[f"{place}.alpha"] = torch.tensor(3.0)
    save_file(tensors, file)


for family in PARTS:
    FILES[f"checkpoints/{family}.safetensors"] = make_saved
    FILES[f"loras/{family}.safetensors"] = make_lora
FILES["diffusion_models/z_image_renamed.ckpt"] = make_renamed


# --- cases ---------------------------------------------------------------------------------------


def parts(family, network=None, dtype="default", tiny=""):
    own, kind, vae = PARTS[family]
    return (
        stock.UNETLoader().load_unet(network or own, dtype)[0],
        stock.CLIPLoader().load_clip("qwen_3_4b.ckpt", kind)[0],
        stock.VAELoader().load_vae(tiny or vae)[0],
    )


def tuned(family, given, text=0.0, name="", strength=0.7):
    model, clip, vae = given
    lora = use(f"loras/{name or family}.safetensors")
    return *stock.LoraLoader().load_lora(model, clip, lora, strength, text), vae


def exported(family):
    """With a LoRA that the test has written as a run does; all of its tensors must be read."""
    given, name = parts(family), f"{family}_exported"
    found = tuned(family, given, name=name, strength=1.0)
    assert "not loaded" not in "".join(LOGGED)
    return found


def saved(family):
    return stock.CheckpointLoaderSimple().load_checkpoint(use(f"checkpoints/{family}.safetensors"))


def shifted(family, node, **given):
    model, clip, vae = parts(family)
    made = getattr(nodes_model_advanced, node)()
    return getattr(made, made.FUNCTION)(model, **given)[0], clip, vae


CASES = {
    **{f"{f}_plain": partial(parts, f) for f in PARTS},
    **{f"{f}_saved": partial(saved, f) for f in PARTS},
    **{f"{f}_lora": lambda f=f: tuned(f, parts(f), 0.4) for f in PARTS},
    **{f"{f}_fp8": partial(parts, f, dtype="fp8_e4m3fn") for f in PARTS},
    **{f"{f}_fp8_lora": lambda f=f: tuned(f, parts(f, dtype="fp8_e4m3fn")) for f in PARTS},
    **{f"{f}_exported": lambda f=f: exported(f) for f in PARTS},
    "zimage_wide": lambda: parts("zimage", "z_image_wide.ckpt"),
    "zimage_renamed": lambda: parts("zimage", use("diffusion_models/z_image_renamed.ckpt")),
    "zimage_shift": lambda: shifted("zimage", "ModelSamplingAuraFlow", shift=6.0),
    "klein_taef2": lambda: parts("klein", tiny="taef2"),
    "klein_scaled": lambda: parts("klein", "flux-2-klein-base-fp8.safetensors"),
    "klein_scaled_lora": lambda: tuned(
        "klein", parts("klein", "flux-2-klein-base-fp8.safetensors")
    ),
    "klein_shift": lambda: shifted(
        "klein", "ModelSamplingFlux", max_shift=1.15, base_shift=0.5, width=512, height=512
    ),
}


def compute(model, clip, vae):
    """What ComfyUI makes of a latent and a prompt, as a sampler of its own would."""
    cond = stock.CLIPTextEncode().encode(clip, PROMPT)[0]
    channels, generator = vae.latent_channels, torch.Generator().manual_seed(0)
    side = 8 if channels < 128 else 4
    x = torch.randn(2, channels, side, side + 2, generator=generator)
    sigma, found = torch.tensor(SIGMA), {"latents": x, "tokens": cond[0][0]}

    def once(denoiser, _x, sigmas, extra_args=None, callback=None, disable=None):
        clean = denoiser(x, sigmas[0].expand(len(x)), **(extra_args or {}))
        found["velocity"] = (x - clean) / sigma
        return x

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(cond, cond)
    guider.set_cfg(1.0)
    sigmas = torch.stack([sigma, sigma / 2])
    empty = torch.zeros_like(x)
    guider.sample(empty, empty, comfy.samplers.KSAMPLER(once), sigmas, seed=0)
    found["images"] = vae.decode(model.model.process_latent_out(x))
    return {key: value.float().clone().contiguous() for key, value in found.items()}


def main():
    for kind in ("diffusion_models", "text_encoders", "vae", "vae_approx"):
        folder_paths.add_model_folder_path(kind, str(Path(CHECKPOINTS, kind)))
    handover, report = pack("nodes.handover.hand_over"), {}
    for case in common.CASES:
        ticks: list[tuple[int, int]] = []
        place = Path(OUT) / case
        with torch.inference_mode():  # as the executor runs nodes
            given_parts = CASES[case]()
            given = handover.hand_over(*given_parts, place, partial(told, ticks))
            computed = compute(*given_parts)
        place.mkdir(parents=True, exist_ok=True)
        save_file(computed, place / "computed.safetensors")
        report[case] = {
            "base": given.base,
            "model": given.model,
            "shift": given.shift,
            "notes": given.notes,
            "is_written": bool(ticks),
        }
        management.unload_all_models()
        del given_parts
    print("REPORT", json.dumps(report))


if __name__ == "__main__":
    main()
