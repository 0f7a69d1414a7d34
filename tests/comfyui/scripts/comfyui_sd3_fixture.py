"""Runs inside a ComfyUI checkout's own Python: never imported by the tests themselves.

usage: python comfyui_sd3_fixture.py COMFYUI_ROOT predict CHECKPOINT INPUTS OUTPUTS SAVED
       python comfyui_sd3_fixture.py COMFYUI_ROOT encode ENCODERS OUTPUTS PROMPT PRESENT...
"""

from __future__ import annotations

import os
import sys

ROOT, TASK, *REST = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, ROOT)
os.chdir(ROOT)

import comfy.options  # noqa: E402 (the path has to be set first)

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from comfy.text_encoders.sd3_clip import SD3ClipModel, SD3Tokenizer  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def predict(checkpoint, inputs_path, outputs_path, saved_path):
    """Embeddings, velocity and images of a checkpoint, and the file that ComfyUI saves of it."""
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(checkpoint)
    inputs = load_file(inputs_path)
    prompt = bytes(inputs["prompt"].tolist()).decode()
    tokens, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
    out = {"tokens": tokens, "pooled": pooled}
    out["images"] = vae.decode(model.model.process_latent_out(inputs["latents"]))
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    rows = len(inputs["latents"])
    with torch.no_grad():
        clean = model.model.apply_model(
            inputs["latents"],
            inputs["sigma"],
            c_crossattn=tokens.expand(rows, -1, -1),
            y=pooled.expand(rows, -1),
        )
    out["velocity"] = (inputs["latents"] - clean) / inputs["sigma"].reshape(-1, 1, 1, 1)
    comfy.sd.save_checkpoint(saved_path, model, clip, vae)
    save_file({key: tensor.float().cpu().contiguous() for key, tensor in out.items()}, outputs_path)


def encode(encoders_path, outputs_path, prompt, *presents):
    """What SD3's text model gives of shallow encoders, for each choice of those present."""
    stored = torch.load(encoders_path, weights_only=True)
    clips = {"num_hidden_layers": 3, "intermediate_size": 64}
    t5 = {"num_layers": 2, "d_ff": 64, "num_heads": 4, "vocab_size": 128}
    options = {"clip_l_model_config": clips, "clip_g_model_config": clips}
    options["t5xxl_model_config"] = t5
    tokens = SD3Tokenizer().tokenize_with_weights(prompt)
    out = {}
    for present in presents:
        model = SD3ClipModel(
            clip_l="l" in present,
            clip_g="g" in present,
            t5="t" in present,
            dtype=torch.float32,
            dtype_t5=torch.float32,
            model_options=options,
        )
        for letter, part in (("l", "clip_l"), ("g", "clip_g"), ("t", "t5xxl")):
            if letter in present:
                tensors = {key: tensor.float() for key, tensor in stored[part].items()}
                told = getattr(model, part).load_sd(tensors)
                assert not told.unexpected_keys, told
                assert set(told.missing_keys) <= {"encoder.embed_tokens.weight"}, told
        with torch.no_grad():
            found, pooled, _ = model.encode_token_weights(tokens)
        out |= {f"{present}.tokens": found.contiguous(), f"{present}.pooled": pooled.contiguous()}
    save_file(out, outputs_path)


if __name__ == "__main__":
    {"predict": predict, "encode": encode}[TASK](*REST)
