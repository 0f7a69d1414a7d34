"""Runs inside a ComfyUI checkout's own Python: never imported by the tests themselves.

Loads flow models with ComfyUI's stock nodes in several ways, hands each over to a worker as the
pack does, and writes down what ComfyUI computes with them.

usage: python comfyui_handover_fixture.py COMFYUI_ROOT PACK MODELS OUT CASE...
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import sys
from functools import partial
from pathlib import Path

ROOT, PACK, MODELS, OUT, *CASES = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, ROOT)
os.chdir(ROOT)

import comfy.options  # noqa: E402 (the path has to be set first)

comfy.options.enable_args_parsing()

import comfy.model_management as management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.text_encoders.sd3_clip as sd3_clip  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import nodes as stock  # noqa: E402

PROMPT = "a red circle left of a blue square"
MADE = Path(OUT) / "made"
WORDS, GUIDANCE = 32128, 3.5

# T5 with few and narrow layers: what is in a file decides nothing of its sizes in ComfyUI
SMALL_T5 = {"num_layers": 2, "d_ff": 64, "d_kv": 16, "num_heads": 2, "d_model": 64}


class SmallT5(sd3_clip.T5XXLModel):
    """T5 of the sizes above."""

    def __init__(self, *args, model_options=None, **kwargs):
        options = {**(model_options or {}), "t5xxl_model_config": SMALL_T5}
        super().__init__(*args, model_options=options, **kwargs)


sd3_clip.T5XXLModel = SmallT5


def pack(module):
    if "pcpo_pack" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "pcpo_pack", PACK + "/__init__.py", submodule_search_locations=[PACK]
        )
        sys.modules["pcpo_pack"] = found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    return importlib.import_module(f"pcpo_pack.{module}")


# --- files ---------------------------------------------------------------------------------------


def random(*shape, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


def checkpoint():
    return load_file(Path(MODELS, "checkpoints", "tiny_sd35.safetensors"))


def network_of(tensors):
    prefix = "model.diffusion_model."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def flux():
    return load_file(Path(MODELS, "diffusion_models", "tiny_flux.safetensors"))


def make_sd3(file):
    save_file(network_of(checkpoint()), file)


def make_wide_flux(file):
    """Attends to tokens of the small T5."""
    tensors = flux()
    tensors["txt_in.weight"] = random(128, SMALL_T5["d_model"], scale=0.1).half()
    save_file(tensors, file)


def make_t5(file):
    width, inner, wide = SMALL_T5["d_model"], 32, SMALL_T5["d_ff"]
    tensors = {"shared.weight": random(WORDS, width)}
    for layer in range(SMALL_T5["num_layers"]):
        block = f"encoder.block.{layer}.layer"
        for name in "qkv":
            tensors[f"{block}.0.SelfAttention.{name}.weight"] = random(inner, width, scale=0.1)
        tensors[f"{block}.0.SelfAttention.o.weight"] = random(width, inner, scale=0.1)
        for name in ("wi_0", "wi_1"):
            tensors[f"{block}.1.DenseReluDense.{name}.weight"] = random(wide, width, scale=0.1)
        tensors[f"{block}.1.DenseReluDense.wo.weight"] = random(width, wide, scale=0.1)
        for part in (0, 1):
            tensors[f"{block}.{part}.layer_norm.weight"] = torch.ones(width)
    tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = random(32, 2)
    tensors["encoder.final_layer_norm.weight"] = torch.ones(width)
    save_file({key: value.half() for key, value in tensors.items()}, file)


def is_matrix(key, weight):
    return weight.ndim == 2 and key.endswith("weight") and ("attn" in key or "linear" in key)


def plain_fp8(tensors):
    return {
        key: value.to(torch.float8_e4m3fn) if is_matrix(key, value) else value
        for key, value in tensors.items()
    }


def scaled_fp8(tensors):
    mark, found = json.dumps({"format": "float8_e4m3fn"}).encode(), {}
    for key, value in tensors.items():
        if not is_matrix(key, value):
            found[key] = value
            continue
        scale = value.float().abs().max() / 448
        place = key.removesuffix("weight")
        found[key] = (value.float() / scale).to(torch.float8_e4m3fn)
        found[f"{place}weight_scale"] = scale
        found[f"{place}comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)
    return found


def make_fp8(file):
    tensors = flux() if "flux" in file.stem else network_of(checkpoint())
    save_file((scaled_fp8 if "scaled" in file.stem else plain_fp8)(tensors), file)


def make_saved_flux(file):
    """As ComfyUI's Save Checkpoint writes it: the norms have other names."""
    model, clip, vae = flux_with_t5()
    comfy.sd.save_checkpoint(str(file), model, clip, vae)


def make_lora(file):
    """Random, on the network and on CLIP-L, far from nothing."""
    model, clip, _ = sd3_parts() if "sd3" in file.stem else flux_parts()
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, module in (("", model.model), ("text_encoders.", clip.cond_stage_model)):
        for key, weight in module.state_dict().items():
            wanted = "attn" in key or "linear1" in key or "proj_mlp" in key
            if wanted and key.endswith("weight") and weight.ndim == 2:
                rows, columns = weight.shape
                place = name + key.removesuffix(".weight")
                up = torch.randn(rows, 2, generator=generator)
                tensors[f"{place}.lora_up.weight"] = up * 0.05
                down = torch.randn(2, columns, generator=generator)
                tensors[f"{place}.lora_down.weight"] = down * 0.05
                tensors[f"{place}.alpha"] = torch.tensor(3.0)
    save_file(tensors, file)


FILES = {
    "diffusion_models/sd3.safetensors": make_sd3,
    "diffusion_models/fp8_sd3.safetensors": make_fp8,
    "diffusion_models/scaled_sd3.safetensors": make_fp8,
    "diffusion_models/wide_flux.safetensors": make_wide_flux,
    "diffusion_models/fp8_flux.safetensors": make_fp8,
    "diffusion_models/scaled_flux.safetensors": make_fp8,
    "text_encoders/t5.safetensors": make_t5,
    "checkpoints/saved_flux.safetensors": make_saved_flux,
    "loras/sd3.safetensors": make_lora,
    "loras/flux.safetensors": make_lora,
}


def use(name):
    """A made file's name, for a stock loader."""
    path = MADE / name
    folder_paths.add_model_folder_path(path.parent.name, str(path.parent))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        FILES[name](path)
    return path.name


# --- cases ---------------------------------------------------------------------------------------


def loaded(name="tiny_sd35.safetensors"):
    return stock.CheckpointLoaderSimple().load_checkpoint(name)


def unet(name, dtype="default"):
    file = (
        use(f"diffusion_models/{name}.safetensors")
        if name != "tiny_flux"
        else f"{name}.safetensors"
    )
    return stock.UNETLoader().load_unet(file, dtype)[0]


def clip_l(kind):
    return stock.CLIPLoader().load_clip("tiny_clip_l.safetensors", kind)[0]


def clip_and_t5(kind):
    t5 = use("text_encoders/t5.safetensors")
    return stock.DualCLIPLoader().load_clip("tiny_clip_l.safetensors", t5, kind)[0]


def decoder():
    return stock.VAELoader().load_vae("tiny_ae16.safetensors")[0]


def sd3_parts(name="sd3", dtype="default"):
    return unet(name, dtype), clip_l("sd3"), decoder()


def flux_parts(name="tiny_flux", dtype="default"):
    return unet(name, dtype), clip_l("stable_diffusion"), decoder()


def flux_with_t5():
    return unet("wide_flux"), clip_and_t5("flux"), decoder()


def tuned(family, parts, with_model=True, with_text=False):
    model, clip, vae = parts
    lora = use(f"loras/{family}.safetensors")
    found = stock.LoraLoader().load_lora(model, clip, lora, 0.7, 0.4)
    return found[0] if with_model else model, found[1] if with_text else clip, vae


def beside_a_patched_clone():
    """The plain model while a clone with a LoRA is what is on the device."""
    parts = loaded()
    management.load_models_gpu([tuned("sd3", parts)[0]], force_full_load=True)
    return parts


def sampled(node, parts, **given):
    from comfy_extras import nodes_model_advanced

    found = getattr(nodes_model_advanced, node)
    model = found().patch(parts[0], **given)[0]
    return model, *parts[1:]


def two_files():
    _, clip, vae = loaded()
    return unet("sd3"), clip, vae


def other_encoders():
    """A whole checkpoint's network with another CLIP: its own must not be added to that."""
    model, _, vae = loaded()
    return model, stock.CLIPLoader().load_clip("tiny_clip_l.safetensors", "sd3")[0], vae


def demo(change=None):
    model, clip, vae = pack("nodes.demo.nodes").PCPODemoModel.execute("tiny-flow").args
    if change == "text":
        clip = clip.clone()
        key = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
        clip.add_patches({key: ("diff", (random(256, 64, scale=0.3),))}, 1.0)
    if change == "lora":
        keys = [k for k in model.model.state_dict() if "adaLN" in k or "qkv" in k]
        keys = [key for key in keys if key.endswith("weight")]
        shapes = {key: model.model.state_dict()[key].shape for key in keys}
        model = model.clone()
        model.add_patches({k: ("diff", (random(*s, scale=0.02),)) for k, s in shapes.items()}, 1.0)
    return model, clip, vae


GOOD = {
    "sd3_one_file": loaded,
    "sd3_ckpt": lambda: loaded("tiny_sd35.ckpt"),
    "sd3_two_files": two_files,
    "sd3_three_files": sd3_parts,
    "sd3_other_clip": other_encoders,
    "sd3_patched_clone": beside_a_patched_clone,
    "sd3_lora": lambda: tuned("sd3", loaded(), with_text=True),
    "sd3_model_lora": lambda: tuned("sd3", sd3_parts()),
    "sd3_text_lora": lambda: tuned("sd3", sd3_parts(), with_model=False, with_text=True),
    "sd3_fp8": lambda: sd3_parts("sd3", "fp8_e4m3fn"),
    "sd3_fp8_lora": lambda: tuned("sd3", sd3_parts("sd3", "fp8_e4m3fn")),
    "sd3_fp8_file": lambda: sd3_parts("fp8_sd3"),
    "sd3_scaled_fp8": lambda: sd3_parts("scaled_sd3"),
    "sd3_scaled_fp8_lora": lambda: tuned("sd3", sd3_parts("scaled_sd3")),
    "sd3_shift": lambda: sampled("ModelSamplingSD3", loaded(), shift=5.5),
    "flux_three_files": flux_parts,
    "flux_t5": flux_with_t5,
    "flux_one_file": lambda: loaded(use("checkpoints/saved_flux.safetensors")),
    "flux_lora": lambda: tuned("flux", flux_parts(), with_text=True),
    "flux_model_lora": lambda: tuned("flux", flux_parts()),
    "flux_fp8": lambda: flux_parts("tiny_flux", "fp8_e4m3fn"),
    "flux_fp8_lora": lambda: tuned("flux", flux_parts("tiny_flux", "fp8_e4m3fn")),
    "flux_fp8_file": lambda: flux_parts("fp8_flux"),
    "flux_scaled_fp8": lambda: flux_parts("scaled_flux"),
    "flux_scaled_fp8_lora": lambda: tuned("flux", flux_parts("scaled_flux")),
    "flux_shift": lambda: sampled(
        "ModelSamplingFlux", flux_parts(), max_shift=1.15, base_shift=0.5, width=512, height=512
    ),
    "demo": demo,
    "demo_lora": lambda: demo("lora"),
    "demo_text_lora": lambda: demo("text"),
}


def compute(model, clip, vae):
    """What ComfyUI makes of fixed latents and a prompt."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 8, 8, generator=generator)
    sigma = torch.tensor([0.8, 0.6022])
    tokens, pooled = clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)
    images = vae.decode(model.model.process_latent_out(latents))
    management.load_models_gpu([model], force_full_load=True)
    given = {"c_crossattn": tokens.expand(2, -1, -1), "y": pooled.expand(2, -1)}
    if type(model.model).__name__ == "Flux":
        given["guidance"] = torch.full((2,), GUIDANCE)
    with torch.no_grad():
        clean = model.model.apply_model(latents, sigma, **given)
    found = {"latents": latents, "sigma": sigma, "tokens": tokens, "pooled": pooled}
    found |= {"velocity": (latents - clean) / sigma.view(-1, 1, 1, 1), "images": images}
    return {key: value.float().contiguous() for key, value in found.items()}


def told(ticks, done, size):
    ticks.append((done, size))


def main():
    for kind in ("checkpoints", "diffusion_models", "text_encoders", "vae"):
        folder_paths.add_model_folder_path(kind, str(Path(MODELS, kind)))
    logging.disable(logging.INFO)
    handover, report = pack("nodes.handover.hand_over"), {}
    for case in CASES:
        ticks: list[tuple[int, int]] = []
        place = Path(OUT) / case
        with torch.inference_mode():  # as the executor runs nodes
            parts = GOOD[case]()
            given = handover.hand_over(*parts, place, partial(told, ticks))
            computed = compute(*parts)
        place.mkdir(parents=True, exist_ok=True)
        save_file(computed, place / "computed.safetensors")
        report[case] = {
            "base": given.base,
            "model": given.model,
            "shift": given.shift,
            "notes": given.notes,
            "written": ticks[-1] if ticks else None,
        }
        management.unload_all_models()
        del parts
    print("REPORT", json.dumps(report))


if __name__ == "__main__":
    main()
