"""Runs inside a ComfyUI checkout's own Python: never imported by the tests themselves.

Loads models with ComfyUI's stock nodes in several ways, hands each over to a worker as the pack
does, and writes down what ComfyUI computes with them.

usage: python comfyui_training_fixture.py COMFYUI_ROOT PACK CHECKPOINTS_FOLDER OUT CASE...
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
from functools import partial
from pathlib import Path

ROOT, PACK, CHECKPOINTS, OUT, *CASES = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, ROOT)
os.chdir(ROOT)

import comfy.options  # noqa: E402 (the path has to be set first)

comfy.options.enable_args_parsing()

import comfy.model_management as management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import nodes as stock  # noqa: E402

PROMPT = "a red circle left of a blue square"
MADE = Path(OUT) / "made"


def pack(module):
    if "pcpo_pack" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "pcpo_pack", PACK + "/__init__.py", submodule_search_locations=[PACK]
        )
        sys.modules["pcpo_pack"] = found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    return importlib.import_module(f"pcpo_pack.{module}")


# --- files ---------------------------------------------------------------------------------------


def checkpoint():
    return load_file(Path(CHECKPOINTS) / "tiny_sd15.safetensors")


def make_lora(file):
    """Random, on the network and on the text encoder, far from nothing."""
    model, clip, _ = load()
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
    sizes = {**model.model.state_dict(), **clip.cond_stage_model.state_dict()}
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, key in keys.items():
        wanted = name.startswith(("lora_unet", "lora_te_")) and "attn" in name
        if wanted and isinstance(key, str) and key.endswith("weight") and sizes[key].ndim == 2:
            rows, columns = sizes[key].shape
            up, down = (torch.randn(*s, generator=generator) for s in ((rows, 2), (2, columns)))
            tensors[f"{name}.lora_up.weight"] = up * 0.05
            tensors[f"{name}.lora_down.weight"] = down * 0.05
            tensors[f"{name}.alpha"] = torch.tensor(3.0)
    assert any("lora_te" in name for name in tensors)
    save_file(tensors, file)


def make_unet(file):
    prefix = "model.diffusion_model."
    found = {k.removeprefix(prefix): v for k, v in checkpoint().items() if k.startswith(prefix)}
    save_file(found, file)


def make_vae(file):
    """SD1.x's own autoencoder with random weights that share one buffer."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    config = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 4}
    config |= {"double_z": True, "resolution": 256, "in_channels": 3, "out_ch": 3}
    config |= {"attn_resolutions": [], "dropout": 0.0}
    with torch.device("meta"):
        vae = AutoencoderKL(ddconfig=config, embed_dim=4)
    buffer = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0)) * 0.02
    tensors = {}
    for i, (key, value) in enumerate(vae.state_dict().items()):
        start = i * 7919 % (buffer.numel() - value.numel())
        tensors[key] = buffer[start : start + value.numel()].view(value.shape)
        if value.ndim == 1 and key.endswith("weight"):
            tensors[key] = tensors[key] + 1
    torch.save({"state_dict": tensors}, file)


def make_scaled(file):
    """The checkpoint with the network's linear layers in scaled fp8."""
    tensors = checkpoint()
    mark = json.dumps({"format": "float8_e4m3fn"}).encode()
    for key in [k for k in tensors if "attn" in k and k.endswith("weight") and "diff" in k]:
        weight = tensors[key].float()
        if weight.ndim == 2:
            scale = weight.abs().max() / 448
            tensors[key] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[key.removesuffix("weight") + "weight_scale"] = scale
            place = key.removesuffix("weight") + "comfy_quant"
            tensors[place] = torch.tensor(list(mark), dtype=torch.uint8)
    save_file(tensors, file)


def make_taesd(file):
    """TAESD's half of the demo model's autoencoder."""
    folder = Path(PACK, "trainers", "demo", "tiny_sd", "vae")
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    state = pack("nodes.demo.parts").vae_state(weights, 1.0)
    prefix = file.stem + "."
    found = {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}
    save_file(found, file)


FILES = {
    "vae_approx/taesd_encoder.safetensors": make_taesd,
    "vae_approx/taesd_decoder.safetensors": make_taesd,
    "loras/random.safetensors": make_lora,
    "diffusion_models/unet.safetensors": make_unet,
    "vae/vae.ckpt": make_vae,
    "checkpoints/scaled.safetensors": make_scaled,
}


def use(name):
    """A made file's name, for a stock loader."""
    kind, _, file = name.partition("/")
    folder_paths.add_model_folder_path(kind, str(MADE / kind))
    path = MADE / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        FILES[name](path)
    return file


# --- cases ---------------------------------------------------------------------------------------


def load(name="tiny_sd15.safetensors"):
    return stock.CheckpointLoaderSimple().load_checkpoint(name)


def with_lora():
    model, clip, vae = load()
    lora = use("loras/random.safetensors")
    return *stock.LoraLoader().load_lora(model, clip, lora, 0.7, 0.4), vae


def beside_a_patched_clone():
    """The plain model while a clone with a LoRA is what is on the device."""
    model, clip, _vae = load()
    lora = use("loras/random.safetensors")
    tuned, _ = stock.LoraLoader().load_lora(model, clip, lora, 0.7, 0.4)
    management.load_models_gpu([tuned], force_full_load=True)
    return model, clip, stock.VAELoader().load_vae(use("vae/vae.ckpt"))[0]


def with_clip_skip():
    model, clip, vae = load()
    return model, stock.CLIPSetLastLayer().set_last_layer(clip, -3)[0], vae


def with_other_vae():
    model, clip, _ = load()
    return model, clip, stock.VAELoader().load_vae(use("vae/vae.ckpt"))[0]


def of_three_files(dtype="default"):
    folder_paths.add_model_folder_path("text_encoders", str(Path(CHECKPOINTS, "../text_encoders")))
    unet = use("diffusion_models/unet.safetensors")
    return (
        stock.UNETLoader().load_unet(unet, dtype)[0],
        stock.CLIPLoader().load_clip("tiny_clip_l.safetensors", "stable_diffusion")[0],
        stock.VAELoader().load_vae(use("vae/vae.ckpt"))[0],
    )


def with_taesd():
    model, clip, _ = load()
    use("vae_approx/taesd_encoder.safetensors")
    use("vae_approx/taesd_decoder.safetensors")
    return model, clip, stock.VAELoader().load_vae("taesd")[0]


def tuned(model, clip, vae):
    """The same with the LoRA."""
    return *stock.LoraLoader().load_lora(model, clip, use("loras/random.safetensors"), 0.7, 0), vae


def with_v_prediction():
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    model, clip, vae = load()
    changed = ModelSamplingDiscrete.execute if hasattr(ModelSamplingDiscrete, "execute") else None
    found = (changed or ModelSamplingDiscrete().patch)(model, "v_prediction", False)
    return found[0], clip, vae


def demo(lora=None):
    module = pack("nodes.demo.nodes")
    model, clip, vae = module.PCPODemoModel.execute("tiny-sd").args
    if lora:
        name = next(iter(module.lora_files()))
        model = module.PCPODemoLora.execute(model, name, lora).args[0]
    return model, clip, vae


def demo_with_text_lora():
    model, clip, vae = demo(1.0)
    clip = clip.clone()
    key = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    change = torch.randn(256, 64, generator=torch.Generator().manual_seed(2)) * 0.3
    clip.add_patches({key: ("diff", (change,))}, 1.0)
    return model, clip, vae


GOOD = {
    "safetensors": load,
    "ckpt": lambda: load("tiny_sd15.ckpt"),
    "lora": with_lora,
    "patched_clone": beside_a_patched_clone,
    "clip_skip": with_clip_skip,
    "other_vae": with_other_vae,
    "three_files": of_three_files,
    "fp8": lambda: of_three_files("fp8_e4m3fn"),
    "fp8_lora": lambda: tuned(*of_three_files("fp8_e4m3fn")),
    "scaled_fp8": lambda: load(use("checkpoints/scaled.safetensors")),
    "scaled_fp8_lora": lambda: tuned(*load(use("checkpoints/scaled.safetensors"))),
    "taesd": with_taesd,
    "v_prediction": with_v_prediction,
    "demo": demo,
    "demo_lora": lambda: demo(0.8),
    "demo_text_lora": demo_with_text_lora,
}


def compute(model, clip, vae):
    """What ComfyUI makes of a fixed latent and a prompt."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    timestep = torch.tensor([37.0, 801.0])
    embeds = clip.encode_from_tokens(clip.tokenize(PROMPT))
    management.load_models_gpu([model], force_full_load=True)
    with torch.no_grad():
        network = model.model.diffusion_model
        prediction = network(latents, timestep, embeds.expand(2, -1, -1).float())
    images = vae.decode(model.model.process_latent_out(latents))
    found = {"latents": latents, "timestep": timestep, "embeds": embeds}
    found |= {"prediction": prediction, "images": images}
    return {key: value.float().contiguous() for key, value in found.items()}


def told(ticks, done, size):
    ticks.append((done, size))


def main():
    folder_paths.add_model_folder_path("checkpoints", CHECKPOINTS)
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
            "source": given.model["source"],
            "prediction_type": given.model.get("prediction_type", "auto"),
            "notes": given.notes,
            "written": ticks[-1] if ticks else None,
            "rises": all(a < b for (a, _), (b, _) in itertools.pairwise(ticks)),
        }
        management.unload_all_models()
        del parts
    print("REPORT", json.dumps(report))


if __name__ == "__main__":
    main()
