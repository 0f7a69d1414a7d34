"""Runs inside a ComfyUI checkout's own Python: never imported by the tests themselves.

Loads tiny SDXL models with ComfyUI's stock nodes in several ways, hands each over to a worker as
the pack does, and writes down what ComfyUI computes with them: as a sampler of its own would, with
the conditions that it makes itself.

usage: python comfyui_sdxl_fixture.py COMFYUI_ROOT PACK CHECKPOINTS_FOLDER OUT CASE...
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import comfyui_training_fixture as common  # sets ComfyUI up
from comfyui_training_fixture import CHECKPOINTS, FILES, OUT, PROMPT, pack, stock, told, use

# isort: split
import comfy.model_management as management
import comfy.samplers
import comfy.utils
import folder_paths
import torch
from safetensors.torch import save_file

WHOLE, ZERO_SNR = "tiny_sdxl.ckpt", "tiny_sdxl_vpred_zsnr.ckpt"
SIZES = {"height": 1024, "width": 768, "crop_h": 16, "crop_w": 32}
SIZES |= {"target_height": 640, "target_width": 512}

comfy.utils.set_progress_bar_enabled(False)


# --- files ---------------------------------------------------------------------------------------


def checkpoint():
    """Views of a few buffers, which stay so in what is written with torch."""
    return torch.load(Path(CHECKPOINTS) / WHOLE, weights_only=True)["state_dict"]


def part(prefix):
    return {k.removeprefix(prefix): v for k, v in checkpoint().items() if k.startswith(prefix)}


def make_unet(file):
    torch.save(part("model.diffusion_model."), file)


def make_clip_l(file):
    torch.save(part("conditioner.embedders.0.transformer."), file)


def make_clip_g(file):
    prefix = "conditioner.embedders.1.model."
    tensors = {k: v for k, v in checkpoint().items() if k.startswith(prefix)}
    found = comfy.utils.clip_text_transformers_convert(tensors, prefix, "")
    torch.save({k: v for k, v in found.items() if "logit_scale" not in k}, file)


def make_lora(file):
    """Random, on the attention of the network and of both CLIPs, far from nothing."""
    model, clip, _ = load()
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
    sizes = {**model.model.state_dict(), **clip.cond_stage_model.state_dict()}
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, key in keys.items():
        wanted = name.startswith(("lora_unet", "lora_te1_", "lora_te2_")) and "attn" in name
        if wanted and isinstance(key, str) and key.endswith("weight") and sizes[key].ndim == 2:
            rows, columns = sizes[key].shape
            up, down = (torch.randn(*s, generator=generator) for s in ((rows, 2), (2, columns)))
            tensors[f"{name}.lora_up.weight"] = up * 0.05
            tensors[f"{name}.lora_down.weight"] = down * 0.05
            tensors[f"{name}.alpha"] = torch.tensor(3.0)
    assert all(any(te in name for name in tensors) for te in ("lora_te1", "lora_te2"))
    save_file(tensors, file)


FILES |= {
    "loras/sdxl.safetensors": make_lora,
    "diffusion_models/sdxl_unet.ckpt": make_unet,
    "text_encoders/sdxl_clip_l.ckpt": make_clip_l,
    "text_encoders/sdxl_clip_g.ckpt": make_clip_g,
}


# --- cases ---------------------------------------------------------------------------------------


def load(name=WHOLE):
    return stock.CheckpointLoaderSimple().load_checkpoint(name)


def with_lora():
    model, clip, vae = load()
    lora = use("loras/sdxl.safetensors")
    return *stock.LoraLoader().load_lora(model, clip, lora, 0.7, 0.4), vae


def with_other_vae():
    model, clip, _ = load()
    return model, clip, stock.VAELoader().load_vae(use("vae/vae.ckpt"))[0]


def with_clip_skip(layer):
    model, clip, vae = load()
    return model, stock.CLIPSetLastLayer().set_last_layer(clip, layer)[0], vae


def of_files(dtype="default"):
    clips = [use(f"text_encoders/sdxl_clip_{letter}.ckpt") for letter in "lg"]
    return (
        stock.UNETLoader().load_unet(use("diffusion_models/sdxl_unet.ckpt"), dtype)[0],
        stock.DualCLIPLoader().load_clip(*clips, "sdxl")[0],
        load()[2],
    )


def of_zero_snr_file():
    """Whose text encoders are another file's."""
    model, _, vae = load(ZERO_SNR)
    return model, load()[1], vae


def sampled_as(prediction, is_zero_snr):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    model, clip, vae = load()
    changed = ModelSamplingDiscrete.execute if hasattr(ModelSamplingDiscrete, "execute") else None
    found = (changed or ModelSamplingDiscrete().patch)(model, prediction, is_zero_snr)
    return found[0], clip, vae


def fine_tuned():
    """A network that the test has written."""
    network = stock.UNETLoader().load_unet(
        use("diffusion_models/fine_tuned.safetensors"), "default"
    )
    return *network, *load()[1:]


def exported():
    """What the pack exports of a zero-SNR model, as the stock loader reads it."""
    parts = of_zero_snr_file()
    write, file = pack("nodes.handover.write"), common.MADE / "checkpoints" / "exported.safetensors"
    tensors = write.checkpoint_of(*parts, None)
    write.write_checkpoint(file, tensors, lambda *_: None)
    del parts, tensors
    management.unload_all_models()
    folder_paths.add_model_folder_path("checkpoints", str(file.parent))
    return load(file.name)


CASES = {
    "plain": load,
    "sizes": load,
    "lora": with_lora,
    "zero_snr_file": of_zero_snr_file,
    "zero_snr_node": lambda: sampled_as("v_prediction", True),
    "exported": exported,
    "fine_tuned": fine_tuned,
    "other_vae": with_other_vae,
    "clip_skip_1": lambda: with_clip_skip(-1),
    "clip_skip_2": lambda: with_clip_skip(-2),
    "clip_skip_3": lambda: with_clip_skip(-3),
    "files": of_files,
    "fp8": lambda: of_files("fp8_e4m3fn"),
}


def encoded(clip, case):
    if case != "sizes":
        return stock.CLIPTextEncode().encode(clip, PROMPT)[0]
    from comfy_extras.nodes_clip_sdxl import CLIPTextEncodeSDXL

    given = {"clip": clip, "text_g": PROMPT, "text_l": PROMPT, **SIZES}
    if hasattr(CLIPTextEncodeSDXL, "execute"):
        return CLIPTextEncodeSDXL.execute(**given)[0]
    return CLIPTextEncodeSDXL().encode(**given)[0]


def compute(case, model, clip, vae):
    """What ComfyUI's network is given and gives in a sampler, of a latent and a prompt."""
    found, cond = {}, encoded(clip, case)
    shape, generator = (2, 4, 8, 12), torch.Generator().manual_seed(0)
    noise = torch.randn(*shape, generator=generator)
    sampling = model.get_model_object("model_sampling")

    def keep(_module, args, kwargs, output):
        context = kwargs.get("context", args[2] if len(args) > 2 else None)
        found.update(latents=args[0], timestep=args[1], tokens=context, prediction=output)

    def once(denoiser, x, sigmas, extra_args=None, callback=None, disable=None):
        denoiser(x, sigmas[:2], **(extra_args or {}))
        return x

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(cond, cond)
    guider.set_cfg(1.0)
    sigmas = sampling.sigma(torch.tensor([801.0, 37.0, 0.0]))
    hook = model.model.diffusion_model.register_forward_hook(keep, with_kwargs=True)
    guider.sample(noise, torch.zeros(shape), comfy.samplers.KSAMPLER(once), sigmas, seed=0)
    hook.remove()
    found["images"] = vae.decode(model.model.process_latent_out(noise))
    found |= {"noise": noise, "pooled": cond[0][1]["pooled_output"]}
    found["sigmas"] = sampling.sigmas
    return {key: value.float().clone().contiguous() for key, value in found.items()}


def main():
    folder_paths.add_model_folder_path("checkpoints", CHECKPOINTS)
    handover, report = pack("nodes.handover.hand_over"), {}
    for case in common.CASES:
        ticks: list[tuple[int, int]] = []
        place = Path(OUT) / case
        with torch.inference_mode():  # as the executor runs nodes
            parts = CASES[case]()
            given = handover.hand_over(*parts, place, partial(told, ticks))
            computed = compute(case, *parts)
        place.mkdir(parents=True, exist_ok=True)
        save_file(computed, place / "computed.safetensors")
        report[case] = {"model": given.model, "notes": given.notes, "base": given.base}
        report[case]["is_written"] = bool(ticks)
        management.unload_all_models()
        del parts
    print("REPORT", json.dumps(report))


if __name__ == "__main__":
    main()
