"""Sockets between the nodes of training."""

from __future__ import annotations

from comfy_api.latest import io

Job = io.Custom("PCPO_JOB")
"""{"id": of the job}."""
Prompts = io.Custom("PCPO_PROMPTS")
"""A `training_prompts.Prompts`."""
Settings = io.Custom("PCPO_SETTINGS")
"""Sections and fields of a `TrainConfig`, as JSON has them."""
LoraModel = io.Custom("LORA_MODEL")
"""ComfyUI's own: a LoRA file's tensors by name."""
LossMap = io.Custom("LOSS_MAP")
"""ComfyUI's own: {"loss": a number an iteration}."""
