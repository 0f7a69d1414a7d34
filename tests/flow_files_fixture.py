"""A short training of a flow model, and what its folder must then hold."""

from __future__ import annotations

import re
from pathlib import Path

from comfyui_pcpo.trainers.job.folder import JobFolder
from safetensors.torch import load_file

CONFIG = """
rewards = { jpeg_incompressibility = 1.0 }
model = { width = 64, height = 64 }
sampler = { transition = "flow_sde", noise_level = 0.7, steps = 3, drop_last = 1 }
advantage = { kind = "group" }
prompts = { per_iteration = 1, images_per_prompt = 2 }
optimizer = { lr = 1e-2 }
run = { iterations = 2, micro_batch = 2, save_every = 2, eval_prompts = 1, eval_steps = 2 }
"""
TARGETS = {
    "flux": r"(single_)?transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
    "sd3": r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
}


def check_run(root: Path, family: str) -> None:
    """Two iterations were trained, exactly on policy, and an adapter of this family exported."""
    run = JobFolder(root)
    lines = run.metrics()
    assert [line["iteration"] for line in lines] == [1, 2]
    for line in lines:
        assert line["log_ratio_max_on_policy"] == 0 and line["grad_norm"] > 0
    tensors = load_file(run.exports()[-1])
    modules = {key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")}
    assert modules and tensors.keys() == {
        f"{module}.{end}"
        for module in modules
        for end in ("alpha", "lora_A.weight", "lora_B.weight")
    }
    for module in modules:
        assert re.fullmatch(rf"transformer\.{TARGETS[family]}", module), module
        down, up = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        assert len(down) == up.shape[1] == 4 and tensors[f"{module}.alpha"] == 4
    assert any(tensors[f"{module}.lora_B.weight"].abs().max() > 1e-4 for module in modules)
